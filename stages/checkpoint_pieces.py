"""Where DCP's pieces of tensors lie: a safetensors file a rank, and a JSON file that says what is where.

DCP's own storage pickles its metadata, and whoever loads a pickle runs what it says. Here nothing is
pickled: `tensors.json` is

    {name: {"dtype": "F32", "shape": [..], "pieces": [[file, offset, shape], ..]}}

and a piece is the tensor `name@o1,o2,..` (its offset) of that file, which any safetensors reader opens.
Only tensors are kept. Pieces are written one after the other: no copy of all of them is made.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from storage import durable
from storage.checked import parse

INDEX = "tensors.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names of types."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def file_of(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def _key(name: str, offset: Sequence[int]) -> str:
    return f"{name}@{','.join(map(str, offset))}"


class PieceWriter(StorageWriter):
    """Writes a checkpoint's pieces into a folder that is there.

    Args:
        folder: seen by all ranks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=file_of(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's pieces: their header, then one after the other.

        Raises:
            TypeError: something is no tensor.
        """
        header: dict[str, Any] = {}
        results, end = [], 0
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is no tensor")
            dtype, chunk = item.tensor_data.properties.dtype, item.tensor_data.chunk
            size = math.prod(chunk.sizes) * dtype.itemsize
            header[_key(item.index.fqn, chunk.offsets)] = {
                "dtype": _NAMES[dtype], "shape": list(chunk.sizes), "data_offsets": [end, end + size],
            }  # fmt: skip
            results.append(WriteResult(item.index, size, plan.storage_data))
            end += size
        if plan.items:
            with open(self._folder / plan.storage_data, "xb") as file:
                text = json.dumps(header, separators=(",", ":")).encode()
                text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
                file.write(struct.pack("<Q", len(text)) + text)
                for item in plan.items:
                    piece = planner.resolve_data(item)
                    assert isinstance(piece, torch.Tensor)
                    flat = piece.detach().cpu().contiguous().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes what is where; the coordinator's task."""
        files = {
            _key(one.index.fqn, one.index.offset or ()): one.storage_data
            for each in results
            for one in each
        }
        index: dict[str, Any] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            index[name] = {
                "dtype": _NAMES[tensor.properties.dtype], "shape": list(tensor.size),
                "pieces": [
                    [files[_key(name, c.offsets)], list(c.offsets), list(c.sizes)]
                    for c in tensor.chunks
                ],
            }  # fmt: skip
        durable.write_bytes(self._folder / INDEX, json.dumps(index).encode())


class PieceReader(StorageReader):
    """Reads what `PieceWriter` has written.

    Args:
        folder: of the checkpoint.
        files: that it may open: those that the checkpoint's facts vouch for.

    Raises (on construction):
        ValueError: `tensors.json` is not what it should be, or names another file.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, files: Collection[str]) -> None:
        self._folder, self._files = folder, dict[MetadataIndex, str]()
        self._tensors: dict[str, TensorStorageMetadata] = {}
        try:
            for name, stated in parse((folder / INDEX).read_bytes()).items():
                self._tensors[name] = self._stated(name, stated, files)
        except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{INDEX} is not a list of tensors: {error!r}") from error

    def _stated(self, name: str, stated: Any, files: Collection[str]) -> TensorStorageMetadata:
        shape, chunks = torch.Size(stated["shape"]), []
        for file, offset, sizes in stated["pieces"]:
            inside = len(offset) == len(sizes) == len(shape) and all(
                0 <= o and 0 <= s and o + s <= n
                for o, s, n in zip(offset, sizes, shape, strict=True)
            )
            if not inside or file not in files:
                raise ValueError(f"{INDEX}: a piece of {name} lies where there is none")
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)))
            self._files[MetadataIndex(name, offset)] = file
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"{INDEX}: the pieces of {name} are not the whole of it")
        return TensorStorageMetadata(TensorProperties(_DTYPES[stated["dtype"]]), shape, chunks)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a reader is for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self) -> Metadata:
        return Metadata(dict(self._tensors), storage_data=self._files)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the pieces that a rank wants into its tensors, file by file.

        Raises:
            ValueError: a piece has another type or shape than is stated.
        """
        from safetensors import safe_open

        wanted: dict[str, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(self._files[item.storage_index], []).append(item)
        for name, items in wanted.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    piece = file.get_tensor(_key(item.storage_index.fqn, item.storage_index.offset))
                    for dim, (begin, length) in enumerate(
                        zip(item.storage_offsets, item.lengths, strict=True)
                    ):
                        piece = piece.narrow(dim, begin, length)
                    if piece.shape != target.shape or piece.dtype != target.dtype:
                        raise ValueError(f"{item.storage_index.fqn} is another tensor")
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
        read: Future[None] = Future()
        read.set_result(None)
        return read
