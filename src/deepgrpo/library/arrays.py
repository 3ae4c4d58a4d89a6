"""Pure functions of DEEP-GRPO on arrays, for other trainers: lists and numpy arrays in, numpy out; torch in, torch out.

Shapes: N terms (trained tokens), B rows, T tokens of a row, n candidates of a rollout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deepgrpo.config import RecoverabilityConfig
from deepgrpo.credit.group import Scale, centre
from deepgrpo.explore.deep import log_q
from deepgrpo.explore.pivots import candidates, draw_without_replacement
from deepgrpo.explore.recoverability import Recoverability

Array = Any
"""A list of numbers, a numpy array or a torch tensor."""


def group_advantages(rewards: Array, *, scale: Scale = "none") -> Array:
    """Advantages of siblings: reward minus the mean of its group. `A_i = r_i - mean(r)`; Dr. GRPO, DEEP-GRPO's own choice.

    Args:
        rewards: `[..., G]`, the siblings of a group along the last axis, at least 2.
        scale: "std" also divides by the group's standard deviation (GRPO), "mean" by its mean (MaxRL).

    Returns:
        the same shape; zeros where the siblings agree.

    Example: [[0, 1, 0, 1], [1, 1, 1, 1]] give [[-.5, .5, -.5, .5], [0, 0, 0, 0]].
    """
    values, back = _numbers(rewards)
    if not values.ndim:
        raise ValueError("rewards is a single number; give the rewards of a group, [..., G]")
    groups = [centre(group.tolist(), scale) for group in values.reshape(-1, values.shape[-1])]
    return back(np.array(groups, dtype=np.float64).reshape(values.shape))


@dataclass(frozen=True, slots=True, eq=False)
class PivotDraw:
    """Pivots of a rollout. `offsets` and `ratios` are those drawn; `candidates` and `q` are all that could have been."""

    offsets: Array
    """`[p]` tokens of the rollout before each pivot, in the order of the draw."""
    ratios: Array
    """`[p]` depth ratios of the pivots."""
    candidates: Array
    """`[n]` offsets."""
    q: Array
    """`[n]` probabilities of the first draw."""


def select_pivots(
    ends: Array, *, num_pivots: int = 1, gamma: float = 2.0, recoverability: Recoverability | None = None,
    root_pivot: bool = True, max_ratio: float = 1.0, room: int | None = None, random: np.random.Generator | int = 0,
) -> PivotDraw:  # fmt: skip
    """Pivots of a failed rollout, drawn without replacement from `Q(r) ∝ P(success | r) · r^gamma`.

    The states of a rollout are the prompt and the ends of its segments; all but the last may become pivots. State i of m has
    the depth ratio r = (i + 1) / m.

    Args:
        ends: `[m - 1]` ascending ends of the segments, in tokens; the last one is the rollout's length.
        recoverability: P(success | r), see `fit_recoverability`; None: 1 at every depth.
        root_pivot: the prompt itself may be drawn.
        max_ratio: deepest pivot.
        room: longest response in tokens; a pivot leaves room for one token at least. None: the rollout's length.
        random: a generator, or a seed.

    Example: with ends [10, 20, 30, 40] the candidates are 0, 10, 20 and 30, and with gamma 2 and no estimate
    q = [1, 4, 9, 16] / 30.
    """
    values, back = _numbers(ends)
    ascending = [int(end) for end in values]
    if not ascending or ascending[0] < 1 or any(b <= a for a, b in itertools.pairwise(ascending)):
        raise ValueError(f"ends is {ascending}; give ascending ends of segments from 1 on, the last one the rollout's length")
    generator = random if isinstance(random, np.random.Generator) else np.random.default_rng(random)
    longest = ascending[-1] if room is None else room
    offsets, ratios = candidates(ascending, room=longest, root=root_pivot, deepest=max_ratio)
    if not offsets:
        empty = back(np.zeros(0))
        return PivotDraw(back(np.zeros(0, np.int64)), empty, back(np.zeros(0, np.int64)), empty)
    logs = log_q(ratios, recoverability or Recoverability(), gamma)
    drawn = draw_without_replacement(logs, num_pivots, generator)
    depth = np.array(ratios)
    return PivotDraw(
        back(np.array(offsets)[drawn]), back(depth[drawn]), back(np.array(offsets)), back(np.exp(logs)),
    )  # fmt: skip


def fit_recoverability(
    ratios: Array, outcomes: Array, *, model: Literal["logistic", "bins"] = "logistic", l2: float = 1.0, bins: int = 10,
    min_items: int = 10,
) -> Recoverability:  # fmt: skip
    """P(success | depth) from pivots that were tried.

    Args:
        ratios: `[N]` depth ratios.
        outcomes: `[N]` 1 if at least one continuation of the pivot succeeded, else 0.
        model: a logistic regression on r, or the share of successes by bins of r.
        l2: C of the regression: the inverse of the penalty on its slope.
        min_items: P is 1 at every depth until there are more items than this, and both outcomes.
    """
    depth, happened = _numbers(ratios)[0], _numbers(outcomes)[0]
    if depth.shape != happened.shape or depth.ndim != 1:
        raise ValueError(f"ratios has the shape {list(depth.shape)} and outcomes {list(happened.shape)}; give [N] and [N]")
    config = RecoverabilityConfig(model=model, window=max(1, len(depth)), min_items=min_items, l2=l2, bins=bins)
    return Recoverability().observe(depth.tolist(), [int(each) for each in happened], config)


def dual_stream_loss(
    logprobs: Array, advantages: Array, *, branch: Array, old_logprobs: Array | None = None, mask: Array | None = None,
    sequence: Array | None = None, reference_logprobs: Array | None = None, lambda_: float = 1.0, beta: float = 0.0,
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = 3.0,
    reduction: Literal["token", "sequence", "constant"] = "token", reduction_length: int | None = None,
) -> Array:  # fmt: skip
    """The loss of DEEP-GRPO: `mean_main ℓ + lambda · mean_branch ℓ + beta · (KL main + KL branch)`, ℓ the clipped surrogate.

    Rows of a padded batch, `[B, T]` with a mask, or terms, `[N]`. Only trained tokens count: the mask leaves out prompts,
    padding, and the prefix of each branch.

    Args:
        logprobs: `[B, T]` or `[N]`, of the current policy, differentiable in torch.
        advantages: of the same shape, or `[B]`, one per row.
        branch: True in the branch stream, False in the main stream; `[B]` or as `logprobs`.
        old_logprobs: of the policy that the batch began with; None: the current one, with a ratio of 1.
        mask: `[B, T]`, True at trained tokens; None: all.
        sequence: `[N]` labels of the sequences of terms; rows of a batch need none.
        reference_logprobs: of the start model, for beta > 0.
        dual_clip: bound for negative advantages; None: no bound.
        reduction: mean over tokens, over sequences of their means, or sums divided by `reduction_length`.

    Returns:
        a scalar: a tensor with gradient, or a float64 of numpy.

    Example: one main token with log-prob -1 and advantage 1, two branch tokens with advantage -0.5: -1 + lambda · 0.5.
    """
    import torch

    from deepgrpo.loss.kl import k3
    from deepgrpo.loss.streams import term_weights
    from deepgrpo.loss.surrogate import surrogate

    _, back = _numbers(logprobs, grad=True)
    current = _tensor(logprobs)
    if current.ndim not in (1, 2):
        raise ValueError(f"logprobs has the shape {list(current.shape)}; give rows [B, T] or terms [N]")
    keep = torch.ones(current.shape, dtype=torch.bool) if mask is None else _tensor(mask, "mask", current).cpu().bool()
    label = torch.arange(current.shape[0])[:, None] if current.ndim == 2 else torch.zeros(current.shape, dtype=torch.long)
    if sequence is None and current.ndim == 1 and reduction != "token":
        raise ValueError(f'reduction is "{reduction}" and logprobs are terms [N]; give sequence, the label of each term')
    label = label if sequence is None else _tensor(sequence, "sequence", current).cpu()

    def terms(values: Any, name: str) -> torch.Tensor:
        found: torch.Tensor = _rows(_tensor(values, name, current), name, current)[keep.to(current.device)]
        return found

    logprob_N = current[keep.to(current.device)]
    old_N = logprob_N.detach() if old_logprobs is None else terms(old_logprobs, "old_logprobs").detach()
    weights = term_weights(
        _rows(_tensor(branch, "branch", current).cpu(), "branch", current)[keep].long().numpy(),
        label.expand(current.shape)[keep].numpy(), lambda_=lambda_, beta=beta, reduction=reduction,
        reduction_length=reduction_length,
    )  # fmt: skip
    loss_N, _ = surrogate(
        logprob_N - old_N, terms(advantages, "advantages").to(logprob_N.dtype), clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip,
    )  # fmt: skip
    total = (torch.from_numpy(weights.policy_N).to(loss_N) * loss_N).sum()
    if beta > 0:
        if reference_logprobs is None:
            raise ValueError(f"beta is {beta}, but reference_logprobs is missing; give the start model's, or beta = 0")
        kl_N = k3(logprob_N, terms(reference_logprobs, "reference_logprobs").detach())
        total = total + (torch.from_numpy(weights.kl_N).to(kl_N) * kl_N).sum()
    return back(total)


def _rows(values: Any, name: str, like: Any) -> Any:
    """Numbers per row spread over its tokens."""
    if values.shape == like.shape:
        return values
    if values.shape == like.shape[:1]:
        return values[:, None].expand(like.shape)
    raise ValueError(f"{name} has the shape {list(values.shape)}; give {list(like.shape)} or {list(like.shape[:1])}")


def _tensor(values: Array, name: str = "logprobs", like: Any = None) -> Any:
    """A torch tensor of an array, on the device of another one."""
    import torch

    found = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.asarray(values))
    return found if like is None else found.to(like.device)


def _numbers(values: Array, *, grad: bool = False) -> tuple[np.ndarray, Callable[[Any], Array]]:
    """Values as a numpy array, and the way back to the kind that came in.

    Args:
        grad: the way back is for a torch scalar whose gradient is kept.
    """
    if type(values).__module__.partition(".")[0] != "torch":
        return np.asarray(values, dtype=np.float64), (lambda found: np.float64(found.item())) if grad else (lambda found: found)
    import torch

    if grad:
        return np.zeros(0), lambda found: found
    kind = values.dtype if values.is_floating_point() else torch.get_default_dtype()

    def back(found: np.ndarray) -> Any:
        made = torch.from_numpy(np.ascontiguousarray(found)).to(values.device)
        return made.to(kind) if made.is_floating_point() else made

    return values.detach().cpu().double().numpy(), back
