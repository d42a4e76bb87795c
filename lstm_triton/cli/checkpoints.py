"""Checkpoints of a run: tensors and plain containers, written whole or not at all, loaded with `weights_only=True`."""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lstm_triton.cli.errors import UserError
from lstm_triton.cli.files import write_whole
from lstm_triton.cli.training import Run

FORMAT = "lstm-triton character model, format 1"


def save(path: Path, run: Run) -> None:
    """Write all that the run needs to go on bit for bit; a failure leaves the former file.

    Nothing in a step is random, so there is no generator state to keep: the seed is among the settings.
    Raises UserError if the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(
        {
            "format": FORMAT,
            "settings": _plain_settings(run),
            "vocabulary": run.corpus.vocabulary,
            "text": run.corpus.digest,
            "step": run.step,
            "learners": {
                learner.name: {
                    "model": learner.model.state_dict(),
                    "optimizer": learner.optimizer.state_dict(),
                    "state": learner.state,
                    "losses": learner.losses,
                    "validation": learner.validation,
                }
                for learner in run.learners
            },
        },
        buffer,
    )
    write_whole(path, buffer.getvalue())


def resume(path: Path, run: Run) -> None:
    """Bring a new run to where the checkpoint was saved.

    Raises UserError if the file is missing, damaged, or of other settings or another text; the run is then unusable.
    """
    checkpoint = _load(path, run.device)
    try:
        _check_same(path, checkpoint, run)
        for learner in run.learners:
            saved = checkpoint["learners"][learner.name]
            learner.model.load_state_dict(saved["model"])
            learner.optimizer.load_state_dict(saved["optimizer"])
            h, c = saved["state"]
            learner.state = (h, c)
            learner.losses = list(saved["losses"])
            learner.validation = dict(saved["validation"])
        run.step = checkpoint["step"]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}") from error


def _load(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if not data:
        raise UserError(f"the checkpoint {path} is empty")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("wrong checksum")
        checkpoint = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    # Foreign bytes fail to load in a dozen ways, none of them a mistake of this program.
    except Exception as error:
        raise UserError(f"the checkpoint {path} is damaged or no checkpoint") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of lstm-triton train")
    return checkpoint


def _plain_settings(run: Run) -> dict[str, Any]:
    return asdict(run.settings) | {"variants": list(run.settings.variants)}


def _check_same(path: Path, checkpoint: dict[str, Any], run: Run) -> None:
    saved = checkpoint["settings"]
    differing = [
        f"{name} {saved.get(name)} there, {value} here"
        for name, value in _plain_settings(run).items()
        if saved.get(name) != value
    ]
    if differing:
        raise UserError(f"the checkpoint {path} has other settings: {'; '.join(differing)}")
    if checkpoint["text"] != run.corpus.digest:
        raise UserError(f"the checkpoint {path} was trained on another text")
