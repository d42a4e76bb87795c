"""The tensors of a checkpoint: a folder in the format of `torch.distributed.checkpoint`, written by all processes.

The format's index, `.metadata`, is a pickle; here only the classes that an index of tensors is made of are unpickled.
`BytesStorageMetadata` is not among them: it announces an object, which PyTorch would unpickle without any limit.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO, IOBase
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

INDEX = ".metadata"

_INDEX_CLASSES = {
    (thing.__module__, thing.__qualname__): thing
    for thing in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
    )
}


def write(folder: Path, tensors: dict[str, Any], alone: bool) -> None:
    """Write nested dicts of tensors into a new folder, each process its own part; they are on the disk afterwards.

    Raises OSError in all processes if it fails in any.
    """
    with _plain_errors():
        checkpoint.save(tensors, storage_writer=_Writer(folder), no_dist=alone)


def read(folder: Path, tensors: dict[str, Any], alone: bool) -> None:
    """Read into nested dicts of tensors, in place; how many processes wrote them, and which part each, does not matter.

    Raises an Exception of any kind if the folder holds something else.
    """
    with open(folder / INDEX, "rb") as file:
        reader = _Reader(folder, _IndexUnpickler(file).load())
    with _plain_errors():
        checkpoint.load(tensors, storage_reader=reader, no_dist=alone)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What goes wrong inside is raised as it was where it went wrong; that one process is alone is no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES:
            return _INDEX_CLASSES[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")


class _File(FileIO):
    """A file that keeps what went wrong first: a full disk, or Ctrl-C."""

    failure: BaseException | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write as ever."""
        try:
            return super().write(data)
        except BaseException as error:
            self.failure = self.failure or error
            raise


class _FileSystem(filesystem.FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IOBase]:
        """Open a file; what goes wrong with it comes out of the `with` as it was.

        `torch.save` drops an exception that the file raises, and raises another about the place in its archive.
        """
        file = _File(path, mode)
        try:
            with BufferedWriter(file) as stream:
                yield cast(IOBase, stream)
        except BaseException as error:
            if file.failure is None or file.failure is error:
                raise
            raise file.failure from error


class _Writer(filesystem.FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _FileSystem()

    def storage_meta(self) -> metadata.StorageMeta:
        """Nothing: the path that a checkpoint is written to is none of its contents."""
        return metadata.StorageMeta()


class _Reader(filesystem.FileSystemReader):
    def __init__(self, folder: Path, index: metadata.Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index that was read already, by the unpickler that knows its limits."""
        return self._index
