"""`python -m benchmarks`: what it prints and writes, and what it says of bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import RESULTS, ROOT, app, plots, readme, report, rows, suites
from benchmarks.providers import PROVIDERS

RECORDED = Path(__file__).parent.parent / "data" / "cpu-recorded.csv"


def call(*arguments):
    result = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "option, wrong, known",
    [
        ("--suite", "cores", [*suites.SUITES, "gpu"]),
        ("--provider", "cudnn", list(PROVIDERS)),
        ("--dtype", "fp8", list(suites.STORAGE)),
        ("--mode", "backward", list(suites.MODES)),
    ],
)
def test_what_is_unknown_is_answered_with_what_exists(tmp_path, option, wrong, known):
    code, output = call("run", option, wrong, "--device", "cpu", "--results", tmp_path)
    assert code == 2 and f"{option}: unknown '{wrong}'" in output
    assert all(name in output for name in known)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("run", "--device", "tpu"), "unknown device 'tpu'"),
        (("run", "--device", "meta"), "cannot run on 'meta'"),
        (("run", "--device", "cuda:99"), "there is no cuda:99"),
        (("run", "--device", "cpu", "--suite", "cpu", "--provider", "lstm_triton:torch"), "nothing to measure"),
        (("run", "--device", "cpu", "--budget", "0"), "--budget"),
        (("run", "--device", "cpu", "--constants", "missing.json"), "missing.json"),
        (("report", "--results", "missing"), "there is no folder missing"),
        (("report", "--readme", "missing.md"), "there is no file missing.md"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    where = () if arguments[0] == "report" else ("--results", tmp_path)
    code, output = call(*arguments, *where)
    assert code == 2 and words in output and not list(tmp_path.glob("*.csv"))


def test_a_provider_that_is_not_installed_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.providers.find_spec", lambda name: None)
    code, output = call("run", "--provider", "flashrnn", "--device", "cpu", "--results", tmp_path)
    assert code == 2 and "flashrnn is not installed" in output


def test_a_folder_that_cannot_be_written_is_named_first(tmp_path):
    (tmp_path / "file").write_text("")
    code, output = call("run", "--device", "cpu", "--suite", "cpu", "--results", tmp_path / "file" / "folder")
    assert code == 2 and "cannot write to" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_step_by_itself_needs_a_gpu(tmp_path):
    code, output = call("steps", "--device", "cpu", "--results", tmp_path)
    assert code == 2 and "times persistent kernels: needs a GPU" in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["16", "16x", "x768", "0x768", "16x768x2", "axb"])
def test_a_shape_is_rows_times_units(text):
    assert app.parse_shape("16x768") == (16, 768)
    with pytest.raises(typer.BadParameter, match=f"--shape: '{text}' is not rows x units, as 16x768"):
        app.parse_shape(text)


def test_without_a_gpu_the_visit_to_one_says_so(tmp_path):
    code, output = call("gpu", "--results", tmp_path)
    assert code == 2 and "there is no GPU" in output and not list(tmp_path.iterdir())


def test_a_run_measures_the_constants_then_appends_its_rows(tmp_path):
    code, output = call(
        "run", "--suite", "cell", "--dtype", "bfloat16", "--mode", "forward", "--provider", "torch.nn.LSTM",
        "--provider", "lstm_triton", "--device", "cpu", "--row-seconds", "0.01", "--results", tmp_path,
    )  # fmt: skip
    assert code == 0, output
    (path,) = tmp_path.glob("*.csv")
    found = rows.read(path)
    assert path.name.startswith("cpu-") and path.name.endswith("-cell.csv")
    assert len(found) == 2 * len(suites.cases(("cell",), ("bfloat16",), ("forward",))) and all(r.timed for r in found)
    assert {row.provider for row in found} == {"torch.nn.LSTM", "lstm_triton"}
    assert path.name in output and f"{found[0].ms_median:.4g} ms" in output
    (micro,) = tmp_path.glob("*-micro.json")
    constants = json.loads(micro.read_text())["constants"]
    assert constants["copy_gb_per_s"] > 0 and constants["wait_us"] is None


def test_a_budget_that_is_spent_leaves_rows_out_and_says_so(tmp_path):
    shutil.copy(RECORDED, tmp_path / "other.csv")
    code, output = call("run", "--suite", "cpu", "--device", "cpu", "--budget", "1", "--results", tmp_path)
    total = sum(p.refuses(c, "cpu") is None for c in suites.cases(("cpu",)) for p in PROVIDERS.values())
    assert code == 0 and f"no time for {total} of {total} rows" in output
    assert [path.name for path in tmp_path.glob("*.csv")] == ["other.csv"]


def test_a_report_of_a_recorded_run_names_what_is_damaged_and_leaves_it_alone(tmp_path):
    shutil.copy(RECORDED, tmp_path / "cpu-2026-11-24-cpu.csv")
    damaged = tmp_path / "h100-2026-11-24-core.csv"
    damaged.write_text("provider,strategy\nlstm_triton,auto\n")
    readme = tmp_path / "README.md"
    readme.write_text("# before\n<!-- benchmarks: begin -->\nwas here\n<!-- benchmarks: end -->\nafter\n")
    code, output = call("report", "--results", tmp_path, "--readme", readme)
    assert code == 0 and "left out, damaged" in output and damaged.name in output
    assert damaged.read_text() == "provider,strategy\nlstm_triton,auto\n"
    written = (tmp_path / "report.md").read_text()
    assert damaged.name in written and PROVIDERS["torch.nn.LSTM:aten"].leaves_out in written
    text = readme.read_text()
    assert text.startswith("# before\n") and text.endswith("after\n") and "was here" not in text
    assert "No GPU result yet" in text
    recorded = rows.read(RECORDED)
    figure = next(row for row in recorded if row.provider == "lstm_triton" and row.timed)
    assert f"{figure.baseline_ratio:.3g}" in written
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert all(picture.name in written for picture in pictures)


@pytest.mark.parametrize("own", [True, False], ids=["the checkout's results", "others"])
def test_a_report_leaves_every_readme_alone_that_is_not_named(tmp_path, monkeypatch, own):
    written = []
    monkeypatch.setattr(app, "write_whole", lambda path, content: written.append(path))
    monkeypatch.setattr(plots, "write_whole", lambda path, content: written.append(path))
    shutil.copy(RECORDED, tmp_path / "cpu-2026-11-24-cpu.csv")
    code, output = call("report", *(() if own else ("--results", tmp_path)))
    assert code == 0 and "README" not in output
    assert written and {path.suffix for path in written} == {".md", ".png"}
    assert {path.name for path in written if path.suffix == ".md"} == {"report.md"}


def test_the_readme_is_what_the_committed_results_make_of_it(tmp_path):
    """The block between the markers is generated; whoever changes results or report runs the report again."""
    found, known, damaged = app.load_results(RESULTS)
    assert found and known and not damaged
    pictures = [(title, picture.name) for title, picture in plots.draw_all(found, tmp_path)]
    assert pictures and all((RESULTS / name).exists() for _, name in pictures)
    text = (ROOT / "README.md").read_text()
    assert readme.rewrite_block(text, app.readme_block(RESULTS, ROOT / "README.md", pictures)) == text
    assert (RESULTS / "report.md").read_text() == report.markdown(found, known, [], pictures, app.leaves_out())
