"""The gradient of every prompt of a batch, by stream, through the learner's own path: select, whiten, pack, loss, backward.

    credits ─► select ─► whiten ─► for each prompt and stream: lay out ─► pack ─► loss ─► backward ─► projected

A step's loss divides sums over its prompts by counts over its prompts (loss/streams.py), so sums and counts of each prompt are
kept apart. Put together again they are the gradient of `Learner.update` (tests/unit/test_probe.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from deepgrpo.config import Config
from deepgrpo.credit.whiten import whiten
from deepgrpo.errors import TrainingError
from deepgrpo.lab.probe.sketch import Sketch, Whole, collected
from deepgrpo.loss.streams import select
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.pack.layout import Layout, Terms, lay_out
from deepgrpo.pack.packs import pack_layout
from deepgrpo.progress import phase
from deepgrpo.records import Credit, Tree
from deepgrpo.train.objective import Objective
from deepgrpo.train.update_metrics import count_sequences

STREAMS: tuple[Literal["main", "branch"], ...] = ("main", "branch")


@dataclass(frozen=True)
class PromptGradient:
    """One prompt's part of a step."""

    numerator_SK: np.ndarray
    """float32; projected sum over its terms, main and branch stream."""
    denominator_S: np.ndarray
    """Its terms, or its sequences, as the reduction counts."""
    tokens: int
    """Tokens forwarded for it, also where another strategy has already paid."""


@dataclass
class GradientMeter:
    """Measures gradients of prompts with fixed weights.

    Args:
        policy: with `start` as the reference of the KL term.
    """

    policy: Policy
    start: Reference | None
    projection: Sketch | Whole
    tokens: int = 0
    """Tokens forwarded so far."""
    _known: dict[bytes, tuple[np.ndarray, int]] = field(default_factory=dict)
    """Gradients that several strategies share, such as those of the same rollouts from the prompt."""

    def measure(
        self, trees: Sequence[Tree], credits: Sequence[Credit], config: Config, objective: Objective, share: float = 1.0
    ) -> list[PromptGradient]:
        """Gradients of the prompts of one batch.

        Args:
            share: size of the batch as a part of a training step; counts of branches that the loss asks for are of a step.

        Raises TrainingError if a loss is not finite.
        """
        few = math.ceil(config.loss.min_branch_sequences * share)
        selection = select(credits, drop_zero_advantage=config.loss.drop_zero_advantage, min_branch_sequences=few)
        chosen = whiten(trees, selection.credits) if config.credit.whiten else selection.credits
        if full := config.loss.full_branch_sequences:
            # lambda depends on the whole step
            part = min(1.0, count_sequences(chosen, "branch") / (share * full))
            scaled = config.loss.model_copy(update={"lambda_": config.loss.lambda_ * part, "full_branch_sequences": 0})
            objective = replace(objective, config=scaled)
        found = []
        with phase("gradients", len(trees)) as advance:
            for tree, credit in zip(trees, chosen, strict=True):
                found.append(self._of_prompt(tree, credit, config, objective))
                advance()
        return found

    def clear(self) -> None:
        """Drop the gradients of earlier prompts."""
        self._known.clear()

    def _of_prompt(self, tree: Tree, credit: Credit, config: Config, objective: Objective) -> PromptGradient:
        numerators, denominators, tokens = [], [], 0
        for stream in STREAMS:
            own = replace(credit, spans=tuple(span for span in credit.spans if span.stream == stream))
            layout = lay_out([tree], [own])
            count = _denominator(layout.terms, config.loss.reduction)
            denominators.append(count)
            numerator, forwarded = self._sum_of_terms(tree, layout, count, config, objective)
            numerators.append(numerator)
            tokens += forwarded
        return PromptGradient(np.stack(numerators).astype(np.float32), np.array(denominators, dtype=np.float64), tokens)

    def _sum_of_terms(
        self, tree: Tree, layout: Layout, count: int, config: Config, objective: Objective
    ) -> tuple[np.ndarray, int]:
        """`[K]` projected gradient of the loss of one prompt and stream, times its denominator; and the tokens forwarded."""
        weights = objective.weights(layout.terms)
        if not weights.policy_N.any() and not weights.kl_N.any():
            return self.projection.empty(self.policy), 0
        key = _key(layout, weights.policy_N, weights.kl_N, objective)
        if key not in self._known:
            verdict, policy = self.policy.verdict, self.policy
            packs = pack_layout(
                [tree], layout, config.learner.tokens_per_pack, tree_packs=verdict.packs, window=verdict.window
            )
            policy.model.train()
            start = self.start if config.loss.beta > 0 else None
            with collected(policy, self.projection) as total:
                for pack in packs:
                    observed = objective.observed(layout.terms)
                    loss = objective.of_pack(policy, start, layout.terms, weights, pack, None, observed)
                    if not math.isfinite(loss.item()):
                        raise TrainingError(
                            f"the loss of a response to prompt {tree.prompt.id!r} is {loss.item()}, so no gradient can be "
                            "measured; look at its reward, at loss.policy and at learner.dtype, or probe an earlier checkpoint"
                        )
                    (count * loss).backward()
            if not np.isfinite(total).all():
                raise TrainingError(
                    f"the gradient of a response to prompt {tree.prompt.id!r} is not finite; set learner.dtype = \"float32\", "
                    "or probe an earlier checkpoint"
                )
            forwarded = sum(pack.num_tokens for pack in packs)
            self.tokens += forwarded
            self._known[key] = (total, forwarded)
        return self._known[key]


def _denominator(terms: Terms, reduction: Literal["token", "sequence", "constant"]) -> int:
    """Count of terms, or of sequences, that `loss/streams.py` divides by."""
    return len(terms) if reduction == "token" else len(np.unique(terms.sequence_N))


def _key(layout: Layout, *parts: Any) -> bytes:
    """Digest of all that a gradient depends on besides the policy."""
    terms, digest = layout.terms, hashlib.blake2b(digest_size=16)
    objective: Objective = parts[-1]
    arrays = [terms.target_N, terms.advantage_N, terms.stream_N, terms.sequence_N, terms.sampler_logprob_N, *parts[:-1]]
    for row in layout.rows:
        arrays += [row.input_ids, row.positions, row.terms]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"|")
    # lambda, beta and the reduction are in the weights
    rest = objective.config.model_copy(update={"lambda_": 0.0, "reduction": "token", "reduction_length": None})
    digest.update(f"{rest!r} {objective.temperature} {objective.weigh}".encode())
    return digest.digest()
