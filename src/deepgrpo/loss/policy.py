"""Registry of policy losses, and the importance weight around them. Shapes: N terms.

To add a loss to the package:

1. a function `(LossInputs, LossSettings) -> LossOutput` (inputs.py) in a file of its own, like cispo.py: one loss per term,
   without importance weight, lambda and reduction
2. here: import it, and add a line to `LOSSES`
3. config/learning.py: its name in `POLICY_LOSSES`, in the order of `LOSSES`; its keys, if it has any, in `LossConfig` and in
   `LossSettings` (inputs.py); a case in `_has_no_idle_key` that refuses the other losses' keys
4. docs/algorithms/switches.md, and train/remedies.py, if it is to advise on its keys
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
