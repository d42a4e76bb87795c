"""Checkpoints of a run: a directory with a record and a folder of tensors, replaced whole or not at all.

    run.json     the settings, the curves, which folder holds the tensors, and the SHA-256 of each of its files
    tensors-a/   (or tensors-b/) in the format of torch.distributed.checkpoint

A save writes to the folder that the record does not name. The record is then replaced in one go, and only then the
former folder removed: whatever comes between, the directory holds a checkpoint that is whole. Nothing in it depends on
the number of processes, and nothing is unpickled but plain tensors and the classes of PyTorch's index of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lstm_triton.cli.errors import UserError
from lstm_triton.cli.files import check_directory, real, reason, sync_directory, write_whole, writing
from lstm_triton.cli.training import Learner, Run

FORMAT = "lstm-triton character model, format 2"
RECORD = "run.json"
FOLDERS = ("tensors-a", "tensors-b")
_WHAT = "the checkpoint"


def check_savable(path: Path, resume: bool) -> None:
    """Find out, before the training, that nothing could be saved to `path`, or should not.

    A directory that has only what an interrupted first save leaves is as good as none.
    Raises UserError.
    """
    with writing(real(path), _WHAT):
        if path.is_file():
            raise UserError(f"{path} is a file, a checkpoint is a directory: give another name")
        check_directory(path, _WHAT)
        if resume or not path.exists():
            return
        if (path / RECORD).exists():
            raise UserError(f"{path} exists: add --resume to continue its run, or remove it")
        if any(entry.name not in FOLDERS for entry in path.iterdir()):
            raise UserError(f"{path} exists and is no checkpoint: give the name of a new directory")


def save(path: Path, run: Run) -> None:
    """Write all that the run needs to go on bit for bit; a failure leaves the former checkpoint.

    All processes call it, and the leader writes all but the tensors. Nothing in a step is random, so there is no
    generator state to keep: the seed is among the settings, as is all that the optimizer does not learn.
    Raises UserError if the checkpoint cannot be written.
    """
    from lstm_triton.cli import tensors

    path = real(path)
    world = run.world
    try:
        with writing(path, _WHAT):
            folder = path / world.of_leader(_make_room(path) if world.leads else "")
            tensors.write(folder, _tensors(run), alone=world.size == 1)
            if world.leads:
                sync_directory(folder)
                sync_directory(path)
                write_whole(path / RECORD, _sealed(_record(run, folder)), _WHAT)
                sync_directory(path)
    finally:
        if world.leads:
            _tidy(path)


def resume(path: Path, run: Run) -> None:
    """Bring a new run to where the checkpoint was saved, by as many processes or others.

    Raises UserError if it is missing, damaged, or of other settings or another text; the run is then unusable.
    """
    from lstm_triton.cli import tensors

    record = _load(path)
    try:
        _check_same(path, record, run)
        folder = _checked_folder(path, record)
        for learner in run.learners:
            saved = record["learners"][learner.name]
            learner.losses = [float(loss) for loss in saved["losses"]]
            learner.validation = {int(step): float(loss) for step, loss in saved["validation"]}
            learner.state = run.zero_state()
        target = _tensors(run)
        tensors.read(folder, target, alone=run.world.size == 1)
        for learner in run.learners:
            _set_tensors(learner, target[learner.name])
        run.step = int(record["step"])
    except UserError:
        raise
    # Foreign bytes fail to load in a dozen ways, none of them a mistake of this program.
    except Exception as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}") from error


def _make_room(path: Path) -> str:
    """Make the directory, and the name of the folder in it that is free for the next save."""
    path.mkdir(exist_ok=True)
    current = _load(path)["folder"] if (path / RECORD).exists() else None
    free = next(name for name in FOLDERS if name != current)
    if (path / free).exists():
        shutil.rmtree(path / free)
    return free


def _tidy(path: Path) -> None:
    """Remove what no record names; the directory too, if there is no record."""
    with suppress(OSError, UserError):
        current = _load(path)["folder"] if (path / RECORD).exists() else None
        for name in FOLDERS:
            if name != current:
                shutil.rmtree(path / name, ignore_errors=True)
        if current is None:
            path.rmdir()


def _tensors(run: Run) -> dict[str, Any]:
    """Return the parameters of each learner, what the optimizer keeps for each of them, and the state of all streams.

    They are the run's own tensors, not copies; with several processes those that are spread over them are DTensors.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict

    found = {}
    for learner in run.learners:
        assert learner.state is not None
        model, optimizer = get_state_dict(learner.model, learner.optimizer)
        h, c = (run.world.whole_state(part.contiguous()) for part in learner.state)
        found[learner.name] = {"model": model, "optimizer": optimizer["state"], "state": {"h": h, "c": c}}
    return found


def _set_tensors(learner: Learner, tensors: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_state_dict
    from torch.distributed.tensor import DTensor

    optimizer = get_optimizer_state_dict(learner.model, learner.optimizer) | {"state": tensors["optimizer"]}
    set_state_dict(learner.model, learner.optimizer, model_state_dict=tensors["model"], optim_state_dict=optimizer)
    h, c = (part.to_local() if isinstance(part, DTensor) else part for part in tensors["state"].values())
    learner.state = (h, c)


def _record(run: Run, folder: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": _plain_settings(run),
        "vocabulary": run.corpus.vocabulary,
        "text": run.corpus.digest,
        "step": run.step,
        "learners": {
            learner.name: {"losses": learner.losses, "validation": list(learner.validation.items())}
            for learner in run.learners
        },
        "folder": folder.name,
        "files": _digests(folder),
    }


def _sealed(record: dict[str, Any]) -> bytes:
    """A record with its own SHA-256, as the contents of a file."""
    text = json.dumps(record)
    return f'{{"sha256": "{_seal(text)}", "run": {text}}}'.encode()


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _load(path: Path) -> dict[str, Any]:
    """The record of a checkpoint."""
    try:
        if path.is_dir() and not (path / RECORD).exists():
            raise UserError(f"{path} is no checkpoint of lstm-triton train: it has no {RECORD}")
        data = (path / RECORD).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    try:
        contents = json.loads(data)
        record, seal = contents["run"], contents["sha256"]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {path} is damaged or no checkpoint") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of lstm-triton train")
    if seal != _seal(json.dumps(record)) or record.get("folder") not in FOLDERS:
        raise UserError(f"the checkpoint {path} is damaged: wrong checksum of {RECORD}")
    return record


def _checked_folder(path: Path, record: dict[str, Any]) -> Path:
    """The folder of the tensors, with exactly the files that were written. Raises UserError if not."""
    folder = path / record["folder"]
    if _digests(folder) != record["files"]:
        raise UserError(f"the checkpoint {path} is damaged: wrong checksum in {folder.name}")
    return folder


def _plain_settings(run: Run) -> dict[str, Any]:
    return asdict(run.settings) | {"variants": list(run.settings.variants)}


def _check_same(path: Path, record: dict[str, Any], run: Run) -> None:
    saved = record["settings"]
    differing = [
        f"{name} {saved.get(name)} there, {value} here"
        for name, value in _plain_settings(run).items()
        if saved.get(name) != value
    ]
    if differing:
        raise UserError(f"the checkpoint {path} has other settings: {'; '.join(differing)}")
    if record["text"] != run.corpus.digest:
        raise UserError(f"the checkpoint {path} was trained on another text")
