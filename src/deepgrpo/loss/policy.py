"""Registry of policy losses, and the importance weight around them. Shapes: N terms.

A new loss is a function in its own file, a line in `LOSSES`, and its name in `POLICY_LOSSES` (config/learning.py).
"""

from __future__ import annotations

from dataclasses import replace

from deepgrpo.loss.cispo import cispo
from deepgrpo.loss.inputs import LossInputs, LossOutput, LossSettings, PolicyLoss, assert_shapes
from deepgrpo.loss.ratio import importance_weight
from deepgrpo.loss.surrogate import ppo

LOSSES: dict[str, PolicyLoss] = {"ppo": ppo, "cispo": cispo}
"""Values of `loss.policy`; a user's own function is loaded by `train/user_loss.py`."""

WEIGHT = "weight"
"""Name of the importance weight among the figures."""


def policy_loss(
    inputs: LossInputs, config: LossSettings, *, function: PolicyLoss | None = None, weigh: bool = False
) -> LossOutput:
    """Loss of each term, multiplied by the importance weight learner / sampler where that is on.

    Args:
        function: a user's loss; None: the one that `config.policy` names.
        weigh: apply importance weights; they are then among the figures as "weight".
    """
    assert_shapes(inputs)
    output = (function or LOSSES[config.policy])(inputs, config)
    if not weigh:
        return output
    weight_N = importance_weight(
        inputs.old_logprob_N, inputs.sampler_logprob_N, *config.importance_range, mode=config.importance_mode,
        sequence_N=inputs.sequence_N if config.ratio == "sequence" else None,
    )  # fmt: skip
    return replace(output, loss_N=output.loss_N * weight_N, figures={**output.figures, WEIGHT: weight_N})
