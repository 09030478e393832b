"""Sharded checkpoints: each process of `trainer.strategy=fsdp2` writes its part of every weight and of every moment.

last.ckpt/
    __0_0.distcp  __1_0.distcp   The parts, a file per process. `torch.distributed.checkpoint` writes them.
    .metadata                    Which file has which part.
    meta.pt                      The other contents of a checkpoint; size and CRC-32 of the files above.

Any number of processes can read them. A tensor's name is `weight/NAME`, or `INDEX/exp_avg` for a moment of the
parameter with this index in the optimizer.
"""

import pickle
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from minigpt_pl.files import file_crc32

PARTS, WEIGHT = ".metadata", "weight"
# All classes and functions that `.metadata` needs.
_SAFE = {
    *(("torch", name) for name in ("Size", "float32", "float64", "bfloat16")),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),  # Python 3.13
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
            *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.2 writes it for a member of an enum
            return _enum_member
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"{PARTS} contains {module}.{name}")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"{PARTS} contains builtins.getattr of {kind!r}")
    return kind[name]


class ShardReader(FileSystemReader):
    """Unlike its base class, it never runs code from a file that somebody has manipulated."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / PARTS).open("rb") as file:
            metadata: Metadata = _SafeUnpickler(file).load()
        if not all(isinstance(kind, TensorStorageMetadata) for kind in metadata.state_dict_metadata.values()):
            raise pickle.UnpicklingError(f"{PARTS} contains more than tensors")
        return metadata


def split(contents: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split the contents of a checkpoint into the contents without tensors, and the tensors by name."""
    tensors = {f"{WEIGHT}/{name}": weight for name, weight in contents["state_dict"].items()}
    optimizers = []
    for optimizer in contents["optimizer_states"]:  # one; none in checkpoints of `convert`
        others: dict[int, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            tensors |= {f"{index}/{name}": value for name, value in state.items() if value.dim()}
            others[index] = {name: value for name, value in state.items() if not value.dim()}  # the number of steps
        optimizers.append(optimizer | {"state": others})
    return {**contents, "state_dict": {}, "optimizer_states": optimizers}, tensors


def join(contents: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `split`. Changes and returns `contents`."""
    for key, tensor in tensors.items():
        index, name = key.split("/")
        state = contents["state_dict"] if index == WEIGHT else contents["optimizer_states"][0]["state"][int(index)]
        state[name] = tensor
    return contents


def write_parts(tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[int, int]]:
    """Write the parts of all processes and flush them to the disk. All processes must call it.

    Returns:
        Size and CRC-32 of each file.

    Raises:
        OSError: one of the processes cannot write. All processes raise it.
    """
    try:
        save(tensors, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, OSError | RuntimeError) for cause in causes):
            raise
        # PyTorch hides an OSError of `file.write` behind a RuntimeError.
        known = [cause for cause in causes if isinstance(cause, OSError)]
        raise known[0] if known else OSError(None, f"write failed: {causes[0]}") from error
    rank = dist.get_rank()
    own: dict[str, tuple[int, int]] | OSError
    try:
        files = [*folder.glob(f"__{rank}_*"), *([folder / PARTS] if rank == 0 else [])]
        own = {path.name: (path.stat().st_size, file_crc32(path)) for path in files}
    except OSError as error:
        own = error
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    checksums: dict[str, tuple[int, int]] = {}
    for found in of_all:
        if isinstance(found, OSError):
            raise found
        checksums |= found
    return checksums


def read_whole(folder: Path, with_moments: bool) -> dict[str, Tensor]:
    """Join the parts in one process.

    Args:
        with_moments: also read the moments of the optimizer, which are two thirds of the bytes.
    """
    reader = ShardReader(folder)
    kinds: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in kinds.items()
        if with_moments or name.startswith(f"{WEIGHT}/")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
