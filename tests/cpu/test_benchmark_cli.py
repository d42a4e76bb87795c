"""`python -m benchmarks`: what it prints and writes, and what it says of bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import app, check, results_folder, rows, second, suites
from benchmarks.providers import PROVIDERS

RECORDED = Path(__file__).parent.parent / "data" / "cpu-recorded.csv"
BLOCK = "# before\n<!-- benchmarks: begin -->\nwas here\n<!-- benchmarks: end -->\nafter\r\n"
ONE_SUITE = (
    "run",
    "--suite",
    "cell",
    "--dtype",
    "bf16",
    "--mode",
    "forward",
    "--device",
    "cpu",
    "--row-seconds",
    "0.01",
)


def call(*arguments):
    result = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "option, wrong, known",
    [
        ("--suite", "cores", [*suites.SUITES, "gpu"]),
        ("--provider", "cudnn", list(PROVIDERS)),
        ("--dtype", "fp8", list(suites.STORAGE)),
        ("--dtype", "float64", list(suites.STORAGE)),
        ("--mode", "backward", list(suites.MODES)),
    ],
)
def test_what_is_unknown_is_answered_with_what_exists(tmp_path, option, wrong, known):
    code, output = call("run", option, wrong, "--device", "cpu", "--results", tmp_path)
    assert code == 2 and option in output and wrong in output
    assert all(name in output for name in known) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("run", "--device", "tpu"), "unknown device 'tpu'"),
        (("run", "--device", "meta"), "cannot run on 'meta'"),
        (("run", "--device", "cuda:99"), "there is no cuda:99"),
        (("run", "--device", "cpu", "--suite", "cpu", "--provider", "lstm_triton:torch"), "nothing to measure"),
        (("run", "--device", "cpu", "--budget", "0"), "--budget"),
        (("run", "--device", "cpu", "--results", "file/folder"), "cannot write to"),
        (("run", "--device", "cpu", "--shape", "T=5,B=3"), "--shape: 'T=5,B=3' has no H"),
        (("run", "--device", "cpu", "--shape", "16x768"), "unknown '16x768'"),
        (("run", "--device", "cpu", "--provider", "flashrnn"), "pip install flashrnn"),
        (("run", "--device", "cpu", "--list", "--suite", "cores"), "--suite: unknown 'cores'"),
        (("report",), "nothing was measured yet"),
        (("floors",), "nothing was measured yet"),
        (("steps", "--device", "cpu"), "times persistent kernels: needs a GPU"),
        (("report", "--results", "missing"), "'missing' does not exist"),
        (("report", "--readme", "missing.md"), "'missing.md' does not exist"),
        (("report", "--results", ".", "--readme", "file"), "the line <!-- benchmarks: begin --> is missing"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("benchmarks.providers.find_spec", lambda package: None)
    Path("file").write_text("")
    code, output = call(*arguments)
    assert code == 2 and words in output and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_for_one_says_so(tmp_path):
    code, output = call("gpu", "--results", tmp_path)
    assert code == 2 and "there is no GPU" in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["16", "16x", "x768", "0x768", "16x768x2", "axb"])
def test_a_shape_is_rows_times_units(text):
    assert app.parse_shape("16x768") == (16, 768)
    with pytest.raises(typer.BadParameter, match=f"'{text}' is not rows x units, as 16x768"):
        app.parse_shape(text)


@pytest.mark.parametrize("command", ["run", "micro", "steps", "second", "warm", "report", "floors", "gpu", "simulate"])
def test_the_help_of_every_command_has_an_example(command):
    code, output = call(command, "--help")
    assert code == 0 and f"Example: python -m benchmarks {command}" in output


def test_results_go_outside_of_the_checkout_if_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for data, folder in (
        (str(tmp_path / "data"), tmp_path / "data"), ("relative", tmp_path / "home" / ".local" / "share"),
        ("", tmp_path / "home" / ".local" / "share"),
    ):  # fmt: skip
        monkeypatch.setenv("XDG_DATA_HOME", data)
        assert (
            results_folder() == app.folder(None) == folder / "lstm_triton" / "benchmarks" and app.folder(None).is_dir()
        )
    assert app.folder(tmp_path / "named") == tmp_path / "named"
    for command in ("run", "micro", "steps", "second", "report", "floors", "gpu"):
        assert "benchmarks in lstm_triton in $XDG_DATA_HOME, else in ~/.local/share" in call(command, "--help")[1]


def test_a_list_says_what_there_is_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("benchmarks.providers.find_spec", lambda package: None)
    code, output = call("run", "--list", "--device", "cpu")
    assert code == 0 and all(key in output for key in PROVIDERS) and "torchrl is not installed: pip install" in output
    for suite, words in suites.WORDS.items():
        assert f"{suite} {len(suites.cases((suite,)))} {words}" in output
    code, output = call("run", "--list", "--suite", "workloads", "--mode", "forward", "--shape", "T=5,B=3,H=7")
    listed = suites.cases(("workloads",), modes=("forward",))
    assert code == 0 and all(str(case) in output for case in listed) and "T=5 B=3 I=7 H=7" in output
    assert "forward+backward" not in output and not list(tmp_path.iterdir())


def test_shapes_of_ones_own_are_measured_without_a_suite(tmp_path):
    shapes = ["T=5,B=3,I=4,H=7,lengths", "T=6,B=3,H=7,resets=0.3,variant=coupled,name=mine"]
    options = [*ONE_SUITE[3:], "--dtype", "fp32", "--provider", "lstm_triton:auto", "--results", tmp_path]
    code, output = call("run", "--shape", shapes[0], "--shape", shapes[1], *options)
    (path,) = tmp_path.glob("*-own.csv")
    found = rows.read(path)
    assert code == 0 and all(row["ms_median"] for row in found), output
    assert {(row["dtype"], row["T"], row["variant"], row["name"]) for row in found} == {
        (dtype, *rest)
        for dtype in ("bfloat16", "float32")
        for rest in ((5, "standard", "lengths"), (6, "coupled", "mine resets=0.3"))
    }
    assert "mine resets=0.3: coupled T=6 B=3 I=7 H=7: " in output


def test_a_run_without_pandas_measures_the_constants_then_appends_its_rows(tmp_path):
    """As on a machine that has neither pandas nor matplotlib; a report says what it needs."""
    for name in ("pandas", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    options = dict(capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    tool, results = [sys.executable, "-m", "benchmarks"], ["--results", str(tmp_path / "new")]
    providers = ["--provider", "torch.nn.LSTM", "--provider", "lstm_triton:auto"]
    done = subprocess.run([*tool, *ONE_SUITE, *providers, *results], **options)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "new").glob("*.csv")
    found = rows.read(path)
    assert path.name.startswith("cpu-") and path.name.endswith("-cell.csv")
    assert len(found) == 2 * len(suites.cases(("cell",), ("bfloat16",), ("forward",)))
    assert all(row["ms_median"] for row in found) and {row["provider"] for row in found} == {
        "torch.nn.LSTM", "lstm_triton"
    }  # fmt: skip
    assert path.name in done.stdout and f"{found[0]['ms_median']:.4g} ms" in done.stdout
    assert "geometric means" in done.stdout
    (micro,) = (tmp_path / "new").glob("*-micro.json")
    constants = json.loads(micro.read_text())["constants"]
    assert constants["copy_gb_per_s"] > 0 and constants["wait_us"] is None
    report = subprocess.run([*tool, "report", *results], **options)
    assert report.returncode == 2 and "a report needs pandas" in report.stderr


def test_a_budget_that_is_spent_leaves_rows_out_and_says_so(tmp_path):
    shutil.copy(RECORDED, tmp_path / "other.csv")
    code, output = call("run", "--suite", "cpu", "--device", "cpu", "--budget", "1", "--results", tmp_path)
    total = sum(p.refuses(c, "cpu") is None for c in suites.cases(("cpu",)) for p in PROVIDERS.values())
    assert code == 0 and f"no time for {total} of {total} rows" in output
    assert [path.name for path in tmp_path.glob("*.csv")] == ["other.csv"]


def test_a_report_of_a_recorded_run_names_what_is_damaged_and_leaves_it_alone(tmp_path):
    shutil.copy(RECORDED, tmp_path / "cpu-2026-11-24-cpu.csv")
    damaged, readme = tmp_path / "h100-2026-11-24-core.csv", tmp_path / "README.md"
    damaged.write_text("provider,strategy\nlstm_triton,auto\n")
    readme.write_bytes(BLOCK.encode())
    code, output = call("report", "--results", tmp_path)
    assert code == 0 and "left out, damaged" in output and damaged.name in output
    assert damaged.read_text() == "provider,strategy\nlstm_triton,auto\n" and readme.read_bytes() == BLOCK.encode()
    written = (tmp_path / "report.md").read_text()
    assert damaged.name in written and PROVIDERS["torch.nn.LSTM:aten"].leaves_out in written
    figure = next(row for row in rows.read(RECORDED) if rows.ratio_of(row))
    assert f"{figure['baseline_ratio']:.3g}" in written
    pictures = list(tmp_path.glob("*.svg"))
    assert pictures and all(picture.name in written for picture in pictures)

    assert call("report", "--results", tmp_path, "--readme", readme)[0] == 0
    text = readme.read_bytes().decode()
    assert text.startswith("# before\n") and text.endswith("-->\nafter\r\n") and "was here" not in text
    assert "No GPU has been measured" in text


@pytest.fixture
def precision_as_before():
    """The command runs in this process, and leaves PyTorch's switches as its last row wanted them."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


def test_a_gradient_penalty_is_compared_and_timed_each_way(tmp_path, precision_as_before):
    shapes = ("--shape", "T=3,B=2,H=5", "--shape", "T=3,B=2,H=5,variant=diagonal,resets=0.1")
    options = ("--dtype", "fp32", "--device", "cpu", "--row-seconds", 0.01, "--results", tmp_path)
    code, output = call("second", *shapes, *options)
    assert code == 0, output
    (path,) = tmp_path.iterdir()
    here, *found = map(json.loads, path.read_text().splitlines())
    assert here["torch"] == torch.__version__
    assert [row["way"] for row in found] == [*second.WAYS] * 2
    timed = [row["way"] for row in found if row["ms"] is not None]
    assert timed == ["reference", "torch.nn.LSTM without cuDNN", "lstm_triton", "reference", "lstm_triton"]
    assert all(row["speed"] > 0 and row["error"] < 1e-4 for row in found if row["ms"] is not None)
    assert "has the standard variant alone" in found[4]["error"] and found[4]["error"] in output
    assert torch.backends.cudnn.enabled


def test_a_gradient_penalty_that_is_wrong_has_no_time(tmp_path, monkeypatch, precision_as_before):
    def wrong(problem):
        model = check.Reference(problem)
        for weight in model.weights.values():
            weight.data *= 1.01
        return model

    monkeypatch.setitem(second.WAYS, "lstm_triton", wrong)
    shape = ("--shape", "T=3,B=2,H=5", "--dtype", "fp32", "--device", "cpu", "--row-seconds", 0.01)
    code, output = call("second", *shape, "--results", tmp_path)
    assert code == 0 and "wrong: weight_" in output
