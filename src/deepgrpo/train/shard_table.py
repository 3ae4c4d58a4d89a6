"""Table of contents of sharded moments (`optimizer/.metadata`), read without running code.

torch writes the table as a pickle, and a pickle may name any function to be called when it is read. This reader resolves only
the names that a table of tensors consists of, and refuses entries that are no tensors, which torch would unpickle freely.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of tensors needs; it was not run")
        return super().find_class(module, name)


class TableReader(FileSystemReader):
    """torch's reader of a sharded checkpoint, with this reader of its table."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table. Raises OSError, or ValueError if it is damaged or holds anything but tensors in this directory."""
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                table = _Unpickler(file).load()
            entries, places = table.state_dict_metadata, table.storage_data
            whole = isinstance(table, Metadata) and all(isinstance(each, TensorStorageMetadata) for each in entries.values())
            inside = all(
                not each.transform_descriptors and PurePath(each.relative_path).name == each.relative_path
                for each in places.values()
            )
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises whatever it likes
            raise ValueError(f"the table {path.name} of the shards cannot be read: {error}") from error
        if not whole or not inside:
            raise ValueError(f"the table {path.name} of the shards holds more than tensors of this directory; it was not used")
        found: Metadata = table
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        return {key: tuple(each.size) for key, each in self.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
