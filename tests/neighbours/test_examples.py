"""The examples of docs/neighbours.md run, say what they show, and fail where what they claim is false."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

import lstm_triton

EXAMPLES = Path(__file__).parents[2] / "examples" / "neighbours"
MODULES = {"sb3": "sb3_contrib"}
LINES = {
    "opacus": (
        "row after row, by opacus",
        "all at once, by gradients_of_rows",
        "opacus' DPLSTM",
        "largest difference of the norms of the rows' gradients",
        "on new rows, by chance 0.333; epsilon",
    ),
    "torchrl": ("1. LSTMModule: ", "2. LSTMWithResets: ", "3. Gradients by both, of one window"),
    "lightning": (
        "the LSTM computed in {torch.bfloat16}, its parameters are torch.float32",
        "LSTM(6, 24, batch_first=True, peephole='diagonal', zoneout=(0.05, 0.1), lstm_triton): largest difference",
        "epochs 3 to 5",
    ),
    "sb3": (
        "largest difference of a parameter from torch.nn.LSTM's",
        "largest relative difference of the log-probabilities",
        "after 2048 steps of training",
    ),
}


def run(name):
    """Run an example, in this process: each of these packages takes seconds to import."""
    pytest.importorskip(MODULES.get(name, name))
    runpy.run_path(str(EXAMPLES / f"with_{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", LINES)
def test_the_example_runs_and_says_what_it_shows(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(name)
    said = capsys.readouterr()
    assert said.err == ""
    for line in LINES[name]:
        assert line in said.out
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


def ignoring(argument):
    """The `forward` of an LSTM that ignores an argument."""
    forward = lstm_triton.LSTM.forward
    return lambda self, x, hx=None, **given: forward(self, x, hx, **{k: v for k, v in given.items() if k != argument})


def off(function, factor=1 + 1e-3):
    """The function with its result multiplied."""
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


FAULTS = {
    # What is wrong: the example, what is replaced, by what, and the last thing that is still printed.
    "gradients of rows that are off": ("opacus", (torch, "einsum", off(torch.einsum)), "all at once"),
    "lengths that are ignored": ("torchrl", (lstm_triton.LSTM, "forward", ignoring("lengths")), "1. LSTMModule: "),
    "resets that are ignored": ("torchrl", (lstm_triton.LSTM, "forward", ignoring("resets")), "2. LSTMWithResets: "),
    "an episode that goes on from the one before": (
        "sb3",
        (lstm_triton.LSTM, "forward", ignoring("resets")),
        "of their gradient",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_example_fails_with(fault, capsys, monkeypatch):
    name, change, last = FAULTS[fault]
    monkeypatch.setattr(*change)
    with pytest.raises(AssertionError):
        run(name)
    assert last in "\n".join(capsys.readouterr().out.rstrip().splitlines()[-5:])


@pytest.mark.parametrize("name", LINES)
def test_without_the_package_the_example_says_so_in_one_line(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^This example needs .*: pip install [a-z0-9 -]+$"):
        runpy.run_path(str(EXAMPLES / f"with_{name}.py"), run_name="__main__")
