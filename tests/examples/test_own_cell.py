"""The example with cells that are not an LSTM: it runs, and fails where what it claims is false."""

import os
from textwrap import dedent

import pytest

from tests.examples.test_examples import PATCH, ROOT, run

pytest.importorskip("triton")


def test_the_example_runs_and_says_what_it_shows(tmp_path):
    done = run("own_cell", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "GRU, reset after the product: relative error against torch.nn.GRU in float64",
        "sLSTM, f = s(a_f): relative error against the formula without stabiliser",
        "sLSTM, f = exp(a_f): relative error against the formula without stabiliser",
        "gradient of weight_hh",
        "0 of 105 are finite",
        "Training: what was the input one step before?",
        "GRU   1.00 ",
        "sLSTM 1.00 ",
    ):
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


FAULTS = {
    # What is wrong: the statements that make it so, and the last thing that the example still prints.
    "a GRU with a wrong gradient": (
        "after(gru, 'gru', lambda h, x, *_: h + 1e-9 * (x - x.detach()).sum())",
        "gradient of bias_hh",
    ),
    "an sLSTM that is off": (
        "after(slstm, 'slstm', lambda r, *_: (r[0] + 1e-9, r[1]))",
        "gradient of bias",
    ),
    "a stabiliser that begins too large": (
        "after(slstm, 'initial_state', lambda r, *_: (r[0], r[1], r[2].nan_to_num(neginf=2000.0)))",
        "gradient of bias",
    ),
    "a training that learns nothing": (
        "torch.optim.Adam.step = lambda self: None",
        "GRU   1.00 ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_example_fails_with(fault, tmp_path):
    statements, last = FAULTS[fault]
    folder = os.fspath(ROOT / "examples" / "own_cell")
    loaded = f"import os, sys\nos.environ['TRITON_INTERPRET'] = '1'\nsys.path.insert(0, {folder!r})\nimport gru, slstm"
    done = run("own_cell", tmp_path, f"{dedent(PATCH)}\n{loaded}\n{statements}")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("AssertionError")
    assert last in "\n".join(done.stdout.rstrip().splitlines()[-2:])


WITHOUT_TRITON = """
    import importlib.util

    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *package: None if name == "triton" else find_spec(name, *package)
"""


def test_without_triton_the_example_says_so_in_one_line(tmp_path):
    done = run("own_cell", tmp_path, WITHOUT_TRITON)
    assert done.returncode == 1 and done.stdout == ""
    assert "triton is not installed" in done.stderr and done.stderr.count("\n") == 1
