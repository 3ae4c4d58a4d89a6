"""Our main stream against TRL's GRPO, both run for real on the same batch: advantages, loss, gradient, several steps.

TRL's side is `trl.GRPOTrainer` itself. Only its sampling is replaced, by the hook TRL has for that (`rollout_func`): it
hands over the tokens of our trees. Padding, rewards, advantages, the reference's log-probs, the loss and the optimizer
steps are TRL's own code. Our side is `sibling_credit` and `Learner.update`.

    loss_type   ours: loss.reduction
    grpo        sequence                                            mean over rollouts of their token means
    dr_grpo     constant, reduction_length = max_completion_length  token sum / (rollouts · length)
    dapo        token                                               token sum / tokens

    importance_sampling_level = "sequence" (GSPO) is our loss.ratio = "sequence", with any of them.
    loss_type = "cispo" with epsilon_high is our loss.policy = "cispo" with cispo_high, and a token mean.

Where the two are not the same, a test says so: rows without advantage (we may drop them), TRL's default KL (another
gradient, even on-policy) and a `delta` below 1 + epsilon_high (which TRL advises against). Both sides compute in
float32, as TRL's output layer knows nothing else; a match leaves about 1e-6 of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from learners import LearnerWithOld, ListeningRank
from torch import Tensor
from trees import make_tree

from deepgrpo.config import Config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.records import Tree
from deepgrpo.train.optim import build_optimizer

# between TRL and transformers, nothing that we call
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

G = 4
"""Rollouts per prompt."""
LONGEST = 16
"""max_completion_length; longer than every rollout, or dr_grpo would be hard to tell from others."""
TEMPERATURE = 0.8
ROUNDING = 1e-5
"""Largest relative difference that float32 may explain."""
DRIFT = 1e-4
"""The same once the weights themselves differ by the rounding of earlier steps."""

MIXED = [
    make_tree([(6, 0.0), (5, 1.0), (9, 0.25), (2, 0.5)], vocabulary=13),
    make_tree([(3, 1.0), (12, 0.0), (2, 0.0), (7, 0.0)], prompt_length=6, first_token=5, vocabulary=11),
]
"""Two prompts of different length, eight rollouts of different length."""
UNANIMOUS = make_tree([(4, 1.0), (10, 1.0), (3, 1.0), (5, 1.0)], prompt_length=4)
NEARLY_UNANIMOUS = make_tree([(4, 0.5), (3, 0.5), (6, 0.5), (5, 0.5 + 2**-12)], prompt_length=4)
"""Its standard deviation, 1.2e-4, is of the size of the 1e-4 that is added to it."""

REDUCTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"reduction": "sequence"},
    "dr_grpo": {"reduction": "constant", "reduction_length": LONGEST},
    "dapo": {"reduction": "token"},
}
WHOLE: dict[str, Any] = {"importance_sampling_level": "sequence"}
"""GSPO on TRL's side."""
PLAIN: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": "none", "drop_zero_advantage": False}


class Step(NamedTuple):
    """What an optimizer step computed, before the weights moved."""

    loss: float
    gradient: dict[str, Tensor]


def gradient_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative L2 distance over the parameters."""
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


# ---------------------------------------------------------------- the two sides


@pytest.fixture
def trainer(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes TRL's trainer for some trees. Its reference is the policy fixture as it is; its policy starts there too."""
    from transformers import LlamaForCausalLM

    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental
    start = tmp_path / "start"
    policy.model.save_pretrained(start)  # TRL reads its reference from where the policy came from

    def make(trees: Sequence[Tree], optimizer: dict[str, Any] | None = None, **settings: Any) -> Any:
        names = [f"tree {i}" for i in range(len(trees))]
        nodes = [(tree, node) for tree in trees for node in tree.nodes]

        def rollouts(prompts: list[str], _: Any) -> dict[str, Any]:
            assert prompts == [name for name in names for _ in range(G)]
            return {
                "prompt_ids": [list(tree.prompt.tokens) for tree, _ in nodes],
                "completion_ids": [list(node.tokens) for _, node in nodes],
                "logprobs": None,
                "reward": [node.reward for _, node in nodes],  # goes on to the reward function
            }

        arguments = {
            # whole generation batches in one pass, unless a test accumulates
            "per_device_train_batch_size": len(nodes), "num_generations": G, "max_completion_length": LONGEST,
            "temperature": TEMPERATURE, "shuffle_dataset": False, "use_bias_correction_kl": False,
            "lr_scheduler_type": "constant", "gradient_checkpointing": False, "use_cpu": True, "bf16": False,
            "report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        return trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda prompts, completions, reward, **_: reward,
            args=trl.GRPOConfig(str(tmp_path / "trl"), **{**arguments, **settings}),
            train_dataset=datasets.Dataset.from_dict({"prompt": names}),
            processing_class=policy.tokenizer,
            rollout_func=rollouts,
            optimizers=(torch.optim.AdamW(model.parameters(), **optimizer) if optimizer else None, None),
        )

    return make


def scored(trainer: Any) -> dict[str, Tensor]:
    """The batch as TRL's own code makes it, one row per rollout in the order of our trees."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def their_step(trainer: Any, inputs: dict[str, Tensor]) -> Step:
    trainer.current_gradient_accumulation_steps = 1  # which `train` sets to the number of micro-batches
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return Step(float(loss.detach()), gradient_of(trainer.model))


def our_steps(
    policy: Policy, config: Config, trees: Sequence[Tree], reference: Reference | None = None,
    old_N: Tensor | None = None,
) -> tuple[list[Step], dict[str, float]]:  # fmt: skip
    """Every optimizer step of one `Learner.update`, and its metrics.

    Args:
        old_N: log-probs that take the place of those before the first step (which are computed if `optim.epochs` > 1).
    """
    optimizer = build_optimizer(policy, config.optim)
    ranks = ListeningRank()
    learner = LearnerWithOld(policy, reference, optimizer, config, old_N=old_N, ranks=ranks)
    gradients: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(gradient_of(policy.model)))
    update = learner.update(trees, [sibling_credit(tree, config.credit.scale) for tree in trees])
    return [Step(*step) for step in zip(ranks.losses, gradients, strict=True)], update.metrics


@pytest.fixture
def config(recipe: Any) -> Callable[..., Config]:
    """Makes our recipe; the weights stay where they are unless `optim` says otherwise."""

    def make(loss: dict[str, Any], scale: str = "std", **sections: Any) -> Config:
        return recipe(
            **{
                "sampling": {"max_new_tokens": 24, "temperature": TEMPERATURE},  # not LONGEST: reduction_length counts
                "credit": {"scale": scale},
                "loss": {"beta": 0.0, **PLAIN, **loss},
                # a second epoch makes `update` use old log-probs; at this rate it finds the same weights
                "optim": {"lr": 1e-30, "epochs": 2, "max_grad_norm": "none"},
                "learner": {"tokens_per_pack": 60},  # several packs
                **sections,
            }
        )

    return make


class OffPolicy(NamedTuple):
    """One batch whose old log-probs are not those of the policy, as both sides need it."""

    trainer: Any
    inputs: dict[str, Tensor]
    old_N: Tensor
    ratio_N: Tensor
    advantage_N: Tensor
    reference: Reference


@pytest.fixture
def off_policy(policy: Policy, trainer: Callable[..., Any]) -> Callable[..., OffPolicy]:
    """Makes the batch and moves both policies, equally, away from the reference."""

    def make(trees: Sequence[Tree], **settings: Any) -> OffPolicy:
        reference = Reference.of(policy)
        theirs = trainer(trees, **settings)
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in theirs.model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        policy.model.load_state_dict(theirs.model.state_dict())
        inputs = scored(theirs)
        mask_BT = inputs["completion_mask"].bool()
        with torch.no_grad():
            logprobs_BT, _, _ = theirs._get_per_token_logps_and_entropies(
                theirs.model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                mask_BT.shape[1],
            )
        # ratios exp(0.6 z): about a third below 0.8, a third above 1.2, a fifth above 1.7
        old_BT = logprobs_BT - 0.6 * torch.randn(mask_BT.shape, generator=noise)
        inputs["old_per_token_logps"] = old_BT
        advantage_N = inputs["advantages"][:, None].expand(mask_BT.shape)[mask_BT]
        # both sides go through the rollouts in order, token by token
        return OffPolicy(theirs, inputs, old_BT[mask_BT], (logprobs_BT - old_BT).exp()[mask_BT], advantage_N, reference)

    return make


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize(("scale_rewards", "scale"), [("group", "std"), ("none", "none")])
def test_advantages(trainer: Callable[..., Any], scale_rewards: str, scale: Any) -> None:
    trees = [*MIXED, UNANIMOUS, NEARLY_UNANIMOUS]
    theirs = scored(trainer(trees, scale_rewards=scale_rewards))["advantages"].tolist()
    spans = [span for tree in trees for span in sibling_credit(tree, scale).spans]
    assert [span.advantage for span in spans] == pytest.approx(theirs, rel=1e-6, abs=1e-7)
    # the second group by hand: rewards 1 0 0 0, mean 1/4, standard deviation sqrt((9/16 + 3/16) / 3) = 1/2
    assert theirs[4] == pytest.approx(0.75 / 0.5001 if scale == "std" else 0.75)
    assert theirs[8:12] == [0.0] * 4


# ---------------------------------------------------------------- one optimizer step


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", REDUCTIONS)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"epsilon": 0.2}, {}),
        ({"epsilon": 0.1, "epsilon_high": 0.28}, {"clip_low": 0.1, "clip_high": 0.28}),
        ({"epsilon": 0.2, "epsilon_high": 0.3, "delta": 1.7}, {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.7}),
    ],
    ids=["clip", "clip-higher", "two-sided"],
)
def test_loss_and_gradient(
    policy: Policy, config: Any, off_policy: Any, loss_type: str, beta: float, theirs: Any, ours: Any
) -> None:
    batch = off_policy(MIXED, loss_type=loss_type, beta=beta, **theirs)
    expected = their_step(batch.trainer, batch.inputs)
    settings = config({"beta": beta, **REDUCTIONS[loss_type], **ours})
    steps, metrics = our_steps(policy, settings, MIXED, batch.reference if beta else None, batch.old_N)
    assert steps[0].loss == pytest.approx(expected.loss, rel=ROUNDING)
    assert distance(steps[0].gradient, expected.gradient) < ROUNDING
    # the batch asks something of every branch of the formula
    loss, up, down = settings.loss, batch.advantage_N > 0, batch.advantage_N < 0
    assert (down & (batch.ratio_N < 1 - loss.clip_low)).sum() >= 3
    assert (up & (batch.ratio_N > 1 + loss.clip_high)).sum() >= 3
    assert (down & (batch.ratio_N > (loss.dual_clip or 1 + loss.clip_high))).sum() >= 3
    # what is logged has the same meaning
    seen = {name: values[-1] for name, values in batch.trainer._metrics["train"].items()}
    assert metrics["main/entropy"] == pytest.approx(seen["entropy"], rel=ROUNDING)
    if beta:
        assert metrics["main/kl"] == pytest.approx(seen["kl"], rel=1e-4) and seen["kl"] > 0.01
    if loss.dual_clip is None:  # TRL does not count what `delta` cuts off
        assert metrics["main/clip_fraction"] == pytest.approx(seen["clip_ratio/region_mean"], rel=ROUNDING)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", REDUCTIONS)
@pytest.mark.parametrize("delta", [None, 1.06])
def test_ratios_of_whole_sequences(
    policy: Policy, config: Any, off_policy: Any, loss_type: str, beta: float, delta: float | None
) -> None:
    batch = off_policy(MIXED, loss_type=loss_type, beta=beta, epsilon=0.1, epsilon_high=0.05, delta=delta, **WHOLE)
    expected = their_step(batch.trainer, batch.inputs)
    clip = {"sequence_clip_low": 0.1, "sequence_clip_high": 0.05, "dual_clip": delta or "none"}
    settings = config({"beta": beta, **REDUCTIONS[loss_type], "ratio": "sequence", **clip})
    steps, metrics = our_steps(policy, settings, MIXED, batch.reference if beta else None, batch.old_N)
    assert steps[0].loss == pytest.approx(expected.loss, rel=ROUNDING)
    assert distance(steps[0].gradient, expected.gradient) < ROUNDING
    # of the eight rollouts, some are clipped from either side, and some of either sign are not
    lengths = [len(node.tokens) for tree in MIXED for node in tree.nodes]
    ratio = torch.stack([part.log().mean().exp() for part in batch.ratio_N.split(lengths)])
    up = torch.stack([part[0] > 0 for part in batch.advantage_N.split(lengths)])
    cut = torch.where(up, ratio > 1.05, ratio < 0.9)
    assert cut[up].any() and cut[~up].any() and not cut[up].all() and not cut[~up].all()
    if delta:
        assert (ratio[~up] > delta).any()
    else:  # ours counts the tokens of the sequences, TRL the sequences
        tokens = float(cut.long() @ torch.tensor(lengths)) / sum(lengths)
        assert metrics["main/clip_fraction"] == pytest.approx(tokens)
        seen = {name: values[-1] for name, values in batch.trainer._metrics["train"].items()}
        assert seen["clip_ratio/region_mean"] == pytest.approx(float(cut.float().mean()))
    # the control: with a ratio for each token, both sides compute something else
    alone = config({"beta": beta, **REDUCTIONS[loss_type], "clip_low": 0.1, "clip_high": 0.05, "dual_clip": delta or "none"})
    steps, _ = our_steps(policy, alone, MIXED, batch.reference if beta else None, batch.old_N)
    assert distance(steps[0].gradient, expected.gradient) > 0.01


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo(policy: Policy, config: Any, off_policy: Any, level: str, beta: float) -> None:
    """TRL's `epsilon_high` bounds the ratio itself, and there is no lower bound."""
    high = 1.4 if level == "token" else 1.05
    batch = off_policy(MIXED, loss_type="cispo", beta=beta, epsilon_high=high, importance_sampling_level=level)
    expected = their_step(batch.trainer, batch.inputs)
    loss = {"beta": beta, "policy": "cispo", "ratio": level, "cispo_high": high, "clip_low": 0.2, "clip_high": 0.2}
    steps, metrics = our_steps(policy, config(loss), MIXED, batch.reference if beta else None, batch.old_N)
    assert steps[0].loss == pytest.approx(expected.loss, rel=ROUNDING)
    assert distance(steps[0].gradient, expected.gradient) < ROUNDING
    # some ratios of either sign of the advantage are above the bound
    lengths = [len(node.tokens) for tree in MIXED for node in tree.nodes] if level == "sequence" else [1] * len(batch.ratio_N)
    ratio_N = torch.cat([part.log().mean().exp().expand(len(part)) for part in batch.ratio_N.split(lengths)])
    up, down = (ratio_N > high) & (batch.advantage_N > 0), (ratio_N > high) & (batch.advantage_N < 0)
    assert up.sum() >= 3 and down.sum() >= 3
    # TRL counts those with a positive advantage; ours counts all whose weight was bounded
    assert metrics["main/clip_fraction"] == pytest.approx(float((up | down).float().mean()))
    if level == "token":
        assert batch.trainer._metrics["train"]["cispo_clip_ratio"][-1] == pytest.approx(float(up.float().mean()))
    # the control: the surrogate is something else
    other, _ = our_steps(policy, config({"beta": beta, "ratio": level}), MIXED, batch.reference if beta else None, batch.old_N)
    assert distance(other[0].gradient, expected.gradient) > 0.01


@pytest.mark.parametrize("loss_type", REDUCTIONS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights(policy: Policy, config: Any, off_policy: Any, loss_type: str, mode: str) -> None:
    """TRL multiplies by `importance_sampling_ratio`, bounded here as its "token_truncate" and "token_mask" bound it.

    The sampler of the trees has -1 for every token. Masked tokens stay in TRL's denominators too.
    """
    batch = off_policy(MIXED, loss_type=loss_type)
    weight_BT = (batch.inputs["old_per_token_logps"] + 1).exp()
    weight_N = weight_BT[batch.inputs["completion_mask"].bool()]
    low, high = float(weight_N.quantile(0.2)), float(weight_N.quantile(0.8))
    outside_BT = (weight_BT < low) | (weight_BT > high)
    bounded_BT = weight_BT.masked_fill(outside_BT, 0.0) if mode == "mask" else weight_BT.clamp(max=high)
    batch.inputs["importance_sampling_ratio"] = bounded_BT
    batch.trainer.use_vllm = True  # which is what makes TRL look at it; nothing is sampled any more
    expected = their_step(batch.trainer, batch.inputs)
    bounds = {"importance_low": low, "importance_high": high} if mode == "mask" else {"importance_cap": high}
    loss = {**REDUCTIONS[loss_type], "importance": "on", "importance_mode": mode, **bounds}
    steps, metrics = our_steps(policy, config(loss), MIXED, old_N=batch.old_N)
    assert steps[0].loss == pytest.approx(expected.loss, rel=ROUNDING)
    assert distance(steps[0].gradient, expected.gradient) < ROUNDING
    assert metrics.get("mismatch/masked", 0.4) == pytest.approx(0.4, abs=0.05)
    # the control: without weights
    plain, _ = our_steps(policy, config(REDUCTIONS[loss_type]), MIXED, old_N=batch.old_N)
    assert distance(plain[0].gradient, expected.gradient) > 0.01


@pytest.mark.parametrize("loss_type", REDUCTIONS)
def test_a_unanimous_group_counts_in_the_denominators_unless_it_is_dropped(
    policy: Policy, config: Any, off_policy: Any, loss_type: str
) -> None:
    trees = [*MIXED, UNANIMOUS]
    batch = off_policy(trees, loss_type=loss_type, beta=0.3, scale_rewards="none")
    expected = their_step(batch.trainer, batch.inputs)
    kept = config({"beta": 0.3, **REDUCTIONS[loss_type]}, scale="none")
    steps, _ = our_steps(policy, kept, trees, batch.reference, batch.old_N)
    assert steps[0].loss == pytest.approx(expected.loss, rel=ROUNDING)
    assert distance(steps[0].gradient, expected.gradient) < ROUNDING
    # dropping it is TRL's loss on the other groups alone: its tokens leave the KL and the denominators
    dropped = config({"beta": 0.3, **REDUCTIONS[loss_type], "drop_zero_advantage": True}, scale="none")
    few = {key: rows[: 2 * G] for key, rows in batch.inputs.items() if rows.dim()}
    few["num_items_in_batch"] = few["completion_mask"].sum()
    alone = their_step(batch.trainer, few)
    terms = int(few["num_items_in_batch"])
    steps, metrics = our_steps(policy, dropped, trees, batch.reference, batch.old_N[:terms])
    assert metrics["loss/dropped_zero_advantage"] == G and metrics["main/terms"] == 2 * terms  # of two epochs
    assert steps[0].loss == pytest.approx(alone.loss, rel=ROUNDING)
    assert distance(steps[0].gradient, alone.gradient) < ROUNDING
    assert distance(steps[0].gradient, expected.gradient) > 0.01


# ---------------------------------------------------------------- several optimizer steps


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", REDUCTIONS)
def test_three_steps_of_training(policy: Policy, config: Any, trainer: Any, loss_type: str, level: str) -> None:
    """`GRPOTrainer.train` beside `Learner.update`, each with its own old log-probs, gradient clipping and AdamW.

    TRL goes through the batch in two micro-batches of four rollouts, we in packs of at most 60 tokens.
    """
    adam = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.1}
    theirs = trainer(
        MIXED, adam, learning_rate=adam["lr"], max_grad_norm=0.05, max_steps=3, num_iterations=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
        loss_type=loss_type, beta=0.3, epsilon=0.1, epsilon_high=0.2, delta=1.5, importance_sampling_level=level,
    )  # fmt: skip
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []
    compute_loss = theirs.compute_loss

    def listening(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = compute_loss(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    theirs.compute_loss = listening
    theirs.optimizer.register_step_pre_hook(lambda *_: gradients.append(gradient_of(theirs.model)))
    theirs.train()

    clip = "sequence_clip" if level == "sequence" else "clip"
    settings = config(
        {"beta": 0.3, **REDUCTIONS[loss_type], "ratio": level, f"{clip}_low": 0.1, f"{clip}_high": 0.2, "dual_clip": 1.5},
        optim={**adam, "max_grad_norm": 0.05, "epochs": 3},
    )
    ours, metrics = our_steps(policy, settings, MIXED, Reference.of(policy))
    assert len(ours) == len(gradients) == 3 and len(losses) == 6
    for i, (our, gradient) in enumerate(zip(ours, gradients, strict=True)):
        allowed = DRIFT if i else ROUNDING
        # grpo's loss is 0 at the first step, where advantages cancel: compare it with the size of its terms, 1
        assert our.loss == pytest.approx(losses[2 * i] + losses[2 * i + 1], rel=allowed, abs=1e-6)
        assert distance(our.gradient, gradient) < allowed
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        assert norm == pytest.approx(0.05, rel=1e-4)  # every gradient was clipped
    assert metrics["main/clip_fraction"] > 0.2 and metrics["main/kl"] > 0.01
    assert distance(policy.model.state_dict(), theirs.model.state_dict()) < DRIFT


# ---------------------------------------------------------------- where we part, and a control


def test_trls_default_kl_has_another_gradient(policy: Policy, config: Any, off_policy: Any) -> None:
    """`use_bias_correction_kl` (DeepSeek-V3.2) multiplies k3 by the ratio, which is differentiable; we have plain k3.

    On-policy the ratio is 1, so the loss is the same and only the gradient tells.
    """
    batch = off_policy(MIXED, loss_type="dapo", beta=0.3, use_bias_correction_kl=True)
    del batch.inputs["old_per_token_logps"]
    settings = config({"beta": 0.3, **REDUCTIONS["dapo"]}, optim={"lr": 1e-30, "max_grad_norm": "none"})
    (ours,), _ = our_steps(policy, settings, MIXED, batch.reference)
    corrected = their_step(batch.trainer, batch.inputs)
    assert ours.loss == pytest.approx(corrected.loss, rel=ROUNDING)
    assert distance(ours.gradient, corrected.gradient) > 0.01
    batch.trainer.args.use_bias_correction_kl = False
    assert distance(ours.gradient, their_step(batch.trainer, batch.inputs).gradient) < ROUNDING


def test_delta_is_our_dual_clip_only_above_the_clip_range(policy: Policy, config: Any, off_policy: Any) -> None:
    """Below 1 + epsilon_high, TRL's delta caps the ratio of positive advantages; ours bounds the negative ones."""
    batch = off_policy(MIXED, loss_type="dapo", epsilon_high=0.5)
    clip = {**REDUCTIONS["dapo"], "clip_high": 0.5}
    for delta, same in ((1.6, True), (1.2, False)):
        batch.trainer.args.delta = delta
        expected = their_step(batch.trainer, batch.inputs)
        steps, _ = our_steps(policy, config({**clip, "dual_clip": delta}), MIXED, old_N=batch.old_N)
        apart = distance(steps[0].gradient, expected.gradient)
        assert apart < ROUNDING if same else apart > 0.01


def test_a_wrong_reduction_is_noticed(policy: Policy, config: Any, off_policy: Any) -> None:
    """Negative control: a loss_type and a reduction that do not belong together are far apart."""
    batch = off_policy(MIXED, loss_type="grpo")
    for loss_type in REDUCTIONS:
        batch.trainer.loss_type = loss_type
        expected = their_step(batch.trainer, batch.inputs)
        for other, reduction in REDUCTIONS.items():
            steps, _ = our_steps(policy, config(reduction), MIXED, old_N=batch.old_N)
            apart = distance(steps[0].gradient, expected.gradient)
            if other == loss_type:
                assert apart < ROUNDING
            else:
                assert apart > 0.01
                assert steps[0].loss != pytest.approx(expected.loss, rel=0.01)
