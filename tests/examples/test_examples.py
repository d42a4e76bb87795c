"""Every example runs, says what it shows, and fails where what it claims is false. Each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(name, folder, fault=None):
    """Run an example in the folder, with a fault after the statements given, and return the finished process."""
    path = ROOT / "examples" / name
    path = path if path.is_dir() else path.with_suffix(".py")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LSTM_TRITON_BACKEND")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"}
    command = [str(path)]
    if fault is not None:
        command = ["-c", f"{dedent(fault)}\nimport runpy\nrunpy.run_path({str(path)!r}, run_name='__main__')"]
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


LINES = {
    "exercise": (
        "Part 1, the cell: LSTMCell(5, 10, lstm_triton)",
        "Part 2, two layers: LSTM(5, 10, num_layers=2, lstm_triton)",
        "Part 3, coupled gates: LSTMCell(5, 10, coupled=True, lstm_triton)",
        "Part 4, peepholes: LSTMCell(5, 10, peephole='full', lstm_triton)",
        "Textbook peepholes: LSTMCell(5, 10, peephole='full', output_peephole='current', lstm_triton)",
        "Every result and every gradient agrees to 1e-12.",
    ),
    "migrate": (
        "the LSTM is now lstm_triton.modules.LSTM; same parameter objects: True",
        "output of lstm_triton.LSTM: torch.bfloat16, of torch.nn.LSTM: torch.",
        "weight_ch_l0, lstm.weight_ch_l0_reverse, lstm.weight_ch_l1, lstm.weight_ch_l1_reverse",
        "with peepholes of zero the outputs are the old model's",
        "no layer's peepholes are still zero",
    ),
    "old_models": (
        "encoder  torch.nn.LSTM      convert  computes the same function; new: weight_ch_l0, weight_ch_l1 of zeros",
        "decoder  torch.nn.LSTMCell  convert  computes the same function; new: weight_ch of zeros",
        "context  torch.nn.GRU       leave    not an LSTM",
        "2 to convert, 1 left as they are, 0 refused",
        "(encoder): LSTM(6, 8, num_layers=2, peephole='diagonal', output_peephole='current', lstm_triton)",
        "with peepholes of zero the outputs are the old model's: difference",
        "coupled gates: the outputs change",
        "Keras, two layers: LSTM(6, 8, num_layers=2, batch_first=True, lstm_triton)",
        "difference from Keras' equations",
        "ONNX, both directions: LSTM(6, 8, bidirectional=True, peephole='diagonal', output_peephole='current', ",
        "difference from ONNX's equations",
    ),
    "kernel_on_a_laptop": ("a_i  kernel", "a_o  kernel", "g    kernel", "c'   kernel", "h'   kernel", "stepwise, two"),
    "rl_resets": (
        "largest difference of the output with resets from that of the episode alone",
        "at all others at most 0.0e+00",
        "LSTM with resets",
        "with resets accuracy",
        "without resets accuracy",
    ),
    "look_inside": (
        "of naming 0 it would be 0.33",
        "2. The gates make the cell states and the output",
        "remembers: its cell states after the mark and the value have a correlation of",
        "NFG, no forget gate  no-forget-gate      288",
        "CIFG, i = 1 - f      coupled             288",
    ),
    "export_onnx": (
        "standard: 2 LSTM",
        "textbook peepholes: 1 LSTM",
        "peepholes on c_{t-1}: 1 Scan",
        "full peepholes, normalised: 1 Scan",
        "T=25, B=1: largest difference",
        "Every output and state agrees to 1e-5.",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=NEEDS_TRITON if n.startswith("kernel") else ()) for n in LINES])
def test_the_example_runs_and_says_what_it_shows(name, tmp_path):
    done = run(name, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for line in LINES[name]:
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


PATCH = """
    import torch, lstm_triton

    def after(owner, name, change):
        original = getattr(owner, name)

        def changed(*args, **kwargs):
            result = original(*args, **kwargs)
            return change(result, *args, **kwargs)

        setattr(owner, name, changed)
"""
"""after(owner, name, change): the function `name` of the owner returns change(result, its arguments) from now on."""

FAULTS = {
    # What is wrong: the example, the statements that make it so, and the last thing that it still prints.
    "a cell off by 1e-9": (
        "exercise",
        "after(lstm_triton.LSTMCell, 'forward', lambda hc, *_: (hc[0] + 1e-9, hc[1]))",
        "Part 1",
    ),
    "a layer with wrong gradients": (
        "exercise",
        "after(lstm_triton.LSTM, 'forward', lambda r, *_: (r[0] + 1e-6 * (r[0] - r[0].detach()), r[1]))",
        "Part 2",
    ),
    "an output gate that reads the other cell state": (
        "exercise",
        """
        forget = lambda _, cell, *__, **___: setattr(cell, "output_peephole", "previous")
        after(lstm_triton.LSTMCell, '__init__', forget)
        """,
        "Textbook peepholes",
    ),
    "a conversion that changes a weight": (
        "migrate",
        "after(lstm_triton.convert, 'from_torch', lambda model, _: model.lstm.weight_hh_l1_reverse.data.add_(0.01))",
        "difference of the outputs",
    ),
    "lengths that are ignored": (
        "migrate",
        """
        forward = lstm_triton.LSTM.forward
        lstm_triton.LSTM.forward = lambda self, x, hx=None, lengths=None: forward(self, x, hx)
        """,
        "largest difference of output",
    ),
    "peepholes that are not zero": (
        "migrate",
        "torch.nn.init.zeros_ = torch.nn.init.ones_",
        "with peepholes of zero",
    ),
    "peepholes that a conversion draws": (
        "old_models",
        "after(torch, 'zeros', lambda zeros, *_, **__: zeros + 0.1)",
        "outputs are the old model's",
    ),
    "Keras' gates in another order": (
        "old_models",
        "lstm_triton.foreign.KERAS_GATES = 'igfo'",
        "difference from Keras' equations",
    ),
    "ONNX' gates in another order": (
        "old_models",
        "lstm_triton.foreign.ONNX_GATES = 'ifog'",
        "difference from ONNX's equations",
    ),
    "a gate matmul that is off": (
        "kernel_on_a_laptop",
        """
        from lstm_triton_kernels import gates
        after(gates, 'gate_preactivations', lambda _, preact, **__: preact[:, -1:].add_(1e-5))
        """,
        "a_o  kernel",
    ),
    "a cell update that is off": (
        "kernel_on_a_laptop",
        """
        from lstm_triton_kernels import cell
        after(cell, 'cell_forward', lambda _, preact, cells, *__, **___: cells[1].mul_(1 + 1e-4))
        """,
        "c'   kernel",
    ),
    "a strategy that computes something else": (
        "kernel_on_a_laptop",
        """
        change = lambda r, lstm, *_: (r[0] * (1 + 1e-3 * (lstm.strategy == 'stepwise')), r[1])
        after(lstm_triton.LSTM, 'forward', change)
        """,
        "stepwise, two",
    ),
    "resets that are ignored": (
        "rl_resets",
        """
        forward = lstm_triton.LSTM.forward
        lstm_triton.LSTM.forward = lambda self, x, hx=None, resets=None: forward(self, x, hx)
        """,
        "that of the episode alone",
    ),
    "gradients that cross": (
        "rl_resets",
        """
        change = lambda r, lstm, x, *_, **__: (r[0] + 1e-6 * (x - x.detach()).sum(), r[1])
        after(lstm_triton.LSTM, 'forward', change)
        """,
        "at all others at most",
    ),
    "a loop that computes something else": (
        "rl_resets",
        "after(torch.nn.LSTMCell, 'forward', lambda hc, *_: (hc[0] * 1.001, hc[1]))",
        "LSTM with resets",
    ),
    "gates of the step before": (
        "look_inside",
        """
        change = lambda r, *_, **asked: (*r[:3], r[3].map(lambda t: t.roll(1, 0))) if asked else r
        after(lstm_triton.LSTM, 'forward', change)
        """,
        "largest difference",
    ),
    "a memory of something else": (
        "look_inside",
        "after(torch, 'corrcoef', lambda r, *_: r * 0.5)",
        "what it keeps, f:",
    ),
    "a graph of another model": (
        "export_onnx",
        "after(torch.onnx, 'export', lambda program, lstm, *_, **__: (lstm.weight_hh_l0.data.mul_(1.01), program)[1])",
        "T=10, B=4: largest difference",
    ),
    "a training that learns nothing": (
        "rl_resets",
        "torch.optim.Adam.step = lambda self: None",
        "without resets accuracy",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_example_fails_with(fault, tmp_path):
    name, statements, last = FAULTS[fault]
    if name.startswith("kernel"):
        pytest.importorskip("triton")
        statements = f"import os\nos.environ['TRITON_INTERPRET'] = '1'\n{dedent(PATCH)}\n{dedent(statements)}"
    else:
        statements = f"{dedent(PATCH)}\n{dedent(statements)}"
    done = run(name, tmp_path, statements)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("AssertionError")
    assert last in "\n".join(done.stdout.rstrip().splitlines()[-5:])


def test_the_gates_are_drawn_into_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    done = run("look_inside", tmp_path, "import sys\nsys.argv = ['', '--plot', 'gates.png']")
    assert (done.returncode, done.stderr) == (0, "") and "drawn: gates.png" in done.stdout
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_without_triton_the_kernel_example_says_so_in_one_line(tmp_path):
    done = run("kernel_on_a_laptop", tmp_path, "import importlib.util\nimportlib.util.find_spec = lambda name: None")
    assert done.returncode == 1 and done.stdout == ""
    assert "triton is not installed" in done.stderr and done.stderr.count("\n") == 1


def test_without_onnxruntime_the_export_example_says_what_to_install(tmp_path):
    missing = "import importlib.util\nimportlib.util.find_spec = lambda name: None"
    done = run("export_onnx", tmp_path, f"import torch, lstm_triton\n{missing}")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == ("this example needs onnxscript and onnxruntime: pip install onnxscript onnxruntime\n")
