"""The end of a training run: the table of results, the plot of the curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lstm_triton.cli.errors import UserError
from lstm_triton.cli.training import WARM_UP_STEPS, Run

SMOOTHED_PARTS = 20
"""A plotted curve is smoothed over such a part of it."""

RATIO_STEPS = 20
"""As many steps after the warm-up make a ratio of two speeds.

Two models that compute the same (the default sizes, a CPU with other work) came out between 0.73 and 1.29 times as fast
as each other by one step, between 0.82 and 1.16 by the median of 2, between 0.88 and 1.02 by that of 20.
"""

BASELINE_COLOUR = "#222222"

PLOT_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg")
"""Formats that matplotlib writes without another program; PostScript, which has no transparency, is left out."""


def results_table(run: Run) -> Table:
    """A row per learner: size, validation loss, speed, and how the curve differs from the baseline's.

    Every learner has made at least one step in this process, and an evaluation.
    """
    table = Table(
        title=f"after {run.step:,} steps of {run.characters_per_step:,} characters",
        caption=_caption(run),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("variant", no_wrap=True)
    for heading in (
        "parameters",
        "validation\nbits/char",
        "chars/s",
        "ratio to\ntorch.nn.LSTM",
        "largest\ndifference",
    ):
        table.add_column(heading, justify="right")
    baseline = run.baseline
    comparable = len(baseline.seconds) >= WARM_UP_STEPS + RATIO_STEPS
    for learner in run.learners:
        ratio = baseline.seconds_per_step() / learner.seconds_per_step()
        table.add_row(
            learner.name,
            f"{learner.parameters:,}",
            f"{learner.validation[run.step]:.3f}",
            f"{run.characters_per_step / learner.seconds_per_step():,.0f}",
            f"{ratio:.2f}x" if comparable else "-",
            f"{learner.largest_difference(baseline):.1e}" if learner is not baseline else "-",
        )
    return table


def _caption(run: Run) -> str:
    counted = len(run.baseline.seconds)
    left_out = f"without the first {WARM_UP_STEPS}" if counted > WARM_UP_STEPS else "warm-up included: too few steps"
    caption = (
        f"chars/s: median over {counted:,} training steps (forward, backward, clipping, AdamW; {left_out}); "
        "the models take turns step by step. "
    )
    if counted < WARM_UP_STEPS + RATIO_STEPS:
        caption += f"A ratio needs {WARM_UP_STEPS + RATIO_STEPS} steps. "
    caption += "Largest difference: between training losses of the same step, bits/char."
    if run.settings.variants != ("standard",):
        caption += (
            " All variants are compared to the standard torch.nn.LSTM; they start from those of its weights "
            "that they have."
        )
    return caption


def smoothed(losses: Sequence[float]) -> list[float]:
    """Centred moving average over a share of the curve; the window shrinks towards both ends, so that nothing lags."""
    radius = len(losses) // (2 * SMOOTHED_PARTS)
    averages = []
    for center in range(len(losses)):
        reach = min(radius, center, len(losses) - 1 - center)
        averages.append(fmean(losses[center - reach : center + reach + 1]))
    return averages


def check_plot(path: Path) -> None:
    """Raise UserError if the suffix of a plot's name is that of no format that it could be drawn in."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise UserError(
            f"--plot {path}: the suffix is the format of the curves, give one of {', '.join(PLOT_SUFFIXES)}"
        )


def plot_curves(run: Run, path: Path) -> bytes:
    """A picture in the format of the suffix of `path`, which is not written to.

    Training and validation curves above, the distance of the training curves to the baseline below.
    """
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    curves, distances = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    assert isinstance(curves, Axes) and isinstance(distances, Axes)
    steps = range(1, run.step + 1)
    baseline = smoothed(run.baseline.losses)
    colours = [BASELINE_COLOUR, *(colormaps["tab10"](index) for index in range(len(run.variants)))]

    # The baseline comes last and dashed, so that a curve equal to it shows through.
    for learner, colour in reversed(list(zip(run.learners, colours, strict=True))):
        line = "--" if learner is run.baseline else "-"
        losses = smoothed(learner.losses)
        curves.plot(steps, learner.losses, color=colour, linewidth=0.6, alpha=0.25)
        curves.plot(
            steps,
            losses,
            line,
            color=colour,
            linewidth=1.8,
            label=f"{learner.name}, {learner.validation[run.step]:.3f}",
        )
        curves.plot(*zip(*sorted(learner.validation.items()), strict=True), "o", color=colour, markersize=4)
        distances.plot(
            steps, [mine - theirs for mine, theirs in zip(losses, baseline, strict=True)], line, color=colour
        )

    handles, labels = curves.get_legend_handles_labels()
    curves.legend(handles[::-1], labels[::-1], title="model, final validation loss", frameon=False)
    curves.set_title(
        f"Character models: hidden {run.settings.hidden}, layers {run.settings.layers}, {run.settings.dtype} on "
        f"{run.world.description}\nlines: training (smoothed), dots: validation",
        loc="left",
    )
    curves.set_ylabel("loss in bits per character")
    distances.set_ylabel("minus torch.nn.LSTM")
    distances.set_xlabel(f"training step ({run.characters_per_step:,} characters each)")
    for axes in (curves, distances):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    distances.margins(x=0.01)
    distances.xaxis.set_major_locator(MaxNLocator(integer=True))

    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=120)
    return buffer.getvalue()
