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
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from lstm_triton_kernels import sequence_normalized, sequence_stepwise
from lstm_triton_kernels.gpus import gpu_of, product_us
from lstm_triton_kernels.normalize import Products
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import Regularized
from lstm_triton_kernels.sizes import Layer, matmul_precision
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights

STEPS = 32
"""Steps of a chunk: the few launches around a replay are little beside them, and capturing takes milliseconds."""

MOST_GRAPHS = 16
"""Graphs that are kept; the one that was not used for longest goes first."""

LONGEST_STEP_US = 60.0
"""Where the products of a step take longer than this, launches are not what is waited for. An assumption."""


@dataclass
class Chunk:
    """A captured chunk: buffers by name, the function that replays it, the event after its last use (None on a CPU)."""

    buffers: dict[str, Tensor]
    replay: Callable[[], None]
    done: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def in_use(self) -> Iterator[dict[str, Tensor]]:
        """Lock the buffers for this thread and, behind the work of other streams on them, for this stream."""
        with self.lock:
            if self.done is not None:
                torch.cuda.current_stream().wait_event(self.done)
            yield self.buffers
            if self.done is not None:
                self.done.record()


_chunks: OrderedDict[tuple[Any, ...], Chunk | Literal["seen", "refused"]] = OrderedDict()
"""By sizes and addresses: captured, seen once, or not to be captured."""


def forward(
    x: Tensor, gate_input: Tensor | None, h_0: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order,
    output: Tensor, gates: Tensor | None, cells: Tensor,
) -> None:  # fmt: skip
    """Compute all steps forward, into output, gates and cells; see `sequence_stepwise.forward`."""
    layer = _layer_of(spec, order, cells, h_0)
    variant, launched = (weights, spec), launched_steps(spec)
    saved = len(cells) > 1
    chunk, rules = None, order.regularized.rules
    if gate_input is not None and pays(layer, output.device):
        sizes = dict(gate_input=part(gate_input), h_0=h_0, output=part(output), gates=part(gates),
                     cells=cells[: STEPS + 1], **mask_sizes(order))  # fmt: skip
        one = order._replace(T=STEPS)

        def steps(b: dict[str, Tensor]) -> None:
            own = with_masks(one, b)
            given = (x, b["gate_input"], b["h_0"])
            launched.forward(*given, *variant, own, b["output"], b.get("gates"), b["cells"])
            b["h_0"].copy_(own.last(b["output"]))
            if saved:
                b["cells"][own.initial_slot(saved)] = b["cells"][own.final_slot(saved)]

        chunk = chunk_of(("forward", spec.name, order.reverse, rules), sizes, weights, steps)
    if chunk is None or gate_input is None:
        return launched.forward(x, gate_input, h_0, *variant, order, output, gates, cells)
    chunks, left = parts(order)
    with chunk.in_use() as b:
        b["h_0"].copy_(h_0)
        b["cells"][one.initial_slot(saved)] = cells[order.initial_slot(saved)]
        if order.regularized.hidden is not None:
            b["hidden"].copy_(order.regularized.hidden)
        for now in chunks:
            replay(chunk, b, now, dict(gate_input=gate_input, **masks(order)), dict(output=output, gates=gates))
            if saved:
                inner = slice(0, STEPS) if order.reverse else slice(1, STEPS + 1)
                cells[now.start + inner.start : now.start + inner.stop] = b["cells"][inner]
        if not saved:
            cells[0] = b["cells"][0]
    if left is not None:
        states = cells[left.start : left.stop + 1] if saved else cells
        h = output[left.stop if order.reverse else left.start - 1]
        own_gates = gates[left] if gates is not None else None
        launched.forward(x, gate_input[left], h, *variant, order.part(left), output[left], own_gates, states)


def backward(
    grad_output: Tensor | None, grad_cells: Tensor | None, dh: Tensor, dc: Tensor, weights: LSTMWeights,
    spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    kept: Tensor | None = None, *products: Products,
) -> None:  # fmt: skip
    """Compute all steps backward, into d_gates (and d_hidden), in place in dh, dc and kept, as `sequence_stepwise`.

    products: one, of a layer with layer normalisation, as `sequence_normalized.backward`.
    """
    chunk, rules = None, order.regularized.rules
    variant, launched = (weights, spec), launched_steps(spec)
    if pays(_layer_of(spec, order, cells, dh), gates.device):
        sizes = dict(grad_output=part(grad_output), dh=dh, dc=dc, gates=part(gates), cells=cells[: STEPS + 1],
                     d_gates=part(d_gates), d_hidden=part(d_hidden), grad_cells=part(grad_cells), kept=kept,
                     **mask_sizes(order))  # fmt: skip
        for normalized in products:
            sizes |= normalized.part(slice(STEPS))._asdict()
        one = order._replace(T=STEPS)

        def steps(b: dict[str, Tensor]) -> None:
            grads = (b.get("grad_output"), b.get("grad_cells"), b["dh"], b["dc"])
            saved, out = (b["gates"], b["cells"]), (b.get("d_hidden"), b.get("kept"))
            of_chunk = (Products(*(b[name] for name in Products._fields)) for _ in products)
            launched.backward(*grads, *variant, with_masks(one, b), *saved, b["d_gates"], *out, *of_chunk)

        chunk = chunk_of(("backward", spec.name, order.reverse, rules), sizes, weights, steps)
    if chunk is None:
        grads, saved = (grad_output, grad_cells, dh, dc), (gates, cells)
        return launched.backward(*grads, *variant, order, *saved, d_gates, d_hidden, kept, *products)
    chunks, left = parts(order)
    if left is not None:  # what forward computed last
        of_output, of_cells, hidden = (t[left] if t is not None else None for t in (grad_output, grad_cells, d_hidden))
        saved, out = (gates[left], cells[left.start : left.stop + 1]), (hidden, kept)
        grads, of_left = (of_output, of_cells, dh, dc), (normalized.part(left) for normalized in products)
        launched.backward(*grads, *variant, order.part(left), *saved, d_gates[left], *out, *of_left)
    with chunk.in_use() as b:
        carried = dict(dh=dh, dc=dc) | (dict(kept=kept) if kept is not None else {})
        given = dict(grad_output=grad_output, grad_cells=grad_cells, gates=gates, **masks(order))
        for normalized in products:
            given |= dict(values=normalized.values, mean=normalized.mean, rstd=normalized.rstd)
            carried["d_cell"] = normalized.d_cell
        for name, tensor in carried.items():
            b[name].copy_(tensor)
        if order.regularized.hidden is not None:
            b["hidden"].copy_(order.regularized.hidden)
        for now in reversed(chunks):
            b["cells"].copy_(cells[now.start : now.stop + 1])
            replay(chunk, b, now, given, dict(d_gates=d_gates, d_hidden=d_hidden))
        for name, tensor in carried.items():
            tensor.copy_(b[name])


def launched_steps(spec: LSTMSpec) -> ModuleType:
    """Return the module that launches the steps of a variant one by one."""
    return sequence_normalized if spec.layer_norm else sequence_stepwise


def masks(order: Order) -> dict[str, Tensor | None]:
    """Return what an order has for each step, by the names of a chunk's buffers."""
    return dict(resets=order.resets, codes=order.regularized.codes, clipped=order.regularized.clipped)


def mask_sizes(order: Order) -> dict[str, Tensor | None]:
    """Return what the buffers of an order's masks look like."""
    return {name: part(mask) for name, mask in masks(order).items()} | dict(hidden=order.regularized.hidden)


def with_masks(order: Order, buffers: dict[str, Tensor]) -> Order:
    """Return the order with its masks in a chunk's buffers."""
    of_rules = (buffers.get(name) for name in ("codes", "hidden", "clipped"))
    regularized = Regularized(order.regularized.rules, *of_rules)
    return order._replace(resets=buffers.get("resets"), regularized=regularized)


def replay(
    chunk: Chunk, buffers: dict[str, Tensor], now: slice, given: dict[str, Tensor | None], out: dict[str, Tensor | None]
) -> None:
    """Compute one chunk of a sequence: copy what is given into the buffers, replay, and copy the results out."""
    for name, sequence in given.items():
        if sequence is not None:
            buffers[name].copy_(sequence[now])
    chunk.replay()
    for name, sequence in out.items():
        if sequence is not None:
            sequence[now] = buffers[name]


def parts(order: Order) -> tuple[list[slice], slice | None]:
    """Return the chunks of a sequence in the order in which forward computes them, and what is left after them."""
    count, rest = divmod(order.T, STEPS)
    starts = [order.T - (n + 1) * STEPS if order.reverse else n * STEPS for n in range(count)]
    left = slice(0, rest) if order.reverse else slice(order.T - rest, order.T)
    return [slice(start, start + STEPS) for start in starts], left if rest else None


def part(sequence: Tensor | None) -> Tensor | None:
    """Return the first chunk of a sequence: what its buffer looks like."""
    return None if sequence is None else sequence[:STEPS]


def _layer_of(spec: LSTMSpec, order: Order, cells: Tensor, h: Tensor) -> Layer:
    """Return the sizes of one direction with cell states (., B, H) and a hidden state (B, P)."""
    _, B, H = cells.shape
    return Layer(spec, order.T, B, H, 1, h.dtype, matmul_precision(), P=h.shape[1])


def pays(layer: Layer, device: torch.device) -> bool:
    """Return whether a sequence is replayed: it has a chunk, its steps are short, and nothing is being captured."""
    if device.type != "cuda" or layer.T < STEPS or torch.cuda.is_current_stream_capturing():
        return False
    return product_us(layer, gpu_of(device)) < LONGEST_STEP_US


def chunk_of(
    name: tuple[Any, ...],
    like: dict[str, Tensor | None],
    weights: LSTMWeights,
    steps: Callable[[dict[str, Tensor]], None],
) -> Chunk | None:
    """Return the chunk for these sizes and weights; None where they are seen for the first time.

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
    """Return what replays the function's launches, and an event for the end of a use."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles and loads what these sizes need: a capture must not
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, torch.cuda.Event()
