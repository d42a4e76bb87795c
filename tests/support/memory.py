"""What the process keeps in memory over hundreds of steps, for every path through the library and way of training.

Run as a program it prints as JSON by how much each grew. A program of its own, since whatever else a process does would
be measured too; and with Python's collector switched off, since nothing may wait for it (but for the interpreter's).

    python -m tests.support.memory cpu | planted | interpreted
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import LSTM, LSTMCell, aten, functional
from tests.support.composes import loss, tensors

ROOT = Path(__file__).parents[2]

BOUND = 0.1
"""Growth a step, as a part of one step's graph, that is no leak yet: some pages, which the allocator keeps."""


class Sizes(NamedTuple):
    """The layer that is measured: few steps in time, since those take the time, of many rows, which take memory."""

    T: int = 2
    B: int = 256
    I: int = 16  # noqa: E741
    H: int = 16

    @property
    def graph(self) -> int:
        """Bytes that any graph of the layer holds: the activated gates, the output and the input, in float32."""
        return (5 * self.H + self.I) * self.T * self.B * 4


SMALL = Sizes(T=1, B=64, I=256, H=32)
"""For interpreted kernels, whose time goes by the number of programs."""


# The paths. Each gives the function that computes results of another input at each call, and the tensors whose gradient
# is wanted.

Path_ = tuple[Callable[[], Any], list[Tensor]]


def layer(sizes: Sizes, asked: Callable[[Sizes], dict[str, Any]] | None = None, **options: Any) -> Path_:
    """A module on a padded input."""
    module, x = LSTM(sizes.I, sizes.H, **options), padded(sizes)
    arguments = {} if asked is None else asked(sizes)
    return lambda: module(x + 0, **arguments), [x, *module.parameters()]


def padded(sizes: Sizes) -> Tensor:
    """An input (T, B, I)."""
    return torch.randn(sizes.T, sizes.B, sizes.I, requires_grad=True)


def lengths(sizes: Sizes) -> dict[str, Tensor]:
    """Rows of several lengths."""
    return dict(lengths=sizes.T - torch.arange(sizes.B) % (sizes.T // 2 + 1))


def resets(sizes: Sizes) -> dict[str, Any]:
    """Rows that begin anew; and every cell state is wanted."""
    begun = (torch.arange(sizes.T)[:, None] + torch.arange(sizes.B)) % 3 == 0
    return dict(resets=begun, return_cell_states=True)


def after_embedding(sizes: Sizes, **options: Any) -> Path_:
    """As in a language model."""
    model = nn.Sequential(nn.Embedding(50, sizes.I), LSTM(sizes.I, sizes.H, batch_first=True, **options))
    tokens = torch.randint(50, (sizes.B, sizes.T))
    return lambda: model(tokens), list(model.parameters())


def packed(sizes: Sizes, **options: Any) -> Path_:
    """A packed batch."""
    module, x, rows = LSTM(sizes.I, sizes.H, **options), padded(sizes), lengths(sizes)["lengths"]
    return lambda: module(pack_padded_sequence(x + 0, rows, enforce_sorted=False)), [x, *module.parameters()]


def cells(sizes: Sizes, **options: Any) -> Path_:
    """A loop over steps."""
    cell, x = LSTMCell(sizes.I, sizes.H, **options), padded(sizes)

    def run() -> Any:
        hx, outputs = None, []
        for x_t in x + 0:
            hx = cell(x_t, hx)
            outputs.append(hx[0])
        return torch.stack(outputs), hx

    return run, [x, *cell.parameters()]


def on_tensors(sizes: Sizes, **options: Any) -> Path_:
    """The functional interface."""
    weights, x = list(LSTM(sizes.I, sizes.H, **options).parameters()), padded(sizes)
    return lambda: functional.lstm(x + 0, None, weights, **options), [x, *weights]


def compiled(sizes: Sizes, **options: Any) -> Path_:
    """torch.compile."""
    module, x = LSTM(sizes.I, sizes.H, **options), padded(sizes)
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    return lambda: run(x + 0), [x, *module.parameters()]


def function(sizes: Sizes, num_layers: int = 1, bidirectional: bool = False) -> Path_:
    """The Function that serves on CUDA, on tensors of the CPU."""
    weights = list(LSTM(sizes.I, sizes.H, num_layers, bidirectional=bidirectional).parameters())
    options = aten.Options(True, num_layers, 0.0, bidirectional)
    x, state = padded(sizes), torch.zeros(num_layers * (2 if bidirectional else 1), sizes.B, sizes.H)
    return lambda: aten.twice_differentiable(options, x + 0, state, state, *weights), [x, *weights]


Builder = Callable[[Sizes], Path_]

BOTH = dict(num_layers=2, bidirectional=True)
CURRENT = dict(peephole="full", output_peephole="current")

FUNCTIONS: dict[str, Builder] = {
    "Function for CUDA": function,
    "Function for CUDA, two layers, both directions": lambda sizes: function(sizes, **BOTH),
}
PATHS: dict[str, Builder] = {
    "standard": layer,
    "standard, two layers, both directions": lambda sizes: layer(sizes, **BOTH),
    "standard after an embedding": after_embedding,
    "coupled": lambda sizes: layer(sizes, coupled=True),
    "coupled after an embedding, both directions": lambda sizes: after_embedding(
        sizes, coupled=True, bidirectional=True
    ),
    "peephole": lambda sizes: layer(sizes, peephole="diagonal"),
    "peephole, recomputed": lambda sizes: layer(sizes, peephole="diagonal", recompute=True),
    "full peephole after an embedding, both directions": lambda sizes: after_embedding(
        sizes, bidirectional=True, **CURRENT
    ),
    "packed": packed,
    "packed, peephole": lambda sizes: packed(sizes, peephole="diagonal"),
    "lengths": lambda sizes: layer(sizes, lengths),
    "resets and cell states, coupled": lambda sizes: layer(sizes, resets, coupled=True),
    "cells": cells,
    "cells, full peephole": lambda sizes: cells(sizes, **CURRENT),
    "functional": on_tensors,
    "functional, peephole": lambda sizes: on_tensors(sizes, peephole="diagonal"),
    "compiled": compiled,
    "compiled, peephole": lambda sizes: compiled(sizes, peephole="diagonal"),
    **FUNCTIONS,
}
KERNELS: dict[str, Builder] = {
    "stepwise": lambda sizes: layer(sizes, strategy="stepwise"),
    "stepwise, peephole, lengths": lambda sizes: layer(sizes, lengths, strategy="stepwise", peephole="diagonal"),
    "persistent": lambda sizes: layer(sizes, strategy="persistent"),
    "cells": cells,
}


# The ways of training. Each is one step.


def trained(path: Path_) -> None:
    """Forward and backward."""
    run, leaves = path
    torch.autograd.grad(loss(run()), leaves)


def never_differentiated(path: Path_) -> None:
    """A graph, and no backward pass."""
    loss(path[0]())


def interrupted(path: Path_) -> None:
    """An error between forward and backward."""
    with suppress(ValueError):
        value = loss(path[0]())
        raise ValueError(f"a loss of {value.shape}")


def interrupted_within(path: Path_) -> None:
    """An error in the backward pass."""
    run, leaves = path
    results = tensors(run())
    results[0].register_hook(refuse)
    with suppress(ValueError):
        torch.autograd.grad(loss(results), leaves)


def refuse(gradient: Tensor) -> None:
    """The hook of a gradient that finds it wrong."""
    raise ValueError("a wrong gradient")


def differentiated_twice(path: Path_) -> None:
    """A gradient penalty."""
    run, leaves = path
    gradients = torch.autograd.grad(loss(run()), leaves, create_graph=True)
    torch.autograd.grad(loss(gradients), leaves)


def kept_elsewhere(path: Path_) -> None:
    """Under hooks of the saved tensors."""
    with saved_tensors_hooks(lambda t: (t.clone(),), lambda kept: kept[0]):
        trained(path)


def without_gradients(path: Path_) -> None:
    """Inference."""
    with torch.no_grad():
        path[0]()


STEPS = {
    trained: 200, never_differentiated: 100, interrupted: 100, interrupted_within: 50, differentiated_twice: 25,
    kept_elsewhere: 50, without_gradients: 100,
}  # fmt: skip
"""How often; the second derivative takes ten times as long."""

INTERPRETED_STEPS = {trained: 30, never_differentiated: 30}


def name_of(way: Callable[[Path_], None]) -> str:
    """Its name in words."""
    return way.__name__.replace("_", " ")


def can(path: str, way: Callable[[Path_], None]) -> bool:
    """Whether PyTorch can: what is compiled cannot be differentiated twice."""
    return not (path.startswith("compiled") and way is differentiated_twice)


# The measurement.


def resident() -> int:
    """Bytes of memory that the process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(path: Path_, way: Callable[[Path_], None], steps: int, graph: int, collect: bool) -> float:
    """By what part of one step's graph the process grows at each step.

    collect: let Python's collector free what is unreachable, after each step.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    for n in range(10 + steps):
        if n == 10:
            before = resident()
        way(path)
        if collect:
            gc.collect()
    grown = resident() - before
    gc.enable()
    return grown / steps / graph


def main(what: str) -> None:
    """Print {"path: way": growth}, an error's words in place of a number."""
    sizes, steps = (SMALL, INTERPRETED_STEPS) if what == "interpreted" else (Sizes(), STEPS)
    paths = dict(cpu=PATHS, planted=FUNCTIONS, interpreted=KERNELS)[what]
    found: dict[str, float | str] = {}
    with ExitStack() as stack:
        if what == "planted":
            aten.operator = with_a_cycle(aten.operator)
        if what == "interpreted":
            stack.enter_context(lstm_triton.backend("triton"))
            stack.enter_context(patched_once())
        for name, build in paths.items():
            path = build(sizes)
            for way, number in steps.items():
                if can(name, way):
                    # Triton's interpreter leaves cycles, which hold the arguments of its kernels.
                    try:
                        grown: float | str = growth(path, way, number, sizes.graph, collect=what == "interpreted")
                    except Exception as error:
                        grown = repr(error)
                    found[f"{name}: {name_of(way)}"] = grown
    print(json.dumps(found))


def with_a_cycle(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator, whose graph has a hook that holds its results: Python's collector does not see the graph's node."""

    def planted(*arguments: Any) -> tuple[Tensor, ...]:
        results = operator(*arguments)
        for result in results:
            if result.requires_grad:
                result.register_hook(lambda gradient: None if results else gradient)
        return results

    return planted


def patched_once() -> ExitStack:
    """As in the interpreted tests: the interpreter patches triton.language once, not at every call."""
    from lstm_triton_kernels.gates import gate_preactivations_kernel

    from tests.support.concurrent import interpreter, prepared
    from tests.support.interpreter import mend

    mend()

    with ExitStack() as stack:
        patch_once = stack.enter_context(prepared(gate_preactivations_kernel))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(interpreter, "_patch_lang", patch_once)
        return stack.pop_all()


def kept(growths: dict[str, float | str]) -> dict[str, float | str]:
    """Those that are a leak, or an error."""
    return {name: grown for name, grown in growths.items() if isinstance(grown, str) or grown > BOUND}


def measured(what: str) -> dict[str, float | str]:
    """What the program prints. Memory that is freed is given back at once, so that none hides what is kept."""
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), OMP_NUM_THREADS="1",
        MALLOC_MMAP_THRESHOLD_="16384", MALLOC_TRIM_THRESHOLD_="16384",
    )  # fmt: skip
    run = [sys.executable, "-m", "tests.support.memory", what]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1])
