"""What is shown during training: a live bar and table on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lstm_triton.cli.training import Learner, Run

PLAIN_LINES = 10


class Display(Protocol):
    """Shows a run while it is entered; `update` is called after every step."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self) -> None:
        """Show the step that was just made."""


def display_for(console: Console, run: Run, last: int) -> Display:
    """The display that suits where the console writes to; the run ends at step `last`."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, run, last)
    return PlainDisplay(console, run, last)


class LiveDisplay:
    """A progress bar over a table with a row per learner, redrawn in place."""

    def __init__(self, console: Console, run: Run, last: int) -> None:
        self._run = run
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=last, completed=run.step)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self) -> None:
        """Show the step that was just made."""
        self._progress.update(self._task, completed=self._run.step)

    def _render(self) -> Group:
        table = Table("", box=None, padding=(0, 2))
        for heading in ("training bits/char", "validation bits/char", "characters/s"):
            table.add_column(heading, justify="right", min_width=len(heading))
        for learner in self._run.learners:
            table.add_row(learner.name, *_figures(learner, self._run))
        return Group(self._progress, table)


class PlainDisplay:
    """A line per tenth of the run."""

    def __init__(self, console: Console, run: Run, last: int) -> None:
        self._console = console
        self._run = run
        self._last = last
        self._every = math.ceil(last / PLAIN_LINES)

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def update(self) -> None:
        """Print a line if a tenth of the run, or all of it, is done."""
        if self._run.step % self._every and self._run.step != self._last:
            return
        figures = []
        for learner in self._run.learners:
            loss, _, rate = _figures(learner, self._run)
            figures.append(f"{learner.name} {loss} bits/char {rate} chars/s")
        self._console.print(
            f"step {self._run.step}/{self._last}: {'; '.join(figures)}", soft_wrap=True, highlight=False, markup=False
        )


def _figures(learner: Learner, run: Run) -> tuple[str, str, str]:
    """Recent training loss, last validation loss, recent characters per second; "-" before there is any."""
    loss = f"{learner.recent_loss():.3f}" if learner.losses else "-"
    validation = f"{list(learner.validation.values())[-1]:.3f}" if learner.validation else "-"
    rate = f"{run.characters_per_step / learner.recent_seconds_per_step():,.0f}" if learner.seconds else "-"
    return loss, validation, rate
