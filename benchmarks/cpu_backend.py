"""The `torch` backend on the CPU beside `torch.nn.LSTM`: forward + backward, gradients for everything.

    python benchmarks/cpu_backend.py [--output FILE.csv]

Times one round of every layer after the other, many rounds, so that whatever else the machine does falls on all alike;
reports the median time and the median of the per-round ratios to `torch.nn.LSTM`. T=64, B=32, I=256, H=512, 2 layers
by default, float32.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

import lstm_triton

VARIANTS = ("standard", "coupled", "diagonal", "coupled+diagonal", "diagonal+current", "full")
BASELINE = "torch.nn.LSTM"


def training_step(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A function that runs the layer forward and backward once; x (T, B, I)."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        output, (h_n, c_n) = layer(x)
        (output.sum() + h_n.sum() + c_n.sum()).backward()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round; each round runs all of them, each time in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for name in names:  # warm-up
        steps[name]()
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure, print a table, and write it as CSV if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(T=64, B=32, I=256, H=512, layers=2, rounds=15).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="CSV file to write the table to")
    a = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(a.T, a.B, a.I, requires_grad=True)
    layers: dict[str, torch.nn.Module] = {BASELINE: torch.nn.LSTM(a.I, a.H, a.layers)}
    for name in VARIANTS:
        spec = lstm_triton.LSTMSpec.parse(name)
        layers[name] = lstm_triton.LSTM(
            a.I, a.H, a.layers, coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole
        )
    with lstm_triton.backend("torch"):
        seconds = measure({name: training_step(layer, x) for name, layer in layers.items()}, a.rounds)
    rows = [
        dict(
            layer=name,
            ms_median=round(1e3 * statistics.median(times), 1),
            ratio_to_torch=round(
                statistics.median(t / base for t, base in zip(times, seconds[BASELINE], strict=True)), 3
            ),
            T=a.T, B=a.B, I=a.I, H=a.H, L=a.layers, rounds=a.rounds, threads=torch.get_num_threads(),
            cpu=platform.machine(), torch=torch.__version__, date=date.today().isoformat(),
        )
        for name, times in seconds.items()
    ]  # fmt: skip
    for row in rows:
        print(f"{row['layer']:<18} {row['ms_median']:>9.1f} ms  {row['ratio_to_torch']:>6.3f} x torch.nn.LSTM")
    if a.output:
        with a.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
