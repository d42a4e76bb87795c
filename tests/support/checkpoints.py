"""Checkpoints of `lstm-triton train`, read with PyTorch's own tools, and made over as a stranger could."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lstm_triton.cli import checkpoints


def read_record(path: str | Path) -> dict[str, Any]:
    """What is written in the record, checksums included."""
    return json.loads((Path(path) / checkpoints.RECORD).read_text())["run"]


def folder(path: str | Path) -> Path:
    """The folder that holds the tensors."""
    return Path(path) / read_record(path)["folder"]


def load(path: str | Path) -> dict[str, Any]:
    """All that a run goes on from: the record without its checksums, each learner with its tensors."""
    record = read_record(path)
    with TemporaryDirectory() as temporary:
        whole = Path(temporary) / "tensors.pt"
        dcp_to_torch_save(folder(path), whole)
        tensors = torch.load(whole, weights_only=True)
    assert tensors.keys() == record["learners"].keys()
    for name, learner in record["learners"].items():
        learner["validation"] = dict(learner["validation"])
        learner.update(tensors[name])
    return {key: value for key, value in record.items() if key not in ("folder", "files")}


def seal(path: str | Path, record: dict[str, Any] | None = None) -> None:
    """Make the checksums right for what the folder holds, and for the record (default: the present one)."""
    record = (record or read_record(path)) | {"files": checkpoints._digests(folder(path))}
    (Path(path) / checkpoints.RECORD).write_bytes(checkpoints._sealed(record))


def contents(path: str | Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
