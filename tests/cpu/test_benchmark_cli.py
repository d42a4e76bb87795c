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

from benchmarks import app, rows, suites
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
        (("steps", "--device", "cpu"), "times persistent kernels: needs a GPU"),
        (("report", "--results", "missing"), "'missing' does not exist"),
        (("report", "--readme", "missing.md"), "'missing.md' does not exist"),
        (("report", "--readme", "file"), "the line <!-- benchmarks: begin --> is missing"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("command", ["run", "micro", "steps", "warm", "report", "gpu", "simulate"])
def test_the_help_of_every_command_has_an_example(command):
    code, output = call(command, "--help")
    assert code == 0 and f"Example: python -m benchmarks {command}" in output


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
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(picture.name in written for picture in pictures)

    assert call("report", "--results", tmp_path, "--readme", readme)[0] == 0
    text = readme.read_bytes().decode()
    assert text.startswith("# before\n") and text.endswith("-->\nafter\r\n") and "was here" not in text
    assert "No GPU has been measured" in text
