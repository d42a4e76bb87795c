"""A stack whose layers are computed at the same time, in chunks of time steps on CUDA streams; differentiable.

`overlap.py` decides how, `lstm_triton_kernels.schedule` says which chunk comes when, and why no launch can starve
another. The results are those of the same chunks with one layer after another, bit for bit: a chunk goes on with h and
c as the kernel would, c in the accumulator type. Backward the gradient of h between two chunks is a matrix product of
its own, in the accumulator type, too. Dropout draws what `F.dropout` would, layer by layer.

On a CPU, for Triton's interpreter, the same is launched in the same order without streams.

Shapes: T time steps, B batch rows, I input features, H hidden units, L layers of one direction, G gate blocks, K steps
of a chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lstm_triton_kernels.gpus import gpu_of
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import Rules
from lstm_triton_kernels.schedule import Schedule, Task
from lstm_triton_kernels.sizes import Layer, accumulator_dtype, matmul_precision
from lstm_triton_kernels.spec import LSTMWeights
from lstm_triton_kernels.watch import check_launches, one_at_a_time
from torch import Tensor

from lstm_triton import gemms, regularization
from lstm_triton.autograd import computing_on, unwatched
from lstm_triton.layer import Call
from lstm_triton.overlap import Overlap, overlap_of, why_not

_asked = threading.local()


@contextmanager
def overlapping(overlap: Overlap | None = None) -> Iterator[None]:
    """Compute the layers of a stack at the same time in the block, in this thread: where that gains by estimate.

    overlap: how both passes are computed, whatever the estimate says, to measure or test it.
    """
    before = getattr(_asked, "how", None)
    _asked.how = (overlap,)
    try:
        yield
    finally:
        _asked.how = before


class How(NamedTuple):
    """How a stack is computed: the call of each layer, the overlap of both passes, and the dropout between layers."""

    call: Call
    forward: Overlap
    backward: Overlap
    dropout: float


def how_of(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], order: Order, call: Call,
    dropout: float,
) -> How | None:  # fmt: skip
    """Return how a stack is overlapped, x (T, B, I), h_0, c_0 (L, B, H); None where it is computed layer by layer."""
    asked = getattr(_asked, "how", None)
    if asked is None or call.engine != "persistent" or order.lengths is not None or dropout == 1:
        return None
    flat = [w for directions in layers for weights in directions for w in weights if w is not None]
    if not unwatched((x, h_0, c_0, *flat)):
        return None
    (T, B, I), H = x.shape, c_0.shape[2]  # noqa: E741
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h_0, c_0, *flat))
    layer = Layer(
        call.spec, T, B, H, len(layers[0]), x.dtype, matmul_precision(), I=I, P=call.projection * h_0.shape[2],
        training=tracked, ragged=order.ragged, L=len(layers),
    )  # fmt: skip
    wanted = ("return_cell_states",) * call.states + regularization.asked(Rules(*call.rules))
    if why_not(layer, wanted, call.recompute) is not None:
        return None
    apart = Overlap(1, T)
    found = [apart, apart]
    for backward in (False, True)[: 1 + tracked]:
        of_pass = asked[0] or overlap_of(layer, backward, gpu_of(x.device))
        found[backward] = apart if isinstance(of_pass, str) else of_pass
    return None if found == [apart, apart] else How(call._replace(save=tracked), found[0], found[1], dropout)


def lstm(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], order: Order, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a stack: x (T, B, I), h_0 and c_0 (L, B, H) -> output (T, B, H), h_n and c_n (L, B, H).

    All of one type and device, rows of full length. Differentiable once: the backward pass raises RuntimeError with
    create_graph=True. Raises RuntimeError where no plan fits the device as compiled.
    """
    flat = [w for (weights,) in layers for w in weights if w is not None]
    if how.call.save:
        found: tuple[Tensor, Tensor, Tensor] = StackFunction.apply(how, order, x, h_0, c_0, *flat)
        return found
    return forward(how, order, x, h_0, c_0, how.call.group(flat))[0]


class Saved(NamedTuple):
    """What the backward pass reads, of each layer.

    - inputs: (T, B, I or H); outputs: (T, B, H); gates: (1, T, B, G·H); cells: (1, T + 1, B, H)
    - masks: of the dropout before each layer but the first, see `dropout_mask`; empty without dropout
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    gates: list[Tensor]
    cells: list[Tensor]
    masks: list[Tensor]


class StackFunction(torch.autograd.Function):
    """apply(how, order, x, h_0, c_0, *weights) -> output, h_n, c_n, as `lstm`."""

    @staticmethod
    def forward(ctx: Any, how: How, order: Order, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, h_0, c_0, *flat = tensors
        results, saved = forward(how, order, x, h_0, c_0, how.call.group(flat))
        ctx.how, ctx.order, ctx.lengths = how, order._replace(resets=None), [len(part) for part in saved]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(order.resets, h_0, *flat, *(t for part in saved for t in part))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of layers that are computed at the same time cannot be differentiated (create_graph=True)"
            )
        needs = ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        resets, h_0, *rest = ctx.saved_tensors
        left = iter(rest)
        weights = ctx.how.call.group([next(left) for _ in needs[3:]])
        saved = Saved(*([next(left) for _ in range(length)] for length in ctx.lengths))
        return None, None, *backward(ctx.how, ctx.order._replace(resets=resets), grads, needs, h_0, weights, saved)


def forward(
    how: How, order: Order, x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights]
) -> tuple[tuple[Tensor, Tensor, Tensor], Saved]:
    """Compute output, h_n and c_n as `lstm`, and what a backward pass reads if the call saves."""
    from lstm_triton_kernels import sequence_persistent

    from lstm_triton.persistent import recurrent_weights

    call, L, (T, B, _), H = how.call, len(weights), x.shape, c_0.shape[2]
    GH = len(call.spec.gates) * H
    schedule = Schedule(L, T, how.forward.chunk, how.forward.lanes)
    check_launches()
    with computing_on(x.device):
        # All that several lanes read or write is made here, on the caller's stream, and freed when all lanes are done.
        masks = [dropout_mask(x.new_ones(T, B, H), how.dropout) for _ in range(L - 1)] if how.dropout else []
        outputs = [x.new_empty(T, B, H) for _ in range(L)]
        dropped = [x.new_empty(T, B, H) for _ in masks]
        inputs = [x, *(dropped or outputs[:-1])]
        gates = [x.new_empty(1, T, B, GH) for _ in range(L if call.save else 0)]
        cells = [x.new_empty(1, T + 1, B, H, dtype=accumulator_dtype(x.dtype)) for _ in gates]
        h = [states(h_0[n], schedule.chunks + 1, h_0.dtype) for n in range(L)]
        c = [states(c_0[n], schedule.chunks + 1, accumulator_dtype(c_0.dtype)) for n in range(L)]
        recurrent = [recurrent_weights([w]) for w in weights]
        biases = [None if w.bias_ih is None or w.bias_hh is None else w.bias_ih + w.bias_hh for w in weights]

        def product(task: Task) -> Tensor:
            """Return the input side of the gates of a chunk, (1, K, B, G·H)."""
            n, now = task.layer, schedule.span(task.chunk)
            if n and masks:
                drop(outputs[n - 1][now], masks[n - 1][now], how.dropout, inputs[n][now])
            rows = inputs[n][now].reshape(-1, inputs[n].shape[2])
            out = gates[n][:, now] if gates else x.new_empty(1, now.stop - now.start, B, GH)
            flat, bias, w_ih = out.view(len(rows), GH), biases[n], weights[n].weight_ih.t()
            if bias is None:
                torch.mm(rows, w_ih, out=flat)
            else:
                torch.addmm(bias, rows, w_ih, out=flat)
            return out

        def steps(task: Task, a: Tensor) -> None:
            n, now = task.layer, schedule.span(task.chunk)
            of_chunk = order.part(now)
            layer = sequence_persistent.layer_of(a, H, call.spec, of_chunk)
            results = dict(h_n_ptr=h[n][task.chunk + 1], c_n_ptr=c[n][task.chunk + 1])
            results["output_ptr"] = outputs[n][now].view(-1, B, 1, H)
            if cells:
                results["cells_ptr"] = cells[n][:, now.start : now.stop + 1]
            launch = sequence_persistent.forward_launch(
                layer, a, h[n][task.chunk], c[n][task.chunk], *recurrent[n], of_chunk, save=call.save,
                save_gates=call.save,
            )  # fmt: skip
            found = sequence_persistent.run(launch._replace(lanes=schedule.lanes, results=results))
            if "hidden_ptr" in found:  # the plain kernels write h in rows of their own
                outputs[n][now] = sequence_persistent.hidden_of(found, layer)

        follow(schedule, x.device, product, steps)
        h_n, c_n = torch.cat([of[-1] for of in h]), torch.cat([of[-1] for of in c]).to(c_0.dtype)
    return (outputs[-1], h_n, c_n), Saved(inputs, outputs, gates, cells, masks)


def backward(
    how: How, order: Order, grads: Sequence[Tensor | None], needs: Sequence[bool], h_0: Tensor,
    weights: Sequence[LSTMWeights], saved: Saved,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of x, h_0, c_0 and each weight, of those for which `needs` is true, else None.

    grads: of output (T, B, H), h_n and c_n (L, B, H), None where zero.
    """
    from lstm_triton_kernels import sequence_persistent

    from lstm_triton.persistent import recurrent_weights

    call, (L, B, H), T = how.call, h_0.shape, len(saved.outputs[0])
    dtype, wide = h_0.dtype, saved.cells[0].dtype
    schedule = Schedule(L, T, how.backward.chunk, how.backward.lanes)
    check_launches()
    with computing_on(h_0.device):
        # In the order of the schedule, whose first layer is the last.
        K = min(T, schedule.chunk)
        output = h_0.new_zeros(K, B, H) if grads[0] is None else grads[0].contiguous()
        d_gates = [torch.empty_like(of_layer) for of_layer in saved.gates]
        zero = h_0.new_zeros(B, H)
        dh, dc = ([states(zero if g is None else g[n], schedule.chunks + 1, wide) for n in range(L)] for g in grads[1:])
        recurrent = [recurrent_weights([w]) for w in weights]

        def product(task: Task) -> Tensor:
            """Return the gradient of a chunk of a layer's output, (K, B, H)."""
            n, now = L - 1 - task.layer, schedule.span(task.chunk, backward=True)
            if n == L - 1:
                return output[: now.stop - now.start] if grads[0] is None else output[now]
            gradient = gemms.input_gradient(d_gates[n + 1][:, now], [weights[n + 1]])
            return drop_backward(gradient, saved.masks[n][now], how.dropout) if saved.masks else gradient

        def steps(task: Task, grad_output: Tensor) -> None:
            n, now = L - 1 - task.layer, schedule.span(task.chunk, backward=True)
            of_chunk = order.part(now)
            gates, cells = saved.gates[n][:, now], saved.cells[n][:, now.start : now.stop + 1]
            layer = sequence_persistent.layer_of(gates, H, call.spec, of_chunk)
            results = dict(d_gates_ptr=d_gates[n][:, now], dc_ptr=dc[n][task.chunk + 1])
            launch = sequence_persistent.backward_launch(
                layer, grad_output, None, dh[n][task.chunk], dc[n][task.chunk], gates, cells, *recurrent[n], of_chunk
            )
            sequence_persistent.run(launch._replace(lanes=schedule.lanes, results=results))
            if task.chunk + 1 < schedule.chunks:
                first = of_chunk.read_first(d_gates[n][0, now.start])
                dh[n][task.chunk + 1].copy_(product_in(wide, first, weights[n].weight_hh))

        follow(schedule, h_0.device, product, steps)
        found: list[Tensor | None] = [
            gemms.input_gradient(d_gates[0], [weights[0]]) if needs[0] else None,
            None,
            torch.cat([of[-1] for of in dc]).to(dtype) if needs[2] else None,
        ]
        if needs[1]:
            initial = zip(d_gates, weights, strict=True)
            found[1] = torch.stack([gemms.initial_hidden_gradient(d[0], w, order) for d, w in initial])
        names = call.spec.parameter_names(call.bias)
        for n in range(L):
            own = needs[3 + n * len(names) : 3 + (n + 1) * len(names)]
            wanted = list(compress(names, own))
            by_name = gemms.weight_gradients(
                wanted, saved.inputs[n], h_0[n], saved.outputs[n], d_gates[n][0], None, saved.gates[n][0],
                saved.cells[n][0], weights[n], call.spec, order,
            )  # fmt: skip
            if {"bias_ih", "bias_hh"} <= by_name.keys():
                by_name["bias_hh"] = by_name["bias_ih"].clone()  # autograd may keep both as .grad
            found += [by_name.get(name) for name in names]
    return found


def states(first: Tensor, count: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return states (1, B, H) of a type, each on 16 bytes, the first of them (B, H) given and the others zero."""
    size = first.numel()
    memory = first.new_zeros(count, (size + 15) // 16 * 16, dtype=dtype)
    memory[0, :size] = first.flatten()
    return memory[:, :size].unflatten(1, (1, *first.shape)).unbind()


def product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in a type that is at least as wide as that of the factors, unrounded before."""
    if left.dtype == dtype:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


# Dropout, cut into a part that draws and a part that multiplies. PyTorch multiplies on a GPU in one kernel with a mask
# of bools, elsewhere with the numbers 0 and 1 / (1 - p) in the type of the sequence.


def dropout_mask(ones: Tensor, p: float) -> Tensor:
    """Return what `F.dropout` would draw for a sequence like these ones, with probability p: 0 < p < 1."""
    return torch.native_dropout(ones, p, True)[1] if ones.device.type == "cuda" else F.dropout(ones, p)


def drop(x: Tensor, mask: Tensor, p: float, out: Tensor) -> None:
    """Compute what `F.dropout` makes of a part of the sequence, rounded as it does."""
    if mask.dtype != torch.bool:
        torch.mul(x, mask, out=out)
        return
    keep = torch.tensor(1.0 - p, dtype=accumulator_dtype(x.dtype))  # the kernel has both numbers in this type
    out.copy_(torch.ops.aten.native_dropout_backward(x, mask, float(1.0 / keep)))


def drop_backward(gradient: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return the gradient of a part of the sequence, as that of `F.dropout` is."""
    if mask.dtype != torch.bool:
        return gradient * mask
    return torch.ops.aten.native_dropout_backward(gradient, mask, 1.0 / (1.0 - p))


# The lanes.


class Lanes:
    """The streams of a device on which a schedule is launched: the current one, and others beside it."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.done: dict[tuple[int, int], tuple[int, torch.cuda.Event]] = {}
        current = torch.cuda.current_stream(device)
        self.streams = [current, *others(device, count - 1)]
        for stream in self.streams[1:]:
            stream.wait_stream(current)

    def on(self, lane: int) -> AbstractContextManager[Any]:
        """Launch on a lane inside of the block."""
        return torch.cuda.stream(self.streams[lane])

    def wait(self, lane: int, layer: int, chunk: int) -> None:
        """Let a lane wait for a task; there are none of layer -1 and of chunk -1."""
        found = self.done.get((layer, chunk))
        if found is not None and found[0] != lane:
            self.streams[lane].wait_event(found[1])

    def finish(self, task: Task) -> None:
        """Remember when a task is done."""
        event = torch.cuda.Event()
        event.record(self.streams[task.lane])
        self.done[task.layer, task.chunk] = task.lane, event

    def join(self) -> None:
        """Let the current stream wait for all lanes."""
        for stream in self.streams[1:]:
            self.streams[0].wait_stream(stream)


class NoLanes:
    """The same where there are no streams: everything is done when it is launched."""

    def on(self, lane: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def wait(self, lane: int, layer: int, chunk: int) -> None: ...

    def finish(self, task: Task) -> None: ...

    def join(self) -> None: ...


def follow(
    schedule: Schedule, device: torch.device, product: Callable[[Task], Tensor], steps: Callable[[Task, Tensor], None]
) -> None:
    """Launch all tasks of a schedule, as one launch among those whose programs wait for each other.

    - product: launches what a task needs of the layer before, when that has the chunk
    - steps: launches its steps, given the product, when the layer has computed the chunk before
    """
    with one_at_a_time(device):
        lanes = Lanes(device, schedule.lanes) if device.type == "cuda" else NoLanes()
        try:
            for task in schedule.tasks():
                with lanes.on(task.lane):
                    lanes.wait(task.lane, task.layer - 1, task.chunk)
                    found = product(task)
                    lanes.wait(task.lane, task.layer, task.chunk - 1)
                    steps(task, found)
                    lanes.finish(task)
        finally:
            lanes.join()


_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def others(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """Return so many streams of a device, the same at every call: each has its own cached memory."""
    streams = _streams.setdefault(device, [])
    while len(streams) < count:
        streams.append(torch.cuda.Stream(device))
    return streams[:count]
