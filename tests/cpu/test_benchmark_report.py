"""The report, the README's block and the plots, from invented rows: no number here was measured."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels.limit import Constants
from rich.console import Console

from benchmarks import RESULTS, ROOT, plots, report, rows, summary
from benchmarks.console import constants_lines, line_of, means_table
from benchmarks.report import BEGIN, END
from benchmarks.rows import BASELINE
from benchmarks.suites import FORWARD, TRAINING
from benchmarks.text import number, table

GPU, CPU = "NVIDIA INVENTED 1", "Invented CPU, 1 threads"
OURS, CUDNN = ("lstm_triton", "auto"), (BASELINE, "cudnn")


def row(ratio=None, error=1e-3, *, gpu=GPU, provider=OURS, ms=1.0, **changes):
    """A row; one with words for an error has no time. Its turns differ by a tenth."""
    on_cpu, timed = gpu == CPU, not isinstance(error, str)
    values = dict.fromkeys(rows.COLUMNS) | dict(
        provider=provider[0], strategy=provider[1], suite="cpu" if on_cpu else "core", mode=FORWARD, dtype="float32",
        regime="cpu" if on_cpu else "cudnn-standard", T=64, B=16, I=256, H=256, L=1, D=1, P=0, variant="standard",
        error=error, limit_us_per_step=5.0, gpu=gpu, driver="" if on_cpu else "580.1", torch="2.13.0", triton="3.8.0",
        cudnn="" if on_cpu else "91002", commit="0123456789", date="2026-01-02", plan="", baseline=BASELINE,
        name="", file="x.csv",
    )  # fmt: skip
    if timed:
        values |= dict(ms_median=ms, ms_p20=ms, ms_p80=ms, us_per_step=15.625, cpu_us_per_call=90.0, peak_mib=1.5)
        values |= dict(limit_ratio=3.125, baseline_ratio=ratio)
    if timed and ratio is not None:
        values |= dict(baseline_ms=ms * ratio, ratio_p20=0.9 * ratio, ratio_p80=1.1 * ratio)
    return values | changes


def text_of(found, known=None, damaged=(), pictures=()):
    return report.markdown(summary.frame_of(found), known or {}, damaged, pictures)


def block_of(found):
    return report.block(summary.frame_of(found), RESULTS.relative_to(ROOT))


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def cells(line):
    """The cells of a line of a Markdown table, as a reader of Markdown splits them."""
    return [cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])*)\|", line.strip().removeprefix("|"))]


ratios = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(ratios, st.sampled_from([FORWARD, TRAINING])), min_size=1, max_size=9))
@settings(max_examples=25, deadline=None)
def test_a_mean_is_geometric_and_of_its_own_group_alone_in_both_tables(drawn):
    found = [row(ratio, mode=mode, H=n + 1) for n, (ratio, mode) in enumerate(drawn)]
    means = summary.means(summary.frame_of(found))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(means_table(found))
    printed = console.export_text()
    for line in means.to_dict("records"):
        own = [ratio for ratio, mode in drawn if mode == line["mode"]]
        mean = number(float(np.exp(np.mean(np.log(own)))))
        assert (line["mean"], line["rows"]) == (mean, str(len(own)))
        assert line["slower"] == sum(1.1 * ratio < 1 for ratio in own)
        assert line["slowest"].split()[0] == number(min(own))
        assert lines_with(printed, f" {line['mode']} ", f" {mean} ", f" {number(min(own))} ", f" {len(own)} ")
    assert len(means) == len({mode for _, mode in drawn})


@pytest.mark.parametrize("column", ["suite", "regime", "mode", "strategy", "variant", "baseline"])
def test_rows_that_differ_in_what_a_mean_is_of_are_not_averaged(column):
    found = [row(2.0), row(8.0, H=512), row(32.0, **{"B": 17, column: "another"})]
    assert sorted(summary.means(summary.frame_of(found))["mean"]) == ["32.0", "4.00"]


def test_rows_without_a_ratio_are_counted_and_named_with_their_words():
    words = {"failed: E: a | *b*": 512, "out of memory: b": 1024, "wrong: error 3.0e-01 of h": 2048}
    found = [row(2.0), *(row(error=error, H=H) for error, H in words.items()), row(H=64, ms=7.5), row(0.5, H=32)]
    own = row(1.0, provider=CUDNN)
    text = text_of([*found, own])
    for error, H in words.items():
        (line,) = lines_with(text, f"H={H} ", error.split(":")[1].split("|")[0])
        assert "lstm_triton auto" in line and cells(line)[-1].replace("\\", "") == error
    assert lines_with(text, "H=64 ", "timed alone", f"no time of {BASELINE} beside it")
    (counts,) = lines_with(text, "1 out of memory")
    assert sorted(re.findall(r"\d [a-z ]+", counts)) == ["1 failed", "1 out of memory", "1 timed alone", "1 wrong"]
    assert lines_with(text, "| 1.00 | 2 of 6 | 1 | 0.500 (0.450 to 0.550) |")  # the mean, the baseline's own not in it
    assert lines_with(block_of([*found, own]), "| core |", "| 2 of 6 | 1.00 |  | 0.500 (0.450 to 0.550) | 1 |")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(means_table([*found, own, row(1.0, provider=("[x]", "[/y]"))]))
    printed = console.export_text()
    assert (
        lines_with(printed, "1.00", "0.500", "1 failed, 1 out of memory, 1 timed alone, 1 wrong")
        and "[x] [/y]" in printed
    )


def test_the_report_has_every_figure_of_a_row():
    one = row(
        1.75, error=2.5e-4, ms=12.345, us_per_step=0.06789, cpu_us_per_call=98.7, peak_mib=4321.0,
        limit_us_per_step=0.0123, limit_ratio=5.52, L=2, D=2, variant="coupled",
    )  # fmt: skip
    (line,) = lines_with(text_of([one]), "2.5e-04")
    assert cells(line) == [
        "lstm_triton auto", FORWARD, "float32", "coupled T=64 B=16 I=256 H=256 L=2 D=2", "12.3", "torch.nn.LSTM",
        "21.6", "1.75 (1.57 to 1.93)", "0.0679", "98.7", "4,321", "0.0123", "5.52", "2.5e-04",
    ]  # fmt: skip
    (own,) = lines_with(text_of([row(1.0, provider=CUDNN)]), "| torch.nn.LSTM cudnn |", "1.0e-03")
    assert cells(own)[5:8] == ["", "", ""]  # of another moment


def test_a_row_of_a_stream_has_its_slowest_calls_in_the_report_and_as_it_is_printed():
    stream = row(1.75, ms=0.25, suite="streaming", ms_p99=0.5, T=1, us_per_step=250.0)
    text = text_of([stream, row(2.0, ms=0.75)])
    within, others = text[text.index("<summary>streaming") :], text[: text.index("<summary>streaming")]
    (heads,), (line,) = lines_with(within, "| ms | p99 ms | baseline |"), lines_with(within, " T=1 ")
    assert dict(zip(cells(heads), cells(line), strict=True))["p99 ms"] == "0.500" and report.WAITED_FOR in within
    assert "p99" not in others and report.WAITED_FOR not in others
    assert ": 0.25 ms, p99 0.5 ms, 250 us a step, torch.nn.LSTM 0.4375 ms, ratio 1.75" in line_of(stream)
    assert "p99" not in line_of(row(2.0))


@given(st.lists(st.tuples(st.none() | ratios, st.sampled_from([GPU, CPU])), max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_rows_make_texts_in_which_every_row_stands(drawn):
    found = [row(ratio, gpu=gpu, H=64 * (n + 1), I=8) for n, (ratio, gpu) in enumerate(drawn)]
    whole, brief = text_of(found), block_of(found)
    assert not re.search(r"\bnan\b|\binf\b|None of|\bNone\b(?!\.)", whole + brief)
    assert all(len(lines_with(whole, rows.shape_of(one), one["dtype"], "1.0e-03")) == 1 for one in found)
    assert ("No GPU has been measured" in brief) == (not any(gpu == GPU for _, gpu in drawn))
    assert ("No row has been measured yet." in whole) == (not drawn)
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines_with(whole + "\n" + brief, "|"))


def test_the_report_says_where_and_with_what_was_measured():
    found = [row(2.0), row(3.0, H=512), row(3.0, H=128, torch="2.14.0", commit="abc+", date="2026-03-04", file="y.csv")]
    known = {"Another": Constants(9.0, {}, wait_us={"data": {132: 0.75}}), GPU: Constants(1234.5, {"tf32": 411.0})}
    pictures = [(f"{GPU}: a plot", "invented 1.png")]
    text = text_of([row(1.0, gpu=CPU), *found], known, ["h1.csv: line 3: T is '0'"], pictures)
    places = [text.index(f"## {gpu}") for gpu in (GPU, CPU, "Another")]
    assert places == sorted(places) and "- h1.csv: line 3: T is '0'" in text
    assert "| [x.csv](x.csv) | 580.1 | 2.13.0 | 3.8.0 | 91002 | 0123456789 | 2026-01-02 | 2 |" in text
    assert "| [y.csv](y.csv) | 580.1 | 2.14.0 | 3.8.0 | 91002 | abc+ | 2026-03-04 | 1 |" in text
    assert "A `+` behind a commit" in text[places[0] : places[1]] and "+` behind" not in text[places[1] :]
    assert "](invented%201.png)" in text[places[0] : places[1]] and "| copy_gb_per_s | 1,234 |" in text
    assert "| matmul_tflop_per_s, tf32 | 411 |" in text and "| wait_us, data, 132 | 0.750 |" in text[places[2] :]
    assert constants_lines(Constants(9.0, {})) == [("copy_gb_per_s", "9.00")]


def test_the_newest_of_rows_that_measured_the_same_counts_and_the_library_stands_first():
    found = [row(9.0, date="2026-01-03"), row(1.0), row(2.0, date="2026-01-03"), row(4.0, B=17)]
    frame = summary.frame_of([row(3.0, provider=("another", "")), *found])
    assert list(frame.ratio) == [2.0, 3.0, 4.0] and list(frame.who[:2]) == ["lstm_triton auto", "another"]
    assert list(summary.frame_of([row(1.0, gpu=CPU), row(1.0)]).gpu) == [GPU, CPU]
    both = summary.frame_of([row(1.0), row(2.0, P=160)])
    assert list(both.ratio) == [1.0, 2.0] and [one.endswith("H=256 P=160") for one in both["shape"]] == [False, True]


def test_the_block_of_a_readme_says_what_a_user_gets_on_each_gpu():
    found = [row(0.5), row(2.0, H=512), row(0.98, H=64), row(4.0, mode=TRAINING), row(3.0, gpu="NVIDIA INVENTED 2")]
    by_hand = row(0.1, suite="overhead-cell", baseline="by-hand", variant="full")
    others = [row(9.0, gpu=CPU), row(9.0, provider=("lstm_triton", "persistent")), row(1.0, provider=CUDNN), by_hand]
    first, second = block_of([*found, *others]).split("**NVIDIA INVENTED 2**")
    words = "one layer, 64 to 2,048 units, 1 to 256 rows"
    mean = number((0.5 * 2.0 * 0.98) ** (1 / 3))
    assert f"| core | {words} | 4 | {mean} | 4.00 | 0.500 (0.450 to 0.550) | 1 |" in first  # 0.98 is noise
    assert f"| core | {words} | 1 | 3.00 |  | 3.00 (2.70 to 3.30) | 0 |" in second
    assert "Driver 580.1, PyTorch 2.13.0, Triton 3.8.0, cuDNN 91002, measured 2026-01-02" in first
    assert "rows of [x.csv](benchmarks/results/x.csv)" in first
    assert "](benchmarks/results/invented-1-speed-over-shapes.svg)" in first
    assert len(lines_with(first + second, "|")) == 6 and len(first.splitlines()) <= 25 and CPU not in first + second


@given(*[st.text().filter(lambda text: "benchmarks:" not in text)] * 4)
def test_a_rewritten_block_leaves_all_else_as_it_was(before, old, after, new):
    found = report.rewrite_block(f"{before}\n{BEGIN}\n{old}\n{END}\n{after}", new)
    assert found == f"{before}\n{BEGIN}\n\n{new.strip(chr(10))}\n\n{END}\n{after}"
    assert report.rewrite_block(found, new) == found


@pytest.mark.parametrize(
    "text, words",
    [
        ("nothing", f"the line {BEGIN} is missing"),
        (BEGIN, f"the line {END} is missing"),
        (f"{BEGIN} {END}", f"the line {BEGIN} is missing"),
        (f"{BEGIN}\n{BEGIN}\n{END}", f"the line {BEGIN} is there 2 times"),
        (f"{BEGIN}\n{END}\n{END}\n{END}", f"the line {END} is there 3 times"),
        (f"{END}\n{BEGIN}", f"the line {END} stands before {BEGIN}"),
    ],
)
def test_wrong_markers_are_refused_by_name(text, words):
    with pytest.raises(report.WrongMarkers, match=re.escape(words)):
        report.rewrite_block(text, "new")


@given(st.floats(1e-12, 1e12))
def test_a_number_is_shown_with_three_digits_within_half_a_percent(value):
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.005)
    shown = {None: "", 0.0: "0", 9.996: "10.0", 99.94: "99.9", 99.96: "100", 1234.5: "1,234", 3: "3", math.nan: ""}
    assert {one: number(one) for one in shown} == shown
    assert table(["a", "b"], [[" x\ny", "|"]], [1]) == "| a | b |\n| --- | ---: |\n| x y | \\| |"


# Plots


def gpu_rows():
    """A GPU's rows that fill every plot: three sizes of H and B, two modes and types."""
    sizes = ((512, 16, 256), (512, 16, 512), (512, 16, 1024), (512, 1, 512), (512, 64, 512), (64, 16, 512))
    return [
        row(2.0 if H < 1024 else 0.5, mode=mode, dtype=dtype, T=T, B=B, I=H, H=H, us_per_step=H / 100)
        for mode in (FORWARD, TRAINING) for dtype in ("bfloat16", "tf32") for T, B, H in sizes
    ]  # fmt: skip


def test_every_plot_of_every_machine_is_drawn_and_named(tmp_path):
    drawn = plots.draw_all(summary.frame_of([row(0.8, gpu=CPU), *gpu_rows()]), tmp_path)
    assert [path.name for _, path in drawn] == [
        *(f"invented-1-{stem}.svg" for stem in ("speed-over-shapes", "time-vs-hidden", "time-vs-batch", "limit")),
        *(f"invented-cpu-1-threads-{stem}.svg" for stem in ("speed-over-shapes", "limit")),  # one size of each alone
    ]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for _, path in drawn}
    for _, path in drawn:
        picture = ElementTree.parse(path).getroot()
        width, height = (float(picture.get(side).removesuffix("pt")) for side in ("width", "height"))
        shapes = len(picture.findall(".//{http://www.w3.org/2000/svg}use"))
        assert width > 500 and height > 100 and shapes > 100 and path.stat().st_size < 300_000
    before = {path: path.read_bytes() for _, path in drawn}
    plots.draw_all(summary.frame_of([row(0.8, gpu=CPU), *gpu_rows()]), tmp_path)
    assert {path: path.read_bytes() for _, path in drawn} == before


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_times_are_drawn_of_rows_that_share_all_other_sizes():
    """And the baseline's is that of its turns with the library, not its own row's."""
    own = row(1.0, provider=CUDNN, mode=FORWARD, dtype="bfloat16", T=512, B=16, I=512, H=512, us_per_step=77.0)
    frame = summary.frame_of([*gpu_rows(), own])
    figure = plots.time_against(frame[frame.who == summary.OURS], "H")
    assert "suite core, standard cell, T=512 B=16 I=H L=1 D=1" in figure.get_suptitle() and len(figure.axes) == 4
    found = lines_of(figure.axes[0])
    assert found[summary.OURS] == [[256, 2.56], [512, 5.12], [1024, 10.24]]
    assert found[BASELINE] == [[256, 5.12], [512, 10.24], [1024, 5.12]]
    assert found["limit"] == [[256, 5.0], [512, 5.0], [1024, 5.0]]
    ours, theirs = (spread.get_datalim(figure.axes[0].transData) for spread in reversed(figure.axes[0].collections))
    assert (ours.y0, ours.y1) == pytest.approx((2.56, 10.24))  # all calls of invented rows take the same time
    assert (theirs.y0, theirs.y1) == pytest.approx((0.9 * 5.12, 1.1 * 10.24))
    held, group = plots.largest_group(frame, "B")
    assert set(group.B) == {1, 16, 64} and "I=512 H=512" in held and "P=" not in held
    projected = [row(1.0, mode=FORWARD, T=512, B=B, I=512, H=512, P=160) for B in (1, 16, 64, 128)]
    held, group = plots.largest_group(summary.frame_of([*gpu_rows(), *projected]), "B")
    assert set(group.P) == {160} and held.endswith("D=1 P=160")


def test_a_limit_that_a_row_is_below_is_not_drawn():
    below = summary.frame_of([*gpu_rows(), row(1.0, limit_ratio=0.9)])
    assert plots.distance_to_limit(below) is None and "limit" not in lines_of(plots.time_against(below, "H").axes[0])


def test_the_map_is_blue_where_the_library_is_faster_and_marks_noise_and_what_has_no_time():
    found = [row(4.0), row(0.25, H=512), row(1.02, B=64), row(error="failed: x", B=64, H=512)]
    (axes,) = plots.speed_over_shapes(summary.frame_of([one | {"I": one["H"]} for one in found])).axes
    (image,) = axes.get_images()
    red, _, blue, _ = np.moveaxis(image.to_rgba(image.get_array(), norm=True), -1, 0)
    assert blue[0, 0] > red[0, 0] + 0.2 and red[0, 1] > blue[0, 1] + 0.2
    assert {text.get_text() for text in axes.texts} == {"4.00", "0.25", "(1.02)", "no\nratio"}


def test_there_is_no_plot_of_nothing(tmp_path):
    for found in ([], [row(error="failed: x")], [row(1.0, provider=CUDNN)]):
        assert plots.draw_all(summary.frame_of(found), tmp_path) == [] and not list(tmp_path.iterdir())


def test_the_committed_report_is_what_the_committed_results_make():
    """Whoever changes results or report runs `python -m benchmarks report` again."""
    frame, damaged = summary.load(RESULTS)
    known, damaged_constants = rows.all_constants(RESULTS)
    assert len(frame) and known and not damaged and not damaged_constants
    text = (RESULTS / "report.md").read_text()
    pictures = re.findall(r"!\[(.*)\]\((.*)\)", text)
    assert pictures and {path.name for path in RESULTS.glob("*.svg")} == {name for _, name in pictures}
    assert report.markdown(frame, known, [], pictures) == text
