"""Streaming: a session holds the states of its rows between calls, each of which computes the next few time steps.

A call of few steps takes the host longer than the GPU. On a CUDA device the calls of one number of steps are therefore
captured once, as one CUDA graph of the whole stack, and replayed: the chunk is copied in, the states go from one call
to the next inside of the graph, and the output is copied out.

Shapes: T time steps of a chunk, B rows, I input features, H hidden units, P hidden size after projection (else H), L
layers.
"""

from __future__ import annotations

import numbers
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lstm_triton_kernels.sizes import matmul_precision
from lstm_triton_kernels.watch import check_launches, one_at_a_time
from torch import Tensor

from lstm_triton import checks, functional, routing
from lstm_triton.autograd import PLAIN, computing_on
from lstm_triton.functional import States
from lstm_triton.ragged import capturing, without_waiting

if TYPE_CHECKING:
    from lstm_triton.modules import LSTM

MOST_GRAPHS = 16
"""Graphs that a session keeps, one for a number of steps; the one that was not used for longest goes first."""

MOST_STEPS = 512
"""Steps of the longest chunk that is captured: by estimate the GPU needs longer for more than the host for its call."""


class Session:
    """Compute the next time steps of B sequences at each call, from where the call before ended. See `LSTM.session`.

    - module: the LSTM; batch_size: B
    - graphs: whether calls are replayed from CUDA graphs, where the device has them; False after a capture failed
    """

    def __init__(self, module: LSTM, batch_size: int, *, graphs: bool = True) -> None:
        """Hold zero states for B rows on the module's device. Raises as `LSTM.session` does."""
        if module.bidirectional:
            raise ValueError(
                "a session is for one direction: the second direction of a bidirectional LSTM starts at the last step, "
                "which has not arrived yet"
            )
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size should be of type int, got: {type(batch_size).__name__}")
        if batch_size <= 0:
            raise ValueError("batch_size must be greater than zero")
        checks.flag("graphs", graphs)
        self.module, self.batch_size, self.graphs = module, batch_size, graphs
        weight = module._current_weights()[0]
        shapes = state_shapes(module, batch_size)
        with torch.inference_mode(False):  # else the buffers could not be written to outside of the user's
            h, c = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes)
        self._states: States = h, c
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self._forget_graphs()

    def __call__(self, input: Tensor, *, resets: Tensor | None = None) -> Tensor:
        """Return the output of the next T steps of all rows, and advance the states.

        - input: (T, B, I), with batch_first (B, T, I), of the type and on the device of the module; T may differ from
          call to call
        - resets: bool, (T, B), with batch_first (B, T): where it is true, h and c are set to zero before that step
        - output: (T, B, P), laid out as the input is; no later call writes to it

        Raises TypeError, ValueError or RuntimeError, as `LSTM.forward` does, for an input or resets that do not fit,
        and leaves the states as they were. Raises RuntimeError if a launch before timed out: then the states have no
        meaning, until `reset` or `load_state`.
        """
        check_launches()
        weights = self.module._current_weights()
        check_chunk(self.module, self.batch_size, input, resets, weights[0])
        with self._in_use(weights[0]) as states:
            chunk = self._chunk(input, resets, weights)
            if chunk is None:
                output, new = compute(self.module, weights, input, states, resets)
                store(states, new)
                return output
            chunk.input.copy_(input)
            if chunk.resets is not None and resets is not None:
                chunk.resets.copy_(without_waiting(resets, chunk.resets.device))
            with one_at_a_time(input.device):
                chunk.replay()
            return chunk.output.clone()

    def reset(self, rows: Tensor | Sequence[int] | int | None = None) -> None:
        """Set the states of some rows to zero, of all if rows is None.

        - rows: a bool mask (B,), or the integer indices of rows, 0 to B - 1. A mask may be on any device, and nothing
          waits for it; for indices on a GPU the host waits, to check them

        Raises TypeError or ValueError for rows that do not fit, and leaves the states as they were.
        """
        mask = None if rows is None else row_mask(rows, self.batch_size)
        with self._in_use(self.module._current_weights()[0]) as states:
            for state in states:
                if mask is None:
                    state.zero_()
                else:
                    state.masked_fill_(without_waiting(mask, state.device)[:, None], 0)

    @property
    def state(self) -> States:
        """Copies of the states after the last step: h (L, B, P) and c (L, B, H)."""
        with self._in_use(self.module._current_weights()[0]) as (h, c):
            return h.clone(), c.clone()

    def load_state(self, state: States) -> None:
        """Set the states to copies of (h, c), of shapes (L, B, P) and (L, B, H), the type and device of the module.

        Raises TypeError unless it is a pair of tensors, RuntimeError for a shape, type or device that does not fit, and
        leaves the states as they were.
        """
        pair = isinstance(state, (tuple, list)) and all(isinstance(part, Tensor) for part in state)
        if not pair or len(state) != 2:
            raise TypeError("state should be a pair of Tensors, (h, c)")
        weight = self.module._current_weights()[0]
        for name, part, shape in zip("hc", state, state_shapes(self.module, self.batch_size), strict=True):
            if tuple(part.shape) != shape:
                raise RuntimeError(f"Expected {name} size {shape}, got {list(part.shape)}")
            if part.dtype != weight.dtype or part.device != weight.device:
                raise RuntimeError(
                    f"Expected {name} of {weight.dtype} on {weight.device}, got {part.dtype} on {part.device}"
                )
        with self._in_use(weight) as states:
            store(states, (state[0], state[1]))

    def __repr__(self) -> str:
        return f"Session({self.module!r}, batch_size={self.batch_size}, graphs={self.graphs})"

    @contextmanager
    def _in_use(self, weight: Tensor) -> Iterator[States]:
        """Yield the states, for this thread alone and behind the work of other streams on them; no gradients.

        They follow the module to the device and type of its weights.
        """
        device, dtype = weight.device, weight.dtype
        with self._lock, torch.inference_mode(False), torch.no_grad(), computing_on(device):
            h, c = self._states
            ordered = not capturing(device)  # what a user's capture holds has the order of its replays
            if self._done is not None and ordered:
                torch.cuda.current_stream(h.device).wait_event(self._done)
            if h.device != device or h.dtype != dtype:
                self._forget_graphs()
                self._states = h, c = h.to(device, dtype), c.to(device, dtype)
                self._done = None  # an event is recorded on one device alone
            try:
                yield h, c
            finally:
                if device.type == "cuda" and ordered:
                    self._done = self._done or torch.cuda.Event()
                    self._done.record()

    def _forget_graphs(self) -> None:
        """Forget the recorder, too: a pool whose graphs are all gone may not be used again."""
        self._chunks: OrderedDict[tuple[int, bool], Chunk] = OrderedDict()
        self._basis: tuple[Any, ...] = ()
        self._recorder: Recorder | None = None

    def _chunk(self, input: Tensor, resets: Tensor | None, weights: Sequence[Tensor]) -> Chunk | None:
        """Return the graph for a chunk like this, captured if it is the first; None where it is computed without one.

        Warns if the capture fails, and captures no more then.
        """
        T = input.shape[1 if self.module.batch_first else 0]
        if not (self.graphs and T <= MOST_STEPS and has_graphs(input.device) and stay(self.module, weights)):
            return None
        basis = basis_of(self.module, weights)
        if basis != self._basis:
            self._forget_graphs()
            self._basis = basis
        key = T, resets is not None
        if key not in self._chunks:
            if self._recorder is None:
                self._recorder = Recorder(input.device)
            like = None if resets is None else torch.zeros(resets.shape, dtype=torch.bool, device=input.device)
            buffers = torch.zeros(input.shape, dtype=input.dtype, device=input.device), like
            steps = Steps(self.module, weights, self._states, *buffers)
            self._recorder.warm_up(steps.computed)  # what is wrong with the call itself is raised here
            try:
                replay, output = self._recorder.capture(steps.taken)
            except RuntimeError as error:
                self.graphs = False
                self._forget_graphs()
                warnings.warn(f"a session computes without CUDA graphs: capturing failed: {error}", stacklevel=3)
                return None
            self._chunks[key] = Chunk(*buffers, replay, output)
            if len(self._chunks) > MOST_GRAPHS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(key)
        return self._chunks[key]


class Chunk(NamedTuple):
    """A captured call: its input and resets, what replays it, and the output that a replay writes."""

    input: Tensor
    resets: Tensor | None
    replay: Callable[[], None]
    output: Tensor


class Steps(NamedTuple):
    """The steps of a chunk in buffers; `computed` leaves the states as they are, `taken` advances them."""

    module: LSTM
    weights: Sequence[Tensor]
    states: States
    input: Tensor
    resets: Tensor | None

    def computed(self) -> Tensor:
        """Return the output."""
        return compute(self.module, self.weights, self.input, self.states, self.resets)[0]

    def taken(self) -> Tensor:
        """Return the output, and store the states."""
        output, new = compute(self.module, self.weights, self.input, self.states, self.resets)
        store(self.states, new)
        return output


class Recorder:
    """Captures functions as CUDA graphs on a stream of its own, with one pool of memory for all of them.

    Graphs may share it because they are replayed one at a time and what a replay leaves behind, the output of each, is
    held: no other graph gets that memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Run the function once: it compiles, settles and loads what a capture must not."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return what replays the function's launches, and the result that a replay writes. Nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay, result


def compute(
    module: LSTM, weights: Sequence[Tensor], input: Tensor, states: States, resets: Tensor | None
) -> tuple[Tensor, States]:
    """Return the output and the new states of a chunk, as the module computes it in eval mode."""
    output, new = functional.lstm(input, states, weights, **(module._options() | dict(training=False)), resets=resets)
    return output, new


def store(states: States, new: States) -> None:
    """Copy new states into the buffers of the old."""
    for state, value in zip(states, new, strict=True):
        state.copy_(value)


def state_shapes(module: LSTM, B: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of h and c: (L, B, P) and (L, B, H)."""
    L, H = module.num_layers, module.hidden_size
    return (L, B, module.proj_size or H), (L, B, H)


def check_chunk(module: LSTM, B: int, input: Any, resets: Any, weight: Tensor) -> None:
    """Raise TypeError, ValueError or RuntimeError unless the input and the resets of a chunk fit the module and B."""
    if not isinstance(input, Tensor):
        raise TypeError(f"a session takes a chunk as a Tensor, got: {type(input).__name__}")
    batch_first, I = module.batch_first, module.input_size  # noqa: E741
    layout = "(B, T, I)" if batch_first else "(T, B, I)"
    if input.dim() != 3:
        raise ValueError(f"a session takes a chunk as {layout}, got {input.dim()}-D {list(input.shape)}")
    checks.lstm_dtype(input.dtype, weight.dtype, autocast=False)
    checks.lstm_features(input.shape[2], I)
    T, rows = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    if rows != B:
        raise RuntimeError(f"Expected {B} rows, as the session has, got {rows} in a chunk {layout} {list(input.shape)}")
    checks.sequence_length(T)
    if input.device != weight.device:
        raise RuntimeError(f"Expected a chunk on {weight.device}, as the module is, got one on {input.device}")
    checks.resets(resets, T, B, True, batch_first)


def row_mask(rows: Any, B: int) -> Tensor:
    """Return rows, a mask or indices, as a bool mask (B,). Raises TypeError or ValueError."""
    if isinstance(rows, Tensor) and rows.dtype == torch.bool:
        if tuple(rows.shape) != (B,):
            raise ValueError(f"Expected a mask of rows of size {(B,)}, got {list(rows.shape)}")
        return rows
    if isinstance(rows, Tensor) and rows.dim() <= 1 and not (rows.is_floating_point() or rows.is_complex()):
        rows = rows.tolist()
    indices: Any = [rows] if isinstance(rows, numbers.Integral) else rows
    integers = isinstance(indices, Sequence) and all(isinstance(n, numbers.Integral) for n in indices)
    if not integers or any(isinstance(n, bool) for n in indices):
        raise TypeError("rows should be a mask, a Tensor of bool, or integers: a Tensor, a list, or one")
    mask = torch.zeros(B, dtype=torch.bool)
    for n in indices:
        if not 0 <= n < B:
            raise ValueError(f"rows must be from 0 to {B - 1}, got {n}")
        mask[n] = True
    return mask


def has_graphs(device: torch.device) -> bool:
    """Return whether a call on this device can be captured now: it has CUDA graphs, and no other capture is on."""
    return device.type == "cuda" and not capturing(device)


def stay(module: LSTM, weights: Sequence[Tensor]) -> bool:
    """Return whether the weights are plain parameters of the module, which a graph may read at their addresses.

    A weight that is computed (by a parametrization, say) is another tensor in each call.
    """
    own = map(module._parameters.get, module._flat_weights_names)
    return all(w is parameter and type(w) in PLAIN for w, parameter in zip(weights, own, strict=True))


def basis_of(module: LSTM, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return what a graph rests on beside its shapes: where the weights are, and what decides how they are used."""
    switches = torch.backends.cudnn.enabled, torch.are_deterministic_algorithms_enabled()
    addresses = [(w.data_ptr(), w.dtype) for w in weights]
    return module.strategy, module.batch_first, routing.requested(), matmul_precision(), *switches, *addresses
