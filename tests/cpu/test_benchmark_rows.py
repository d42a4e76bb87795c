"""Cases, regimes and the results files."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lstm_triton_kernels.limit import Constants

from benchmarks import RESULTS, ROOT, rows, suites
from benchmarks.suites import FORWARD, TRAINING, Case

ROW = dict(
    provider="lstm_triton", strategy="auto", suite="core", regime="cudnn-standard", mode=FORWARD, dtype="bfloat16",
    T=512, B=16, I=300, H=500, L=2, D=1, variant="standard", ms_median=2.5, ms_p20=2.25, ms_p80=3.0, us_per_step=2.441,
    cpu_us_per_call=120.0, peak_mib=12.5, error=3.1e-4, baseline_ratio=1.25, limit_us_per_step=1.5, limit_ratio=1.627,
    gpu="NVIDIA H100 80GB HBM3", driver="580.159.04", torch="2.11.0", triton="3.6.0", cudnn="91900", commit="abc",
    date="2026-11-24", plan="", baseline="torch.nn.LSTM", baseline_ms=3.125, ratio_p20=1.125, ratio_p80=1.5,
    name="a workload", ms_p99=3.5, P=0,
)  # fmt: skip
FAILED = ROW | dict.fromkeys(rows.NUMBERS) | {"error": "failed: words"}


def test_the_columns_are_the_documented_ones_in_their_order():
    documented = (ROOT / "docs" / "benchmarking.md").read_text()
    assert list(ROW) == list(rows.COLUMNS) and all(f"`{name}`" in documented for name in rows.COLUMNS)
    for path in RESULTS.rglob("*.csv"):
        assert path.read_text().splitlines()[0].split(",") in rows.HEADERS


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
    assert {c.variant for c in of["variants"]} == {"coupled", "diagonal", "full", "full+current"}
    assert {(c.B, c.H) for c in of["variants"] if c.variant == "full+current"} == {(16, 768), (64, 512), (64, 1024)}
    assert all(c.cell and c.T == 1 for c in (*of["cell"], *of["overhead-cell"]))
    assert all(c.dtype == "float32" for name in suites.CPU_SUITES for c in of[name])
    variants = ("standard", "coupled", "diagonal", "full")
    for name, steps in (("overhead", (1, 25)), ("overhead-cell", (1,))):
        assert {(c.T, c.variant, c.mode) for c in of[name]} == set(itertools.product(steps, variants, suites.MODES))
        assert {(c.B, c.I, c.H) for c in of[name]} == {(1, 64, 64)}
    assert {(c.T, c.B, c.H, c.variant) for c in of["compile"]} == {(200, 1, 64, "standard"), (64, 16, 256, "standard")}
    assert set(suites.GPU_SUITES) | set(suites.CPU_SUITES) == set(suites.SUITES)
    assert {c.suite for c in suites.cases(suites.SUITES) if c.name} == {"deepbench", "workloads"}
    assert {c.suite for c in suites.cases(suites.SUITES) if c.stream} == {"streaming"}


def test_streams_are_chunks_of_few_steps_forward_alone_behind_the_first_rows():
    found = suites.cases(("streaming",))
    assert {c.T for c in found} == {1, 4, 32} and {c.B for c in found} == {1, 16, 256} and 12 <= len(found) <= 18
    sizes = {(c.H, c.dtype, c.L) for c in found}
    assert sizes == {(128, "tf32", 1), (512, "tf32", 1), (512, "float16", 2)} and all(c.I == c.H for c in found)
    assert all(c.stream and c.mode == FORWARD for c in found) and str(found[0]).endswith(" stream")
    assert max(c.rank for c in suites.cases(("anchor",))) < min(c.rank for c in found)
    assert "streaming" in suites.GPU_SUITES


def test_deepbench_has_its_training_and_its_server_cases():
    found = suites.cases(("deepbench",))
    training = {(c.T, c.H, c.B) for c in found if c.name == "DeepBench training"}
    server = {(c.T, c.H, c.B) for c in found if c.name == "DeepBench server"}
    assert len(training) == 22 and len(server) == 15 and len(found) == 2 * 22 + 15
    assert {B for *_, B in server} == {1, 2, 4} and {H for _, H, _ in server} == {256, 512, 1024, 1536, 2048}
    assert {(T, H) for T, H, _ in server} < {(T, H) for T, H, _ in training}
    assert all(c.I == c.H and c.L == c.D == 1 and c.dtype == "float16" for c in found)
    assert {c.mode for c in found if c.name == "DeepBench server"} == {FORWARD}


def test_the_workloads_are_named_and_as_published():
    of: dict = {}
    for case in suites.cases(("workloads",)):
        of.setdefault(case.name, []).append(case)
    assert len(of) == 22 and "" not in of
    assert {(c.H, c.I) for c in of["AWD-LSTM WT2"]} == {(1150, 400), (400, 1150)}
    assert {(c.L, c.D) for c in of["GNMT"]} == {(4, 1), (1, 2)} and {c.L for c in of["RNN-T"]} == {2, 3}
    assert [name for name in of if any(c.ragged for c in of[name])] == ["DeepSpeech"]
    assert {name for name in of if any(c.resets for c in of[name])} == {"R2D2", "torchrl"}
    assert {c.H for c in of["OpenAI Five"]} == {4096} and {c.D for c in of["TF-GridNet"]} == {2}
    assert {c.mode for c in of["Silero VAD"]} == {FORWARD} and {c.H for c in of["amp modelling"]} == {24, 32}
    assert {(c.name, c.I, c.H, c.P, c.D, c.variant) for own in of.values() for c in own if c.P} == {
        ("ELMo", 512, 4096, 512, 2, "standard"), ("streaming RNN-T", 640, 2048, 640, 1, "standard"),
        ("LSTMP", 512, 1024, 512, 1, "diagonal+current"),
    }  # fmt: skip
    assert all((c.layer.P, c.layer.hidden) == (c.P, c.hidden) for own in of.values() for c in own)
    assert all(c.layer.ragged == (c.ragged or c.resets > 0) for own in of.values() for c in own)


# Shapes of one's own


def test_a_shape_of_ones_own_is_read_with_what_it_does_not_say():
    whole = suites.parse_shape("T=512,B=32,I=80,H=320,L=2,D=2,P=160,lengths,resets=0.03,variant=coupled,name=a model")
    assert whole == Case(
        "own", 512, 32, 80, 320, "", L=2, D=2, P=160, ragged=True, resets=0.03, variant="coupled",
        name="a model lengths resets=0.03",
    )  # fmt: skip
    short = suites.parse_shape("H=7, T=5,B=3")
    assert short == Case("own", 5, 3, 7, 7, "") and suites.parse_shape("T=5,B=3,H=7,P=0,lengths=0,resets=0") == short
    assert str(replace(whole, dtype="tf32")).endswith("L=2 D=2 P=160 lengths resets=0.03 (a model lengths resets=0.03)")
    found = suites.own_cases([short, short], ("tf32", "float32"), suites.MODES)
    assert [(c.dtype, c.mode) for c in found] == list(itertools.product(("tf32", "float32"), suites.MODES))


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "unknown ''"),
        ("16x768", "unknown '16x768'"),
        ("T=5,B=3", "has no H: T, B and H are needed"),
        ("I=5", "has no T and no B and no H"),
        ("T=5,B=3,H=7,T=6", "T is there twice"),
        ("T=5,B=,H=7", "B needs a value"),
        ("T=5,B=3,H", "H needs a value"),
        ("T=5,B=0,H=7", "B=0 in .*: a whole number from 1"),
        ("T=5,B=3,H=7.5", "H=7.5 in"),
        ("T=5,B=3,H=7,D=3", "D=3 in .*: 1 or 2"),
        ("T=5,B=3,H=7,P=7", "P=7 in .*: a whole number below H, 0 for no projection"),
        ("T=5,B=3,H=7,P=-1", "P=-1 in"),
        ("T=5,B=3,H=7,P=2.5", "P=2.5 in"),
        ("T=5,B=3,H=7,P=", "P needs a value"),
        ("T=5,B=3,H=7,lengths=2", "lengths=2 in .*: 0 or 1"),
        ("T=5,B=3,H=7,lengths=", "lengths needs a value"),
        ("T=5,B=3,H=7,resets=1", "resets=1 in .*: a probability below 1"),
        ("T=5,B=3,H=7,resets=-0.1", "resets=-0.1 in"),
        ("T=5,B=3,H=7,variant=fast", "variant must be one of standard, .*got 'fast'"),
    ],
)
def test_a_shape_that_is_none_is_refused_with_the_reason(text, words):
    with pytest.raises(ValueError, match=words):
        suites.parse_shape(text)


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
        (dict(resets=0.03), "cudnn-persistent"),  # of the standard cell beside it, which has none
        (dict(H=1024), "cudnn-persistent"),
        (dict(P=512), "cudnn-standard"),
        (dict(H=64, P=32, dtype="tf32"), "cudnn-standard"),
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


@given(ms=st.floats(0, 9), ratio=numbers, error=numbers, T=st.integers(1, 10**6), text=words, failure=words)
def test_what_is_written_is_read_back(tmp_path_factory, ms, ratio, error, T, text, failure):
    path = tmp_path_factory.mktemp("rows") / "x.csv"
    measured = dict(ms_median=float(f"{ms:.6g}"), baseline_ratio=ratio, error=error, T=T, gpu=text)
    written = [
        ROW | measured,
        FAILED | {"error": f"failed: {failure}"},
        ROW | {"plan": "forward U8 K32x8x3, data", "P": 160},
        ROW,
    ]
    for row in written:
        rows.append(path, row)
    assert rows.read(path) == written


@pytest.mark.parametrize("first", ["plan", "baseline", "name", "ms_p99", "P"])
def test_a_file_from_before_there_was_a_column_is_read(tmp_path, first):
    path, count = tmp_path / "x.csv", rows.COLUMNS.index(first)
    rows.append(path, ROW)
    path.write_text("".join(",".join(line.split(",")[:count]) + "\n" for line in path.read_text().splitlines()))
    (old,) = rows.read(path)
    numbers = [name for name in rows.COLUMNS[count:] if name in rows.NUMBERS]
    name = {} if first in ("ms_p99", "P") else dict(name="")
    assert old == ROW | dict.fromkeys(numbers) | name and not rows.is_noise(old)


@pytest.mark.parametrize(
    "suite, sizes, name",
    [
        ("workloads", dict(T=50, B=128, I=1024, H=1024, L=4), "GNMT"),
        ("deepbench", dict(T=25, B=64, I=512, H=512, L=1), "DeepBench training"),
        ("workloads", dict(T=120, B=64, I=520, H=512, L=1), ""),  # R2D2's rows begin anew, these did not
        ("workloads", dict(T=250, B=16, I=640, H=2048, L=1), ""),  # the layer of that name is projected, this was not
        ("core", dict(T=50, B=128, I=1024, H=1024, L=4), ""),
    ],
)
def test_a_row_of_before_there_were_names_has_that_of_its_shape(tmp_path, suite, sizes, name):
    path = tmp_path / "x.csv"
    rows.append(path, ROW | sizes | dict(suite=suite))
    assert rows.read(path)[0]["name"] == "a workload"
    path.write_text("".join(line.rsplit(",", 3)[0] + "\n" for line in path.read_text().splitlines()))
    (old,) = rows.read(path)
    words = rows.shape_of(old)
    assert old["name"] == name and words.startswith(f"{name}: standard T=" if name else "standard T=")


def test_a_projection_is_among_the_sizes_of_a_row():
    assert rows.shape_of(ROW | {"P": 160}) == "a workload: standard T=512 B=16 I=300 H=500 L=2 P=160"
    assert "P=" not in rows.shape_of(ROW)


@pytest.mark.parametrize(
    "ratio, low, high, noise",
    [
        (1.25, 1.125, 1.5, False), (0.8, 0.75, 0.9, False), (1.06, 0.95, 1.1, True), (0.97, 0.9, 1.0, True),
        (1.02, 0.9, 0.99, True), (0.98, 1.01, 1.1, True), (1.02, None, None, False), (None, None, None, False),
    ],
)  # fmt: skip
def test_a_ratio_that_is_not_with_its_spread_on_one_side_of_1_is_noise(ratio, low, high, noise):
    assert rows.is_noise(ROW | dict(baseline_ratio=ratio, ratio_p20=low, ratio_p80=high)) is noise


def test_a_baselines_own_row_has_no_ratio_and_what_became_of_a_row_is_said():
    assert rows.ratio_of(ROW | {"provider": "torch.nn.LSTM"}) is None and rows.ratio_of(ROW) == 1.25
    outcomes = {"failed: x": "failed", "wrong: error 1": "wrong", "out of memory: y": "out of memory"}
    assert {words: rows.outcome_of(FAILED | {"error": words}) for words in outcomes} == outcomes
    assert (rows.outcome_of(ROW), rows.outcome_of(ROW | {"baseline_ratio": None})) == ("has a ratio", "timed alone")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda text: text[:-20], "the last line is not whole"),
        (lambda text: text.replace("provider,", "who,"), "line 1"),
        (lambda text: text.replace(",512,", ",-5,", 1), "line 2 has a number that cannot be measured"),
        (lambda text: text.replace(",512,", ",five,", 1), "line 2: .*'five'"),
        (lambda text: text.replace(",3.5,0", ",3.5,500"), "line 2 has a number that cannot be measured"),
        (lambda text: text.replace(",3.5,0", ",3.5,-1"), "line 2 has a number that cannot be measured"),
        (lambda text: text.replace(",3.5,0", ",3.5,"), "line 2: "),
        (lambda text: text.replace("2.5,", "nan,", 1), "line 2 has a number that cannot be measured"),
        (lambda text: text.replace("2.5,", "fast,", 1), "line 2: .*'fast'"),
        (lambda text: text.replace("0.00031", "wrong", 1), "line 2: .*'wrong'"),
        (lambda text: text.replace("lstm_triton,auto,", "lstm_triton,", 1), "line 2 has another number of cells"),
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
    with pytest.raises(rows.DamagedResults, match=words) as error:
        rows.read(path)
    found, damaged = rows.read_all(tmp_path)
    assert found == [ROW | {"file": "a.csv"}] and [str(e) for e in damaged] == [str(error.value)]
    assert path.read_bytes() == before and str(error.value).startswith("x.csv: ")


def test_files_are_named_after_machine_date_and_suite_and_never_overwritten(tmp_path):
    first = rows.new_file(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-24", "anchor")
    rows.append(first, ROW)
    second = rows.new_file(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-24", "anchor")
    assert [path.name for path in (first, second)] == [
        "h100-80gb-hbm3-2026-11-24-anchor.csv", "h100-80gb-hbm3-2026-11-24-anchor-2.csv"
    ]  # fmt: skip
    assert rows.slug("NVIDIA A100-SXM4-40GB") == "a100-sxm4-40gb" and rows.slug("") == "gpu"
    names = [tmp_path / f"x{number}.csv" for number in ("", "-2", "-11")]
    assert rows.in_order(reversed(names)) == names  # the eleventh run of a day is newer than the second


def test_constants_are_read_back_and_a_damaged_file_is_named(tmp_path):
    found = Constants(
        3000.0, {"bfloat16": 700.0}, 5500.0, 0.6, 3.0, {"counter": {1: 0.5, 132: 2.0}, "data": {4: 0.8}}, 132, 2**19
    )
    where, path = dict(gpu="H100", date="2026-11-24"), tmp_path / "h100-2026-11-24-micro.json"
    rows.save_constants(path, found, where)
    with pytest.raises(FileExistsError):
        rows.save_constants(path, found, where)
    assert rows.load_constants(path) == ("H100", found)
    newer = replace(found, copy_gb_per_s=3100.0, wait_us=None)
    rows.save_constants(tmp_path / "h100-2026-11-24-micro-2.json", newer, where)
    (tmp_path / "h100-2026-11-25-micro.json").write_text('{"constants": {"no": 1}}')
    known, damaged = rows.all_constants(tmp_path)
    assert known == {"H100": newer}
    assert [str(error).partition(":")[0] for error in damaged] == ["h100-2026-11-25-micro.json"]
