"""Sharded moments from a stranger: nothing in them is run, and what does not fit is a sentence."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from deepgrpo.model.policy import Policy
from deepgrpo.train.moments import SHARDED, read_moments

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a single process saves


class Attack:
    """Unpickled freely, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def moments(policy: Policy, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Of every parameter, saved as one process of several does."""
    found = {f"exp_avg/{name}": torch.full_like(p.detach(), 0.5) for name, p in policy.trainable().items()}
    found |= {f"step/{name}": torch.tensor(3.0) for name in policy.trainable()}
    save(found, checkpoint_id=tmp_path / SHARDED, no_dist=True)
    return found


def test_whole_shards_come_back(policy: Policy, tmp_path: Path, moments: dict[str, torch.Tensor]) -> None:
    read = read_moments(policy, tmp_path)
    assert read.keys() == moments.keys() and all(torch.equal(read[name], moments[name]) for name in read)


def _change(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        table = pickle.loads((folder / ".metadata").read_bytes())
        (folder / ".metadata").write_bytes(pickle.dumps(change(table)))

    return damage


def _bytes_entry(table: Metadata) -> Metadata:
    """torch would unpickle the bytes of such an entry freely."""
    table.state_dict_metadata[next(iter(table.state_dict_metadata))] = BytesStorageMetadata()
    return table


def _outside(table: Metadata) -> Metadata:
    next(iter(table.storage_data.values())).relative_path = "../../elsewhere"
    return table


def _renamed(table: Metadata) -> Metadata:
    table.state_dict_metadata["exp_avg/nobody"] = table.state_dict_metadata.pop(next(iter(table.state_dict_metadata)))
    return table


def _other_shape(table: Metadata) -> Metadata:
    first = next(iter(table.state_dict_metadata.values()))
    first.size = torch.Size([2, 2])  # type: ignore[union-attr]
    return table


def _half(folder: Path) -> None:
    for shard in folder.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_change(lambda table: Attack(Path("run"))), r"it names posix.mkdir, which no table of tensors needs; it was not run"),
        (_change(lambda table: {"planner": eval}), r"it names builtins.eval"),
        (_change(lambda table: [1, 2]), "cannot be read"),
        (_change(_bytes_entry), "it names torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
        (_change(_outside), "holds more than tensors of this directory"),
        (_change(_renamed), "has moments of 'nobody', which the model does not train"),
        (_change(_other_shape), r"with shape \(2, 2\); the model has"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / ".metadata").write_bytes(os.urandom(300)), "cannot be read"),
        (_half, "optimizer/ cannot be read"),
    ],
)
def test_a_foreign_or_damaged_table(
    policy: Policy, tmp_path: Path, moments: Any, monkeypatch: pytest.MonkeyPatch, damage: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(tmp_path / SHARDED)
    with pytest.raises(ValueError, match=says):
        read_moments(policy, tmp_path)
    assert not (tmp_path / "run").exists()
