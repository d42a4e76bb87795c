"""The texts and plots of the benchmarks, from invented rows: no number here was measured."""

import math
import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels.limit import Constants
from matplotlib import image
from rich.console import Console

from benchmarks import markdown, plots, readme, report, summary
from benchmarks.readme import BEGIN, END
from benchmarks.rows import BASELINE, DamagedResults, Row

GPU, CPU = "NVIDIA INVENTED 1", "Invented CPU, 1 threads"
FORWARD, TRAINING = "forward", "forward+backward"
OURS = ("lstm_triton", "auto")

CONSTANTS = Constants(
    copy_gb_per_s=1234.5,
    matmul_tflop_per_s={"float32": 51.0, "bfloat16": 678.0},
    l2_read_gb_per_s=5000.0,
    l2_round_trip_us=0.25,
    launch_us=2.0,
    wait_us={"counter": {1: 0.1, 132: 1.5}, "data": {132: 0.75}},
    multiprocessors=132,
    on_chip_bytes=2**19,
)


def row(ratio=None, error=1e-3, *, gpu=GPU, provider=OURS, ms=1.0, **changes):
    """A row; one with words for an error has no time. Its turns differ by a tenth."""
    timed = not isinstance(error, str)
    on_cpu = gpu == CPU
    ms = ms if timed else None
    values = dict(
        provider=provider[0], strategy=provider[1], suite="cpu" if on_cpu else "core",
        regime="cpu" if on_cpu else "cudnn-standard", mode=FORWARD, dtype="float32", T=64, B=16, I=256, H=256, L=1, D=1,
        variant="standard", ms_median=ms, ms_p20=ms, ms_p80=ms, us_per_step=15.625 if timed else None,
        cpu_us_per_call=90.0 if timed else None, peak_mib=1.5 if timed else None, error=error,
        baseline_ratio=ratio if timed else None, limit_us_per_step=5.0, limit_ratio=3.125 if timed else None, gpu=gpu,
        driver="" if on_cpu else "580.1", torch="2.13.0", triton="3.8.0", cudnn="" if on_cpu else "91002",
        commit="0123456789", date="2026-01-02",
    )  # fmt: skip
    if ratio is not None and math.isfinite(ratio) and timed:
        values |= dict(baseline_ms=ms * ratio, ratio_p20=0.9 * ratio, ratio_p80=1.1 * ratio)
    return Row(**(values | changes))


def gpu_rows():
    """A GPU's rows that fill every plot: three sizes of H, B and T, two modes and types, three providers."""
    rows = []
    for mode in (FORWARD, TRAINING):
        for dtype in ("bfloat16", "tf32"):
            for T, B, H in (
                (512, 16, 256),
                (512, 16, 512),
                (512, 16, 1024),
                (512, 1, 512),
                (512, 64, 512),
                (64, 16, 512),
            ):
                for n, provider in enumerate(((BASELINE, "cudnn"), OURS, ("torchrl", "triton"))):
                    sizes = dict(T=T, B=B, I=H, H=H)
                    us = H * B**0.5 / 100 * (1 + n)
                    rest = dict(us_per_step=us, limit_us_per_step=us / 4, limit_ratio=4.0)
                    rows.append(row(1 / (1 + n), provider=provider, mode=mode, dtype=dtype, **sizes, **rest))
    return rows


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def cells(line):
    """The cells of a line of a Markdown table, as a reader of Markdown splits them."""
    return [cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])*)\|", line.strip().removeprefix("|"))]


ratios = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(ratios, st.sampled_from([FORWARD, TRAINING]), st.sampled_from(["core", "odd"])), max_size=20))
def test_a_mean_is_geometric_and_of_its_own_group_alone(drawn):
    rows = [row(ratio, mode=mode, suite=suite) for ratio, mode, suite in drawn]
    means = summary.geometric_means(rows)
    groups = {(mode, suite) for _, mode, suite in drawn}
    assert {(mean.mode, mean.suite) for mean in means} == groups and len(means) == len(groups)
    for mean in means:
        own = [ratio for ratio, mode, suite in drawn if (mode, suite) == (mean.mode, mean.suite)]
        assert mean.ratio == pytest.approx(np.prod(np.array(own, dtype=np.longdouble)) ** (1 / len(own)), rel=1e-9)
        assert (mean.count, mean.slower) == (len(own), sum(1.1 * ratio < 1 for ratio in own))
        assert mean.worst.baseline_ratio == min(own)


@pytest.mark.parametrize("column", ["gpu", "suite", "regime", "mode", "strategy", "variant", "baseline"])
def test_rows_that_differ_in_what_a_mean_is_of_are_not_averaged(column):
    means = summary.geometric_means([row(2.0), row(8.0), replace(row(32.0), **{column: "another"})])
    assert sorted(mean.ratio for mean in means) == pytest.approx([4.0, 32.0])


def test_rows_without_a_ratio_are_counted_and_kept_apart():
    failed, alone = row(error="failed: E: words"), row(ratio=None, H=512)
    (mean,) = summary.geometric_means([row(2.0), failed, row(0.5, H=128), alone, row(math.nan, H=64), row(0.0, H=32)])
    assert mean.ratio == pytest.approx(1.0)
    assert (mean.count, mean.total, mean.slower) == (2, 6, 1)
    (noisy,) = summary.geometric_means([row(0.95), row(0.95, H=128, ratio_p80=0.99)])
    assert (noisy.count, noisy.slower) == (2, 1)  # the first's turns go beyond 1
    assert mean.untimed == (failed,)
    assert {found.H for found in mean.unpaired} == {512, 64, 32}
    assert markdown.mean_cell(mean) == "1.00 (2 of 6)"
    (none,) = summary.geometric_means([failed])
    assert (none.ratio, none.worst, none.count, none.total) == (None, None, 0, 1)
    assert markdown.mean_cell(none) == "none of 1"


def test_providers_stand_in_one_order_whichever_has_the_first_shape():
    others = [
        row(1.0, provider=(BASELINE, "cudnn"), H=512),
        row(1.0, H=512),
        row(1.0, provider=("torchrl", "triton"), H=64),
    ]
    assert [mean.name for mean in summary.geometric_means(others)] == [
        "torch.nn.LSTM cudnn", "lstm_triton auto", "torchrl triton",
    ]  # fmt: skip


@given(st.lists(st.tuples(st.none() | ratios, st.sampled_from([GPU, CPU])), max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_rows_make_texts_in_which_every_row_stands(drawn):
    rows = [row(ratio, gpu=gpu, H=64 * (n + 1), I=8) for n, (ratio, gpu) in enumerate(drawn)]
    whole, brief = report.markdown(rows, {}, []), readme.readme_block(rows, {}, "report.md")
    assert not re.search(r"\bnan\b|\binf\b|None of|\bNone\b(?!\.)", whole + brief)
    for one in rows:
        assert len(lines_with(whole, one.shape, one.dtype, "1.0e-03")) == 1
    assert (summary.NO_GPU in brief) == (not any(gpu == GPU for _, gpu in drawn))
    for line in lines_with(whole + "\n" + brief, "|"):
        assert line.startswith("| ") and line.endswith(" |")


def test_no_text_is_made_of_numbers_that_are_not_finite():
    bad = dict(ms=math.inf, us_per_step=math.nan, peak_mib=math.inf, limit_ratio=math.nan)
    rows = [row(math.nan, error=math.nan, **bad), row(math.inf, H=512)]
    text = report.markdown(rows, {}, []) + readme.readme_block(rows, {}, "r.md")
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
    assert "not finite" in text


def test_nothing_at_all_is_said_in_words():
    assert "No row has been measured yet." in report.markdown([], {}, [])
    brief = readme.readme_block([], {}, "report.md")
    assert summary.NO_GPU in brief and "No CPU result yet." in brief
    assert summary.geometric_means([]) == []
    assert summary.short_table([]).row_count == 0


def test_the_report_says_where_and_with_what_was_measured():
    rows = [
        row(2.0),
        row(3.0, date="2026-02-03", H=512),
        row(3.0, H=128, torch="2.14.0", commit="abc+", date="2026-03-04"),
    ]
    text = report.markdown([*rows, row(1.0, gpu=CPU)], {}, [])
    assert text.index(f"## {GPU}") < text.index(f"## {CPU}")
    assert "| 580.1 | 2.13.0 | 3.8.0 | 91002 | 0123456789 | 2026-01-02 to 2026-02-03 | 2 |" in text
    assert "| 580.1 | 2.14.0 | 3.8.0 | 91002 | abc+ | 2026-03-04 | 1 |" in text
    assert "device events" in text and "in turns" in text.replace("takes turns", "in turns")
    assert summary.NO_GPU not in text


def test_the_report_has_every_figure_of_a_row():
    one = row(
        1.75, error=2.5e-4, ms=12.345, us_per_step=0.06789, cpu_us_per_call=98.7, peak_mib=4321.0,
        limit_us_per_step=0.0123, limit_ratio=5.52, L=2, D=2, variant="coupled",
    )  # fmt: skip
    (line,) = lines_with(report.markdown([one], {}, []), "2.5e-04")
    assert cells(line) == [
        "lstm_triton auto", FORWARD, "float32", "coupled T=64 B=16 I=256 H=256 L=2 D=2", "12.3", "torch.nn.LSTM",
        "21.6", "1.75 (1.57 to 1.93)", "0.0679", "98.7", "4,321", "0.0123", "5.52", "2.5e-04",
    ]  # fmt: skip


def test_the_slowest_row_is_named_in_both_texts():
    rows = [row(2.0), row(0.321, H=1536, dtype="bfloat16"), row(0.9, H=512), row(error="failed: x", H=2048)]
    for text in (report.markdown(rows, {}, []), readme.readme_block(rows, {}, "r.md")):
        (line,) = lines_with(text, "0.321", "bfloat16", "standard T=64 B=16 I=256 H=1536", "2 of 3")
        assert "lstm_triton auto" in line


def test_rows_that_failed_are_named_with_their_words():
    words = {"failed: E: a": 512, "out of memory: b": 1024, "wrong: error 3.0e-01 of h": 2048}
    rows = [row(2.0), *(row(error=error, H=H) for error, H in words.items()), row(None, H=64, ms=7.5)]
    text = report.markdown(rows, {}, [])
    for error, H in words.items():
        (line,) = lines_with(text, error)
        assert f"H={H} " in line and "lstm_triton auto" in line
    assert lines_with(text, "H=64 ", f"7.50 ms, but no time of {BASELINE}")
    assert "1 failed, 1 out of memory, 1 timed alone, 1 wrong." in text
    assert "Of 5 rows 4 have no ratio: `lstm_triton auto` 1 failed, 1 out of memory, 1 timed alone, 1 wrong." in (
        readme.readme_block(rows, {}, "r.md")
    )
    assert "2.00 (1 of 5)" in text


@given(st.text(min_size=1))
@settings(max_examples=100, deadline=None)
def test_no_words_of_an_error_break_their_table(words):
    text = report.markdown([row(error=f"failed: {words}")], {}, [])
    (line,) = lines_with(text, "| failed:")
    assert len(cells(line)) == 6
    assert re.sub(r"\\(.)", r"\1", cells(line)[-1]).split() == f"failed: {words}".split()


def test_bars_and_marks_in_the_words_of_an_error_are_escaped():
    text = report.markdown([row(error="failed: a | b\n<c> *d* `e` \\| f")], {}, [])
    assert r"failed: a \| b \<c\> \*d\* \`e\` \\\| f |" in text


def test_damaged_files_are_named_without_their_folder():
    errors = [DamagedResults("/some/where else/h1-core.csv: line 3: T is '0'"), DamagedResults("no path")]
    text = report.markdown([], {}, errors)
    assert "- h1-core.csv: line 3: T is '0'\n- no path" in text
    assert "where else" not in text


def test_the_constants_stand_with_their_machine():
    text = report.markdown(
        [row(2.0), row(1.0, gpu=CPU)], {GPU: CONSTANTS, "Another, 2 threads": Constants(9.0, {})}, []
    )
    order = [text.index(f"## {name}") for name in (GPU, "Another, 2 threads", CPU)]
    assert order == sorted(order)
    own = text[order[0] : order[1]]
    for line in (
        "device memory, copy, GB/s | 1,234", "matmul, bfloat16, TFLOP/s | 678", "L2 round trip, us | 0.250",
        "on-chip memory of a multiprocessor, KiB | 512", "wait by counter, 1 program, us | 0.100",
        "wait by counter, 132 programs, us | 1.50", "wait by data, 132 programs, us | 0.750",
    ):  # fmt: skip
        assert f"| {line} |" in own
    assert "| device memory, copy, GB/s | 9.00 |" in text[order[1] : order[2]]
    assert "L2" not in text[order[1] :]


def test_the_report_links_the_plots():
    text = report.markdown([], {}, [], [("a plot", "invented 1-limit.png")])
    assert "- [a plot](invented%201-limit.png)" in text


def cpu_rows():
    rows = []
    for n, mode in enumerate((FORWARD, TRAINING), 1):
        rows.append(row(1.0, gpu=CPU, provider=(BASELINE, "aten"), mode=mode, ms=10.0 * n))
        rows.append(row(0.8, gpu=CPU, mode=mode, ms=12.5 * n))
        rows.append(row(0.5, gpu=CPU, mode=mode, ms=20.0 * n, variant="full"))
    return [*rows, row(1.25, gpu=CPU, H=999)]


def test_without_a_gpu_the_readme_claims_nothing_and_shows_the_cpu():
    text = readme.readme_block(cpu_rows(), {}, "results/report.md", [("p", "results/p.png")])
    assert "No GPU result yet: no figure of speed against cuDNN is claimed." in text
    start = "T=64 B=16 I=256 H=256 float32 | torch.nn.LSTM"
    figures = "20.0 ms | 10.0 ms | 0.500 (0.450 to 0.550) | 40.0 ms | 20.0 ms | 0.500 (0.450 to 0.550)"
    assert f"| lstm_triton auto full | {start} | {figures} |" in text
    assert "torch.nn.LSTM aten" not in text  # its own row is of another moment
    assert "1 more shape is in the report" in text and "H=999" not in text
    assert "| cpu | cpu | forward | standard | torch.nn.LSTM | 1.00 (2) |" in text  # of 0.8 and 1.25
    assert "| cpu | cpu | forward | full | torch.nn.LSTM | 0.500 (1) |" in text
    assert "[report.md](results/report.md)" in text
    assert "Plots: [p](results/p.png)." in text and "![" not in text
    assert "cudnn" not in text


def test_a_cpu_row_without_a_time_says_why():
    text = readme.readme_block(
        [*cpu_rows()[:-2], row(error="wrong: x", gpu=CPU, mode=TRAINING, variant="full")], {}, "r.md"
    )
    assert "| 20.0 ms | 10.0 ms | 0.500 (0.450 to 0.550) | wrong |  |  |" in text


def shown_ms(cell):
    value, unit = cell.split()
    return float(value.replace(",", "")) / {"ms": 1, "us": 1000}[unit]


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0.1, 10)), min_size=2, max_size=6, unique_by=lambda d: d[0]))
@settings(max_examples=50, deadline=None)
def test_the_times_and_the_ratio_of_a_line_agree_and_noise_is_called_so(drawn):
    """Whatever the baseline's own row, of another moment, says."""
    own = row(1.0, gpu=CPU, provider=(BASELINE, "aten"), ms=7.77e6)
    variants = ("standard", "coupled", "diagonal", "full", "full+current", "coupled+full")
    rows = [row(ratio, gpu=CPU, ms=ms, variant=variant) for (ms, ratio), variant in zip(drawn, variants, strict=False)]
    lines = [cells(line) for line in lines_with(readme.readme_block([own, *rows], {}, "r.md"), "lstm_triton auto", "(")]
    assert len(lines) == len(rows) and all(shown_ms(line[place]) < 1e6 for line in lines for place in (3, 4))
    for one, (layer, _, _, time, baseline, ratio) in zip(
        sorted(rows, key=lambda one: (one.variant != "standard", one.variant)), lines, strict=True
    ):
        assert layer.endswith(f" {one.variant}")
        assert shown_ms(baseline) / shown_ms(time) == pytest.approx(float(ratio.split()[0].replace(",", "")), rel=0.016)
        assert ratio.endswith("noise)") == (0.9 * one.baseline_ratio <= 1 <= 1.1 * one.baseline_ratio)


def test_a_baseline_that_is_another_is_named_and_a_call_of_microseconds_is_in_them():
    by_hand = dict(gpu=CPU, suite="overhead-cell", T=1, B=1, variant="coupled", baseline="by-hand")
    rows = [row(1.0, provider=("by-hand", "eager"), ms=0.03, **by_hand), row(0.25, ms=0.128, **by_hand)]
    rows.append(row(0.5, ms=0.06, **by_hand | dict(variant="standard", baseline=BASELINE)))
    text = readme.readme_block(rows, {}, "r.md")
    start = "lstm_triton auto coupled | overhead-cell: T=1 B=1 I=256 H=256 float32 | by-hand"
    assert f"| {start} | 128 us | 32.0 us | 0.250 (0.225 to 0.275) |" in text
    assert not lines_with(text, "by-hand eager")  # its own row, of another moment
    (line,) = lines_with(report.markdown(rows, {}, []), "by-hand eager")
    assert cells(line)[4:8] == ["0.0300", "", "", ""]


def test_a_ratio_of_an_older_file_is_shown_without_what_it_lacks():
    old = dict(gpu=CPU, baseline_ms=None, ratio_p20=None, ratio_p80=None)
    rows = [row(0.75, **old), row(0.5, variant="full", **old)]
    for text in (report.markdown(rows, {}, []), readme.readme_block(rows, {}, "r.md")):
        assert "A ratio without a time of the baseline is of an older file" in text
        assert lines_with(text, "lstm_triton auto", "| 0.750 |")
    new = [row(0.75, gpu=CPU), row(1.0, gpu=CPU, provider=(BASELINE, "aten"), baseline_ms=None)]
    assert "older file" not in report.markdown(new, {}, []) + readme.readme_block(new, {}, "r.md")


def test_with_a_gpu_the_readme_has_its_means_and_the_cpu_in_brief():
    pictures = [("first", "a.png"), ("second", "b.png")]
    text = readme.readme_block([*gpu_rows(), *cpu_rows()], {GPU: CONSTANTS}, "r.md", pictures)
    assert summary.NO_GPU not in text
    assert text.index(GPU) < text.index(CPU)
    assert "driver 580.1, PyTorch 2.13.0, Triton 3.8.0, cuDNN 91002, 2026-01-02" in text
    assert "| suite | regime | mode | variant | baseline | lstm_triton auto | torchrl triton |" in text
    assert "| core | cudnn-standard | forward | standard | torch.nn.LSTM | 0.500 (12) | 0.333 (12) |" in text
    assert "`lstm_triton auto` 4.00 times" in text
    assert "1,234 GB/s copied, 678 TFLOP/s in bfloat16, 0.750 us for one wait of 132 programs" in text
    assert "![first](a.png)" in text and "Plots: [second](b.png)." in text
    assert "lstm_triton auto full" in text


def test_two_machines_have_each_their_own():
    rows = [row(4.0), row(2.0, gpu="NVIDIA INVENTED 2")]
    for text in (report.markdown(rows, {}, []), readme.readme_block(rows, {}, "r.md")):
        first, second = text.split("INVENTED 2")[:2]
        assert "4.00 (1)" in first and "2.00 (1)" in second and "4.00" not in second


README = f"# Title\r\n\nbefore\n{BEGIN}\nold\n{END}\nafter\t \x0c\u2028 no end"
text_without_markers = st.text().filter(lambda text: "benchmarks:" not in text)


@given(text_without_markers, text_without_markers, text_without_markers, text_without_markers)
def test_a_rewritten_block_leaves_all_else_as_it_was(before, old, after, block):
    new = readme.rewrite_block(f"{before}\n{BEGIN}\n{old}\n{END}\n{after}", block)
    assert new.startswith(f"{before}\n{BEGIN}\n") and new.endswith(f"\n{END}\n{after}")
    between = new[len(f"{before}\n{BEGIN}\n") : -len(f"\n{END}\n{after}")]
    assert between.strip("\n") == block.strip("\n")
    assert readme.rewrite_block(new, block) == new


def test_a_block_is_rewritten_with_blank_lines_around_it():
    assert readme.rewrite_block(README, "new\nlines\n") == README.replace("\nold\n", "\n\nnew\nlines\n\n")
    assert readme.rewrite_block(readme.rewrite_block(README, "new"), "") == README.replace("old", "")


@pytest.mark.parametrize(
    "text, words",
    [
        ("nothing", f"the line {BEGIN} is missing"),
        (BEGIN, f"the line {END} is missing"),
        (f"{END}\n", f"the line {BEGIN} is missing"),
        (f"{BEGIN} {END}", f"the line {BEGIN} is missing"),
        (f"{BEGIN}\n{BEGIN}\n{END}", f"the line {BEGIN} is there 2 times"),
        (f"{BEGIN}\n{END}\n{END}\n{END}", f"the line {END} is there 3 times"),
        (f"{END}\n{BEGIN}", f"the line {END} stands before {BEGIN}"),
    ],
)
def test_wrong_markers_are_refused_by_name(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        readme.rewrite_block(text, "new")


def test_a_block_with_a_marker_is_refused():
    with pytest.raises(ValueError, match="itself contains"):
        readme.rewrite_block(README, f"a\n{END}\nb")


def test_the_short_table_shows_means_and_what_failed():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    failed = row(error="out of memory: [bold]x[/nonsense]", H=64)
    console.print(summary.short_table([row(4.0), row(1.0, H=512), failed, row(1.0, provider=("[x]", "[/y]"))]))
    text = console.export_text()
    (line,) = lines_with(text, "lstm_triton auto")
    assert line.split()[-8:] == ["2.00", "1.00", "2", "1", "1", "out", "of", "memory"]
    assert "[x] [/y]" in text


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, ""), (0.0, "0"), (1.0, "1.00"), (9.996, "10.0"), (99.94, "99.9"), (99.96, "100"), (1234.5, "1,234"),
        (132, "132"), (3, "3"), (0.05, "0.0500"), (math.nan, "not finite"), (-math.inf, "not finite"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, shown):
    assert summary.number(value) == shown


@given(st.floats(1e-12, 1e12))
def test_a_shown_number_is_within_half_a_percent(value):
    assert float(summary.number(value).replace(",", "")) == pytest.approx(value, rel=0.005)


def pixels(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(BytesIO(png))[..., :3]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots") / "new"
    return folder, plots.draw_all([*cpu_rows(), *gpu_rows()], folder)


def test_every_plot_of_every_machine_is_drawn_and_named(drawn):
    folder, pictures = drawn
    found = [path.name for _, path in pictures]
    on_gpu = ("speed-over-shapes", "time-vs-hidden", "time-vs-batch", "time-vs-steps", "limit")
    assert found == [
        *(f"invented-1-{stem}.png" for stem in on_gpu),
        *(f"invented-cpu-1-threads-{stem}.png" for stem in ("speed-over-shapes", "limit")),  # one size of each alone
    ]
    assert {path.name for path in folder.iterdir()} == set(found)
    assert all(title.startswith((GPU, CPU)) for title, _ in pictures)


def test_plots_are_pictures_with_something_on_them(drawn):
    _, pictures = drawn
    for _, path in pictures:
        picture = pixels(path.read_bytes())
        assert picture.shape[0] > 200 and picture.shape[1] > 500
        inked = (np.abs(picture - picture[0, 0]).max(axis=-1) > 0.1).mean()
        assert inked > 0.01, path.name
        colours = np.unique((picture * 7).astype(np.int32) @ (64, 8, 1))
        assert len(colours) > 10, path.name


def test_a_plot_shows_what_the_rows_say():
    rows = gpu_rows()
    same = plots.time_against(rows, "H")
    assert (pixels(same) == pixels(plots.time_against(rows, "H"))).all()
    slower = [replace(one, us_per_step=9 * one.us_per_step) if one.name == "torchrl triton" else one for one in rows]
    assert same != plots.time_against(slower, "H")


def test_a_baseline_is_drawn_with_the_time_of_its_turns_with_the_library():
    own = row(1.0, provider=(BASELINE, "cudnn"), ms=153.0, us_per_step=2391.0, limit_ratio=1.78)
    ours = row(0.98, ms=104.0, us_per_step=1625.0, limit_ratio=1.22)
    other = row(1.0, provider=(BASELINE, "cudnn"), ms=9.0, H=512)
    alone, beside, apart = summary.in_turns_with_ours([own, ours, other])
    assert (beside, apart) == (ours, other)
    assert alone.ms_median == ours.baseline_ms and (alone.ms_p20, alone.ms_p80) == (None, None)
    assert alone.us_per_step / ours.us_per_step == pytest.approx(0.98, rel=1e-3)
    assert alone.limit_ratio == pytest.approx(1.78 * 0.98 * 104 / 153)
    assert summary.in_turns_with_ours([own, row(error="failed: x")])[0] == own


def test_every_plot_takes_those_times(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "time_against", lambda rows, size: seen.append(list(rows)))
    monkeypatch.setattr(plots, "distance_to_limit", lambda rows: seen.append(list(rows)))
    rows = [replace(one, ms_median=99.0) if one.is_baseline else one for one in gpu_rows()]
    plots.draw_all(rows, tmp_path)
    assert seen == [summary.in_turns_with_ours(rows)] * 4
    assert all(one.ms_median == 0.5 for one in seen[0] if one.is_baseline)


def test_a_map_marks_what_is_noise():
    clear, noise = row(1.05, ratio_p20=1.01), row(1.05)
    assert noise.noise and not clear.noise
    rest = [row(2.0, B=64)]
    assert plots.speed_over_shapes([clear, *rest]) != plots.speed_over_shapes([noise, *rest])


def test_the_map_is_blue_where_the_library_is_faster_and_red_where_it_is_slower():
    def share(ratio, near, far):
        picture = pixels(plots.speed_over_shapes([row(ratio), row(ratio, B=64)]))
        return (picture[..., near] - picture[..., far] > 0.2).mean()

    red, blue = 0, 2
    assert share(4.0, blue, red) > 0.3 > 0.2 > share(4.0, red, blue)
    assert share(0.25, red, blue) > 0.3 > 0.2 > share(0.25, blue, red)


def test_there_is_no_plot_of_nothing(tmp_path):
    failed = row(error="failed: x", limit_us_per_step=None)
    for rows in ([], [failed]):
        assert plots.draw_all(rows, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    assert plots.time_against([row(1.0)], "H") is None  # a single value of H makes no line
    assert plots.distance_to_limit([row(1.0, limit_ratio=None)]) is None
    assert plots.speed_over_shapes([row(1.0, provider=(BASELINE, "cudnn"))]) is None
    assert plots.distance_to_limit([row(1.0)]) is not None
    assert plots.speed_over_shapes([row(1.0), row(error="failed: x", H=512)]) is not None


def test_points_of_a_line_share_all_other_sizes():
    fixed, points = plots.largest_group(gpu_rows(), "H")
    assert {(one.T, one.B, one.L, one.D, one.I == one.H) for one in points} == {(512, 16, 1, 1, True)}
    assert {one.H for one in points} == {256, 512, 1024}
    assert fixed == {"suite": "core", "variant": "standard", "T": 512, "B": 16, "L": 1, "D": 1, "I": "H"}
    fixed, points = plots.largest_group(gpu_rows(), "B")
    assert {one.B for one in points} == {1, 16, 64} and fixed["H"] == fixed["I"] == 512
    assert plots.largest_group([], "B") == ({}, [])


def test_of_equal_groups_the_first_measured_is_drawn():
    small = [row(1.0, H=64, I=64, T=T, provider=(name, "")) for T in (16, 32) for name in ("a", "b", "c")]
    first = [row(1.0, H=512, I=512, T=T) for T in (16, 32)]
    assert {one.H for one in plots.largest_group([*first, *small], "T")[1]} == {512}
    assert {one.H for one in plots.largest_group([*small, *first], "T")[1]} == {64}
