"""`deepgrpo probe`: its estimator on gradients whose truth is known, its projection, and the learner's own gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from trees import make_tree

from deepgrpo import rng
from deepgrpo.config import Config, DeepExplore, RootExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import ConfigError, TrainingError
from deepgrpo.lab.probe.arms import Arm, arms_of, reference_arm
from deepgrpo.lab.probe.estimate import PromptGradients, Reference, figures, prompt_weights, spread
from deepgrpo.lab.probe.findings import ArmFigures, Difference, Figure, Findings
from deepgrpo.lab.probe.gradient import GradientMeter
from deepgrpo.lab.probe.measure import ArmResult, Measured, Plan
from deepgrpo.lab.probe.remember import RememberingEngine
from deepgrpo.lab.probe.sketch import Sketch, Whole, _turned, collected
from deepgrpo.lab.probe.verdict import remarks, verdict
from deepgrpo.model.policy import Policy
from deepgrpo.model.policy import Reference as StartModel
from deepgrpo.records import SampleRequest, Tree
from deepgrpo.train.learner import Learner
from deepgrpo.train.objective import build_objective
from deepgrpo.train.optim import build_optimizer

# ---------------------------------------------------------------- estimator


def one_stream(gradient_NK: np.ndarray, tokens: float = 100.0) -> PromptGradients:
    count = len(gradient_NK)
    return PromptGradients(np.asarray(gradient_NK)[None], np.ones((1, count)), np.full(count, tokens))


def point(one: PromptGradients, reference: np.ndarray, step_prompts: float) -> tuple[float, float]:
    found = figures(one, Reference(reference), np.ones((1, len(reference))), step_prompts)
    return float(found.cos_R[0]), float(found.root_R[0])


def test_figures_by_hand() -> None:
    """x = (2, 0), (0, 2) and y = (1, 0), (1, 1): along = (x0·y1 + x1·y0) / 2 = (2 + 0) / 2 = 1; truth = y0·y1 = 1.

    mean² = x0·x1 = 0, but at least along² / truth = 1. |x|² = 4, B = 4: power = 4/4 + 3/4 · 1 = 7/4; cos = 1 / sqrt(7/4).
    cos² = 4/7, snr² = (4/7) / (3/7) = 4/3; per 1,000 tokens, with 4 prompts of 100 tokens, 4/3 · 1000 / 400 = 10/3.
    """
    cos, root = point(one_stream(np.array([[2.0, 0], [0, 2]])), np.array([[1.0, 0], [1, 1]]), 4)
    assert cos == pytest.approx((4 / 7) ** 0.5) and root == pytest.approx((10 / 3) ** 0.5)


def test_a_step_of_two_streams_by_hand() -> None:
    """Main sums (6, 0) over 3 terms, branch sums (0, 4) over 2: a step is (2, 0) + (0, 2); merged, both over 5."""
    numerators = np.array([[[6.0, 0], [0, 0]], [[0.0, 0], [0, 4]]])
    below = np.array([[1.0, 2.0], [0.0, 2.0]])
    assert PromptGradients(numerators, below, np.ones(2)).step() == pytest.approx([2, 2])
    assert PromptGradients(numerators, below, np.ones(2), merged=True).step() == pytest.approx([6 / 5, 4 / 5])


def test_truth_is_the_mean_over_all_halves() -> None:
    """<r₁, r₂> over the 6 ways to divide 4 prompts into two halves."""
    y = rng.generator("halves").normal(size=(4, 7))
    halves = [
        y[list(chosen)].mean(axis=0) @ y[[i for i in range(4) if i not in chosen]].mean(axis=0)
        for chosen in itertools.combinations(range(4), 2)
    ]
    assert Reference(y).truth(np.ones((1, 4)))[0] == pytest.approx(np.mean(halves))


def world(
    seed: int, bias: float, own_noise: float, prompts: int, reference: int, strategy: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """x and y with means (1, bias, 0, ...) and (1, 0, ...) in 40 dimensions; half of the noise of y is in x too."""
    y = rng.generator("world", seed).normal(size=(reference, 40)) * 1.5
    x = 0.5 * y[:prompts] + rng.generator("strategy", seed, strategy).normal(size=(prompts, 40)) * own_noise
    x[:, 1] += bias
    x[:, 0] += 1
    y[:, 0] += 1
    return x, y


@pytest.mark.parametrize(("bias", "own_noise"), [(0.0, 2.0), (0.8, 1.0)])
def test_the_known_cosine_is_found(bias: float, own_noise: float) -> None:
    """|E g|² = 1 + bias²; noise of a prompt: (.5² · 1.5² + own²) · 40; cos = 1 / sqrt(|E g|² + noise / B)."""
    noise = 40 * (0.25 * 2.25 + own_noise**2)
    true = 1 / np.sqrt(1 + bias**2 + noise / 16)
    found, naive = [], []
    for seed in range(60):
        x, y = world(seed, bias, own_noise, 64, 192)
        found.append(point(one_stream(x), y, 16)[0])
        step, truth = x.mean(axis=0), y[:64].mean(axis=0)
        naive.append(step @ truth / np.linalg.norm(step) / np.linalg.norm(truth))
    assert np.mean(found) == pytest.approx(true, abs=3.5 * np.std(found) / 60**0.5)
    assert np.mean(naive) > true + 0.15  # the noise that a prompt shares with itself looks like signal


def test_the_scale_of_a_gradient_does_not_matter() -> None:
    x, y = world(1, 0.3, 1.0, 24, 48)
    assert point(one_stream(x), y, 8) == pytest.approx(point(one_stream(7 * x), 0.1 * y, 8))


def test_intervals_hold_the_known_cosine_in_most_worlds() -> None:
    """About 95% of the intervals, and of those of the difference of two strategies that are equally good, and not wide ones."""
    true, held, equal, widths, found = 1 / np.sqrt(1 + 40 * (0.5625 + 1) / 16), 0, 0, [], []
    names = [str(i) for i in range(96)]
    for seed in range(100):
        x, y = world(seed, 0.0, 1.0, 32, 96)
        other, _ = world(seed, 0.0, 1.0, 32, 96, strategy=1)
        weights = prompt_weights(names[:32], names[32:], seed, 300)
        a, b = (figures(one_stream(each), Reference(y), weights, 16) for each in (x, other))
        low, high = np.quantile(spread(a.cos_R), [0.025, 0.975])
        held += low <= true <= high
        widths.append(high - low)
        found.append(a.cos_R[0])
        low, high = np.quantile(spread(a.root_R - b.root_R), [0.025, 0.975])
        equal += low <= 0 <= high
    assert held >= 91 and equal >= 91
    assert np.mean(widths) < 1.4 * 3.92 * np.std(found)


def test_a_gradient_against_the_truth_is_negative() -> None:
    x, y = world(2, 0.0, 0.5, 64, 128)
    cos, root = point(one_stream(-x), y, 16)
    assert cos < -0.3 and root < 0


def test_no_gradient_at_all_has_cosine_zero() -> None:
    found = figures(
        PromptGradients(np.zeros((2, 8, 3)), np.zeros((2, 8)), np.full(8, 9.0)), Reference(np.zeros((8, 3))),
        prompt_weights([str(i) for i in range(8)], [], 0, 5), 4,
    )  # fmt: skip
    assert not found.cos_R.any() and not found.root_R.any()


# ---------------------------------------------------------------- projection


def test_a_sketch_keeps_inner_products_within_its_error() -> None:
    """Two gradients of 5,000 coordinates with a few large ones; the error is the mean over 200 seeds, by formula."""
    random = rng.generator("sketch")
    g, h = np.abs(random.normal(size=(2, 5000))) * np.where(np.arange(5000) % 256 == 0, 20, 1)  # of one sign, in one column
    h = h + 0.5 * g
    exact, errors, norms = g @ h, [], []
    for seed in range(200):
        sketch = Sketch(256, seed)
        a, b = (sketch.project("weight", torch.from_numpy(each)) for each in (g, h))
        errors.append(a @ b - exact)
        norms.append(a @ a / (g @ g))
    spread = np.sqrt(((g @ g) * (h @ h) + exact**2) / 256)
    assert abs(np.mean(errors)) < 3.5 * spread / 200**0.5 and np.std(errors) < 1.15 * spread
    assert np.mean(norms) == pytest.approx(1, abs=0.03)


def test_a_sketch_is_linear_and_its_parameters_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    g, h = (torch.from_numpy(each) for each in rng.generator("linear").normal(size=(2, 31, 17)))
    sketch = Sketch(64, 3)
    both = sketch.project("a", g) + sketch.project("a", h)
    assert sketch.project("a", g + h) == pytest.approx(both, abs=1e-5)
    assert not np.allclose(sketch.project("b", g), sketch.project("a", g))
    assert not np.allclose(Sketch(64, 4).project("a", g), sketch.project("a", g))
    whole = sketch.project("a", g)
    monkeypatch.setattr("deepgrpo.lab.probe.sketch.BLOCK", 64)  # row by row
    assert sketch.project("a", g) == pytest.approx(whole, abs=1e-6)


def test_rows_are_turned_alike_on_every_device() -> None:
    """[1, 2, 3] turned by 1 is [3, 1, 2], [4, 5, 6] by 2 is [5, 6, 4]."""
    rows, shifts = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), np.array([1, 2])
    assert _turned(rows, shifts).tolist() == [8, 7, 6]
    place = (torch.arange(3) - torch.from_numpy(shifts)[:, None]) % 3
    assert rows.gather(1, place).sum(dim=0).tolist() == [8, 7, 6]


# ---------------------------------------------------------------- the learner's gradient

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)]), (2, 0, [(4, 0.0), (5, 1.0), (2, 0.0)])]),
    make_tree([(3, 1.0), (8, 0.0), (2, 0.0)], [(1, 6, [(1, 1.0), (9, 0.0)])], prompt_length=5),
    make_tree([(4, 1.0), (4, 1.0)]),
]


def learners_gradient(policy: Policy, config: Config, start: Any, trees: Sequence[Tree] = TREES) -> np.ndarray:
    """Flat gradient that `Learner.update` accumulates, before it is clipped; the weights stay."""
    caught: list[np.ndarray] = []
    optimizer = build_optimizer(policy, config.optim)

    def step(closure: Any = None) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable().values()]
        caught.append(torch.cat([grad.flatten() for grad in grads]).double().numpy().copy())

    optimizer.step = step  # type: ignore[method-assign]
    Learner(policy, start, optimizer, config).update(trees, [sibling_credit(tree) for tree in trees])
    return caught[0]


def probes_gradient(policy: Policy, config: Config, start: Any, projection: Any) -> np.ndarray:
    meter = GradientMeter(policy, start, projection)
    found = meter.measure(
        TREES, [sibling_credit(tree) for tree in TREES], config, build_objective(config, exact_sampler=True)
    )
    result = ArmResult(Arm("any", config), gradients=found, tokens=[1] * len(found))
    return result.as_gradients().step()


@pytest.mark.parametrize(
    ("loss", "credit"),
    [
        pytest.param({"beta": 0.0}, {}, id="token"),
        pytest.param({"beta": 0.0, "reduction": "sequence", "lambda": 0.5}, {}, id="sequence"),
        pytest.param({"beta": 0.0, "reduction": "constant"}, {"whiten": True}, id="constant-whitened"),
        pytest.param({"beta": 0.0, "streams": "merged", "lambda": 2.0}, {}, id="merged"),
        pytest.param({"beta": 0.3, "lambda_scales_kl": True, "lambda": 0.5}, {}, id="kl"),
        pytest.param({"beta": 0.0, "drop_zero_advantage": False, "min_branch_sequences": 20}, {}, id="too few branches"),
        pytest.param({"beta": 0.2, "full_branch_sequences": 10}, {}, id="few branches"),
        pytest.param({"beta": 0.0, "lambda": 0.0}, {}, id="lambda 0"),
    ],
)
def test_the_gradient_is_the_learners(policy: Policy, recipe: Any, loss: Any, credit: Any) -> None:
    config = recipe(optim={"lr": 1e-3, "max_grad_norm": "none"}, loss=loss, credit=credit, learner={"tokens_per_pack": 24})
    policy.try_tree_packing()
    start = StartModel.of(policy) if config.loss.beta else None
    if start is not None:  # another start model, so that the KL has a gradient
        with torch.no_grad():
            for parameter in start.policy.model.parameters():
                parameter += 0.05 * torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter)
    expected = learners_gradient(policy, config, start)
    found = probes_gradient(policy, config, start, Whole())
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(found - expected) < 3e-6 * np.linalg.norm(expected)
    sketch = Sketch(512, 1)
    projected: Any = sketch.empty(policy)
    offset = 0
    for name, parameter in policy.trainable().items():
        part = expected[offset : offset + parameter.numel()]
        projected = projected + sketch.project(name, torch.from_numpy(part).view_as(parameter))
        offset += parameter.numel()
    found = probes_gradient(policy, config, start, sketch)
    assert np.linalg.norm(found - projected) < 3e-6 * np.linalg.norm(projected)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(expected), rel=5 * (2 / 512) ** 0.5)


def test_gradients_are_freed_and_shared_ones_computed_once(policy: Policy, recipe: Any) -> None:
    config = recipe(loss={"beta": 0.0})
    meter, objective = GradientMeter(policy, None, Whole()), build_objective(config, exact_sampler=True)
    credits = [sibling_credit(tree) for tree in TREES]
    meter.measure(TREES, credits, config, objective)
    paid = meter.tokens
    assert paid > 0 and all(parameter.grad is None for parameter in policy.trainable().values())
    again = recipe(loss={"beta": 0.0, "lambda": 0.5})
    found = meter.measure(TREES, credits, again, build_objective(again, exact_sampler=True))
    branches = sum(len(tree.path(i)) for tree in TREES for i, _ in tree.stream("branch"))
    assert 0 < meter.tokens - paid <= branches + 1  # the main stream is the same, the branch stream has another weight
    assert sum(each.tokens for each in found) == paid
    meter.clear()
    meter.measure(TREES, credits, config, objective)
    assert meter.tokens >= 2 * paid


def test_a_loss_that_is_not_finite_names_the_prompt(policy: Policy, recipe: Any) -> None:
    config = recipe(loss={"beta": 0.0})
    with torch.no_grad():
        next(iter(policy.trainable().values())).fill_(float("nan"))
    meter = GradientMeter(policy, None, Whole())
    with pytest.raises(TrainingError, match=r"the loss of a response to prompt 'p' is nan"):
        meter.measure(TREES[:1], [sibling_credit(TREES[0])], config, build_objective(config, exact_sampler=True))


def test_hooks_are_gone_afterwards(policy: Policy) -> None:
    with collected(policy, Whole()) as total:
        sum(parameter.sum() for parameter in policy.trainable().values()).backward()  # type: ignore[union-attr]
    assert (total == 1).all()
    sum(parameter.sum() for parameter in policy.trainable().values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in policy.trainable().values()) and (total == 1).all()


# ---------------------------------------------------------------- engine


def test_draws_are_sampled_once(policy: Policy) -> None:
    plain = EmbeddedEngine(policy, max_rows=4)
    engine = RememberingEngine(EmbeddedEngine(policy, max_rows=4))
    first = [SampleRequest((3, 4), (1, 2), 6), SampleRequest((5, 6), (1,), 6)]
    second = [SampleRequest((3, 4), (2, 9), 6), SampleRequest((5, 6), (1,), 7)]
    expected = [plain.sample(each, SamplingParams())[0] for each in (first, second)]
    found, stats = engine.sample(first, SamplingParams())
    again, more = engine.sample(second, SamplingParams())
    assert [found, again] == expected
    # key 2 behind (3, 4) is known; a longer limit, or another temperature, is another draw
    assert stats.sampled_tokens == sum(len(c.tokens) for group in found for c in group)
    assert more.sampled_tokens == len(again[0][1].tokens) + len(again[1][0].tokens)
    assert engine.sample(second, SamplingParams(temperature=0.5))[1].sampled_tokens > 0
    assert engine.sample(second, SamplingParams())[1].sampled_tokens == 0
    engine.clear()
    assert engine.sample(first, SamplingParams())[1].sampled_tokens == stats.sampled_tokens


# ---------------------------------------------------------------- strategies


def test_strategies_keep_the_keys_of_the_recipe(recipe: Any) -> None:
    base = recipe(explore={"type": "deep", "num_rollouts": 6, "branches_per_pivot": 3, "gamma": 1.0})
    arms = arms_of(base, ("root", "deep:gamma=0,segments.type=tokens,segments.size=4", "deep:loss.lambda=0.5"), None).measured
    root, deep, half = (arm.config for arm in arms)
    assert isinstance(deep.explore, DeepExplore)
    assert isinstance(root.explore, RootExplore) and root.explore.num_rollouts == 6
    assert (deep.explore.gamma, deep.explore.branches_per_pivot, deep.explore.segments.size) == (0, 3, 4)
    assert half.loss.lambda_ == 0.5 and half.explore == base.explore
    assert [arm.name for arm in arms_of(base, (), None).measured] == ["root", "deep", "random"]
    own = recipe(explore={"type": "treerl"})
    assert [arm.name for arm in arms_of(own, (), None).measured] == ["root", "deep", "random", "treerl"]
    assert reference_arm(base, None).config.explore.num_rollouts == 6
    assert reference_arm(base, 12).config.explore.num_rollouts == 12


def test_equal_gradients_are_measured_once(recipe: Any) -> None:
    arms = arms_of(recipe(), ("root", "root:optim.lr=1e-5", "deep"), None)
    assert [arm.name for arm in arms.measured] == ["root", "deep"] and arms.twins == {"root:optim.lr=1e-5": "root"}


@pytest.mark.parametrize(
    ("strategies", "says"),
    [
        (("depe",), "names 'depe', which is no strategy; did you mean 'deep'"),
        (("deep:gama=1",), "gama"),
        (("deep:gamma",), "'gamma' has no value; write TYPE:key=value"),
        (("root:data.seed=3",), "compared on the same model and data; leave data.seed out"),
        (("root", "root"), "names 'root' twice"),
    ],
)
def test_what_can_be_wrong_with_strategies(recipe: Any, strategies: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        arms_of(recipe(), strategies, None)


# ---------------------------------------------------------------- verdict


def arm(name: str, snr: float, mixed: float = 1.0) -> ArmFigures:
    figure = Figure(snr, snr / 2, 2 * snr)
    return ArmFigures(name, 8, 200.0, Figure(0.3, 0.1, 0.5), figure, Figure(mixed, 0.5, 2.0), 0.3, None, None, 0.0)


def results(arms: Sequence[ArmFigures], apart: set[tuple[str, str]], **changes: Any) -> Findings:
    pairs = itertools.combinations(arms, 2)
    differences = [
        Difference(a.name, b.name, d := a.snr.value - b.snr.value, d - 0.1 * (d > 0), d + 0.1 * (d < 0))
        if (a.name, b.name) in apart else Difference(a.name, b.name, a.snr.value - b.snr.value, -1.0, 1.0)
        for a, b in pairs
    ]
    return Findings(tuple(arms), tuple(differences), **{"agreement": 0.8, "truth_shown": True, "any_signal": True, **changes})


@pytest.fixture
def measured(recipe: Any) -> Measured:
    plan = Plan(16, 48, 4, 0)
    arms = [ArmResult(each, rewards=[0.0], tokens=[100]) for each in arms_of(recipe(), ("root", "deep"), None).measured]
    return Measured(plan, arms, [np.zeros(2)] * 16, [np.zeros(2)] * 32)


def test_verdicts(measured: Measured) -> None:
    root, deep, bad = arm("root", 1.0), arm("deep", 3.0), arm("random", 0.5, mixed=9.0)
    every = {("root", "deep"), ("root", "random"), ("deep", "random")}
    said = verdict(results([root, deep, bad], every), measured)
    assert (said.code, said.best) == ("best", ("deep",))
    assert said.sentence == "deep is best: its snr² per 1,000 sampled tokens is 3, 3.0 times that of root, the next"
    said = verdict(results([root, deep, bad], {("deep", "random")}), measured)
    assert (said.code, said.best) == ("some", ("deep", "root"))
    assert said.sentence.startswith("deep or root: deep leads with snr² 3") and "random is worse" in said.sentence
    said = verdict(results([root, deep, bad], set()), measured)
    assert (said.code, said.best) == ("none", ()) and "--prompts 64 halves the intervals" in said.sentence
    # told apart from the second only: random is as good as deep for all that is known
    assert verdict(results([root, deep, bad], {("root", "deep")}), measured).best == ("deep", "random")
    assert verdict(results([root, deep], every, truth_shown=False), measured).code == "no_truth"
    said = verdict(results([root, deep], every, any_signal=False), measured)
    assert said.code == "no_signal" and "easier questions" in said.sentence
    assert verdict(results([root], set()), measured).code == "single"
    notes = remarks(results([root, deep, bad], every), measured)
    assert any(note.startswith("random has the most mixed groups per token") for note in notes)
