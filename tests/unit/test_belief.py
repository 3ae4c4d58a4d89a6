"""Belief: the probability of the reference answer at each step, and the pivots before its drops."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from trees import make_tree

from deepgrpo.config import BeliefExplore
from deepgrpo.errors import ConfigError, RewardError
from deepgrpo.explore.base import BELIEF, Limits, Signal
from deepgrpo.explore.belief import BeliefStrategy, drops
from deepgrpo.model.policy import Policy
from deepgrpo.records import Prompt, Tree
from deepgrpo.runs.trees import load_trees
from deepgrpo.train.belief import Likelihood, measure_belief, sequence_logprobs
from deepgrpo.train.loop import train

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)


def by_twos(tokens: Any) -> list[int]:
    return [*range(2, len(tokens), 2), len(tokens)]


def _strategy(**changes: Any) -> BeliefStrategy:
    return BeliefStrategy(BeliefExplore.model_validate({"cue": "#", "branches_per_pivot": 3, **changes}), by_twos)


def _believed(tree: Tree, beliefs: list[float]) -> Tree:
    """Main rollouts with a given belief at the start of each of their steps of two tokens."""
    for index in tree.children(0):
        own = tuple(np.repeat(beliefs, 2)[: len(tree.nodes[index].tokens)])
        tree = tree.with_signal(index, BELIEF, own)
    return tree


# ---------------------------------------------------------------- pivots


def test_drops_add_up_to_the_first_belief() -> None:
    assert drops([0.5, 0.75, 0.25]).tolist() == [-0.25, 0.5, 0.25]
    assert drops([0.3]).tolist() == [0.3]


def test_q_by_hand() -> None:
    """Beliefs .5, .75, .25, .2 at the candidates: drops -.25, .5, .05, .2. With temperature .1, exp of -2.5, 5, .5, 2:

    .082085 + 148.413159 + 1.648721 + 7.389056 = 157.533021, so Q = .000521, .942108, .010466, .046905.
    """
    tree = _believed(make_tree([(8, 0.0), (8, 1.0)]), [0.5, 0.75, 0.25, 0.2])
    (pivot,) = _strategy(temperature=0.1).plan(tree, {}, LIMITS, np.random.default_rng(0))
    assert pivot.candidates == (0, 2, 4, 6)
    assert pivot.q == pytest.approx((0.000521, 0.942108, 0.010466, 0.046905), abs=1e-6)
    assert pivot.parent == 0  # the failed rollout alone
    assert pivot.offset == 2 and pivot.ratio == 2 / 5


def test_a_small_temperature_takes_the_largest_drops() -> None:
    tree = _believed(make_tree([(8, 0.0), (8, 0.0)]), [0.5, 0.75, 0.25, 0.2])
    for seed in range(20):
        pivots = _strategy(temperature=1e-4, num_pivots=2).plan(tree, {}, LIMITS, np.random.default_rng(seed))
        assert [pivot.offset for pivot in pivots] == [2, 6, 2, 6]


def test_metrics_are_means_over_the_pivots_of_the_step() -> None:
    strategy = _strategy(temperature=1e-4)
    tree = _believed(make_tree([(8, 0.0), (8, 0.0)]), [0.5, 0.75, 0.25, 0.2])
    grown = tree.add(strategy.plan(tree, {}, LIMITS, np.random.default_rng(0)), [])
    state = strategy.observe(strategy.initial_state(), [grown])
    assert strategy.report(state) == {"belief/first": pytest.approx(0.5), "belief/drop": pytest.approx(0.5)}
    assert strategy.observe(state, [make_tree([(4, 1.0), (4, 1.0)])]) == state
    assert json.loads(json.dumps(state)) == state


def test_only_failed_rollouts_are_measured() -> None:
    assert {signal.most_reward for signal in _strategy().signals} == {0.0}
    assert {signal.most_reward for signal in _strategy(expand="all").signals} == {math.inf}


# ---------------------------------------------------------------- measurement


@torch.no_grad()
def one_by_one(policy: Policy, prefix: tuple[int, ...], cue: str, answer: str) -> float:
    """Probability of an answer behind prefix and cue, by a forward pass of its own."""
    cued = (*prefix, *policy.tokenizer(cue).input_ids)
    wanted = policy.tokenizer(answer).input_ids
    logits = policy.causal(torch.tensor([[*cued, *wanted]])).logits[0].double()
    log_p = torch.log_softmax(logits, -1)
    return math.exp(sum(float(log_p[len(cued) - 1 + i, token]) for i, token in enumerate(wanted)))


def _sampled(policy: Policy, answer: str, *lengths: int) -> Tree:
    random = np.random.default_rng(0)
    tree = make_tree([(length, 0.0) for length in lengths])
    texts = [random.integers(2, len(policy.tokenizer), len(node.tokens)) for node in tree.nodes]
    nodes = tuple(replace(node, tokens=tuple(map(int, text))) for node, text in zip(tree.nodes, texts, strict=True))
    prompt = Prompt("p", "3+4:", tuple(policy.tokenizer("3+4:").input_ids), "3+4:", answer)
    return replace(tree, prompt=prompt, nodes=nodes)


def _here(policy: Policy) -> Likelihood:
    return lambda trees, credits: sequence_logprobs(policy, trees, credits, 4096)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cue", ["#", ""])
def test_belief_is_that_of_a_pass_for_each_state(policy: Policy, packed: bool, cue: str) -> None:
    if packed:
        assert policy.try_tree_packing().packs
    tree = _sampled(policy, "12", 7, 4)
    signal = Signal(BELIEF, by_twos, cue=cue, closing=";")
    found, cost = measure_belief(policy, signal, [(tree, 0), (tree, 1)], _here(policy))
    for index, values in enumerate(found):
        tokens = tree.nodes[index].tokens
        bounds = [0, *by_twos(tokens)]
        for start, end in itertools.pairwise(bounds):
            expected = one_by_one(policy, tree.prompt.tokens + tokens[:start], cue, "12;")
            assert values[start:end] == pytest.approx([expected] * (end - start), rel=1e-4)
    # rollouts up to their last state, once; a probe of cue and three tokens at each state
    asked = len(cue) + 3
    assert cost == ((4 + 6 + 4 * asked) + (4 + 2 + 2 * asked) if packed else sum(4 + s + asked for s in (0, 2, 4, 6, 0, 2)))


def test_of_several_accepted_answers_the_likeliest(policy: Policy) -> None:
    tree = _sampled(policy, "7", 5)
    several = replace(tree, prompt=replace(tree.prompt, accepted=("7", "3", "99")))
    signal = Signal(BELIEF, by_twos, cue="#")
    (values,), _ = measure_belief(policy, signal, [(several, 0)], _here(policy))
    at_start = max(one_by_one(policy, tree.prompt.tokens, "#", each) for each in ("7", "3", "99"))
    assert values[0] == pytest.approx(at_start, rel=1e-4)


def test_where_the_context_has_no_room_to_ask_the_belief_is_zero(policy: Policy) -> None:
    tree = _sampled(policy, "7", 8)
    policy.context = 4 + 4 + 2  # the prompt, two steps, cue and answer
    (values,), _ = measure_belief(policy, Signal(BELIEF, by_twos, cue="#"), [(tree, 0)], _here(policy))
    assert (values[:6] > 0).all() and (values[6:] == 0).all()


def test_a_prompt_without_an_answer_is_an_error(policy: Policy) -> None:
    tree = _sampled(policy, "7", 5)
    tree = replace(tree, prompt=replace(tree.prompt, answer=None))
    with pytest.raises(RewardError, match=r'no reference answer, but explore.type = "belief" compares with one'):
        measure_belief(policy, Signal(BELIEF, by_twos), [(tree, 0)], _here(policy))


# ---------------------------------------------------------------- in a run


def test_a_run_branches_before_drops_and_counts_what_it_costs(recipe: Any) -> None:
    explore = {"type": "belief", "cue": "#", "num_rollouts": 4, "branches_per_pivot": 2,
               "segments": {"type": "tokens", "size": 3}}  # fmt: skip
    config = recipe(explore=explore, run={"steps": 2}, log={"trees_every": 1})
    directory = train(config)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["ledger/signal_tokens"] > 0 and 0 < rows[-1]["belief/first"] < 1
    seen = 0
    for file in sorted((directory / "trees").iterdir()):
        for tree in load_trees(file):
            for index, node in tree.stream("main"):
                assert (BELIEF in node.signals) == (node.reward <= 0)
                for pivot in (each for each in tree.pivots[1:] if each.parent == index):
                    beliefs = [node.signals[BELIEF][offset] for offset in pivot.candidates]
                    scores = np.exp(drops(beliefs) / 0.05)
                    assert pivot.q == pytest.approx(tuple(scores / scores.sum()), rel=1e-6)
                    seen += 1
    assert seen


def test_bad_recipes_are_refused_in_words(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"explore.cue is '\\n#### ', which the tokenizer cannot encode .* \"#\""):
        train(recipe(explore={"type": "belief"}))
    with pytest.raises(ConfigError, match=r"cluster.overlap is on, but explore.type = .belief."):
        recipe(explore={"type": "belief"}, cluster={"overlap": True})
    data = {"type": "jsonl", "path": "x.jsonl", "columns": {"answer": None}}
    with pytest.raises(ConfigError, match=r"explore.type is .belief., but data.columns.answer is none"):
        recipe(
            explore={"type": "belief"}, data=data, model={"type": "pretrained", "path": "x"},
            reward={"type": "user", "function": "x.py:f"},
        )  # fmt: skip
    mix = {"type": "mix", "sources": [{"data": {**data, "path": f"{name}.jsonl", **more}} for name, more in
                                      (("a", {"columns": {}}), ("b", {}))]}  # fmt: skip
    with pytest.raises(ConfigError, match=r"explore.type is .belief., but data.columns.answer is none"):
        recipe(
            explore={"type": "belief"}, data=mix, model={"type": "pretrained", "path": "x"},
            reward={"type": "user", "function": "x.py:f"},
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"explore.temperature"):
        recipe(explore={"type": "belief", "cue": "#", "temperature": 0})
