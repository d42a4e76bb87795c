"""The process that measures: rows are computed in a child, so that none of them can take the run with it.

A row that crashes the process, hangs, or leaves the device unusable is reported in words, and the next row gets a new
process.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.bench import Bench, Measurement, failed
from benchmarks.providers import Provider
from benchmarks.suites import Case


class Measures(Protocol):
    """What a run asks for its rows."""

    def measure(self, provider: Provider, case: Case, timeout: float) -> Measurement:
        """Return the row of the provider for the case, within so many seconds."""


class Worker:
    """Measures in a child process, started when the first row is asked for.

    - device: a torch device's name; baselines: as `providers.baseline_of` takes them
    - seconds: what the timing of a row may take
    - log: file to which everything goes that the child prints
    """

    def __init__(self, device: str, baselines: Sequence[Provider], seconds: float, log: Path) -> None:
        self._arguments = (device, baselines, seconds, str(log))
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def measure(self, provider: Provider, case: Case, timeout: float) -> Measurement:
        """Return the row; words if the process ended, lost its device or was not done after `timeout` seconds."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, *self._arguments), daemon=True)
            self._process.start()
            theirs.close()
        assert self._connection is not None
        try:
            self._connection.send((provider, case))
            if not self._connection.poll(timeout):
                self.close()
                return failed(f"failed: not done after {timeout:.0f} s, stopped", stopped=True)
            measurement = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            code = self._process.exitcode
            self.close()
            return failed(f"failed: the process that computed it ended (exit code {code})")
        if measurement.lost_device:
            self.close()
        return measurement

    def close(self) -> None:
        """End the child, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def serve(connection: Connection, device: str, baselines: Sequence[Provider], seconds: float, log: str) -> None:
    """Answer every (provider, case) with its Measurement until the other end closes."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    bench = Bench(torch.device(device), baselines, seconds)
    try:
        while True:
            connection.send(bench.measure(*connection.recv()))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException:  # the parent reports the end of this process
        traceback.print_exc()
