"""AdamW's moments by parameter name, in memory and on disk.

    optimizer.safetensors   whole, written by one process: `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`
    optimizer/              shards, written by several: torch.distributed.checkpoint, the same names

Any number of processes can read either form. No file is unpickled freely: shard_table.py reads the pickled table of contents of
the second form by a list of what it may hold, and torch reads the shards with `weights_only`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepgrpo.errors import first_line
from deepgrpo.model.policy import Policy

Moments = dict[str, Tensor]
WHOLE, SHARDED = "optimizer.safetensors", "optimizer"
_RANDOM_STATE = "torch_random_state"


def moments_of(policy: Policy, optimizer: torch.optim.Optimizer) -> Moments:
    """Moments by `KEY/PARAMETER`; empty before the first optimizer step."""
    return {
        f"{key}/{name}": value.detach()
        for name, parameter in policy.trainable().items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(policy: Policy, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Load moments into the optimizer; whole ones are sharded like their parameters."""
    for name, parameter in policy.trainable().items():
        own = {key.split("/", 1)[0]: value for key, value in moments.items() if key.split("/", 1)[-1] == name}
        if own:
            # the fused AdamW keeps its step count on the parameter's device, as a number that is never sharded
            optimizer.state[parameter] = {
                k: v.to(parameter.device) if k == "step" else as_part(v, parameter) for k, v in own.items()
            }


def save_moments(moments: Moments, directory: Path) -> None:
    """Write whole moments and torch's random state."""
    tensors = {key: value.contiguous() for key, value in moments.items()}
    save_file({_RANDOM_STATE: torch.get_rng_state(), **tensors}, directory / WHOLE)


def save_shards(moments: Moments, directory: Path) -> None:
    """Write this process's shards; all processes call it, on a shared directory."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(moments, checkpoint_id=directory / SHARDED)


def read_moments(policy: Policy, directory: Path) -> Moments:
    """Read the moments of a checkpoint, in either form: whole tensors, or shards where the policy is sharded.

    Restores torch's random state, if the checkpoint has one. Raises OSError, SafetensorError, or ValueError for shards that do
    not fit or hold anything but tensors.
    """
    if (directory / WHOLE).is_file():
        tensors: Moments = load_file(directory / WHOLE)
        torch.set_rng_state(tensors.pop(_RANDOM_STATE))
        return tensors
    if not (directory / SHARDED).is_dir():
        raise FileNotFoundError(f"{directory} has neither {WHOLE} nor {SHARDED}/")
    # imported here: this takes longer than all of this package, and only shards need it
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from deepgrpo.train.shard_table import TableReader

    reader = TableReader(directory / SHARDED)
    names = policy.trainable()
    moments: Moments = {}
    for key, size in reader.tensors().items():
        kind, _, name = key.partition("/")
        if kind != "step" and name not in names:
            raise ValueError(f"{SHARDED}/ has moments of {name!r}, which the model does not train")
        moments[key] = torch.zeros(()) if kind == "step" else torch.zeros_like(names[name].detach())
        if tuple(moments[key].shape) != size:
            raise ValueError(f"{SHARDED}/ has {key!r} with shape {size}; the model has {tuple(moments[key].shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended: a single process
        try:
            load(moments, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # of torch: the errors of all processes
            raise ValueError(f"{SHARDED}/ cannot be read: {first_line(next(iter(error.failures.values()))[0])}") from error
        except (RuntimeError, AssertionError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{SHARDED}/ cannot be read: {first_line(error)}") from error
    return moments


def as_part(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor on the parameter's device, sharded like it."""
    if hasattr(value, "device_mesh") or not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    # no source rank: each process cuts its own copy, and nothing is sent
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
