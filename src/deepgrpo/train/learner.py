"""The update: trees with credit go in, new weights come out.

    select rows ─► lay out terms ─► pack ─► [old log-probs] ─► for each pack: log-probs, loss, backward ─► clip, step

What the textbook algorithm has and this one leaves out: a value network, an entropy bonus, and (with one optimizer step
per batch, the default) the pass for old log-probs, which would only find a ratio of exactly 1. Shapes: N terms of an
optimizer step, n those of one pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepgrpo.config import Config
from deepgrpo.credit.whiten import whiten
from deepgrpo.errors import TrainingError
from deepgrpo.loss.kl import k3
from deepgrpo.loss.ratio import importance_weight, log_ratio
from deepgrpo.loss.streams import BRANCH, MAIN, select, term_weights
from deepgrpo.loss.surrogate import surrogate
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.pack.budget import Pack, pack_rows
from deepgrpo.pack.layout import Layout, Terms, lay_out
from deepgrpo.pack.tree import pack_trees
from deepgrpo.records import Credit, Ledger, Tree
from deepgrpo.train.moments import load_moments, moments_of, read_moments, save_moments
from deepgrpo.train.optim import learning_rate, set_learning_rate
from deepgrpo.train.ranks import Ranks, SingleRank


@dataclass(frozen=True, slots=True)
class Update:
    """What an update has to say."""

    metrics: dict[str, float]
    ledger: Ledger
    optimizer_steps: int


@dataclass
class Observed:
    """Per-term figures of one optimizer step, filled pack by pack; float32 `[N]` on the CPU."""

    stream: np.ndarray
    loss: Tensor
    entropy: Tensor
    clipped: Tensor
    kl: Tensor
    weight: Tensor
    """Importance weights."""
    drift: Tensor
    """Learner's old log-prob minus the sampler's."""

    @classmethod
    def empty(cls, terms: Terms) -> Observed:
        return cls(terms.stream_N, *(torch.zeros(len(terms)) for _ in range(6)))

    def gather(self, ranks: Ranks) -> None:
        """Fill in what the other processes have seen: a term is in one pack only, and zero elsewhere."""
        names = ("loss", "entropy", "clipped", "kl", "weight", "drift")
        for name, column in zip(names, ranks.add(torch.stack([getattr(self, name) for name in names])), strict=True):
            setattr(self, name, column)


class Learner:
    """Policy, optimizer and what the update needs to know of the recipe.

    Args:
        reference: the frozen start model; None if `loss.beta` is 0.
        exact_sampler: whether the engine's log-probs are the learner's own up to rounding.
        optimizer_steps: steps taken so far.
        ranks: the processes that compute the update together; every one of them makes the same calls.
    """

    def __init__(
        self, policy: Policy, reference: Reference | None, optimizer: torch.optim.Optimizer, config: Config, *,
        exact_sampler: bool = True, optimizer_steps: int = 0, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.reference, self.optimizer, self.config = policy, reference, optimizer, config
        self.optimizer_steps, self.ranks = optimizer_steps, ranks or SingleRank()
        self.total_steps = config.run.steps * config.optim.minibatches * config.optim.epochs
        wanted = config.loss.importance
        self.weigh = wanted == "on" or (wanted == "auto" and not exact_sampler)

    def adopt(self) -> None:
        """See `train.backend.UpdatesPolicy`. The policy is this learner's own: there is nothing to take over."""

    def freeze_reference(self) -> None:
        """See `train.backend.UpdatesPolicy`."""
        if self.config.loss.beta > 0:
            self.reference = Reference.of(self.policy)

    def save(self, directory: Path) -> None:
        """See `train.backend.UpdatesPolicy`."""
        save_moments(moments_of(self.policy, self.optimizer), directory)

    def load(self, directory: Path, optimizer_steps: int) -> None:
        """See `train.backend.UpdatesPolicy`."""
        load_moments(self.policy, self.optimizer, read_moments(self.policy, directory))
        self.policy.version = self.optimizer_steps = optimizer_steps

    def update(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> Update:
        """Take `minibatches · epochs` optimizer steps on a batch of trees.

        Raises TrainingError if a loss or a gradient is not finite; that optimizer step is then not taken.
        """
        optim, loss = self.config.optim, self.config.loss
        selection = select(
            credits, drop_zero_advantage=loss.drop_zero_advantage, min_branch_sequences=loss.min_branch_sequences
        )
        # after the selection: whitening would give a unanimous group an advantage again
        chosen = whiten(selection.credits) if self.config.credit.whiten else selection.credits
        batches: list[tuple[Layout, list[Pack]]] = []
        for part in np.array_split(np.arange(len(trees)), optim.minibatches):
            layout = lay_out([trees[i] for i in part], [chosen[i] for i in part])
            batches.append((layout, self._pack([trees[i] for i in part], layout)))
        # with a single step the policy is its own old policy; the ratio is 1 and one pass is saved
        several = optim.minibatches * optim.epochs > 1
        olds = [self._old_logprobs(layout.terms, packs) if several else None for layout, packs in batches]
        seen: list[Observed] = []
        norms: list[float] = []
        before = self.optimizer_steps
        lr = 0.0
        for _ in range(optim.epochs):
            for (layout, packs), old in zip(batches, olds, strict=True):
                if not packs:
                    continue  # no row of these prompts carries a signal
                lr = learning_rate(optim, self.optimizer_steps, self.total_steps)
                observed, norm = self._optimizer_step(layout.terms, packs, old, lr)
                seen.append(observed)
                norms.append(norm)
        passes = optim.epochs + several + (optim.epochs if self.reference else 0)
        tokens = sum(pack.num_tokens for _, packs in batches for pack in packs)
        metrics = _summarise(seen, importance=self.weigh, reference=self.reference is not None) | {
            "grad_norm": float(np.mean(norms)) if norms else math.nan,
            "lr": lr,
            "loss/dropped_zero_advantage": float(selection.dropped_zero),
            "loss/dropped_few_branches": float(selection.dropped_few),
            "main/sequences": float(_count(selection.credits, "main")),
            "branch/sequences": float(_count(selection.credits, "branch")),
        }
        steps = self.optimizer_steps - before
        ledger = Ledger(
            learner_tokens=tokens * passes,
            learner_tokens_unique=sum(layout.unique_tokens for layout, _ in batches) * passes,
            trained_tokens=sum(len(layout.terms) for layout, _ in batches),
            optimizer_steps=steps,
        )
        return Update(metrics, ledger, steps)

    def _pack(self, trees: Sequence[Tree], layout: Layout) -> list[Pack]:
        """Tree packs if the model has proved that it can be packed and no path is longer than its window."""
        budget, verdict = self.config.learner.tokens_per_pack, self.policy.verdict
        longest = max((len(row.input_ids) for row in layout.rows), default=0)
        if verdict.packs and (verdict.window is None or longest <= verdict.window):
            packs = pack_trees(trees, layout, budget)
        else:
            packs = pack_rows(layout.rows, budget)
        # a prefix may be forwarded in several packs, the terms of a node never are: its sequence ratio depends on it
        sequence_N = layout.terms.sequence_N
        parts = sum(len(np.unique(sequence_N[pack.terms_n])) for pack in packs)
        assert parts == len(np.unique(sequence_N)), "the terms of a node are in more than one pack"
        return packs

    def _optimizer_step(
        self, terms: Terms, packs: Sequence[Pack], old_N: Tensor | None, lr: float
    ) -> tuple[Observed, float]:
        """Accumulate the gradient over the packs, clip it, and move the weights."""
        self.policy.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        observed = Observed.empty(terms)
        losses = self._loss_function(terms, observed)
        total = torch.zeros((), device=self.policy.device)
        for pack, counts in self.ranks.share(packs):
            if counts:
                loss = losses(pack, old_N)
            else:  # what it sees is not noted
                loss = 0.0 * self._loss_function(terms, Observed.empty(terms))(pack, old_N)
            self.ranks.backward(loss)
            total += loss.detach()
        # asked of the sum, so that all processes come to the same answer
        total = self.ranks.add(total)
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss of optimizer step {self.optimizer_steps} is {total.item()}, so it was not taken. "
                "Look at optim.lr (too high?), learner.dtype and the data of the step. Checkpoints so far are whole: "
                "continue from the newest with --resume and a lower --optim.lr"
            )
        parameters = list(self.policy.trainable().values())
        self.ranks.sum_gradients(parameters)
        norm = self.ranks.clip(parameters, self.config.optim.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient norm of optimizer step {self.optimizer_steps} is {norm}, so it was not taken. "
                "Lower optim.lr, or set learner.dtype = \"float32\"; continue from the newest checkpoint with --resume"
            )
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer_steps += 1
        self.policy.version = self.optimizer_steps
        observed.gather(self.ranks)
        return observed, norm

    def _loss_function(self, terms: Terms, observed: Observed) -> Callable[[Pack, Tensor | None], Tensor]:
        """The loss of a pack as a function; the sum over packs is the loss of the optimizer step."""
        config, device = self.config.loss, self.policy.device
        clip_low, clip_high = config.clip_range
        weights = term_weights(
            terms.stream_N, terms.sequence_N, lambda_=config.lambda_, beta=config.beta, reduction=config.reduction,
            reduction_length=config.reduction_length or self.config.sampling.max_new_tokens,
            streams=config.streams, lambda_scales_kl=config.lambda_scales_kl,
        )  # fmt: skip

        def loss_of(pack: Pack, old_N: Tensor | None) -> Tensor:
            here = torch.from_numpy(pack.terms_n)
            logprob_n, entropy_n = self._logprobs(self.policy, terms, pack, with_entropy=True)
            old_n = logprob_n.detach() if old_N is None else old_N[here].to(device)
            advantage_n = _tensor(terms.advantage_N[pack.terms_n], device)
            # no sequence is in two packs, so its ratio can be computed here
            sequence_n = _tensor(terms.sequence_N[pack.terms_n], device) if config.ratio == "sequence" else None
            loss_n, clipped_n = surrogate(
                log_ratio(logprob_n, old_n, sequence_n), advantage_n,
                clip_low=clip_low, clip_high=clip_high, dual_clip=config.dual_clip,
            )  # fmt: skip
            sampler_n = _tensor(terms.sampler_logprob_N[pack.terms_n], device)
            weight_n = importance_weight(old_n, sampler_n, config.importance_cap, sequence_n)
            if self.weigh:
                loss_n = loss_n * weight_n
            total = (_tensor(weights.policy_N[pack.terms_n], device) * loss_n).sum()
            if self.reference is not None:
                with torch.no_grad(), self.reference.active() as start:
                    reference_n, _ = self._logprobs(start, terms, pack)
                kl_n = k3(logprob_n, reference_n)
                total = total + (_tensor(weights.kl_N[pack.terms_n], device) * kl_n).sum()
                observed.kl[here] = kl_n.detach().float().cpu()
            observed.loss[here] = loss_n.detach().float().cpu()
            observed.entropy[here] = entropy_n.float().cpu()
            observed.clipped[here] = clipped_n.float().cpu()
            observed.weight[here] = weight_n.float().cpu()
            observed.drift[here] = (old_n - sampler_n).float().cpu()
            return total

        return loss_of

    @torch.no_grad()
    def _old_logprobs(self, terms: Terms, packs: Sequence[Pack]) -> Tensor:
        """`[N]` log-probs of the policy before the first of several optimizer steps."""
        self.policy.model.train()  # the mode of the update, so that both passes compute the same
        old_N = torch.zeros(len(terms))
        for pack, counts in self.ranks.share(packs):
            logprob_n = self._logprobs(self.policy, terms, pack)[0].float().cpu()
            if counts:  # the old log-probs of the others' packs are not needed here
                old_N[torch.from_numpy(pack.terms_n)] = logprob_n
        return old_N

    def _logprobs(
        self, policy: Policy, terms: Terms, pack: Pack, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        device = self.policy.device
        return policy.logprobs(
            torch.from_numpy(pack.input_ids_BT).to(device),
            torch.from_numpy(pack.rows_n).to(device),
            torch.from_numpy(terms.target_N[pack.terms_n]).to(device),
            temperature=self.config.sampling.temperature,
            with_entropy=with_entropy,
            positions_BT=None if pack.positions_BT is None else torch.from_numpy(pack.positions_BT).to(device),
            segments=[(s.start, s.end, s.until, s.parent) for s in pack.segments],
        )


def _summarise(seen: Sequence[Observed], *, importance: bool, reference: bool) -> dict[str, float]:
    """Means over the terms of each stream, over all optimizer steps of the update."""
    metrics: dict[str, float] = {}
    if not seen:
        return metrics
    stream = np.concatenate([o.stream for o in seen])

    def column(name: str) -> np.ndarray:
        values: np.ndarray = torch.cat([getattr(o, name) for o in seen]).numpy()
        return values

    for label, code in (("main", MAIN), ("branch", BRANCH)):
        here = stream == code
        metrics[f"{label}/terms"] = float(here.sum())
        if here.any():
            metrics |= {
                f"{label}/loss": float(column("loss")[here].mean()),
                f"{label}/entropy": float(column("entropy")[here].mean()),
                f"{label}/clip_fraction": float(column("clipped")[here].mean()),
            }
            if reference:  # unmeasured must not look like no drift
                metrics[f"{label}/kl"] = float(column("kl")[here].mean())
    drift = column("drift").astype(np.float64)
    metrics |= {
        # E_μ[log μ - log π] estimated by k3, which is never negative
        "mismatch/kl": float((np.expm1(drift) - drift).mean()),
        "mismatch/max": float(np.abs(drift).max()),
        "mismatch/weight": float(column("weight").mean()) if importance else 1.0,
    }
    return metrics


def _count(credits: Sequence[Credit], stream: str) -> int:
    return len({(i, s.node) for i, credit in enumerate(credits) for s in credit.spans if s.stream == stream})


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
