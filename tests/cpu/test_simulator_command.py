"""`python -m benchmarks simulate`: what it prints, its file of all suites' shapes, and what it says of bad input."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import triton
from lstm_triton_kernels.gpus import nominal_constants
from lstm_triton_kernels.limit import least_pass_us
from lstm_triton_kernels.settle import Usage
from triton.runtime.interpreter import InterpretedFunction
from typer.testing import CliRunner

from benchmarks import RESULTS, app, rows, suites
from benchmarks.simulator import kernels, passes, table
from benchmarks.simulator.kernels import Case
from benchmarks.simulator.machine import H100
from benchmarks.simulator.passes import Pass
from benchmarks.simulator.step import PHASES
from benchmarks.simulator.step_time import StepTime

SMALL = ("simulate", "--hidden", 8, "--batch", 16)
KERNELS = {"bf16": ("exchanged", "HMMA.16816.F32.BF16"), "float32": ("persistent", "FFMA")}
"""By the type: those in Gluon and those in plain Triton, and what they multiply with."""
TOO_LARGE = ("simulate", "--hidden", 8192, "--batch", 16)


def call(*arguments):
    result = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def words(output):
    return " ".join(output.replace("│", " ").split())


@pytest.mark.xdist_group("simulator")
@pytest.mark.parametrize("dtype, wait", [("bf16", "data"), ("float32", "alone")])
def test_the_json_of_a_layer_is_one_line_with_both_passes(dtype, wait):
    code, output = call(*SMALL, "--dtype", dtype, "--json")
    assert code == 0 and output.count("\n") == 1
    found = json.loads(output)
    assert list(found) == ["forward", "backward", "triton"] and found["triton"] == triton.__version__
    for one in (found["forward"], found["backward"]):
        assert list(one) == [
            "cycles", "us", "plan", "phases", "registers", "spilled", "barriers", "wavefronts", "needed", "early",
        ]  # fmt: skip
        assert list(one["phases"]) == list(PHASES)
        assert sum(one["phases"].values()) == pytest.approx(one["cycles"], abs=1)
        assert one["us"] == pytest.approx(one["cycles"] / H100.clock_ghz / 1e3, abs=1e-3)
        assert one["plan"].endswith(wait) and 0 < one["registers"] <= 255 and one["spilled"] == 0
        assert one["wavefronts"] >= one["needed"] > 0 and one["barriers"] > 0 and one["early"] == 0


@pytest.mark.xdist_group("simulator")
def test_the_text_calls_its_numbers_simulated():
    as_json = json.loads(call(*SMALL, "--json")[1])
    code, output = call(*SMALL)
    assert code == 0 and f"simulated from the code of Triton {triton.__version__}" in output
    for name in ("forward", "backward"):
        one = as_json[name]
        assert f"plan {one['plan']}" in output
        assert f"simulated {one['cycles']:.0f} cycles, {one['cycles'] / H100.clock_ghz / 1e3:.2f} us" in output
        assert f"{one['wavefronts']:.0f} wavefronts of shared memory, {one['needed']} without" in output
    assert all(f"    {phase} " in output for phase in PHASES)


@pytest.mark.xdist_group("simulator")
@pytest.mark.parametrize("dtype", KERNELS)
def test_the_instructions_of_a_step_have_their_phases(dtype):
    code, output = call(*SMALL, "--code", "--dtype", dtype)
    found = [line.split()[0] for line in output.splitlines() if line.startswith("  ")]
    assert code == 0 and set(found) <= set(PHASES) and {"products", "activations"} <= set(found)
    kernels, multiplies = KERNELS[dtype]
    assert all(f"{kernels}_{name}.py:" in output for name in ("forward", "backward"))
    of_products = [line for line in output.splitlines() if line.startswith("  products")]
    assert any(multiplies in line for line in of_products)
    assert {"poll", "sums"} <= set(found) or dtype == "float32"  # one program holds all units


def test_a_layer_without_a_plan_has_the_reason(monkeypatch):
    code, output = call(*TOO_LARGE)
    assert code == 1 and words(output).count("no persistent kernel: no tiles of the recurrent weights") == 2
    code, output = call(*TOO_LARGE, "--json")
    found = json.loads(output)
    assert code == 1 and found["triton"] == triton.__version__
    assert all(list(found[name]) == ["reason"] for name in ("forward", "backward"))
    code, output = call(*TOO_LARGE, "--all-plans")
    assert code == 1 and words(output).count("no persistent kernel") == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--hidden", 64), "needs --hidden and --batch, or --suites"),
        ((*SMALL[1:], "--dtype", "fp8"), "unknown dtype 'fp8': choose from bfloat16, float16, "),
        ((*SMALL[1:], "--variant", "odd"), "--variant: unknown 'odd': choose from standard"),
        ((*SMALL[1:], "--wait", "long"), "--wait: unknown 'long': choose from counter, data"),
        ((*SMALL[1:], "--gpu", "a100"), "--gpu: no model of 'a100': there are h100"),
        ((*SMALL[1:], "--skew", -1), "--skew"),
        ((*SMALL[1:], "--json", "--code"), "one of --json, --code, not several"),
        ((*SMALL[1:], "--out", "table.md"), "--first and --out are for --suites"),
        (("--suites", "--json"), "one of --json, --suites, not several"),
        ((*SMALL[1:], "--proj", 8), "--proj: 8 is not smaller than the 8 units of the layer"),
        (("--suites", "--proj", 8), "--suites has shapes of its own"),
        (("--suites", "--hidden", 64), "--suites has shapes of its own"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, output = call("simulate", *arguments)
    assert code == 2 and said in words(output) and not list(tmp_path.iterdir())


def test_a_projection_is_simulated_and_named(monkeypatch):
    monkeypatch.setattr(passes, "as_text", lambda case, machine: [passes.heading(case, machine), repr(case)])
    code, output = call(*SMALL, "--proj", 4)
    assert code == 0 and "B=16 H=8 P=4 standard bfloat16" in output and " P=4," in output
    assert "P=" not in call(*SMALL)[1].splitlines()[0]


def test_a_projected_layer_has_its_size_in_the_file():
    case = Case(16, 1024, variant="diagonal+current", P=512)
    limit = least_pass_us(case.layer, nominal_constants(kernels.H100), False)
    start = f"| diagonal+current | 16 | 1024 | 1 | 512 | forward | LSTMP | {PLAN} | 1234 | 0.70 | {limit:.2f} |"
    assert table.line("forward", case, invented(case, H100)).startswith(start)


def test_interpreted_kernels_cannot_be_simulated(monkeypatch):
    monkeypatch.setattr(kernels, "persistent_forward_kernel", InterpretedFunction(lambda: None))
    code, output = call(*SMALL)
    assert code == 2 and "needs a process without TRITON_INTERPRET" in words(output)


# The file of all suites' shapes


PLAN = "U8 R16/16 K32x8x3 96x1x1 counter"


def invented(case, machine):
    """A pass that nobody simulated. The backward pass of 512 units has no plan."""
    if case.backward and case.H == 512:
        raise LookupError("there is none")
    plan = SimpleNamespace(describe=lambda: PLAN)
    time = StepTime(1234.4, 0.7, dict.fromkeys(PHASES, 1.0), 10, Counter(BAR=36, MUFU=4), 300.2, 150, 0.25)
    return Pass(plan, Usage(182, 3, 1024), time)


@pytest.fixture
def simulated(monkeypatch):
    """The cases that were simulated, as they come."""
    asked = []
    monkeypatch.setattr(table, "simulate_pass", lambda case, machine: asked.append(case) or invented(case, machine))
    monkeypatch.setattr(table, "kernels_commit", lambda: "0123456")
    return asked


def test_a_shape_has_the_names_of_its_workloads():
    assert table.names_of(Case(128, 1024)).startswith("GNMT")
    assert table.names_of(Case(17, 768)) == table.names_of(Case(16, 2048, P=512)) == ""
    assert table.names_of(Case(16, 2048, P=640)) == "streaming RNN-T"


def test_the_shapes_are_those_of_the_suites_once_each_the_most_telling_first():
    found = table.shapes("bfloat16")
    assert [(case.B, case.H) for case in found[:7]] == list(table.FIRST)
    assert len(set(found)) == len(found) and {case.D for case in found} == {1, 2}
    variants = {"standard", "coupled", "diagonal", "full", "full+current", "diagonal+current"}
    assert variants | set(suites.REGULARIZED) == {case.variant for case in found} - {"norm"}
    assert Case(16, 1024, variant="diagonal+current", P=512) in found
    of_suites = {(case.variant, case.B, case.H, case.D, case.P) for case in suites.cases(suites.SUITES, ("bfloat16",))}
    assert {(case.variant, case.B, case.H, case.D, case.P) for case in found[7:]} <= of_suites
    assert any(case.H == 2048 for case in found)
    assert not any(case.H == 2048 for case in table.shapes("float32"))  # no persistent plan


def test_a_cell_has_no_persistent_kernel_and_no_line(monkeypatch):
    of_suites = suites.cases(("odd",), ("bfloat16",), ("forward",))
    cells = [replace(case, B=3, cell=True) for case in of_suites]
    monkeypatch.setattr(suites, "cases", lambda *_: [*cells, *of_suites])
    assert table.shapes("bfloat16")[7:] == [Case(case.B, case.H) for case in of_suites]


def test_the_file_grows_by_a_line_a_pass_and_is_resumed(tmp_path, simulated):
    path = tmp_path / "simulated.md"
    code, output = call("simulate", "--suites", "--first", 2, "--out", path)
    assert code == 0 and path.name in output
    text = path.read_text()
    assert f"Simulated time steps, Triton {triton.__version__}" in text and "commit 0123456" in text
    assert "Simulated, not measured" in text and "time steps, Triton" in text.splitlines()[0]
    lines = text[text.index("| standard") :].splitlines()
    expected = []
    for B, H, backward in ((16, 768, False), (16, 768, True), (64, 512, False)):
        limit = least_pass_us(Case(B, H).layer, nominal_constants(kernels.H100), backward)
        cells = f"{PLAN} | 1234 | 0.70 | {limit:.2f} | {0.7 / limit:.1f} | 36 | 300 | 150 | 182 | 3 | 0.2 |"
        name = "backward" if backward else "forward"
        expected.append(f"| standard | {B} | {H} | 1 | 0 | {name} | {table.names_of(Case(B, H))} | {cells}")
    assert lines == expected
    columns = text[: text.index("| standard")].splitlines()[-2]
    assert columns.count("|") == lines[0].count("|")

    simulated.clear()
    path.write_text(text[: text.index("| standard | 64")] + "| standard | 64 | 51")  # killed while it wrote
    assert call("simulate", "--suites", "--first", 2, "--out", path)[0] == 0
    assert path.read_text() == text
    assert simulated == [Case(64, 512), Case(64, 512, backward=True)]


@pytest.mark.parametrize("options", [("--dtype", "fp16"), ("--skew", 200)])
def test_a_file_of_something_else_is_left_alone(tmp_path, simulated, options):
    path = tmp_path / "simulated.md"
    assert call("simulate", "--suites", "--first", 1, "--out", path)[0] == 0
    before = path.read_text()
    code, output = call("simulate", "--suites", "--first", 1, "--out", path, *options)
    assert code == 2 and "was written from other kernels" in words(output)
    assert path.read_text() == before


def test_the_file_is_none_that_the_report_reads(simulated):
    path = table.default_path("bfloat16")
    assert path.parent == RESULTS and path.name.startswith("simulated-triton-") and "kernels-0123456" in path.name
    found, damaged = rows.read_all(RESULTS)
    assert not damaged and not any("simulated" in f"{row['provider']} {row['strategy']} {row['gpu']}" for row in found)
    assert path.suffix == ".md"


def test_the_commit_is_of_the_kernels(monkeypatch):
    answers = {"log": "0123456\n", "status": ""}
    monkeypatch.setattr(table.subprocess, "run", lambda command, **_: SimpleNamespace(stdout=answers[command[3]]))
    assert table.kernels_commit() == "0123456"
    answers["status"] = " M kernel.py\n"
    assert table.kernels_commit() == "0123456+"
    answers["log"] = ""
    assert table.kernels_commit() == "unknown"
