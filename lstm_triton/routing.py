"""Routing: which engine computes a layer, and why. The only module that decides it.

The engines:

- "persistent": the persistent kernels, one launch for all steps of a pass
- "stepwise": the kernels of one step, launched step by step
- "kernels": one of these two, chosen when a compiled graph runs, since the sizes are unknown while it is traced
- "operator": PyTorch's own LSTM operator (cuDNN on CUDA)
- "eager": the steps in PyTorch's own operators
- "reference": the reference, for what differentiates in ways that none of the others are made for
- "scan": the reference's steps in PyTorch's `scan`, for exported programs
- "onnx": the reference's steps in ONNX's operators, for the exporter of ONNX that is based on TorchScript

`decide` is a pure function of facts; `route` gathers them in this process: the backend that was asked for, the device,
the transform at work. (Not named `backends`: torch.compile skips every file with `triton/backends` in its
path, `lstm_triton/backends` too.)
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from lstm_triton_kernels.gpus import GPU, gpu_of
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import SUPPORTED_DTYPES, Layer, matmul_precision
from lstm_triton_kernels.spec import STANDARD, LSTMSpec

from lstm_triton import onnx_node, transforms
from lstm_triton.estimates import call_us, cudnn_is_persistent, estimate_us, passes

Backend = Literal["auto", "triton", "torch"]
Strategy = Literal["auto", "persistent", "stepwise", "cudnn"]

BACKENDS: tuple[Backend, ...] = get_args(Backend)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
ENVIRONMENT_VARIABLE = "LSTM_TRITON_BACKEND"
MINIMUM_CAPABILITY = (8, 0)
NEEDS_CUDA = (
    "it needs a CUDA device, move model and input there (model.to('cuda')); CPU tensors only with TRITON_INTERPRET=1, "
    "set before the program starts"
)
ON_CPU = "the kernels run on CUDA devices, not on cpu"
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

FROM_ENVIRONMENT = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
"""Read once: at every call it would cost a tenth of a short one."""

CPU_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""The types of PyTorch's operator on a CPU; of others it rounds the cell state at every step."""

MOST_CUDNN_STEPS = 65_535
"""cuDNN fails on longer sequences (github.com/pytorch/pytorch/issues/133751)."""

FASTER = 0.9
"""`auto` takes the kernels in place of cuDNN where their estimate is below this part of cuDNN's: both are estimates."""

SINGLE_STEP = "a single time step reads the weights once, so that keeping them on the chip gains nothing"

COMPILED_FOR = (256, 16)
"""The time steps and rows for which `auto` decides between cuDNN and the kernels inside of torch.compile."""

_requested: list[str] = []  # innermost last; a plain list because torch.compile guards on it, and not on a ContextVar


class Choice(NamedTuple):
    """A chosen engine or backend, and the reason in words."""

    name: str
    reason: str


class Facts(NamedTuple):
    """Facts on which a decision rests.

    - layer: its sizes, variant and types; gpu: the GPU; None while a graph is traced, when T and B are unknown
    - strategy, backend: what the user asked for
    - no_kernels, no_operator, no_cudnn: what keeps the kernels, PyTorch's operator, or the operator by cuDNN from
      computing it; None if nothing does
    """

    layer: Layer
    gpu: GPU | None
    strategy: str = "auto"
    backend: str = "auto"
    no_kernels: str | None = None
    no_operator: str | None = None
    no_cudnn: str | None = None

    @property
    def cudnn_may(self) -> bool:
        """Whether `auto` may take cuDNN in place of the kernels."""
        return self.backend == "auto" and self.no_operator is None and self.no_cudnn is None


def decide(facts: Facts) -> Choice:
    """Return the engine of a layer. Raises RuntimeError with the reason where what was asked for cannot run."""
    layer, strategy, backend = facts.layer, facts.strategy, facts.backend
    if strategy == "cudnn":
        obstacle = facts.no_cudnn or facts.no_operator
        if obstacle is None and backend == "triton":
            obstacle = "backend 'triton' was asked for"
        refuse(strategy, obstacle)
        return Choice("operator", "asked for")
    if strategy != "auto":
        obstacle = facts.no_kernels
        if obstacle is None and backend == "torch":
            obstacle = "backend 'torch' was asked for"
        refuse(strategy, obstacle)
        return Choice(strategy, "asked for") if facts.gpu is None else kernels(strategy, layer, facts.gpu)
    name, reason = backend_of(facts)
    if name == "torch":
        # A single step of the coupled variant takes the operator longer, since its weights are made first.
        short = layer.spec.coupled and layer.T == 1 and not layer.dtype.is_complex
        engine = "eager" if short or facts.no_operator is not None else "operator"
        return Choice(engine, reason)
    if facts.gpu is None:
        return Choice("kernels", "chosen when the graph runs")
    if facts.cudnn_may and layer.B > 0:
        return persistent_or_cudnn(layer, facts.gpu)
    return kernels("auto", layer, facts.gpu)


def backend_of(facts: Facts) -> Choice:
    """Return the backend that computes. Raises RuntimeError where "triton" was asked for and cannot run."""
    if facts.backend == "torch":
        return Choice("torch", "asked for")
    if facts.no_kernels is None:
        return Choice("triton", "asked for" if facts.backend == "triton" else "the kernels can run here")
    if facts.backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot run here: {facts.no_kernels}")
    return Choice("torch", facts.no_kernels)


def refuse(strategy: str, obstacle: str | None) -> None:
    """Raise RuntimeError if there is an obstacle to the strategy that was asked for."""
    if obstacle is not None:
        raise RuntimeError(f"strategy {strategy!r} cannot run here: {obstacle}")


# The kernels: persistent or stepwise.


def kernels(strategy: str, layer: Layer, gpu: GPU) -> Choice:
    """Return which kernels compute a layer, for the strategy "auto", "persistent" or "stepwise".

    Of an empty batch there is nothing to launch. Raises RuntimeError with the reason where "persistent" was asked for
    and cannot run.
    """
    if layer.B == 0:
        return Choice("stepwise", "there are no rows")
    return _kernels(strategy, layer._replace(T=min(layer.T, 2), I=0, L=1), gpu)


@functools.lru_cache(maxsize=4096)
def _kernels(strategy: str, layer: Layer, gpu: GPU) -> Choice:
    if strategy == "stepwise":
        return Choice("stepwise", "asked for")
    obstacle = why_not_persistent(layer, gpu)
    if strategy == "persistent":
        refuse(strategy, obstacle)
        return Choice("persistent", "asked for")
    obstacle = obstacle or why_rather_not_persistent(layer, gpu)
    if obstacle is not None:
        return Choice("stepwise", obstacle)
    return Choice("persistent", "a plan fits, and by estimate nothing else is faster")


def why_not_persistent(layer: Layer, gpu: GPU) -> str | None:
    """Return what keeps the persistent kernels from computing a layer; None if nothing does."""
    for name, backward in passes(layer).items():
        plans = ranked_plans(layer, backward, gpu)
        if isinstance(plans, str):
            return plans if not backward else f"{name} pass: {plans}"
    return None


def why_rather_not_persistent(layer: Layer, gpu: GPU) -> str | None:
    """Return why `auto` does without the persistent kernels where they could run; None if it does not."""
    if layer.T == 1:
        return SINGLE_STEP
    own, other = estimate_us("persistent", layer, gpu), estimate_us("stepwise", layer, gpu)
    if own <= other:
        return None
    return f"{own:.1f} us a step by estimate ({' and '.join(passes(layer))}); step by step it takes {other:.1f} us"


@functools.lru_cache(maxsize=4096)
def persistent_or_cudnn(layer: Layer, gpu: GPU) -> Choice:
    """Return the route by the persistent kernels where they are faster than cuDNN by a margin; else by the operator."""
    obstacle = why_not_persistent(layer, gpu) or (SINGLE_STEP if layer.T == 1 else None)
    if obstacle is not None:
        return Choice("operator", f"cuDNN has this variant, and the persistent kernels do not suit it: {obstacle}")
    ours, other = call_us("persistent", layer, gpu), call_us("operator", layer, gpu)
    algorithm = "persistent" if cudnn_is_persistent(layer, layer.training) else "standard"
    compared = f"{ours / 1e3:.2f} ms a call, {other / 1e3:.2f} ms by cuDNN's {algorithm} algorithm; both are estimates"
    if ours < FASTER * other:
        return Choice("persistent", compared)
    return Choice("operator", f"the persistent kernels would not take less than {FASTER} of its time: {compared}")


def why_not_cudnn(device: torch.device, spec: LSTMSpec) -> str | None:
    """Return what keeps `torch.nn.LSTM`'s own operator from computing a variant with cuDNN; None if nothing does."""
    if device.type != "cuda":
        return f"it computes on CUDA devices, not on {device.type}"
    if (obstacle := why_not_in_operator(spec)) is not None:
        return obstacle
    if not cudnn_is_on():
        return "cuDNN is not available, or switched off"
    return None


def cudnn_is_on() -> bool:
    """Return whether PyTorch has cuDNN and may use it. Dynamo cannot trace the question, and keeps the answer."""
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


cudnn_is_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


# What is true of the process, and the way from there to an engine.


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Compute every call inside the `with` block on the given backend.

    - name: "triton" (the kernels; an error where they cannot run), "torch" (PyTorch's own operators), or "auto"
      (the kernels for CUDA tensors of a supported type on compute capability 8.0 or newer, else PyTorch)

    Holds for the whole process, whichever thread calls. Overrides the environment variable LSTM_TRITON_BACKEND, which
    is read when the library is imported. Raises ValueError for another name.
    """
    _requested.append(check_backend(name, "backend"))
    try:
        yield
    finally:
        _requested.pop()


def check_backend(name: str, source: str) -> str:
    """Return the name, if it is a backend's. Raises ValueError if not."""
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def check_strategy(strategy: Any, spec: LSTMSpec) -> None:
    """Raise ValueError for an unknown name, and for a strategy that no device has for the variant."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if strategy == "cudnn" and spec.peephole is not None:
        raise ValueError(f"strategy 'cudnn' computes no peepholes, got the variant {spec.name!r}")
    if strategy == "cudnn" and spec.layer_norm:
        raise ValueError(f"strategy 'cudnn' computes no layer normalisation, got the variant {spec.name!r}")
    if strategy == "cudnn" and not spec.activated:
        raise ValueError(f"strategy 'cudnn' has no activation but tanh, got the variant {spec.name!r}")


def requested() -> str:
    """Return the backend that was asked for: by the innermost `with backend(...)`, else by the environment."""
    if _requested:
        return _requested[-1]
    return check_backend(FROM_ENVIRONMENT, ENVIRONMENT_VARIABLE)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what keeps the kernels from running on such tensors; None if nothing does."""
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if (obstacle := why_not_dtype(dtype)) is not None:
        return obstacle
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return f"{device} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
        return None
    if device.type == "cpu":
        from lstm_triton_kernels.inline_ptx import INTERPRETED

        return None if INTERPRETED else NEEDS_CUDA
    return f"the kernels run on CUDA devices, not on {device.type}"


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """Return what keeps the kernels from computing in a type; None if nothing does."""
    if dtype in SUPPORTED_DTYPES:
        return None
    return f"the kernels compute in {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype}"


def why_not_in_operator(spec: LSTMSpec) -> str | None:
    """Return what a variant has that `torch.nn.LSTM`'s own operator has not; None if nothing."""
    if spec.peephole is not None:
        return f"it has no peepholes, as {spec.name!r} has"
    if spec.layer_norm:
        return f"it has no layer normalisation, as {spec.name!r} has"
    return None if spec.activated else f"it has no activation but tanh, which {spec.name!r} does without"


def why_not_operator(device: torch.device, layer: Layer, asked: tuple[str, ...]) -> str | None:
    """Return what keeps `torch.nn.LSTM`'s own operator from computing a call; None if nothing does.

    asked: the arguments of the call that `torch.nn.LSTM` does not have.
    """
    if (obstacle := why_not_in_operator(layer.spec)) is not None:
        return obstacle
    if device.type != "cuda" and layer.dtype not in CPU_DTYPES:
        return f"in {layer.dtype} it rounds the cell state at every step"
    if transforms.active() or transforms.forward_mode():
        return "torch.func and forward-mode differentiation do not see through torch.nn.LSTM's operator"
    if asked:
        return f"torch.nn.LSTM's operator takes no {', '.join(asked)}"
    known = isinstance(layer.T, int) or not transforms.exporting()  # else the question would bound T in the program
    if device.type == "cuda" and known and layer.T > MOST_CUDNN_STEPS:
        return f"cuDNN fails on more than {MOST_CUDNN_STEPS} steps, got {layer.T}"
    return None


def facts_of(layer: Layer, device: torch.device, strategy: str = "auto", asked: tuple[str, ...] = ()) -> Facts:
    """Return what is true of a layer on a device in this process now; `asked` as of `why_not_operator`."""
    name, gpu, no_cudnn = requested(), None, None
    if strategy == name == "auto" and device.type != "cuda":
        no_kernels: str | None = ON_CPU if device.type == "cpu" else f"the kernels run on CUDA devices, not on {device}"
    else:
        no_kernels = why_not_triton(device, layer.dtype)
        compiling = torch.compiler.is_compiling()
        if no_kernels is None and not compiling:
            layer, gpu = layer._replace(precision=matmul_precision()), gpu_of(device)
        if strategy == "cudnn" or (no_kernels is None and not compiling):  # else see cudnn_when_compiled
            no_cudnn = why_not_cudnn(device, layer.spec)
    return Facts(layer, gpu, strategy, name, no_kernels, why_not_operator(device, layer, asked), no_cudnn)


def choose_backend(device: torch.device, dtype: torch.dtype) -> Choice:
    """Return the backend for tensors of a device and type, in this process now.

    Raises RuntimeError where "triton" was asked for and cannot run, ValueError for an unknown name.
    """
    return backend_of(facts_of(Layer(STANDARD, 1, 1, 1, 1, dtype), device))


def route(
    layer: Layer, device: torch.device, strategy: str = "auto", asked: tuple[str, ...] = (), packed: bool = False
) -> Choice:
    """Return the engine of a call in this process now. Raises RuntimeError where what was asked for cannot run.

    asked: the arguments of the call that `torch.nn.LSTM` does not have; packed: whether rows are packed.
    """
    if (torch.compiler.is_compiling() or torch.jit.is_tracing()) and transforms.exporting_to_onnx():
        return for_onnx(layer, asked, packed)
    return _route(layer, device, strategy, asked, packed)


def _route(
    layer: Layer, device: torch.device, strategy: str = "auto", asked: tuple[str, ...] = (), packed: bool = False
) -> Choice:
    facts = facts_of(layer, device, strategy, asked)
    found = decide(facts)
    if torch.compiler.is_compiling():
        found = when_compiled(found, facts, device, packed)
    if transforms.unfit_for_operators():
        if strategy != "auto" or facts.backend == "triton":
            raise RuntimeError(
                "forward-mode differentiation, and torch.func inside of torch.compile, are for strategy 'auto' with "
                "backend 'auto' or 'torch'"
            )
        return Choice("reference", "a transform differentiates in a way that no operator is made for")
    if found.name == "eager" and layer.T == 1 and not asked and not packed:
        return Choice("reference", found.reason)  # a single step has nothing to prepare for others
    if found.name == "eager" and layer.spec.layer_norm:
        scan = transforms.exporting() and not packed  # the reference would fix the number of steps in a program
        return Choice("scan" if scan else "reference", found.reason)
    return found


def for_onnx(layer: Layer, asked: tuple[str, ...], packed: bool) -> Choice:
    """Return the engine of a call that an exporter of ONNX traces. Raises RuntimeError with a way out for packed rows.

    The exporter with dynamo=True translates a layer's operator, as `autograd.layer_in_onnx` says; the older one knows
    PyTorch's own, also of packed rows, and for all else there is the engine "onnx".
    """
    traced = torch.jit.is_tracing()
    node = onnx_node.why_not(layer.spec, layer.P > 0, layer.dtype, asked) is None
    operator = traced and node and why_not_in_operator(layer.spec) is None and "lengths" not in asked
    refuse_packed_in_onnx(packed and not operator)
    if operator:
        return Choice("operator", "the exporter knows it")
    return Choice("onnx" if traced else "kernels", "what stands for it in ONNX is made of its layers")


def refuse_packed_in_onnx(packed: bool) -> None:
    """Raise RuntimeError if the rows of a call that is exported to ONNX are packed."""
    if packed:
        raise RuntimeError("a PackedSequence cannot be exported to ONNX: give a padded input and lengths")


def refuse_drawn_in_onnx(drawn: bool) -> None:
    """Raise RuntimeError if a call that is exported to ONNX draws masks for its steps or its weights."""
    if drawn:
        raise RuntimeError(
            "an LSTM that draws random masks in training (recurrent_dropout, zoneout, weight_dropout) cannot be "
            "exported to ONNX: call model.eval() before"
        )


def when_compiled(found: Choice, facts: Facts, device: torch.device, packed: bool) -> Choice:
    """Return the route of a call that torch.compile or torch.export traces.

    An exported program holds PyTorch's operator as that of `torch.nn.LSTM` does, so that it needs nothing of this
    library; but of a number of steps that is not fixed that would fix it. In a compiled graph the operator stands
    inside of one of this library: "operator inside". Of a packing it would read the batch sizes while it is traced.
    With backend "torch" nothing of this library may stand in an exported program: what is left is PyTorch's `scan`.
    """
    layer = facts.layer
    if found.name == "kernels" and facts.cudnn_may and not packed:
        sizes = (layer.spec.name, layer.D, layer.H, layer.P, layer.training)
        if cudnn_when_compiled(device, layer.dtype, *sizes):
            found = Choice("operator", "faster by estimate")
    alone = transforms.exporting() and facts.backend == "torch" and not packed
    if found.name != "operator":
        return Choice("scan", "a program of PyTorch's operators alone") if alone and found.name == "eager" else found
    in_place = transforms.exporting() and not torch.compiler.is_dynamo_compiling() and not packed
    if in_place and isinstance(layer.T, int):
        return found
    if alone:
        return Choice("scan", "a program of PyTorch's operators alone, of any number of steps")
    if not packed and not transforms.unfit_for_operators():
        return Choice("operator inside", found.reason)
    if facts.strategy == "cudnn":
        raise RuntimeError("strategy 'cudnn' cannot run here: not with packed rows or torch.func in torch.compile")
    return Choice("eager", "PyTorch's operator cannot be traced with packed rows or torch.func")


def cudnn_when_compiled(
    device: torch.device, dtype: torch.dtype, variant: str, D: int, H: int, P: int, training: bool
) -> bool:
    """Return whether `auto` leaves a layer to cuDNN inside of torch.compile, where T and B may be unknown.

    It decides as for COMPILED_FOR. Dynamo does not trace this function, but calls it once and keeps the result.
    """
    T, B = COMPILED_FOR
    spec = LSTMSpec.parse(variant)
    if why_not_cudnn(device, spec) is not None:
        return False
    layer = Layer(spec, T, B, H, D, dtype, matmul_precision(), P=P, training=training)
    return decide(Facts(layer, gpu_of(device))).name == "operator"


cudnn_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def now(engine: str, layer: Layer, device: torch.device) -> str:
    """Return the engine of a call whose sizes are known: of "kernels" the one that is chosen; others as they are."""
    if engine not in ("kernels", "persistent", "stepwise"):
        return engine
    strategy = "auto" if engine == "kernels" else engine
    return kernels(strategy, layer, gpu_of(device)).name


def double_backward(
    engine: str, device: torch.device, dtype: torch.dtype, watched: bool, regularized: bool = False
) -> Choice:
    """Return what computes a backward pass that is differentiated itself: an engine that a layer has, or "reference".

    - engine: of the forward pass, that of a layer or "operator"
    - watched: whether something beside autograd looks at the tensors, or they are a batch or have tangents
    - regularized: whether steps are regularised or normalised
    """
    if regularized:
        return Choice("reference", "the kernels for second derivatives are of plain steps")
    if watched:
        return Choice("reference", "torch.func, a mode or a tracer is at work, or the gradients are a batch")
    if (obstacle := why_not_dtype(dtype)) is not None:
        return Choice("reference", obstacle)
    if engine == "operator":  # asked of cuDNN's alone: on a CPU the operator is differentiated by autograd
        backend = choose_backend(device, dtype)
        if backend.name == "triton":
            return Choice("kernels", "cuDNN has no second derivative")
        return Choice("reference", f"PyTorch's operator has no second derivative, and of the kernels: {backend.reason}")
    if engine == "operator inside":
        return Choice("reference", "PyTorch's operator saved nothing to go on from")
    if engine == "eager" and dtype.itemsize == 2:
        return Choice("reference", f"it rounds to {dtype} at the end alone, and a CPU gains nothing from {dtype}")
    return Choice(engine, "the second derivative goes on from what the first one saved")


def cell(layer: Layer, device: torch.device, plain: bool) -> Choice:
    """Return the engine of one step of an LSTMCell: "operator" is PyTorch's own cell then. Raises as `route`.

    plain: whether nothing but autograd looks at the tensors. PyTorch's cell takes the standard variant then, on a GPU
    as well, unless the kernels were asked for: a step of ours takes Python 400 us to launch on the machine that was
    measured, and PyTorch's takes 100 us in all (benchmarks/NOTES.md).
    """
    if plain and layer.spec.standard and requested() != "triton" and not transforms.active():
        cuda = device.type == "cuda"
        if layer.dtype in (SUPPORTED_DTYPES if cuda else CPU_DTYPES) and not (cuda and transforms.forward_mode()):
            return Choice("operator", "PyTorch's own cell is the quickest for a single step")
    if transforms.exporting_to_onnx():
        return Choice("reference", "of a single step ONNX has the operators")
    found = _route(layer, device, asked=("cells",))
    return Choice("reference", found.reason) if found.name == "eager" else found
