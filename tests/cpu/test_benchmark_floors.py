"""Floors: what a GPU measured before, and rows that are slower now. No number here was measured."""

import json

import pytest

from benchmarks import RESULTS, app, bench, regressions, rows, suites, timing
from benchmarks.suites import FORWARD, TRAINING
from tests.cpu.test_benchmark_cli import ONE_SUITE, call

GPU = "NVIDIA INVENTED 1"


def row(us=10.0, **changes):
    values = dict.fromkeys(rows.COLUMNS, "") | dict.fromkeys(rows.NUMBERS) | dict(
        provider="lstm_triton", strategy="auto", suite="workloads", name="GNMT", regime="cudnn-standard", mode=FORWARD,
        dtype="float16", T=50, B=128, I=1024, H=1024, L=4, D=1, P=0, variant="standard", us_per_step=us, gpu=GPU,
        date="2026-01-02",
    )  # fmt: skip
    return values | changes


def test_of_each_shape_the_newest_time_of_the_library_on_a_gpu_is_the_floor():
    found = [
        row(7.0, date="2026-01-03"), row(9.0), row(5.0, mode=TRAINING), row(None, date="2026-01-04"),
        row(1.0, provider="torch.nn.LSTM", strategy="cudnn"), row(1.0, strategy="persistent"),
        row(1.0, gpu="a CPU", regime="cpu"), row(3.0, gpu="NVIDIA INVENTED 2"),
    ]  # fmt: skip
    floors = regressions.floors_of(found)
    assert {gpu: sorted(own.values()) for gpu, own in floors.items()} == {GPU: [5.0, 7.0], "NVIDIA INVENTED 2": [3.0]}
    assert floors[GPU][regressions.key_of(row())] == 7.0


@pytest.mark.parametrize(
    "change, slower",
    [
        (dict(us=10.9), False), (dict(us=11.1), True), (dict(us=5.0), False), (dict(us=None), False),
        (dict(us=99.0, name="another"), False), (dict(us=99.0, H=1025), False), (dict(us=99.0, mode=TRAINING), False),
        (dict(us=99.0, P=512), False),
        (dict(us=99.0, strategy="persistent"), False), (dict(us=99.0, regime="cpu"), False),
    ],
)  # fmt: skip
def test_a_row_is_slower_where_it_takes_a_tenth_longer_than_its_own_floor(change, slower):
    floors = regressions.floors_of([row(10.0)])[GPU]
    found = regressions.slower_rows([row(10.0, dtype="tf32"), row(**change)], floors)
    assert [(one.row["us_per_step"], one.floor) for one in found] == [(change["us"], 10.0)] * slower


def test_the_slowest_stands_first_with_what_it_took_before():
    floors = regressions.floors_of([row(10.0), row(2.0, B=64)])[GPU]
    first, second = map(str, regressions.slower_rows([row(12.0), row(8.0, B=64)], floors))
    words = "GNMT: standard T=50 B=64 I=1024 H=1024 L=4: 8 us a step, 4.00 times its floor of 2"
    assert first == f"workloads forward float16 {words}" and "12 us a step, 1.20 times its floor of 10" in second


def test_floors_are_written_from_results_files_and_read_back(tmp_path):
    results, out = tmp_path / "results", tmp_path / "floors"
    (results / "older").mkdir(parents=True)
    rows.append(results / "older" / "z.csv", row(3.0))  # of the same date as the next
    rows.append(results / "older" / "z.csv", row(5.0, B=64))
    rows.append(results / "a.csv", row(4.0))
    rows.append(results / "a.csv", row(6.0, P=512))
    (results / "b.csv").write_text("damaged")
    code, output = call("floors", "--results", results, "--out", out)
    assert code == 0 and "left out, damaged: b.csv" in output and [path.name for path in out.iterdir()] == [
        "invented-1.json"
    ]  # fmt: skip
    assert regressions.load(GPU, out) == {
        regressions.key_of(row()): 4.0, regressions.key_of(row(P=512)): 6.0, regressions.key_of(row(B=64)): 5.0
    }  # fmt: skip
    assert regressions.load("another", out) == {}
    text = (out / "invented-1.json").read_text()
    assert json.loads(text)["gpu"] == GPU and len(text.splitlines()) == 5 and text.count('"P"') == 1


class OneMillisecond:
    """In the place of the process that measures: every call takes a millisecond."""

    def __init__(self, *_):
        pass

    def measure(self, *_):
        return bench.Measurement(timing.columns([1.0, 1.0], [1.0, 1.0]))

    def close(self):
        pass


@pytest.mark.parametrize("options, code", [((), 1), (("--no-floors",), 0)])
def test_a_run_that_is_slower_than_its_floors_says_so_after_all_rows_and_fails(tmp_path, monkeypatch, options, code):
    """As on a GPU, of which the run has no more than the name."""
    cases = suites.cases(("cell",), ("bfloat16",), (FORWARD,))
    first, second = ({key: getattr(case, key) for key in regressions.KEY} for case in cases[:2])
    floors = {regressions.key_of(first): 10.0, regressions.key_of(second): 950.0}
    monkeypatch.setattr(regressions, "has_floor", lambda row: row["provider"] == "lstm_triton")
    monkeypatch.setattr(regressions, "load", lambda gpu: floors)
    monkeypatch.setattr(app, "constants_of", lambda *_: None)
    monkeypatch.setattr(app, "Worker", OneMillisecond)
    found, output = call(*ONE_SUITE, *options, "--results", tmp_path)
    (path,) = tmp_path.glob("*.csv")
    assert found == code and len(rows.read(path)) > len(cases)
    assert output.count("1e+03 us a step, 100.00 times its floor of 10") == output.count("its floor") == code
    assert ("slower than before" in output) == bool(code)


def test_the_committed_floors_are_what_the_committed_results_make(tmp_path):
    """Whoever changes results runs `python -m benchmarks floors --results benchmarks/results` again."""
    written, damaged = regressions.write(RESULTS, tmp_path)
    committed = {path.name: path.read_text() for path in regressions.FLOORS.iterdir()}
    assert {path.name: path.read_text() for path in written} == committed and not damaged
