"""Figures of an update, by hand: the distance of sampler and learner, weights, masks, and a loss's own figures."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import ListeningRank
from torch import Tensor
from trees import make_tree

from deepgrpo.config import Config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.errors import TrainingError
from deepgrpo.feedback import Score
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.pack.layout import lay_out
from deepgrpo.records import Credit, Tree
from deepgrpo.stats import finite_mean
from deepgrpo.train.learner import Learner, Update
from deepgrpo.train.optim import build_optimizer
from deepgrpo.train.ranks import SingleRank
from deepgrpo.train.update_metrics import Observed, sampler_kl, summarise


@torch.no_grad()
def sampled(policy: Policy, tree: Tree, above: dict[int, float]) -> Tree:
    """The tree as if another policy had sampled it: the learner's log-prob of each token of a node is higher by so much."""
    nodes = []
    for index, node in enumerate(tree.nodes):
        path, own = tree.path(index), node.tokens
        log_p = torch.log_softmax(policy.model(torch.tensor([path])).logits[0], -1)
        mine = log_p[torch.arange(len(path) - len(own) - 1, len(path) - 1), torch.tensor(own)]
        nodes.append(replace(node, logprobs=tuple((mine - above.get(index, 0.0)).tolist())))
    return replace(tree, nodes=tuple(nodes))


def update(policy: Policy, config: Config, trees: list[Tree]) -> Update:
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    return learner.update(trees, [sibling_credit(tree) for tree in trees])


# ---------------------------------------------------------------- by hand


def test_the_estimate_of_the_kl_has_a_sign() -> None:
    """k3 with d = log π - log μ: d = log 2 gives 2 - 1 - log 2 = .306853; d = -log 2 gives .5 - 1 + log 2 = .193147."""
    assert sampler_kl(np.array([math.log(2)])) == pytest.approx(0.306853, abs=1e-6)
    assert sampler_kl(np.array([-math.log(2)])) == pytest.approx(0.193147, abs=1e-6)
    assert sampler_kl(np.array([math.log(2), 0.0])) == pytest.approx(0.153426, abs=1e-6)


def test_means_are_over_the_terms_of_a_stream() -> None:
    """Three main terms and one branch term; the mismatch is over all four, the first of which is masked."""
    columns = {
        "loss": [1.0, 2.0, 6.0, 5.0], "entropy": [0.5, 0.5, 2.0, 4.0], "clipped": [1.0, 0.0, 0.0, 1.0],
        "kl": [3.0, 0.0, 0.0, 2.0],
        "weight": [0.0, 1.0, 2.0, 0.5], "drift": [math.log(2), 0.0, -2 * math.log(2), 0.0], "figure/x": [1.0, 1.0, 4.0, 7.0],
    }  # fmt: skip
    observed = Observed(np.array([0, 0, 0, 1]), {name: torch.tensor(values) for name, values in columns.items()})
    assert summarise([observed], reference=True, importance=True, masks=True) == pytest.approx({
        "main/terms": 3, "main/loss": 3.0, "main/entropy": 1.0, "main/clip_fraction": 1 / 3, "main/kl": 1.0,
        "main/figure/x": 2.0,
        "branch/terms": 1, "branch/loss": 5.0, "branch/entropy": 4.0, "branch/clip_fraction": 1.0, "branch/kl": 2.0,
        "branch/figure/x": 7.0,
        # (.306853 + (1/4 - 1 + 2 log 2)) / 4 = (.306853 + .636294) / 4
        "mismatch/kl": 0.235787, "mismatch/max": 1.386294, "mismatch/weight": 0.875, "mismatch/masked": 0.25,
    }, abs=1e-6)  # fmt: skip


def test_figures_of_several_processes_add_up() -> None:
    """A term is in the pack of one process; the other has zeros there, in every column, also in a loss's own."""
    terms = lay_out([tree := make_tree([(1, 0.0), (1, 1.0)])], [sibling_credit(tree)]).terms
    mine, other = (Observed.empty(terms, ["x"]) for _ in range(2))
    mine.note(torch.tensor([0]), loss=torch.tensor([2.0]), **{"figure/x": torch.tensor([5.0])})
    other.note(torch.tensor([1]), loss=torch.tensor([3.0]), drift=torch.tensor([-1.0]), **{"figure/x": torch.tensor([7.0])})

    class Two(SingleRank):
        def add(self, values: Tensor) -> Tensor:
            return values + torch.stack(list(other.columns.values()))

    mine.gather(Two())
    assert {name: column.tolist() for name, column in mine.columns.items()} == {
        "loss": [2, 3], "entropy": [0, 0], "clipped": [0, 0], "kl": [0, 0], "weight": [0, 0], "drift": [0, -1],
        "figure/x": [5, 7],
    }  # fmt: skip


def test_what_was_not_measured_is_not_there() -> None:
    terms = lay_out([tree := make_tree([(2, 0.0), (1, 1.0)])], [sibling_credit(tree)]).terms
    found = summarise([Observed.empty(terms)], reference=False, importance=False)
    assert found["mismatch/weight"] == 1.0 and found["branch/terms"] == 0
    assert not {"main/kl", "branch/loss", "mismatch/masked"} & set(found)
    assert summarise([], reference=True, importance=True, masks=True) == {}


# ---------------------------------------------------------------- through the learner


@pytest.mark.parametrize("epochs", [1, 2])
def test_drift_is_the_learners_old_log_prob_minus_the_samplers(policy: Policy, recipe: Any, epochs: int) -> None:
    """The learner gives the 4 tokens of node 1, of 16, twice the sampler's probability: (2 - 1 - log 2) / 4 = .076713.

    Half as likely, they are 4 · .193147 / 16. Old log-probs are those before the first step, also in a second epoch.
    """
    tree = make_tree([(6, 0.0), (4, 1.0), (6, 0.0)])
    config = recipe(optim={"lr": 1e-30, "epochs": epochs}, loss={"beta": 0.0, "importance": "on"})
    metrics = update(policy, config, [sampled(policy, tree, {1: math.log(2)})]).metrics
    assert metrics["mismatch/kl"] == pytest.approx(0.0767132, abs=1e-5)
    assert metrics["mismatch/max"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["mismatch/weight"] == pytest.approx(1.25, abs=1e-5)  # (12 + 4 · 2) / 16
    metrics = update(policy, config, [sampled(policy, tree, {1: -math.log(2)})]).metrics
    assert metrics["mismatch/kl"] == pytest.approx(0.0482868, abs=1e-5)
    assert metrics["mismatch/weight"] == pytest.approx(0.875, abs=1e-5)  # (12 + 4 / 2) / 16


def test_masked_tokens_keep_their_place_in_the_denominator(policy: Policy, recipe: Any) -> None:
    """Advantages -1/3, 2/3, -1/3 of 6, 4 and 6 tokens. Node 0 is 8 times as likely by the learner: masked.

    The loss per token is -A · w: (0 · 6 - 2/3 · 4 + 1/3 · 6) / 16 = -1/24, divided by 16 tokens and not by 10.
    """
    tree = make_tree([(6, 0.0), (4, 1.0), (6, 0.0)])
    config = recipe(optim={"lr": 1e-30}, loss={"beta": 0.0, "importance": "on", "importance_mode": "mask"})
    found = update(policy, config, [sampled(policy, tree, {0: math.log(8)})])
    assert found.metrics["mismatch/masked"] == 6 / 16 and found.metrics["main/terms"] == 16
    assert found.metrics["main/loss"] == pytest.approx(-1 / 24, abs=1e-5)
    # (0 · 6 + 10) / 16
    assert found.metrics["mismatch/weight"] == pytest.approx(0.625, abs=1e-5)
    truncated = recipe(optim={"lr": 1e-30}, loss={"beta": 0.0, "importance": "on"})
    other = update(policy, truncated, [sampled(policy, tree, {0: math.log(8)})]).metrics
    assert "mismatch/masked" not in other
    assert other["main/loss"] == pytest.approx((2 * 6 - 8 + 6) / 3 / 16, abs=1e-5)


def test_a_loss_names_figures_of_its_own(policy: Policy, recipe: Any, tmp_path: Path) -> None:
    """The mean advantage over tokens: (-6 / 3 + 8 / 3 - 6 / 3) / 16 = -1/12, in several packs."""
    (tmp_path / "mine.py").write_text(
        "from deepgrpo.loss.inputs import LossOutput\n"
        "def f(inputs, config):\n"
        "    return LossOutput(-inputs.advantage_N * inputs.logprob_N, figures={'advantage': inputs.advantage_N})\n"
    )
    config = recipe(loss={"beta": 0.0, "policy": f"{tmp_path}/mine.py:f"}, learner={"tokens_per_pack": 10})
    tree = make_tree([(6, 0.0), (4, 1.0), (6, 0.0)], [(0, 3, [(2, 1.0), (2, 0.0)])])
    metrics = update(policy, config, [tree]).metrics
    assert metrics["main/figure/advantage"] == pytest.approx(-1 / 12)
    assert metrics["branch/figure/advantage"] == pytest.approx(0.0) and metrics["main/clip_fraction"] == 0.0


# ---------------------------------------------------------------- what an update counts

TREE = make_tree([(6, 0.0), (4, 1.0), (6, 0.0)], [(0, 3, [(2, 1.0), (2, 0.0)])])
"""20 tokens of its own behind a prompt of 3; as rows 9 + 7 + 9 + 8 + 8 = 41."""


@pytest.mark.parametrize(
    ("optim", "beta", "passes"),
    [
        ({}, 0.0, 1),
        ({}, 0.1, 2),  # and one by the reference
        ({"epochs": 2}, 0.0, 3),  # two, and one for the old log-probs
        ({"epochs": 2}, 0.1, 5),
        ({"minibatches": 2}, 0.0, 2),  # one, and one for the old log-probs
    ],
)
def test_tokens_are_counted_for_every_pass(policy: Policy, recipe: Any, optim: Any, beta: float, passes: int) -> None:
    config = recipe(optim={"lr": 1e-30, **optim}, loss={"beta": beta})
    reference = Reference.of(policy) if beta else None
    learner = Learner(policy, reference, build_optimizer(policy, config.optim), config)
    found = learner.update([TREE, TREE], [sibling_credit(TREE)] * 2)
    assert found.ledger.learner_tokens == 2 * 41 * passes and found.ledger.learner_tokens_unique == 2 * 23 * passes
    assert found.ledger.trained_tokens == 40
    assert found.metrics["main/sequences"] == 6 and found.metrics["branch/sequences"] == 4


def test_dropped_rows_are_counted_by_their_reason(policy: Policy, recipe: Any) -> None:
    """Three rollouts that agree; of the other tree, two branches, which are fewer than three."""
    config = recipe(optim={"lr": 1e-30}, loss={"beta": 0.0, "min_branch_sequences": 3})
    found = update(policy, config, [TREE, make_tree([(2, 1.0), (2, 1.0), (2, 1.0)])])
    assert found.metrics["loss/dropped_zero_advantage"] == 3 and found.metrics["loss/dropped_few_branches"] == 2
    assert found.ledger.trained_tokens == 16


def test_whitening_brings_no_dropped_row_back(policy: Policy, recipe: Any) -> None:
    """Nine tokens without advantage would get one: the mean over all tokens is not 0."""
    config = recipe(optim={"lr": 1e-30}, credit={"whiten": True}, loss={"beta": 0.0})
    found = update(policy, config, [TREE, make_tree([(3, 1.0), (3, 1.0), (3, 1.0)])])
    assert found.ledger.trained_tokens == 20 and found.metrics["main/terms"] == 16


def test_an_advantage_beyond_float32_names_prompt_and_reward(policy: Policy, recipe: Any) -> None:
    config = recipe(loss={"beta": 0.0})
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    values = itertools.cycle((1e308, 0.0))
    huge = replace(TREE, nodes=tuple(replace(node, score=Score(next(values))) for node in TREE.nodes))
    says = r"step 1 \(prompt 'p'\).* rewards reach 1e\+308.* float32"
    with np.errstate(over="ignore"), pytest.raises(TrainingError, match=says):
        learner.update([huge], [sibling_credit(huge)])
    assert learner.optimizer_steps == 0
    # their mean is a number, and so is the metric
    assert finite_mean([1e308, 1.5e308]) == pytest.approx(1.25e308)
    assert finite_mean([0.5, 0.25]) == 0.375


def test_the_schedule_counts_steps_without_signal(policy: Policy, recipe: Any, tmp_path: Path) -> None:
    """Of four run steps the second has no signal and takes no optimizer step, and the rates stay 4/4, -, 2/4, 1/4; so after a
    resume before the last one. With 2 mini-batches, of which the first has no signal, the rates are those of the second."""
    config = recipe(run={"steps": 4, "prompts_per_step": 2}, optim={"lr": 1e-20, "schedule": "linear"}, loss={"beta": 0.0})
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    signal = [sibling_credit(TREE)] * 2
    dead = [Credit((), ())] * 2
    rates = [learner.update([TREE, TREE], credits).metrics["lr"] for credits in (signal, dead, signal)]
    assert [rate / 1e-20 for rate in rates] == pytest.approx([1.0, 0.0, 0.5])
    learner.save(tmp_path)
    resumed = Learner(policy, None, build_optimizer(policy, config.optim), config)
    resumed.load(tmp_path, 3, learner.optimizer_steps)
    assert resumed.optimizer_steps == 2
    assert resumed.update([TREE, TREE], signal).metrics["lr"] / 1e-20 == pytest.approx(0.25)

    optim = {"lr": 1e-20, "schedule": "linear", "minibatches": 2}
    config = recipe(run={"steps": 2, "prompts_per_step": 2}, optim=optim, loss={"beta": 0.0})
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    halves = [dead[0], signal[0]]
    assert [learner.update([TREE, TREE], halves).metrics["lr"] / 1e-20 for _ in range(2)] == pytest.approx([0.75, 0.25])


def test_the_schedule_counts_optimizer_steps(policy: Policy, recipe: Any) -> None:
    """Three steps of 2 mini-batches and 2 epochs are 12 optimizer steps. The metric is the rate of the last one.

    Linear: after the first update it is that of step 3, (12 - 3) / 12; after the second that of step 7, 5 / 12.
    With a warm-up of 8: 4 / 8, then 8 / 8.
    """
    for schedule, expected in (({"schedule": "linear"}, [0.75, 5 / 12]), ({"warmup_steps": 8}, [0.5, 1.0])):
        config = recipe(optim={"lr": 1e-20, "minibatches": 2, "epochs": 2, **schedule}, loss={"beta": 0.0})
        learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
        rates = [learner.update([TREE, TREE], [sibling_credit(TREE)] * 2).metrics["lr"] for _ in range(2)]
        assert [rate / 1e-20 for rate in rates] == pytest.approx(expected)


def test_the_loss_of_a_step_is_the_sum_of_its_parts(policy: Policy, recipe: Any) -> None:
    """main + .5 · branch + .3 · (KL main + KL branch), from a reference that is another model; lambda leaves the KL alone."""
    config = recipe(optim={"lr": 1e-30}, loss={"beta": 0.3, "lambda": 0.5})
    reference, noise = Reference.of(policy), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    ranks = ListeningRank()
    learner = Learner(policy, reference, build_optimizer(policy, config.optim), config, ranks=ranks)
    m = learner.update([TREE], [sibling_credit(TREE)]).metrics
    assert min(m["main/kl"], m["branch/kl"]) > 0.01
    by_hand = m["main/loss"] + 0.5 * m["branch/loss"] + 0.3 * (m["main/kl"] + m["branch/kl"])
    assert ranks.losses == [pytest.approx(by_hand, rel=1e-5)]
