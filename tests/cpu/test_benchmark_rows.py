"""Cases, regimes and the results file."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lstm_triton_kernels.limit import Constants

from benchmarks import constants, rows, suites
from benchmarks.suites import FORWARD, TRAINING, Case

ROW = rows.Row(
    provider="lstm_triton", strategy="auto", suite="core", regime="cudnn-standard", mode=FORWARD, dtype="bfloat16",
    T=512, B=16, I=300, H=500, L=2, D=1, variant="standard", ms_median=2.5, ms_p20=2.25, ms_p80=3.0, us_per_step=2.441,
    cpu_us_per_call=120.0, peak_mib=12.5, error=3.1e-4, baseline_ratio=1.25, limit_us_per_step=1.5, limit_ratio=1.627,
    gpu="NVIDIA H100 80GB HBM3", driver="580.159.04", torch="2.11.0", triton="3.6.0", cudnn="91900", commit="abc",
    date="2026-11-24", baseline="torch.nn.LSTM", baseline_ms=3.125, ratio_p20=1.125, ratio_p80=1.5,
)  # fmt: skip
EMPTY = dict(
    ms_median=None, ms_p20=None, ms_p80=None, us_per_step=None, cpu_us_per_call=None, peak_mib=None,
    baseline_ratio=None, limit_us_per_step=None, limit_ratio=None, baseline_ms=None, ratio_p20=None, ratio_p80=None,
)  # fmt: skip


def test_the_columns_are_the_documented_ones():
    assert ",".join(rows.COLUMNS) == (
        "provider,strategy,suite,regime,mode,dtype,T,B,I,H,L,D,variant,ms_median,ms_p20,ms_p80,us_per_step,"
        "cpu_us_per_call,peak_mib,error,baseline_ratio,limit_us_per_step,limit_ratio,gpu,driver,torch,triton,cudnn,"
        "commit,date,plan,baseline,baseline_ms,ratio_p20,ratio_p80"
    )


def test_the_core_suite_is_every_combination():
    found = {(c.B, c.H, c.T, c.dtype, c.mode) for c in suites.cases(("core",))}
    wanted = itertools.product(
        (1, 16, 64, 128, 256), (64, 128, 256, 512, 768, 1024, 1536, 2048), (128, 512, 1024),
        ("bfloat16", "float16", "tf32", "float32"), (FORWARD, TRAINING),
    )  # fmt: skip
    assert found == set(wanted)
    assert all(c.I == c.H and c.L == c.D == 1 for c in suites.cases(("core",)))


def test_the_other_suites_hold_what_they_are_for():
    of = {name: suites.cases((name,)) for name in suites.SUITES}
    assert {(c.B, c.T, c.I, c.H, c.dtype) for c in of["anchor"]} == {
        (16, 1024, 768, 768, "float16"), (16, 1024, 768, 768, "bfloat16")
    }  # fmt: skip
    assert {c.L for c in of["deep"]} == {1, 2, 4} and {c.D for c in of["deep"]} == {1, 2}
    assert all(c.ragged for c in of["ragged"])
    assert {(c.B, c.H, c.I) for c in of["odd"]} == {(12, 500, 300)}
    assert {c.variant for c in of["variants"]} == {"coupled", "diagonal", "full"}
    assert all(c.cell and c.T == 1 for c in (*of["cell"], *of["overhead-cell"]))
    assert all(c.dtype == "float32" for name in suites.CPU_SUITES for c in of[name])
    variants = ("standard", "coupled", "diagonal", "full")
    for name, steps in (("overhead", (1, 25)), ("overhead-cell", (1,))):
        assert {(c.T, c.variant, c.mode) for c in of[name]} == set(itertools.product(steps, variants, suites.MODES))
        assert {(c.B, c.I, c.H) for c in of[name]} == {(1, 64, 64)}
    assert {(c.T, c.B, c.H, c.variant) for c in of["compile"]} == {(200, 1, 64, "standard"), (64, 16, 256, "standard")}
    assert set(suites.GPU_SUITES) | set(suites.CPU_SUITES) == set(suites.SUITES)


@given(st.sampled_from(suites.SUITES), st.sampled_from(sorted(suites.STORAGE)), st.sampled_from(suites.MODES))
def test_a_selection_is_that_part_of_everything_in_the_same_order(suite, dtype, mode):
    everything = suites.cases(suites.SUITES)
    assert [c.rank for c in everything] == sorted(c.rank for c in everything)
    assert len(set(everything)) == len(everything)
    chosen = suites.cases((suite,), (dtype,), (mode,))
    assert chosen == [c for c in everything if (c.suite, c.dtype, c.mode) == (suite, dtype, mode)]


ANCHOR = Case("anchor", T=1024, B=16, I=768, H=768, dtype="float16", mode=TRAINING)


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(), "cudnn-persistent"),
        (dict(dtype="bfloat16"), "cudnn-standard"),
        (dict(dtype="tf32"), "cudnn-standard"),
        (dict(L=2), "cudnn-standard"),
        (dict(D=2), "cudnn-standard"),
        (dict(ragged=True), "cudnn-standard"),
        (dict(H=1024), "cudnn-persistent"),
        (dict(H=1152), "cudnn-standard"),
        (dict(H=700), "cudnn-standard"),
        (dict(I=700), "cudnn-standard"),
        (dict(B=12), "cudnn-standard"),
        (dict(B=128), "cudnn-persistent"),
        (dict(B=136), "cudnn-standard"),
        (dict(H=128, dtype="bfloat16"), "cudnn-persistent"),
        (dict(H=129, dtype="bfloat16"), "cudnn-standard"),
        (dict(H=192, dtype="bfloat16", mode=FORWARD), "cudnn-persistent"),
        (dict(H=193, dtype="bfloat16", mode=FORWARD), "cudnn-standard"),
        (dict(H=100, I=3, B=1, L=4, D=2, dtype="tf32"), "cudnn-persistent"),
    ],
)
def test_the_regime_is_what_pytorch_asks_cudnn_for(change, expected):
    assert suites.regime(replace(ANCHOR, **change), "cuda") == expected
    assert suites.regime(replace(ANCHOR, **change), "cpu") == "cpu"


numbers = st.one_of(st.none(), st.floats(0, 1e12, allow_nan=False).map(lambda x: float(f"{x:.6g}")))
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=40)


@given(
    ms=numbers, ratio=numbers, error=numbers, T=st.integers(1, 10**6), text=words,
    failure=words.filter(lambda w: w.strip() and not _is_number(w)),
)  # fmt: skip
def test_what_is_written_is_read_back(tmp_path_factory, ms, ratio, error, T, text, failure):
    path = tmp_path_factory.mktemp("rows") / "x.csv"
    written = [
        replace(ROW, ms_median=ms, baseline_ratio=ratio, error=error, T=T, gpu=text),
        replace(ROW, **EMPTY, error=f"failed: {failure}"),
        replace(ROW, plan="forward U8 R16/16 K32x8x3 96x1x1 data"),
        ROW,
    ]
    for row in written:
        rows.append(path, row)
    assert rows.read(path) == written


@pytest.mark.parametrize("first", ["plan", "baseline"])
def test_a_file_from_before_there_was_a_column_is_read(tmp_path, first):
    rows.append(tmp_path / "x.csv", ROW)
    count = rows.COLUMNS.index(first)
    lines = [",".join(line.split(",")[:count]) + "\n" for line in (tmp_path / "x.csv").read_text().splitlines()]
    (tmp_path / "x.csv").write_text("".join(lines))
    old = replace(ROW, baseline_ms=None, ratio_p20=None, ratio_p80=None)
    assert rows.read(tmp_path / "x.csv") == [old] and not old.noise


@pytest.mark.parametrize(
    "ratio, low, high, noise",
    [
        (1.25, 1.125, 1.5, False), (0.8, 0.75, 0.9, False), (1.06, 0.95, 1.1, True), (0.97, 0.9, 1.0, True),
        (1.02, 0.9, 0.99, True), (0.98, 1.01, 1.1, True), (1.02, None, None, False), (None, None, None, False),
    ],
)  # fmt: skip
def test_a_ratio_that_is_not_with_its_spread_on_one_side_of_1_is_noise(ratio, low, high, noise):
    assert replace(ROW, baseline_ratio=ratio, ratio_p20=low, ratio_p80=high).noise is noise


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda text: text[:-20], "the last line is not whole"),
        (lambda text: text.replace("provider,", "who,"), "line 1"),
        (lambda text: text.replace(",512,", ",-5,", 1), "T is '-5'"),
        (lambda text: text.replace(",512,", ",five,", 1), "T is 'five'"),
        (lambda text: text.replace("2.5,", "nan,", 1), "ms_median is 'nan'"),
        (lambda text: text.replace("2.5,", "fast,", 1), "ms_median is 'fast'"),
        (lambda text: text.replace("0.00031", "wrong", 1), "error is 'wrong'"),
        (lambda text: text.replace("lstm_triton,auto,", "lstm_triton,", 1), "34 cells instead of 35"),
        (lambda text: text + '"open\n', "x.csv"),
        (lambda text: "", "x.csv"),
        (lambda text: "\udcff", "x.csv"),
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, damage, words):
    good, path = tmp_path / "a.csv", tmp_path / "x.csv"
    for target in (good, path):
        rows.append(target, ROW)
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(rows.DamagedResults, match=r"x\.csv") as error:
        rows.read(path)
    assert words in str(error.value)
    found, damaged = rows.read_all(tmp_path)
    assert found == [ROW] and [str(e) for e in damaged] == [str(error.value)]
    assert path.read_bytes() == before


def test_files_are_named_after_machine_date_and_suite_and_never_overwritten(tmp_path):
    first = rows.new_file(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-24", "anchor")
    assert first.name == "h100-80gb-hbm3-2026-11-24-anchor.csv"
    rows.append(first, ROW)
    second = rows.new_file(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-24", "anchor")
    assert second.name == "h100-80gb-hbm3-2026-11-24-anchor-2.csv"
    assert rows.slug("NVIDIA A100-SXM4-40GB") == "a100-sxm4-40gb" and rows.slug("") == "gpu"


def test_the_newest_of_rows_that_measured_the_same_counts(tmp_path):
    for count in range(1, 12):  # the eleventh run of a day is newer than the second
        rows.append(rows.new_file(tmp_path, "gpu", "2026-11-24", "core"), replace(ROW, ms_median=float(count)))
    found, damaged = rows.read_all(tmp_path)
    assert not damaged and [row.ms_median for row in rows.newest(found)] == [11.0]
    older, other = replace(ROW, date="2026-11-23", ms_median=99.0), replace(ROW, B=17)
    assert {row.ms_median for row in rows.newest([*found, older, other])} == {11.0, ROW.ms_median}


def test_constants_are_read_back_and_a_damaged_file_is_named(tmp_path):
    found = Constants(
        3000.0, {"bfloat16": 700.0}, 5500.0, 0.6, 3.0, {"counter": {1: 0.5, 132: 2.0}, "data": {4: 0.8}}, 132, 2**19
    )
    where = dict(gpu="H100", date="2026-11-24")
    constants.save(tmp_path / "h100-2026-11-24-micro.json", found, where)
    with pytest.raises(FileExistsError):
        constants.save(tmp_path / "h100-2026-11-24-micro.json", found, where)
    assert constants.load(tmp_path / "h100-2026-11-24-micro.json") == (found, where)
    newer = replace(found, copy_gb_per_s=3100.0)
    constants.save(tmp_path / "h100-2026-11-24-micro-2.json", newer, where)
    (tmp_path / "h100-2026-11-25-micro.json").write_text('{"constants": {"no": 1}}')
    known, damaged = constants.load_all(tmp_path)
    assert known == {"H100": newer}
    assert len(damaged) == 1 and "h100-2026-11-25-micro.json" in str(damaged[0])
