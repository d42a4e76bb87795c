"""`lstm-triton train` as several processes that `torchrun` starts: the same curves as one process."""

import os
import pydoc_data.topics
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lstm_triton import cli, routing
from lstm_triton.cli import parallel, training
from lstm_triton.cli.errors import UserError
from lstm_triton.cli.parallel import Place
from tests.support import checkpoints as saved
from tests.support.planted_train import CLIPPED_AT, FAULTY_STEP

pytestmark = pytest.mark.xdist_group("torchrun")  # the runs that several tests look at are made once

TEXT = "".join(pydoc_data.topics.topics.values())[:400]
STEPS = 12
OPTIONS = [
    "train", "--text=text.txt", "--device=cpu", "--dtype=float64", "--variant=coupled", "--variant=diagonal",
    "--embedding=5", "--hidden=7", "--layers=2", "--batch=4", "--window=9", "--sample-length=3",
]  # fmt: skip
TOLERANCE = 1e-11
"""Bits per character, of losses near 6, in float64: a sum in another order."""


@pytest.fixture(scope="module", autouse=True)
def directory(tmp_path_factory):
    """A directory with a text so short that epochs, after which the state is reset, end within the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("distributed"))
        for variable in (routing.ENVIRONMENT_VARIABLE, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(variable, raising=False)
        patch.setattr(training, "MAX_GRADIENT_NORM", CLIPPED_AT)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        yield


def alone(path, *options):
    """One process, this one."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*OPTIONS, f"--checkpoint={path}", *options])
    assert exit_info.value.code == 0
    return path


def start(*command):
    """`torchrun` with two processes: its exit code, and what all of them wrote to stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launcher, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise
    return process.returncode, output, errors


def together(path, *options, planted="nothing"):
    return start("-m", "tests.support.planted_train", planted, *OPTIONS, f"--checkpoint={path}", *options)


def copied(path, name):
    return Path(shutil.copytree(path, name))


def assert_finished(result):
    """All went well, and one process said so."""
    code, output, errors = result
    assert (code, errors) == (0, "")
    for line in ("to learn", f"step {STEPS}/{STEPS}", f"after {STEPS} steps", "sample of", "curves:", "checkpoint:"):
        assert output.count(line) == 1, output


def numbers(path):
    """Everything that is saved, by name: losses of each step, validation losses, each tensor of all learners."""
    found = {}

    def visit(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{name}/{key}", inner)
        elif not isinstance(value, str):
            found[name] = torch.as_tensor(value, dtype=torch.float64)

    checkpoint = saved.load(path)
    visit("", checkpoint["learners"] | {"step": checkpoint["step"]})
    return found


def assert_same_run(path, other, tolerance=TOLERANCE):
    actual, expected = numbers(path), numbers(other)
    assert actual.keys() == expected.keys()
    assert len(actual["/coupled/losses"]) == STEPS
    assert_close(actual, expected, tolerance)


def assert_close(actual, expected, tolerance=TOLERANCE):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def one(directory):
    """An uninterrupted run of one process."""
    return alone(Path("one"), f"--steps={STEPS}")


@pytest.fixture(scope="module")
def ddp(directory):
    """An uninterrupted run of two processes: its checkpoint, and how it ended."""
    return Path("ddp"), together("ddp", f"--steps={STEPS}")


@pytest.fixture(scope="module")
def interrupted(directory):
    """A run of two processes that Ctrl-C stopped in the second of them: its checkpoint, and how it ended."""
    return Path("interrupted"), together("interrupted", f"--steps={STEPS}", planted="ctrl-c")


def test_two_ddp_processes_are_one(one, ddp):
    path, result = ddp
    assert_finished(result)
    assert "float64 on 2 cpu processes with ddp" in result[1]
    assert_same_run(path, one)


def test_two_fsdp_processes_are_one(one):
    assert_finished(together("fsdp", f"--steps={STEPS}", "--parallel=fsdp"))
    assert len(list(saved.folder("fsdp").glob("*.distcp"))) == 2
    assert_same_run("fsdp", one)


def test_all_stop_at_the_same_step_when_one_is_interrupted(interrupted):
    path, (code, output, errors) = interrupted
    assert code == 1
    assert output.count(f"stopped after step {FAULTY_STEP} of {STEPS}; saved to {path}, continue with --resume") == 1
    assert errors.count("interrupted\n") == 1
    assert "exitcode  : 130" in errors  # of the one that ended first; torchrun may have ended the other
    assert saved.load(path)["step"] == FAULTY_STEP


def test_interrupted_and_resumed_by_as_many_is_uninterrupted_bit_for_bit(ddp, interrupted):
    path = copied(interrupted[0], "resumed-ddp")
    assert_finished(together(path, f"--steps={STEPS}", "--resume"))
    assert_same_run(path, ddp[0], tolerance=0)


def test_fsdp_continues_what_ddp_began_and_one_what_fsdp_began(one, interrupted):
    path = copied(interrupted[0], "passed-on")
    # How often a run is evaluated depends on how far it was meant to go.
    code, _, errors = together(path, "--steps=10", "--resume", "--parallel=fsdp")
    assert (code, errors) == (0, "")
    alone(path, f"--steps={STEPS}", "--resume")
    expected, actual = numbers(one), numbers(path)
    assert_close(actual, {name: value for name, value in expected.items() if name in actual})
    assert not [name for name in expected.keys() - actual.keys() if "/validation/" not in name]


def test_a_failure_of_one_ends_all_with_its_message(interrupted):
    code, output, errors = together("none", f"--steps={STEPS}", planted="out of memory")
    assert code == 1
    assert errors.count("error: ") == 1
    assert "error: out of memory, try a smaller --hidden, --batch or --window: planted" in errors
    assert "Gloo" not in errors
    assert output.count("to learn") == 1
    assert not Path("none").exists()


def test_two_continue_what_one_began_and_a_save_that_fails_in_one_of_them_leaves_the_former_checkpoint(one):
    path = alone(Path("kept"), "--steps=2")
    code, _, errors = together(path, f"--steps={STEPS}", "--resume", "--save-every=5", planted="full disk")
    assert code == 1
    assert errors.count("error: ") == 1
    assert f"error: cannot write the checkpoint {path.resolve()}: No space left on device" in errors
    assert len(list(path.iterdir())) == 2
    actual, expected = saved.load(path), saved.load(one)
    assert actual["step"] == 5
    for name, learner in actual["learners"].items():
        assert learner["losses"] == pytest.approx(expected["learners"][name]["losses"][:5], rel=0, abs=TOLERANCE)


def test_a_closed_pipe_stops_all_after_a_save_without_a_word(directory):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "lstm_triton.cli", *OPTIONS, "--checkpoint=unheard", "--steps=1000"]
    with subprocess.Popen(
        [*launcher, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "exitcode  : 1" in errors  # 141 or 130, of the one that ended first
    for words in ("error: ", "interrupted", "Gloo", "cli/app.py"):
        assert words not in errors
    assert 0 < saved.load("unheard")["step"] < 1000


def test_what_all_refuse_is_said_once():
    code, output, errors = start("-m", "lstm_triton.cli", *OPTIONS, "--batch=5")
    assert (code, output) == (1, "")
    assert errors.count("error: ") == 1
    assert "error: --batch 5 cannot be shared out among 2 processes: give a multiple of 2" in errors


# The parts


def test_place():
    assert parallel.place_in({}) == Place(0, 1, 0)
    assert parallel.place_in({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(5, 8, 1)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, RANK is not: start several processes with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "must be numbers: .*'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK 2 and LOCAL_RANK 0 must be below WORLD_SIZE 2"),
    ],
)
def test_impossible_place(environment, message):
    with pytest.raises(UserError, match=message):
        parallel.place_in(environment)


@pytest.mark.parametrize(
    "asked, gpus, expected",
    [("auto", 0, "cpu"), ("cpu", 8, "cpu"), ("auto", 8, "cuda:3"), ("cuda", 8, "cuda:3"), ("abacus", 8, "abacus")],
)
def test_each_process_takes_its_own_device(monkeypatch, asked, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert parallel.device_name(asked, Place(7, 8, 3)) == expected


def test_one_gpu_is_not_for_many_processes():
    assert parallel.device_name("cuda:1", Place()) == "cuda:1"
    with pytest.raises(UserError, match="--device cuda:1 is one GPU for 8 processes"):
        parallel.device_name("cuda:1", Place(7, 8, 3))


def test_shares_are_all_of_the_streams():
    streams = torch.arange(24).view(6, 4)
    shares = [parallel.World(torch.device("cpu"), rank, 3).share(streams) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert torch.equal(torch.cat(shares), streams)


def test_several_failures_are_all_told_where_no_store_is_reached():
    assert parallel.speaks_first({"WORLD_SIZE": "2", "RANK": "1"})
