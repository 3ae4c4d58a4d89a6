"""The update: trees with credit → new weights.

    select rows ─► lay out terms ─► pack ─► [old log-probs] ─► for each pack: log-probs, loss, backward ─► clip, step

Not here, although in the textbook algorithm: a value network, an entropy bonus, and (with one optimizer step per batch, the
default) a pass for old log-probs, which would only find a ratio of exactly 1. The loss is in `train/objective.py`.
Shapes: N terms of an optimizer step, n those of a pack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepgrpo.config import Config
from deepgrpo.credit.whiten import whiten
from deepgrpo.errors import DivergenceError
from deepgrpo.ledger import Ledger
from deepgrpo.loss.streams import select
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.pack.budget import Pack
from deepgrpo.pack.layout import Layout, Terms, lay_out
from deepgrpo.pack.packs import pack_layout
from deepgrpo.progress import Advance, phase
from deepgrpo.records import Credit, Tree
from deepgrpo.train.belief import sequence_logprobs
from deepgrpo.train.moments import load_moments, moments_of, read_moments, save_moments
from deepgrpo.train.objective import build_objective
from deepgrpo.train.optim import learning_rate, set_learning_rate
from deepgrpo.train.ranks import Ranks, SingleRank, clip
from deepgrpo.train.update_metrics import Observed, count_sequences


@dataclass(frozen=True, slots=True)
class Update:
    """Outcome of an update."""

    metrics: dict[str, float]
    ledger: Ledger
    optimizer_steps: int


class Learner:
    """Updates a policy.

    Args:
        reference: frozen start model; None if `loss.beta` is 0.
        exact_sampler: the engine's log-probs equal the learner's up to rounding.
        ranks: processes that compute the update together; all of them make the same calls.

    Raises ConfigError if a user's loss cannot be used.
    """

    def __init__(
        self, policy: Policy, reference: Reference | None, optimizer: torch.optim.Optimizer, config: Config, *,
        exact_sampler: bool = True, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.reference, self.optimizer, self.config = policy, reference, optimizer, config
        self.updates, self.optimizer_steps, self.ranks = 0, 0, ranks or SingleRank()
        self.objective = build_objective(config, exact_sampler=exact_sampler)

    def adopt(self) -> None:
        """See `train.backend.UpdatesPolicy`. The policy is this learner's own, so there is nothing to do."""

    def freeze_reference(self) -> None:
        """See `train.backend.UpdatesPolicy`."""
        if self.config.loss.beta > 0:
            self.reference = Reference.of(self.policy)

    def likelihood(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> tuple[np.ndarray, int]:
        """See `train.backend.UpdatesPolicy`."""
        return sequence_logprobs(self.policy, trees, credits, self.config.learner.tokens_per_pack, self.ranks)

    def save(self, directory: Path) -> None:
        """See `train.backend.UpdatesPolicy`."""
        save_moments(moments_of(self.policy, self.optimizer), directory)

    def load(self, directory: Path, updates: int, optimizer_steps: int) -> None:
        """See `train.backend.UpdatesPolicy`."""
        load_moments(self.policy, self.optimizer, read_moments(self.policy, directory))
        self.count(updates, optimizer_steps)

    def count(self, updates: int, optimizer_steps: int) -> None:
        """Continue after this many updates and optimizer steps."""
        self.updates = updates
        self.policy.version = self.optimizer_steps = optimizer_steps

    def update(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> Update:
        """Take `minibatches · epochs` optimizer steps on a batch of trees.

        Raises DivergenceError if a loss or a gradient is not finite; that optimizer step is then not taken.
        """
        optim, loss = self.config.optim, self.config.loss
        selection = select(
            credits, drop_zero_advantage=loss.drop_zero_advantage, min_branch_sequences=loss.min_branch_sequences
        )
        # after the selection: whitening would give a unanimous group an advantage again
        chosen = whiten(trees, selection.credits) if self.config.credit.whiten else selection.credits
        batches: list[tuple[list[Tree], Layout, list[Pack]]] = []
        for part in np.array_split(np.arange(len(trees)), optim.minibatches):
            own = [trees[i] for i in part]
            layout = lay_out(own, [chosen[i] for i in part])
            self._require_finite(own, layout)
            batches.append((own, layout, self._pack(own, layout)))
        # with a single step the policy is its own old policy; the ratio is 1 and one pass is saved
        several = optim.minibatches * optim.epochs > 1
        with phase("old log-probs"):
            olds = [self.old_logprobs(layout.terms, packs) if several else None for _, layout, packs in batches]
        seen: list[Observed] = []
        norms: list[float] = []
        before = self.optimizer_steps
        lr, per_update = 0.0, optim.minibatches * optim.epochs
        with phase("learning", optim.epochs * sum(len(packs) for *_, packs in batches)) as advance:
            for epoch in range(optim.epochs):
                for number, ((own, layout, packs), old) in enumerate(zip(batches, olds, strict=True)):
                    if not packs:
                        continue  # no row of these prompts carries a signal
                    place = self.updates * per_update + epoch * optim.minibatches + number
                    lr = learning_rate(optim, place, self.config.run.steps * per_update)
                    observed, norm = self._optimizer_step(own, layout, packs, old, lr, advance)
                    seen.append(observed)
                    norms.append(norm)
        passes = optim.epochs + several + (optim.epochs if self.reference else 0)
        tokens = sum(pack.num_tokens for *_, packs in batches for pack in packs)
        metrics = self.objective.metrics(seen, reference=self.reference is not None) | {
            "grad_norm": float(np.mean(norms)) if norms else math.nan,
            "lr": lr,
            "loss/dropped_zero_advantage": float(selection.dropped_zero),
            "loss/dropped_few_branches": float(selection.dropped_few),
            "main/sequences": float(count_sequences(selection.credits, "main")),
            "branch/sequences": float(count_sequences(selection.credits, "branch")),
        }
        self.updates += 1
        steps = self.optimizer_steps - before
        ledger = Ledger(
            learner_tokens=tokens * passes,
            learner_tokens_unique=sum(layout.unique_tokens for _, layout, _ in batches) * passes,
            trained_tokens=sum(len(layout.terms) for _, layout, _ in batches),
            optimizer_steps=steps,
        )
        return Update(metrics, ledger, steps)

    def _pack(self, trees: Sequence[Tree], layout: Layout) -> list[Pack]:
        verdict = self.policy.verdict
        return pack_layout(
            trees, layout, self.config.learner.tokens_per_pack, tree_packs=verdict.packs, window=verdict.window
        )

    def _require_finite(self, trees: Sequence[Tree], layout: Layout) -> None:
        """Raise DivergenceError if an advantage is beyond float32."""
        finite_N = np.isfinite(layout.terms.advantage_N)
        if not finite_N.all():
            row = next(row for row in layout.rows if not finite_N[row.terms].all())
            tree = trees[row.tree]
            raise DivergenceError(
                f"an advantage of step {self.updates + 1} (prompt {tree.prompt.id!r}) is not a finite number: its rewards "
                f"reach {max(abs(node.reward) for node in tree.nodes):.3g}, and the loss is computed in float32, which ends at "
                "3.4e38; divide the rewards by a constant"
            )

    def _optimizer_step(
        self, trees: Sequence[Tree], layout: Layout, packs: Sequence[Pack], old_N: Tensor | None, lr: float,
        advance: Advance,
    ) -> tuple[Observed, float]:  # fmt: skip
        """Accumulate the gradient over the packs, clip it, and move the weights."""
        terms = layout.terms
        self.policy.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        observed, weights = self.objective.observed(terms), self.objective.weights(terms)
        total = torch.zeros((), device=self.policy.device)
        for pack, counts in self.ranks.share(packs):
            # the figures of a pack that does not count are thrown away
            figures = observed if counts else self.objective.observed(terms)
            loss = self.objective.of_pack(self.policy, self.reference, terms, weights, pack, old_N, figures)
            if not counts:
                loss = 0.0 * loss
            self.ranks.backward(loss)
            total += loss.detach()
            advance()
        # test the sum, so that all processes decide alike
        total = self.ranks.add(total)
        if not torch.isfinite(total):
            own = f"your loss ({self.config.loss.policy}), " if self.config.loss.user_function else ""
            raise DivergenceError(
                f"the loss of step {self.updates + 1} (optimizer step {self.optimizer_steps}) is {total.item()}, "
                f"so the step was not taken{_culprit(trees, layout, observed)}. "
                f"Look at {own}optim.lr (too high?), learner.dtype and the data of the step. Checkpoints so far are whole: "
                "continue from the newest with --resume and a lower --optim.lr"
            )
        parameters = list(self.policy.trainable().values())
        self.ranks.sum_gradients(parameters)
        norm = clip(parameters, self.config.optim.max_grad_norm)
        if not math.isfinite(norm):
            raise DivergenceError(
                f"the gradient norm of step {self.updates + 1} (optimizer step {self.optimizer_steps}) is {norm}, "
                "so the step was not taken. "
                "Lower optim.lr, or set learner.dtype = \"float32\"; continue from the newest checkpoint with --resume"
            )
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer_steps += 1
        self.policy.version = self.optimizer_steps
        observed.gather(self.ranks)
        return observed, norm

    @torch.no_grad()
    def old_logprobs(self, terms: Terms, packs: Sequence[Pack]) -> Tensor:
        """`[N]` log-probs of the policy before the first of several optimizer steps, on the CPU."""
        self.policy.model.train()  # the mode of the update, so that both passes compute the same
        old_N = torch.zeros(len(terms))
        for pack, counts in self.ranks.share(packs):
            logprob_n = self.objective.logprobs(self.policy, terms, pack, self.policy.device)[0].float().cpu()
            if counts:  # each process needs the old log-probs of its own packs only
                old_N[torch.from_numpy(pack.terms_n)] = logprob_n
        return old_N


def _culprit(trees: Sequence[Tree], layout: Layout, observed: Observed) -> str:
    """The first prompt with a loss or a KL that is not finite, as a clause; empty if this process has none."""
    finite_N = torch.isfinite(observed.columns["loss"]) & torch.isfinite(observed.columns["kl"])
    row = next((row for row in layout.rows if not finite_N[torch.from_numpy(row.terms)].all()), None)
    return "" if row is None else f"; the first such loss is of a response to prompt {trees[row.tree].prompt.id!r}"
