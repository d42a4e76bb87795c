"""The benchmark of a step alone: its passes are those of the reference, and what is wrong is not timed."""

import pytest
import torch

from benchmarks import steps
from benchmarks.check import distances
from lstm_triton import autograd

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(steps, "TIMED", 4)


@pytest.mark.parametrize(
    "variant, P", [("standard", 0), ("coupled", 0), ("diagonal", 0), ("full", 0), ("full+current", 0), ("standard", 5)]
)
def test_both_passes_are_timed_and_right(variant, P):
    (case,) = steps.cases([(3, 12, "float32", variant)], P)
    forward, backward = steps.measure(case, None, CPU)
    assert [forward.backward, backward.backward] == [False, True]
    for row in (forward, backward):
        assert 0 < row.us_least <= row.us <= row.us_most and row.plan.endswith("alone") and row.estimate_us > 0
        assert 0 < row.error < steps.ALLOWED["float32"]
        assert f"{row.us:.3f} us a step" in str(row) and row.P == P and (f" P={P}" in str(row)) == (P > 0)


def test_the_passes_of_a_normalised_layer_are_right_by_the_other_kernels():
    """Triton's interpreter has not the persistent ones."""
    (case,) = steps.cases([(3, 8, "float32", "coupled+diagonal+norm")])
    passes = steps.Passes(case, CPU)
    passes.engine = autograd.loop_of("stepwise")
    assert max(distances(passes.results(), passes.expected()).values()) < 1e-5


def test_a_wrong_result_is_not_timed(monkeypatch):
    wanted = steps.Passes.expected

    def another(passes):
        found = wanted(passes)
        return found | {"d_gates": found["d_gates"] * 1.1}

    monkeypatch.setattr(steps.Passes, "expected", another)
    (case,) = steps.cases([(3, 12, "float32", "standard")])
    (row,) = steps.measure(case, None, CPU)
    assert row.us is None and row.error.startswith("RuntimeError: wrong: d_gates is off by 9")
    assert row.error in str(row)


@pytest.mark.parametrize("H, dtype, wait", [(300, "float32", "counter"), (12, "float16", None)])
def test_what_has_no_plan_says_so(H, dtype, wait):
    (case,) = steps.cases([(3, H, dtype, "standard")])
    (row,) = steps.measure(case, wait, CPU)
    assert row.us is None and "strategy 'persistent' cannot run here" in row.error


def test_rows_are_lines_of_the_file(tmp_path):
    (case,) = steps.cases([(3, 12, "float32", "standard")])
    found = list(steps.run([(case, None)], CPU, tmp_path / "steps.jsonl"))
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == len(found) == 2
