"""The stepwise strategy, replayed from CUDA graphs: launches of a step cost the host more than the step takes.

A sequence is cut into chunks of STEPS steps. The launches of one chunk, on buffers of its own, are captured once and
replayed for every chunk of every sequence of the same sizes, of any length: the chunk's inputs are copied in and its
results out, and the states go from one chunk to the next inside. What is left of a sequence, one that is seen for the
first time, and one inside a capture of the user's, are computed launch by launch.

A graph holds the addresses of the weights; they are part of what it is found by, so that it reads this call's weights.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lstm_triton_kernels import sequence_stepwise
from lstm_triton_kernels.gpus import gpu_of
from lstm_triton_kernels.order import final_slot, initial_slot
from lstm_triton_kernels.plan import matmul_precision
from lstm_triton_kernels.sequence_stepwise import fuses_input

__all__ = ["backward", "forward", "fuses_input"]

STEPS = 32
"""Steps of a chunk: the few launches around a replay are little beside them, and capturing takes milliseconds."""

MOST_GRAPHS = 16
"""Graphs that are kept; the one that was not used for longest goes first."""

LONGEST_STEP_US = 60.0
"""Where the products of a step take longer than this, launches are not what is waited for. An assumption."""


@dataclass
class Chunk:
    """A captured chunk: its buffers by name, what replays it, the event after its last use (None on a CPU)."""

    buffers: dict[str, Tensor]
    replay: Callable[[], None]
    done: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def in_use(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the buffers are this thread's and, after what other streams have asked of them, this stream's."""
        with self.lock:
            if self.done is not None:
                torch.cuda.current_stream().wait_event(self.done)
            yield self.buffers
            if self.done is not None:
                self.done.record()


_chunks: OrderedDict[tuple[Any, ...], Chunk | Literal["seen", "refused"]] = OrderedDict()
"""By sizes and addresses: captured, seen once, or not to be captured."""


def forward(
    x: Tensor, gate_input: Tensor | None, h_0: Tensor, weights: Any, spec: Any, reverse: bool,
    output: Tensor, gates: Tensor | None, cells: Tensor, resets: Tensor | None = None,
) -> None:  # fmt: skip
    """All steps forward, into output, gates and cells; see `sequence_stepwise.forward`."""
    T = output.shape[0]
    rest = (weights, spec, reverse)
    if gate_input is None or not pays(output.device, T, cells.shape[1], cells.shape[2], h_0.shape[1], spec, h_0.dtype):
        return sequence_stepwise.forward(x, gate_input, h_0, *rest, output, gates, cells, resets)
    saved = cells.shape[0] > 1
    sizes = dict(gate_input=part(gate_input), h_0=h_0, output=part(output), gates=part(gates),
                 cells=cells[: STEPS + 1], resets=part(resets))  # fmt: skip

    def steps(b: dict[str, Tensor]) -> None:
        out = (b["output"], b.get("gates"), b["cells"])
        sequence_stepwise.forward(x, b["gate_input"], b["h_0"], *rest, *out, b.get("resets"))
        b["h_0"].copy_(b["output"][0 if reverse else -1])
        if saved:
            b["cells"][initial_slot(STEPS, reverse, saved)] = b["cells"][final_slot(STEPS, reverse, saved)]

    chunk = chunk_of(("forward", spec.name, reverse), sizes, weights, steps)
    if chunk is None:
        return sequence_stepwise.forward(x, gate_input, h_0, *rest, output, gates, cells, resets)
    whole, left = divmod(T, STEPS)
    with chunk.in_use() as b:
        b["h_0"].copy_(h_0)
        b["cells"][initial_slot(STEPS, reverse, saved)] = cells[initial_slot(T, reverse, saved)]
        for n in range(whole):
            start = T - (n + 1) * STEPS if reverse else n * STEPS
            now = slice(start, start + STEPS)
            b["gate_input"].copy_(gate_input[now])
            if resets is not None:
                b["resets"].copy_(resets[now])
            chunk.replay()
            output[now] = b["output"]
            if gates is not None:
                gates[now] = b["gates"]
            if saved:
                inner = slice(0, STEPS) if reverse else slice(1, STEPS + 1)
                cells[start + inner.start : start + inner.stop] = b["cells"][inner]
        if not saved:
            cells[0] = b["cells"][0]
    if left:
        now = slice(0, left) if reverse else slice(T - left, T)
        states = cells[now.start : now.stop + 1] if saved else cells
        h = output[left if reverse else T - left - 1]
        part_gates = gates[now] if gates is not None else None
        part_resets = resets[now] if resets is not None else None
        sequence_stepwise.forward(x, gate_input[now], h, *rest, output[now], part_gates, states, part_resets)


def backward(
    grad_output: Tensor | None, dh: Tensor, dc: Tensor, weights: Any, spec: Any, reverse: bool,
    gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    resets: Tensor | None = None, grad_cells: Tensor | None = None,
) -> None:  # fmt: skip
    """All steps backward, into d_gates (and d_hidden), in place in dh and dc; see `sequence_stepwise.backward`."""
    T = gates.shape[0]
    rest = (weights, spec, reverse)
    chunk = None
    if pays(gates.device, T, dc.shape[0], dc.shape[1], dh.shape[1], spec, dh.dtype):
        sizes = dict(grad_output=part(grad_output), dh=dh, dc=dc, gates=part(gates), cells=cells[: STEPS + 1],
                     d_gates=part(d_gates), d_hidden=part(d_hidden), resets=part(resets),
                     grad_cells=part(grad_cells))  # fmt: skip

        def steps(b: dict[str, Tensor]) -> None:
            saved, out = (b["gates"], b["cells"]), (b["d_gates"], b.get("d_hidden"))
            sequence_stepwise.backward(
                b.get("grad_output"), b["dh"], b["dc"], *rest, *saved, *out, b.get("resets"), b.get("grad_cells")
            )

        chunk = chunk_of(("backward", spec.name, reverse), sizes, weights, steps)
    if chunk is None:
        out = (d_gates, d_hidden)
        return sequence_stepwise.backward(grad_output, dh, dc, *rest, gates, cells, *out, resets, grad_cells)
    whole, left = divmod(T, STEPS)
    if left:  # what forward computed last
        now = slice(0, left) if reverse else slice(T - left, T)
        grads, hidden, restarts, grads_c = (
            t[now] if t is not None else None for t in (grad_output, d_hidden, resets, grad_cells)
        )
        saved, out = (gates[now], cells[now.start : now.stop + 1]), (d_gates[now], hidden)
        sequence_stepwise.backward(grads, dh, dc, *rest, *saved, *out, restarts, grads_c)
    with chunk.in_use() as b:
        b["dh"].copy_(dh)
        b["dc"].copy_(dc)
        for n in reversed(range(whole)):
            start = T - (n + 1) * STEPS if reverse else n * STEPS
            now = slice(start, start + STEPS)
            for name, sequence in (("grad_output", grad_output), ("resets", resets), ("grad_cells", grad_cells)):
                if sequence is not None:
                    b[name].copy_(sequence[now])
            b["gates"].copy_(gates[now])
            b["cells"].copy_(cells[start : start + STEPS + 1])
            chunk.replay()
            d_gates[now] = b["d_gates"]
            if d_hidden is not None:
                d_hidden[now] = b["d_hidden"]
        dh.copy_(b["dh"])
        dc.copy_(b["dc"])


def part(sequence: Tensor | None) -> Tensor | None:
    """The first chunk of a sequence: what its buffer looks like."""
    return None if sequence is None else sequence[:STEPS]


def pays(device: torch.device, T: int, B: int, H: int, P: int, spec: Any, dtype: torch.dtype) -> bool:
    """Whether a sequence is replayed: there is a chunk of it, its steps are short, and nothing is being captured."""
    if device.type != "cuda" or T < STEPS or torch.cuda.is_current_stream_capturing():
        return False
    name = str(dtype).removeprefix("torch.")
    rate = "tf32" if name == "float32" and matmul_precision() == "tf32" else name
    operations = 2 * B * H * P * len(spec.gates)
    return operations / (0.5 * gpu_of(device).tflop_per_s[rate] * 1e6) < LONGEST_STEP_US


def chunk_of(
    name: tuple[Any, ...], like: dict[str, Tensor | None], weights: Any, steps: Callable[[dict[str, Tensor]], None]
) -> Chunk | None:
    """The chunk for these sizes and weights; None where they are seen for the first time.

    Capturing for one use would cost more than it brings; and by then the kernels are compiled.
    """
    present = {key: tensor for key, tensor in like.items() if tensor is not None}
    device = next(iter(present.values())).device
    shapes = tuple((key, tensor.shape, tensor.dtype) for key, tensor in present.items())
    addresses = tuple((key, w.data_ptr()) for key, w in weights.present().items())
    key = (name, device, shapes, addresses, matmul_precision())
    if key not in _chunks:
        _chunks[key] = "seen"
        while len(_chunks) > MOST_GRAPHS:
            _chunks.popitem(last=False)
        return None
    _chunks.move_to_end(key)
    chunk = _chunks[key]
    if chunk == "seen":
        buffers = {k: torch.zeros(t.shape, dtype=t.dtype, device=device) for k, t in present.items()}
        try:
            chunk = _chunks[key] = Chunk(buffers, *capture(lambda: steps(buffers)))
        except RuntimeError as error:
            chunk = _chunks[key] = "refused"
            warnings.warn(f"the steps of an LSTM are launched one by one: capturing them failed: {error}", stacklevel=2)
    return chunk if isinstance(chunk, Chunk) else None


def capture(function: Callable[[], None]) -> tuple[Callable[[], None], Any]:
    """What replays the function's launches, and an event for the end of a use."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles and loads what these sizes need: a capture must not
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, torch.cuda.Event()
