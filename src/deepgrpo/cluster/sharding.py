"""Data-parallel and sharded learning by torch.distributed, without Ray.

ddp   every learner has the whole model. Gradients are summed in buckets once per optimizer step; a learner without a pack
      adds zeros.
fsdp  every learner has a shard of each parameter (FSDP2, `fully_shard` on each decoder layer and on the rest). Layers are
      gathered in every forward and backward pass, so all learners make the same number of passes: one with fewer packs
      forwards two tokens instead, with a loss of zero.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.model.materialize import Materializer, tensor_of
from deepgrpo.model.policy import Policy
from deepgrpo.pack.budget import Pack

BUCKET_SIZE = 2**25
"""Elements of one all-reduce."""

IDLE_PACK = Pack(np.zeros((1, 2), dtype=np.int64), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), 2)
"""Two tokens and the first term of the step, forwarded with a loss of zero."""


def assign_packs(packs: Sequence[Pack], size: int) -> list[list[Pack]]:
    """Assign packs to `size` learners: the largest first, each to the learner with the fewest tokens so far.

    Example: packs of 5, 9 and 6 tokens on two learners become [9] and [6, 5].
    """
    shares: list[list[Pack]] = [[] for _ in range(size)]
    load = [0] * size
    for pack in sorted(packs, key=lambda pack: -pack.num_tokens):  # stable: equal packs keep their order
        least = load.index(min(load))
        shares[least].append(pack)
        load[least] += pack.num_tokens
    return shares


def _device() -> torch.device:
    """Device on which the default process group communicates."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


class DistributedRanks:
    """One rank of the default process group (`train.ranks.Ranks`).

    Args:
        sharded: true if the parameters are sharded (fsdp).
    """

    def __init__(self, *, sharded: bool) -> None:
        self.sharded, self.rank, self.size = sharded, dist.get_rank(), dist.get_world_size()
        self.device = _device()

    def share(self, packs: Sequence[Pack]) -> Sequence[tuple[Pack, bool]]:
        shares = assign_packs(packs, self.size)
        own = [(pack, True) for pack in shares[self.rank]]
        missing = max(map(len, shares)) - len(own) if self.sharded else 0
        return own + [(IDLE_PACK, False)] * missing

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.sharded:
            return  # each backward pass has summed its own
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET_SIZE:
                _all_reduce(bucket)
                bucket = []
        _all_reduce(bucket)

    def add(self, values: Tensor) -> Tensor:
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.to(values.device)


def _all_reduce(gradients: Sequence[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


# ---------------------------------------------------------------- shards


class _Whole(nn.Module):
    """The policy's log-probs as the forward pass of a module, around which FSDP gathers parameters outside the layers."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self.compute = policy.logprobs

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self.compute(*arguments, **options)


def shard(policy: Policy, filling: Materializer | None = None) -> Policy:
    """Shard the parameters of a policy over all learners, in place; returns the policy that computes log-probs with them.

    Args:
        policy: with weights, or without them and then with `filling`.
        filling: supplies the weights, layer by layer before each is sharded, and the rest at the end.

    Raises ModelError if the model's decoder layers cannot be found, ConfigError if torch is too old.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(
            f'cluster.sharding is "fsdp", but torch {torch.__version__} cannot add up sharded gradients without dividing '
            'them; install torch 2.9 or later, or set cluster.sharding = "ddp"'
        )
    # torch's own choice is CUDA wherever it was built for it, and moves the parameters there
    mesh = init_device_mesh(_device().type, (dist.get_world_size(),))
    whole = _Whole(copy.copy(policy))
    parts: list[nn.Module] = [*decoder_layers(policy), whole]
    for part in parts:
        if filling is not None:
            filling.fill(part)
        fully_shard(part, mesh=mesh)
    for part in parts:
        assert isinstance(part, FSDPModule)
        # a sum, not a mean: the loss weights include their denominators; and gloo has no mean
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    sharded = copy.copy(policy)
    sharded.logprobs = whole  # type: ignore[method-assign]
    return sharded


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """Return the decoder layers (`Policy.layers`). Raises ModelError if none were found."""
    if policy.layers is None:
        wanted = policy.causal.config.get_text_config().num_hidden_layers
        raise ModelError(
            f'cluster.sharding is "fsdp", but no list of {wanted} decoder layers was found in '
            f'{type(policy.causal).__name__}; set cluster.sharding = "ddp"'
        )
    return list(policy.layers)


@torch.no_grad()
def gather_weights(policy: Policy, *, keep: bool) -> dict[str, np.ndarray] | None:
    """Gather the trained parameters by name, as whole float32 arrays. All learners call it; without `keep` it returns None."""
    found: dict[str, np.ndarray] = {}
    for name, parameter in policy.trainable().items():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        if keep:
            found[name] = value.detach().cpu().numpy()
    return found if keep else None


@torch.no_grad()
def load_weights(policy: Policy, weights: dict[str, np.ndarray]) -> None:
    """Copy whole weights into a policy, sharded or not."""
    from deepgrpo.train.moments import as_part

    for name, parameter in policy.trainable().items():
        parameter.copy_(as_part(tensor_of(weights[name]), parameter))
