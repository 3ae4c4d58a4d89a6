"""A user's own policy loss: `loss.policy = "mine.py:my_loss"`.

    def my_loss(inputs, config) -> LossOutput

`loss/inputs.py` documents both types; `config` is the section `[loss]`. The function is tried on a few made-up terms before
the run starts, and its output is checked again for every pack (docs/algorithms/switches.md, A loss of your own).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepgrpo.config import LossConfig
from deepgrpo.errors import ConfigError, TrainingError
from deepgrpo.foreign import unchanged_process
from deepgrpo.loading import load_object, show, where
from deepgrpo.loss.inputs import LossInputs, LossOutput, LossSettings, PolicyLoss
from deepgrpo.loss.policy import LOSSES, WEIGHT


@dataclass(frozen=True)
class ChosenLoss:
    """Policy loss of a recipe."""

    function: PolicyLoss
    figures: tuple[str, ...] = ()
    """Names of its figures."""


class _FaultError(Exception):
    """A sentence on what is wrong with a user's loss."""


_REMEDY = "although the inputs are finite; guard its divisions and logarithms"


def build_loss(config: LossConfig) -> ChosenLoss:
    """Policy loss of a recipe.

    Raises ConfigError: a user's function cannot be loaded or called, raises, or returns something that cannot be trained on.
    """
    if not config.user_function:
        return ChosenLoss(LOSSES[config.policy])
    function = load_object(config.policy, "loss.policy")
    try:
        _check_signature(function)
        names = [_try(function, config, inputs) for inputs in (_trial(6), _trial(1))]
        if names[0] != names[1]:
            raise _FaultError(f"names its figures {' and then '.join(str(list(each)) for each in names)}; name the same always")
    except _FaultError as fault:
        raise ConfigError(f"loss.policy is {config.policy!r}, but the function {fault}") from fault.__cause__
    figures = names[0]

    def checked(inputs: LossInputs, settings: LossSettings) -> LossOutput:
        try:
            return _call(function, inputs, settings, figures)
        except _FaultError as fault:
            raise TrainingError(f"loss.policy is {config.policy!r}, and the function {fault}") from fault.__cause__

    return ChosenLoss(checked, figures)


def _check_signature(function: PolicyLoss) -> None:
    try:
        signature = inspect.signature(function)
        signature.bind(None, None)
    except TypeError:
        raise _FaultError(f"takes {signature}; it is called with two arguments: write def my_loss(inputs, config)") from None
    except ValueError:
        pass  # a builtin without a signature: the call will tell


def _try(function: PolicyLoss, config: LossConfig, inputs: LossInputs) -> tuple[str, ...]:
    """Call a loss on made-up terms and take its gradient. Returns the names of its figures."""
    output = _call(function, inputs, config, None)
    number = f"of {len(inputs)} terms" if len(inputs) > 1 else "of a single term, as a pack may hold one,"
    if not output.loss_N.isfinite().all():
        raise _FaultError(f"gives the losses {_numbers(output.loss_N)} {number} {_REMEDY}")
    (gradient,) = torch.autograd.grad(output.loss_N.sum(), inputs.logprob_N, allow_unused=True)
    if gradient is None:
        raise _FaultError(
            "returned a loss_N that does not depend on inputs.logprob_N, so nothing is trained; compute it from that"
        )
    if not gradient.isfinite().all():
        raise _FaultError(f"has the gradient {_numbers(gradient)} {number} {_REMEDY}")
    return tuple(output.figures)


def _call(
    function: PolicyLoss, inputs: LossInputs, config: LossSettings, figures: tuple[str, ...] | None
) -> LossOutput:
    """Call a user's loss, and check type, shape, gradient and names of its output, not its values.

    Args:
        figures: expected names; None: any.
    """
    try:
        with unchanged_process():
            output = function(inputs, config)
    except (Exception, SystemExit) as error:
        raise _FaultError(f"raised {where(error)}; correct it") from error
    if not isinstance(output, LossOutput):
        raise _FaultError(f"returned {show(output)}; return deepgrpo.loss.inputs.LossOutput(loss_N)")
    shape = inputs.logprob_N.shape
    tensors: Mapping[str, object] = {"loss_N": output.loss_N, **{f"figures[{name!r}]": v for name, v in output.figures.items()}}
    if output.clipped_N is not None:
        tensors = {**tensors, "clipped_N": output.clipped_N}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise _FaultError(f"returned {name} = {show(tensor)}; give a torch tensor with one number per term")
        if tensor.shape != shape:
            raise _FaultError(
                f"returned {name} of the shape {list(tensor.shape)}, but there are {len(inputs)} terms; return one number per "
                "term: sums and means are taken outside, by loss.reduction"
            )
    if not output.loss_N.requires_grad:
        raise _FaultError("returned a loss_N without gradient; compute it from inputs.logprob_N, without detach() or no_grad()")
    if WEIGHT in output.figures:
        raise _FaultError(f'returned a figure named "{WEIGHT}", a name that is taken; rename it')
    if figures is not None and tuple(output.figures) != figures:
        raise _FaultError(f"returned the figures {list(output.figures)}, but {list(figures)} before; name the same always")
    return output


def _trial(count: int) -> LossInputs:
    """Up to six made-up terms: both streams, both signs of the advantage, and ratios within and beyond usual bounds."""
    logprob_N = torch.tensor([-0.5, -1.2, -2.0, -0.1, -3.0, -0.7])[:count]
    old_N = logprob_N - torch.tensor([0.0, 0.3, -0.4, 0.05, -0.9, 1.7])[:count]
    return LossInputs(
        logprob_N.clone().requires_grad_(), old_N, old_N - 0.01,
        torch.tensor([0.75, 0.75, 0.75, -0.25, -0.25, 0.5])[:count],
        torch.tensor([0, 0, 0, 1, 1, 2])[:count], torch.tensor([0, 0, 0, 0, 0, 1])[:count],
    )  # fmt: skip


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values.tolist()) + "]"
