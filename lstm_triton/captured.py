"""A whole stack in CUDA graphs, forward and backward, for calls of fixed shapes in training and inference.

`torch.cuda.make_graphed_callables` captures the stack as a function of the input and the weights. Its memory is used
again by every replay; here a call that would meet the memory of another is computed as usual, and whatever leaves the
graphs is a copy:

- the outputs, which a later call would overwrite
- the gradients, which autograd may keep as `.grad`, and the next backward pass would overwrite
- the activations: between a call and its backward pass, the module itself computes other calls. A backward pass that
  comes too late all the same (a second one, with retain_graph=True) raises an error
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lstm_triton_kernels.watch import check_launches, one_at_a_time
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import functional, routing, transforms
from lstm_triton.autograd import computing_on, unwatched
from lstm_triton.functional import Lengths, States, autocast_dtype
from lstm_triton.session import basis_of, has_graphs, stay
from lstm_triton.stack import overlapping

if TYPE_CHECKING:
    from lstm_triton.modules import LSTM

MOST_GRAPHS = 8
"""Shapes whose graphs are kept; each has the memory of its activations. What was not used for longest goes first."""


class Captured:
    """Call an LSTM by CUDA graphs where they can compute the call, else as usual. See `LSTM.captured`."""

    def __init__(self, module: LSTM, overlap: bool = False) -> None:
        """Capture nothing yet."""
        self.module, self.overlap = module, overlap
        self._graphs: OrderedDict[tuple[Any, ...], Graph | None] = OrderedDict()
        self._basis: tuple[Any, ...] = ()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have graphs of their own, of the copied module."""
        return Captured, (self.module, self.overlap)

    def __repr__(self) -> str:
        return f"Captured({self.module!r}{', overlap=True' * self.overlap})"

    def __call__(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[Any, ...]:
        """Return what the module returns: arguments, results and errors are those of `LSTM.forward`."""
        asked: dict[str, Any] = dict(lengths=lengths, resets=resets, return_cell_states=return_cell_states)
        if return_gates is not False:  # for looking inside, which the module does
            return self.module(input, hx, **asked, return_gates=return_gates)
        found = None
        if not torch.compiler.is_compiling() and why_as_usual(self.module, input, hx, **asked) is None:
            weights = self.module._current_weights()
            states = () if hx is None else tuple(hx)
            given: Any = (input, *states) if resets is None else (input, *states, resets)
            with self._lock:
                graph = self._graph(given, weights, len(states), return_cell_states)
                found = None if graph is None or graph.pending else graph(given, weights)
        if found is None:
            return self.module(input, hx, **asked)
        return (found[0], (found[1], found[2]), *found[3:])

    def _graph(
        self, given: tuple[Any, ...], weights: Sequence[Tensor], states: int, return_cell_states: bool
    ) -> Graph | None:
        """Return the graphs for such a call, captured if it is the first; None if that failed once, with a warning."""
        basis = basis_of(self.module, weights)
        if basis != self._basis:
            self._graphs.clear()
            self._basis = basis
        options = self.module._options()
        tracked = torch.is_grad_enabled()
        like = [(t.shape, t.dtype, tracked and t.requires_grad) for t in given]
        learning = [tracked and w.requires_grad for w in weights]
        key = (states, return_cell_states, autocast_dtype(given[0]), *options.values(), *like, *learning)
        if key not in self._graphs:
            stack = Stack(options | dict(return_cell_states=return_cell_states), len(given), states)
            stack.check(given, weights, self.module)
            try:
                with overlapping() if self.overlap else nullcontext():
                    self._graphs[key] = Graph(stack, given, weights)
            except RuntimeError as error:
                self._graphs[key] = None
                warnings.warn(f"an LSTM is computed without CUDA graphs: capturing it failed: {error}", stacklevel=3)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]


def why_as_usual(module: LSTM, input: Any, hx: Any, lengths: Any, resets: Any, return_cell_states: Any) -> str | None:
    """Return why a call is not computed by graphs; None if it may be.

    A call that does not fit is not: the module has the errors.
    """
    states = () if hx is None else hx
    if not isinstance(input, Tensor) or not isinstance(states, (tuple, list)) or len(states) not in (0, 2):
        return "the input is no tensor, or there is no pair of states"
    given = (input, *states) if resets is None else (input, *states, resets)
    if not all(isinstance(t, Tensor) and t.device == input.device for t in given):
        return "tensors are on several devices"
    if not has_graphs(input.device):
        return "the device has no CUDA graphs, or a capture is on"
    if lengths is not None:
        return "the values of lengths are looked at in each call"
    if input.numel() == 0 or not isinstance(return_cell_states, bool):
        return "there is nothing to compute"
    own = map(module._parameters.get, module._flat_weights_names)  # before a computed weight is asked for
    if any(w is None for w in own) or not stay(module, module._current_weights()):
        return "the weights are computed, or no plain parameters"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "hooks look at the module, or at what it saves"
    if transforms.forward_mode() or not unwatched(given):
        return "a tracer, a mode or a transform looks at the call"
    if torch._C._current_graph_task_id() != -1:
        return "a backward pass is on, which computes the call again"
    return None


class Stack:
    """The stack as a function of tensors alone: the input, the states if any, the resets if any, the weights."""

    def __init__(self, options: dict[str, Any], given: int, states: int) -> None:
        self.options, self.given, self.states = options, given, states

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return output, h_n, c_n, and the cell states if the options ask for them."""
        input, hx, resets = self.arguments(tensors)
        output, states, *rest = functional.lstm(input, hx, tensors[self.given :], **self.options, resets=resets)
        return output, *states, *rest

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Any, Tensor | None]:
        """Return input, states and resets."""
        hx = tuple(tensors[1 : 1 + self.states]) or None
        return tensors[0], hx, tensors[1 + self.states] if self.given > 1 + self.states else None

    def check(self, given: Sequence[Tensor], weights: Sequence[Tensor], module: LSTM) -> None:
        """Raise as the module does for arguments that do not fit and a strategy that cannot run."""
        input, hx, resets = self.arguments(given)
        taken = functional.take(
            input, hx, weights, module.spec, module.num_layers, 2 if module.bidirectional else 1, module.bias,
            module.batch_first, module.proj_size, module.strategy, None, resets, self.options["return_cell_states"],
            module._rules(),
        )  # fmt: skip
        routing.route(*taken.question)


class Graph:
    """The graphs of one kind of call, and who uses their memory."""

    def __init__(self, stack: Stack, given: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Warm up and capture. Raises RuntimeError if that fails.

        Of the weights aliases are captured: the graphs read and differentiate the memory of the parameters.
        """
        device = given[0].device
        self.device, self.replays = device, 0
        self.last: Callable[[], Use | None] = lambda: None
        self.done = torch.cuda.Event() if device.type == "cuda" else None
        tracked = torch.is_grad_enabled()
        autocast = autocast_dtype(given[0])
        cast = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False)
        with torch.inference_mode(False), torch.set_grad_enabled(tracked), computing_on(device), cast:
            static = [t.detach().clone().requires_grad_(tracked and t.requires_grad) for t in given]
            static += [w.detach().requires_grad_(tracked and w.requires_grad) for w in weights]
            with drawing_nothing(device):
                self.call = make_graphed(stack, tuple(static))

    @property
    def pending(self) -> bool:
        """Whether the activations are those of a call whose backward pass may still come."""
        use = self.last()
        return use is not None and not use.done

    def __call__(self, given: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Replay the forward pass, and return copies of its results."""
        check_launches()
        with computing_on(self.device):
            if self.done is not None:
                torch.cuda.current_stream().wait_event(self.done)
            with one_at_a_time(self.device):
                results = self.call(*given, *weights)
            self.replays += 1
            node = results[0].grad_fn
            if node is not None:
                use = Use(self, weights)
                node.register_prehook(use.before)
                node.register_hook(use.after)
                self.last = weakref.ref(use)
            copies = [result.clone() for result in results]
            if self.done is not None:
                self.done.record()
        return copies


class Use:
    """One call by graphs: held by the node of autograd that it made, so that it ends when no backward pass can come."""

    def __init__(self, graph: Graph, weights: Sequence[Tensor]) -> None:
        self.graph, self.replay, self.done = graph, graph.replays, False
        self.weights = [(w, w._version) for w in weights]

    def before(self, grads: Any) -> None:
        """Check that the backward pass can be replayed. Raises RuntimeError with the reason if not."""
        check_launches()
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an LSTM's gradient by CUDA graphs cannot be differentiated (create_graph=True): call the module itself"
            )
        if self.graph.replays != self.replay:
            raise RuntimeError(
                "this backward pass comes too late: another call has overwritten what the CUDA graphs of the LSTM "
                "saved for it; a second backward pass (retain_graph=True) must come before the next call"
            )
        if any(w._version != version for w, version in self.weights):
            raise RuntimeError("a weight of the LSTM was changed in place between a call and its backward pass")

    def after(self, inputs: Sequence[Tensor | None], outputs: Any) -> tuple[Tensor | None, ...]:
        """Return copies of the gradients."""
        copies = tuple(None if gradient is None else gradient.clone() for gradient in inputs)
        if self.graph.done is not None:
            self.graph.done.record()
        self.done = True
        return copies


@contextmanager
def drawing_nothing(device: torch.device) -> Iterator[None]:
    """Leave the device's generator as it was: a call draws the same whether or not its graphs are captured before."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(before, device)


def make_graphed(stack: Stack, static: tuple[Tensor, ...]) -> Any:
    """Capture the stack; where PyTorch has the choice, other threads may use CUDA meanwhile."""
    known = inspect.signature(torch.cuda.make_graphed_callables).parameters
    mode = dict(capture_error_mode="thread_local") if "capture_error_mode" in known else {}
    graphed: Any = torch.cuda.make_graphed_callables(stack, static, allow_unused_input=True, **mode)  # type: ignore
    return graphed
