"""Pivots: segments, chains, Q, draws, recoverability, labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.config import DeepExplore, RecoverabilityConfig, SegmentConfig
from deepgrpo.explore.base import Limits
from deepgrpo.explore.deep import DeepStrategy, log_q
from deepgrpo.explore.pivots import candidates, draw_without_replacement
from deepgrpo.explore.recoverability import Recoverability, fit_logistic
from deepgrpo.explore.segments import build_segmenter, count_ends, sentence_ends, step_ends, token_texts

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)


class Characters:
    """A tokenizer whose token i is the i-th string of a list."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.texts[t] for t in tokens)


# ---------------------------------------------------------------- segments


def test_sentences_end_at_punctuation_and_lines_but_not_in_decimals() -> None:
    #        0    1     2    3        4    5       6      7      8
    texts = ["I", " am", ".", " Pay", " 3", ".", "5", ".\n", "end"]
    assert sentence_ends(texts) == [3, 8, 9]


def test_a_line_break_after_a_full_stop_is_no_sentence_of_its_own() -> None:
    assert sentence_ends(["a", ".", "\n", "b", "\n", "\n", "c"]) == [3, 6, 7]


def test_closing_quotes_belong_to_the_sentence() -> None:
    assert sentence_ends(['He', ' said "no."', " Then", "!", "*", "<eos>"]) == [2, 4, 6]


def test_period_is_the_bare_token_only() -> None:
    tokenizer = Characters(["a", ".", ".\n", "b"])
    segment = build_segmenter(SegmentConfig(type="period"), tokenizer)
    assert segment([0, 1, 3, 2, 3, 1, 0]) == [2, 6, 7]


def test_tokens_count_and_step() -> None:
    assert build_segmenter(SegmentConfig(type="tokens", size=3), None)(range(7)) == [3, 6, 7]  # type: ignore[arg-type]
    assert build_segmenter(SegmentConfig(type="tokens", size=3), None)(range(6)) == [3, 6]  # type: ignore[arg-type]
    assert count_ends(10, 4) == [2, 5, 8, 10]
    assert count_ends(2, 4) == [1, 2]
    assert step_ends(["a", "\n", "\n", "b", "c\n\n", "d"]) == [3, 5, 6]
    assert step_ends(["a\n", "\n", "b"]) == [2, 3]
    assert step_ends(["foo.\n", "\nbar", "x"]) == [2, 3]


def test_no_step_is_blank() -> None:
    assert step_ends(["\n\n", "a", "\n\n", "\n", "\n", "\n\n", "b"]) == [6, 7]
    assert step_ends(["a\n\n\n\n", "b\n", " ", "\n", "c"]) == [1, 4, 5]
    assert step_ends(["\n", "\n", "a"]) == [3]
    assert step_ends(["a", "\n", "b", "\n", "c"]) == [5]  # single line breaks end nothing
    assert step_ends(["a\n\nb\n\nc", "d"]) == [1, 2]


class Bytes:
    """One token per byte of UTF-8."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def test_a_character_of_several_tokens_ends_a_sentence_at_its_last() -> None:
    text = "好！ok"  # 3 + 3 + 2 bytes
    assert build_segmenter(SegmentConfig(), Bytes())(list(text.encode())) == [6, 8]
    assert token_texts(list(text.encode()), lambda *t: Bytes().decode(list(t))) == ["", "", "好", "", "", "！", "o", "k"]


def test_bytes_that_never_form_a_character_are_kept_apart() -> None:
    """The first byte of a character, then letters: no end of a sentence is swallowed."""
    broken = [0xE5, ord("."), ord("a")]
    assert token_texts(broken, lambda *t: Bytes().decode(list(t))) == ["", "\ufffd.", "a"]
    assert build_segmenter(SegmentConfig(), Bytes())([0xE5] * 12 + [ord("."), ord("a")])[-2:] == [13, 14]


def test_extra_ends_for_chains_of_arithmetic() -> None:
    tokenizer = Characters(list("1+=;#"))
    segment = build_segmenter(SegmentConfig(extra_ends=(";",)), tokenizer)
    assert segment([0, 1, 0, 2, 0, 3, 4, 0]) == [6, 8]


@given(st.lists(st.sampled_from(["a", ".", "\n", "\n\n", "1", '."', " "]), min_size=1, max_size=30))
def test_every_segmenter_ends_at_the_last_token_and_ascends(texts: list[str]) -> None:
    tokenizer = Characters(sorted(set(texts)))
    tokens = [tokenizer.texts.index(t) for t in texts]
    for kind in ("sentence", "period", "tokens", "count", "step"):
        ends = build_segmenter(SegmentConfig(type=kind, size=4), tokenizer)(tokens)
        assert ends[-1] == len(tokens)
        assert all(a < b for a, b in zip([0, *ends], ends, strict=False))


# ---------------------------------------------------------------- Q


def test_chain_counts_the_root_and_leaves_out_the_last_segment() -> None:
    assert candidates([10, 20, 30, 40], room=100) == ([0, 10, 20, 30], pytest.approx([0.2, 0.4, 0.6, 0.8]))
    assert candidates([10, 20, 30, 40], room=100, root=False)[0] == [10, 20, 30]
    assert candidates([10, 20, 30, 40], room=20)[0] == [0, 10]  # 20 and 30 leave no space for a token
    assert candidates([7], room=100) == ([0], [0.5])  # a single segment can only start again
    assert candidates([10, 20, 30, 40], room=100, deepest=0.6)[0] == [0, 10, 20]
    assert candidates([7], room=100, deepest=0.4) == ([], [])


def test_q_by_hand() -> None:
    """(w, b) = (-3.175, 1.427), gamma 2, four candidates of a chain of five, r = .2, .4, .6, .8.

    logits  1.427 - 3.175 r =  .792      .157     -.478    -1.113
    P = sigmoid             =  .688261   .539170   .382725   .247312
    P · r²                  =  .0275304  .0862671  .1377808  .1582797      sum .4098581
    Q                       =  .067171   .210480   .336167   .386182
    """
    estimate = Recoverability(w=-3.175, b=1.427, fitted=True)
    q = np.exp(log_q([0.2, 0.4, 0.6, 0.8], estimate, gamma=2.0))
    assert q == pytest.approx([0.067171, 0.210480, 0.336167, 0.386182], abs=1e-6)


def test_before_the_first_fit_only_depth_counts() -> None:
    q = np.exp(log_q([0.5, 1.0], Recoverability(w=-9.0, b=1.0), gamma=2.0))
    assert q == pytest.approx([0.2, 0.8])  # .25 : 1


def test_gamma_minus_20_is_the_root_and_does_not_underflow() -> None:
    ratios = [(i + 1) / 2000 for i in range(1999)]
    q = np.exp(log_q(ratios, Recoverability(), gamma=-20.0))
    assert q[0] > 0.9999
    assert np.isfinite(log_q(ratios, Recoverability(), gamma=-200.0)).all()


@given(st.floats(-5, 5), st.integers(1, 12), st.floats(-10, 10), st.floats(-10, 10))
def test_q_is_a_distribution(gamma: float, count: int, w: float, b: float) -> None:
    q = np.exp(log_q([(i + 1) / (count + 1) for i in range(count)], Recoverability(w=w, b=b, fitted=True), gamma))
    assert q.sum() == pytest.approx(1.0)


def test_draws_follow_q_without_replacement() -> None:
    q = np.array([0.5, 0.3, 0.2])
    random = np.random.default_rng(0)
    first = np.zeros(3)
    pairs = np.zeros((3, 3))
    for _ in range(20_000):
        a, b = draw_without_replacement(np.log(q), 2, random)
        first[a] += 1
        pairs[a, b] += 1
    assert first / 20_000 == pytest.approx(q, abs=0.012)
    # second given first = 0: .3/.5 and .2/.5
    assert pairs[0] / pairs[0].sum() == pytest.approx([0.0, 0.6, 0.4], abs=0.015)
    assert draw_without_replacement(np.log(q), 9, random) != []
    assert sorted(draw_without_replacement(np.log(q), 9, random)) == [0, 1, 2]


# ---------------------------------------------------------------- recoverability


@examples(40)
@given(
    st.lists(st.tuples(st.floats(0.02, 1.0), st.booleans()), min_size=11, max_size=200),
    st.sampled_from([0.1, 1.0, 10.0]),
)
def test_fit_equals_scikit_learn(items: list[tuple[float, bool]], c: float) -> None:
    from sklearn.linear_model import LogisticRegression

    ratios = np.array([r for r, _ in items])
    outcomes = np.array([int(y) for _, y in items])
    outcomes[0], outcomes[1] = 0, 1  # both classes
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(ratios[:, None], outcomes)
    w, b = fit_logistic(ratios, outcomes, c=c)
    grid = np.linspace(0.05, 1.0, 20)
    ours = Recoverability(w=w, b=b, fitted=True).probability(grid)
    assert ours == pytest.approx(model.predict_proba(grid[:, None])[:, 1], abs=2e-5)


def test_fit_waits_for_more_than_ten_items_and_both_outcomes() -> None:
    config = RecoverabilityConfig(window=100)
    ten = Recoverability().observe([0.5] * 10, [0, 1] * 5, config)
    assert not ten.fitted
    assert ten.probability([0.1, 0.9]).tolist() == [1.0, 1.0]
    eleven = ten.observe([0.5], [1], config)
    assert eleven.fitted
    one_class = Recoverability().observe([0.5] * 50, [1] * 50, config)
    assert not one_class.fitted


def test_window_forgets_the_oldest_and_a_fit_stays_in_use() -> None:
    config = RecoverabilityConfig(window=20)
    fitted = Recoverability().observe([0.2] * 10 + [0.9] * 10, [1] * 10 + [0] * 10, config)
    assert fitted.fitted and fitted.w < 0
    later = fitted.observe([0.9] * 20, [0] * 20, config)
    assert later.outcomes == (0,) * 20
    assert (later.w, later.b) == (fitted.w, fitted.b)


def test_bins_follow_a_cliff_that_the_logistic_regression_smooths() -> None:
    """Four bins. (0, .25]: 3 of 4 rescued, (3 + 1) / (4 + 2); (.25, .5]: 1 of 2; (.5, .75]: none tried; (.75, 1]: 0 of 8."""
    ratios = [0.2, 0.25, 0.1, 0.05, 0.3, 0.5] + [0.8] * 8
    outcomes = [1, 1, 1, 0, 1, 0] + [0] * 8
    estimate = Recoverability().observe(ratios, outcomes, RecoverabilityConfig(model="bins", bins=4))
    assert estimate.rates == pytest.approx((4 / 6, 2 / 4, 1 / 2, 1 / 10))
    # edges belong to the bin below
    assert estimate.probability([0.25, 0.26, 0.5, 0.75, 0.751, 1.0]) == pytest.approx([4 / 6, 0.5, 0.5, 0.5, 0.1, 0.1])
    q = np.exp(log_q([0.25, 0.5, 1.0], estimate, gamma=1.0))
    assert q == pytest.approx(np.array([1 / 6, 1 / 4, 1 / 10]) / (1 / 6 + 1 / 4 + 1 / 10))
    early = Recoverability().observe([0.5] * 5, [1, 0] * 2 + [0], RecoverabilityConfig(model="bins"))
    assert early.probability([0.1, 0.9]).tolist() == [1.0, 1.0]  # min_items


def test_uniform_never_fits() -> None:
    config = RecoverabilityConfig(model="uniform")
    assert not Recoverability().observe([0.5] * 40, [0, 1] * 20, config).fitted


def test_state_survives_json() -> None:
    import json

    for model in ("logistic", "bins"):
        state = Recoverability().observe([0.2, 0.9] * 10, [1, 0] * 10, RecoverabilityConfig(model=model)).to_dict()
        assert Recoverability.from_dict(json.loads(json.dumps(state))) == Recoverability.from_dict(state)


# ---------------------------------------------------------------- the strategy


def _strategy(**changes: object) -> DeepStrategy:
    config = DeepExplore.model_validate({"num_rollouts": 3, "branches_per_pivot": 2, **changes})
    return DeepStrategy(config, lambda tokens: [*range(2, len(tokens), 2), len(tokens)])


def test_two_rounds_failed_rollouts_only() -> None:
    strategy, random = _strategy(), np.random.default_rng(0)
    empty = make_tree([])
    empty = type(empty)(empty.prompt)
    state = strategy.initial_state()
    (first,) = strategy.plan(empty, state, LIMITS, random)
    assert (first.num_branches, first.stream, first.offset) == (3, "main", 0)
    grown = make_tree([(8, 0.0), (8, 1.0), (6, 0.0)])
    pivots = strategy.plan(grown, state, LIMITS, random)
    assert [p.parent for p in pivots] == [0, 2]
    assert all(p.num_branches == 2 and p.stream == "branch" for p in pivots)
    assert pivots[0].candidates == (0, 2, 4, 6) and sum(pivots[0].q) == pytest.approx(1.0)
    assert pivots[0].ratio == pytest.approx((pivots[0].candidates.index(pivots[0].offset) + 1) / 5)
    done = make_tree([(8, 0.0), (8, 1.0)], [(0, 4, [(2, 1.0), (2, 0.0)])])
    assert strategy.plan(done, state, LIMITS, random) == []


def test_expand_all_and_several_pivots() -> None:
    strategy = _strategy(expand="all", num_pivots=2)
    pivots = strategy.plan(
        make_tree([(8, 0.0), (8, 1.0)]), strategy.initial_state(), LIMITS, np.random.default_rng(0)
    )
    assert [p.parent for p in pivots] == [0, 0, 1, 1]
    assert pivots[0].offset != pivots[1].offset


def test_gamma_minus_20_resamples_from_the_root_alone() -> None:
    """A chain of five, r = .2 to .8: Q is 1, 2^-20, 3^-20, 4^-20 over their sum.

    A fit that hopes for the deep end does not outweigh it. w = 8, b = -6 give P = .01213, .05732, .23148, .59869, that is
    1, 4.727, 19.09, 49.37 times the root's: Q is then 1, 4.508e-6, 5.47e-9, 4.49e-11 of the root's.
    """
    strategy = _strategy(gamma=-20.0, expand="all")
    tree = make_tree([(8, 0.0), (8, 1.0), (8, 0.0)])
    fitted = Recoverability(w=8.0, b=-6.0, fitted=True).to_dict()
    for state, shares in (
        (strategy.initial_state(), [2.0**-20, 3.0**-20, 4.0**-20]), (fitted, [4.508e-6, 5.47e-9, 4.49e-11]),
    ):  # fmt: skip
        for seed in range(20):
            pivots = strategy.plan(tree, state, LIMITS, np.random.default_rng(seed))
            assert [(p.parent, p.offset, p.num_branches, p.stream) for p in pivots] == [
                (parent, 0, 2, "branch") for parent in range(3)
            ]
            assert np.array(pivots[0].q[1:]) / pivots[0].q[0] == pytest.approx(shares, rel=2e-3, abs=0)


def test_root_only_branches_are_a_group_of_their_own() -> None:
    """Whole responses again, but compared with each other: (1, 0) against their mean, not with the main rollouts (0, 0)."""
    tree = make_tree([(10, 0.0), (10, 0.0)], [(0, 0, [(9, 1.0), (7, 0.0)])])
    assert tree.path(2) == tree.prompt.tokens + tree.nodes[2].tokens
    assert [(s.node, s.end, s.advantage, s.stream) for s in _strategy(gamma=-20.0).credit(tree).spans] == [
        (0, 10, 0.0, "main"), (1, 10, 0.0, "main"), (2, 9, 0.5, "branch"), (3, 7, -0.5, "branch"),
    ]  # fmt: skip


@pytest.mark.parametrize(("expand", "parents"), [("failed", [[0, 2], [0, 1]]), ("all", [[0, 1, 2], [0, 1]]),
                                                ("unsolved", [[], [0, 1]])])  # fmt: skip
def test_rollouts_that_get_pivots(expand: str, parents: list[list[int]]) -> None:
    strategy = _strategy(expand=expand)
    trees = make_tree([(8, 0.0), (8, 1.0), (8, 0.0)]), make_tree([(8, 0.0), (8, 0.0)])
    for tree, expected in zip(trees, parents, strict=True):
        pivots = strategy.plan(tree, strategy.initial_state(), LIMITS, np.random.default_rng(0))
        assert [pivot.parent for pivot in pivots] == expected


def test_pivots_no_deeper_than_max_ratio() -> None:
    strategy = _strategy(gamma=20.0, max_ratio=0.5)
    tree = make_tree([(8, 0.0), (8, 0.0)])
    for pivot in strategy.plan(tree, strategy.initial_state(), LIMITS, np.random.default_rng(0)):
        assert 0 < pivot.ratio <= 0.5 and len(pivot.candidates) == len(pivot.q)


def test_label_is_any_success_among_the_branches() -> None:
    strategy = _strategy()
    tree = make_tree([(8, 0.0), (8, 0.0)], [(0, 4, [(2, 1.0), (2, 0.0)]), (1, 4, [(2, 0.0), (2, 0.0)])])
    state = strategy.observe(strategy.initial_state(), [tree])
    assert state["outcomes"] == (1, 0)
    assert state["ratios"] == (0.5, 0.5)


def test_paper_figure_of_recoverability() -> None:
    estimate = Recoverability(w=-3.175, b=1.427, fitted=True)
    assert estimate.probability([0.1, 1.0]) == pytest.approx([0.752, 0.148], abs=1e-3)
    assert math.isclose(float(np.exp(estimate.log_probability([0.5]))[0]), 1 / (1 + math.exp(0.1605)), rel_tol=1e-9)
