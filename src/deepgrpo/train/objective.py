"""The objective of an optimizer step, one pack at a time.

    log-probs ─► policy loss of each term (loss/policy.py) ─► + KL to the start model ─► weighted sum (loss/streams.py)

Shapes: N terms of the step, n those of the pack, B × T the pack's token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepgrpo.config import Config, LossConfig
from deepgrpo.loss.inputs import LossInputs
from deepgrpo.loss.kl import k3
from deepgrpo.loss.policy import WEIGHT, policy_loss
from deepgrpo.loss.streams import TermWeights, term_weights
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.pack.budget import Pack
from deepgrpo.pack.layout import Terms
from deepgrpo.train.update_metrics import Observed, figure_column, summarise
from deepgrpo.train.user_loss import ChosenLoss, build_loss


@dataclass(frozen=True)
class Objective:
    """Loss of a recipe as a function of log-probs.

    Args:
        longest: response length that the reduction "constant" divides by where the recipe names none.
        weigh: importance weights are on.
    """

    config: LossConfig
    loss: ChosenLoss
    temperature: float
    longest: int
    weigh: bool

    def weights(self, terms: Terms) -> TermWeights:
        """Final weight of each term of an optimizer step."""
        config = self.config
        return term_weights(
            terms.stream_N, terms.sequence_N, lambda_=config.lambda_, beta=config.beta, reduction=config.reduction,
            reduction_length=config.reduction_length or self.longest,
            streams=config.streams, lambda_scales_kl=config.lambda_scales_kl,
            full_branch_sequences=config.full_branch_sequences,
        )  # fmt: skip

    def observed(self, terms: Terms) -> Observed:
        """Empty figures of an optimizer step."""
        return Observed.empty(terms, self.loss.figures)

    def of_pack(
        self, policy: Policy, reference: Reference | None, terms: Terms, weights: TermWeights, pack: Pack,
        old_N: Tensor | None, observed: Observed,
    ) -> Tensor:  # fmt: skip
        """Loss of a pack; the sum over the packs of a step is the loss of the optimizer step.

        Args:
            old_N: log-probs before the first of several steps; None: the policy is its own old policy, and every ratio is 1.
            observed: receives the figures of the pack's terms.
        """
        device, chosen = policy.device, pack.terms_n
        here = torch.from_numpy(chosen)
        logprob_n, entropy_n = self.logprobs(policy, terms, pack, device, with_entropy=True)
        inputs = LossInputs(
            logprob_n, logprob_n.detach() if old_N is None else old_N[here].to(device),
            _tensor(terms.sampler_logprob_N[chosen], device), _tensor(terms.advantage_N[chosen], device),
            _tensor(terms.sequence_N[chosen], device), _tensor(terms.stream_N[chosen], device),
        )  # fmt: skip
        output = policy_loss(inputs, self.config, function=self.loss.function, weigh=self.weigh)
        total = (_tensor(weights.policy_N[chosen], device) * output.loss_N).sum()
        if reference is not None:
            with torch.no_grad(), reference.active() as start:
                reference_n, _ = self.logprobs(start, terms, pack, device)
            kl_n = k3(logprob_n, reference_n)
            total = total + (_tensor(weights.kl_N[chosen], device) * kl_n).sum()
            observed.note(here, kl=kl_n)
        observed.note(here, loss=output.loss_N, entropy=entropy_n, drift=inputs.old_logprob_N - inputs.sampler_logprob_N)
        if output.clipped_N is not None:
            observed.note(here, clipped=output.clipped_N)
        for name, values_n in output.figures.items():
            observed.note(here, **{name if name == WEIGHT else figure_column(name): values_n})
        return total

    def logprobs(
        self, policy: Policy, terms: Terms, pack: Pack, device: torch.device, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`[n]` log-probs and entropies at a pack's terms, under the sampling temperature."""
        return pack_logprobs(policy, terms, pack, device, temperature=self.temperature, with_entropy=with_entropy)

    def metrics(self, seen: Sequence[Observed], *, reference: bool) -> dict[str, float]:
        """Metrics of an update from the figures of its optimizer steps."""
        masks = self.weigh and self.config.importance_mode == "mask"
        return summarise(seen, reference=reference, importance=self.weigh, masks=masks)


def build_objective(config: Config, *, exact_sampler: bool) -> Objective:
    """Objective of a recipe.

    Args:
        exact_sampler: the engine's log-probs equal the learner's up to rounding.

    Raises ConfigError if a user's loss cannot be used.
    """
    wanted = config.loss.importance
    return Objective(
        config.loss, build_loss(config.loss), config.sampling.temperature, config.sampling.max_new_tokens,
        weigh=wanted == "on" or (wanted == "auto" and not exact_sampler),
    )  # fmt: skip


def pack_logprobs(
    policy: Policy, terms: Terms, pack: Pack, device: torch.device, *, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """`[n]` log-probs and entropies at a pack's terms."""
    return policy.logprobs(
        torch.from_numpy(pack.input_ids_BT).to(device),
        torch.from_numpy(pack.rows_n).to(device),
        torch.from_numpy(terms.target_N[pack.terms_n]).to(device),
        temperature=temperature,
        with_entropy=with_entropy,
        positions_BT=None if pack.positions_BT is None else torch.from_numpy(pack.positions_BT).to(device),
        segments=[(s.start, s.end, s.until, s.parent) for s in pack.segments],
    )


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
