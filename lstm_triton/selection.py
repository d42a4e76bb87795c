"""Which strategy computes a layer: the persistent kernels, the stepwise ones, or PyTorch's own operator; and why.

Pure functions of sizes, variant, type and GPU. `dispatch.py` has chosen the backend before: the strategies are those of
the `triton` backend, and cuDNN, which `auto` takes for variants without peepholes where it expects it to be faster.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lstm_triton_kernels.gpus import GPU, gpu_of
from lstm_triton_kernels.persistent_plan import (
    ANY,
    PersistentPlan,
    Preference,
    Recurrence,
    installed_release,
    persistent_plan,
)
from lstm_triton_kernels.plan import matmul_precision
from torch import Tensor

from lstm_triton import dispatch, transforms
from lstm_triton.dispatch import Choice
from lstm_triton.spec import LSTMSpec, LSTMWeights

STRATEGIES = ("auto", "persistent", "stepwise", "cudnn")

STEPWISE_US = {False: 7.0, True: 10.0}
"""A step forward (False) and backward (True) in two launches, replayed from a CUDA graph, without the time of the
products: as measured on an H200 (benchmarks/NOTES.md)."""


class Layer(NamedTuple):
    """The sizes of one layer: T steps, B rows, H units, D directions, whether it is projected, and what is asked of it.

    precision: of float32 products, "tf32" or "ieee"; training: whether a backward pass will follow; ragged: whether
    rows have lengths or resets.
    """

    spec: LSTMSpec
    T: int
    B: int
    H: int
    D: int
    projected: bool
    dtype: torch.dtype
    precision: str
    training: bool
    ragged: bool = False


def layer_of(
    x: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, training: bool, ragged: bool = False
) -> Layer:
    """The sizes of a layer with input x (T, B, I) and initial cell states c_0 (D, B, H)."""
    D, B, H = c_0.shape
    projected = weights[0].weight_hr is not None
    return Layer(spec, x.shape[0], B, H, D, projected, x.dtype, matmul_precision(), training, ragged)


SHOWN_FASTER = "benchmarks/NOTES.md"
"""Where it stands that cuDNN's persistent kernels are faster than the present ones of this library, with the files."""


def asks_for_large_persistent(dtype: torch.dtype, B: int, H: int, D: int, ragged: bool) -> bool:
    """Whether PyTorch asks cuDNN for its persistent kernel of many units, of one layer with I a multiple of 128.

    As `get_algo` in ATen's native/cudnn/RNN.cpp decides it on a large GPU of compute capability 8.0 or 9.0.
    """
    return dtype == torch.float16 and D == 1 and not ragged and H <= 1024 and H % 128 == 0 and B <= 128 and B % 8 == 0


def asks_for_small_persistent(H: int, training: bool) -> bool:
    """Whether PyTorch asks cuDNN for its persistent kernel of few units, in every type but float64; source as above."""
    most_units = 128 if training else 192
    return most_units >= H


def cudnn_is_persistent(layer: Layer) -> bool:
    """Whether PyTorch asks cuDNN for a persistent kernel, and cuDNN has one.

    The numbers of layers and of input features are taken to be such that it asks. For bfloat16 it asks as well where
    there are few units, but the profile of a run shows cuDNN's standard algorithm (benchmarks/results, -kernels.json).
    """
    if layer.ragged or layer.projected or layer.dtype not in (torch.float16, torch.float32):
        return False
    large = asks_for_large_persistent(layer.dtype, layer.B, layer.H, layer.D, layer.ragged)
    return large or asks_for_small_persistent(layer.H, layer.training)


def recurrence(layer: Layer, backward: bool) -> Recurrence:
    """What a plan is made for."""
    return Recurrence.of(layer.spec, layer.B, layer.H, layer.D, layer.dtype, layer.precision, backward, layer.ragged)


def plans(layer: Layer, gpu: GPU, preference: Preference = ANY) -> dict[str, PersistentPlan | str]:
    """The plan of each pass, "forward" and, in training, "backward"; a sentence why where there is none.

    As the preference wants them, under the release of Triton that is installed.
    """
    passes = {"forward": False, "backward": True} if layer.training else {"forward": False}
    release = installed_release()
    return {
        name: persistent_plan(recurrence(layer, backward), gpu, preference, release)
        for name, backward in passes.items()
    }


def why_not_persistent(layer: Layer, gpu: GPU) -> str | None:
    """What keeps the persistent kernels from computing this layer; None if nothing does."""
    if layer.projected:
        return "a projection needs a product between two steps, which no persistent kernel has"
    if layer.spec.full and layer.spec.output_current:
        return "a full peephole on c_t needs a product within the step, which no persistent kernel has"
    for name, plan in plans(layer, gpu).items():
        if isinstance(plan, str):
            return f"{name} pass: {plan}"
    return None


def why_rather_not_persistent(layer: Layer, gpu: GPU) -> str | None:
    """Why `auto` does without the persistent kernels where they could run; None if it does not."""
    if layer.T == 1:
        return "a single step has no weights to keep"
    found = [(name, plan) for name, plan in plans(layer, gpu).items() if isinstance(plan, PersistentPlan)]
    own = sum(plan.estimate_us for _, plan in found)
    other = sum(stepwise_estimate_us(recurrence(layer, backward=name == "backward"), gpu) for name, _ in found)
    if own <= other:
        return None
    blocks = max(plan.blocks_per_program for _, plan in found)
    return (
        f"{own:.1f} us a step by estimate ({' and '.join(name for name, _ in found)}, up to {blocks} row blocks to a "
        f"program); in launches of its own a step takes {other:.1f} us"
    )


def stepwise_estimate_us(work: Recurrence, gpu: GPU) -> float:
    """A step of a pass in launches of its own: their time, and the recurrent product at half of the full rate."""
    operations = 2 * work.B * work.H * work.H * (work.gates + work.matrices) * work.D
    return STEPWISE_US[work.backward] * work.D + operations / (0.5 * gpu.tflop_per_s[work.rate] * 1e6)


@functools.lru_cache(maxsize=4096)
def kernels(strategy: str, layer: Layer, gpu: GPU) -> Choice:
    """Which kernels compute the layer, "persistent" or "stepwise", for the strategy "auto" or one of these.

    Raises RuntimeError with the reason where "persistent" was asked for and cannot run.
    """
    if strategy == "stepwise":
        return Choice("stepwise", "asked for")
    obstacle = why_not_persistent(layer, gpu)
    if strategy == "persistent":
        if obstacle is not None:
            raise RuntimeError(f"strategy 'persistent' cannot run here: {obstacle}")
        return Choice("persistent", "asked for")
    obstacle = obstacle or why_rather_not_persistent(layer, gpu)
    if obstacle is not None:
        return Choice("stepwise", obstacle)
    return Choice("persistent", "a plan fits, and by estimate nothing else is faster")


def strategy_of(strategy: str, layer: Layer, gpu: GPU, cudnn_may: bool) -> Choice:
    """`kernels`, or "cudnn": where that was asked for, or where `auto` expects it to be faster and `cudnn_may` run.

    Raises RuntimeError with the reason where what was asked for cannot run.
    """
    if strategy == "cudnn":
        return Choice("cudnn", "asked for")
    chosen = kernels(strategy, layer, gpu)
    if strategy != "auto" or not cudnn_may or layer.spec.peephole is not None:
        return chosen
    if cudnn_is_persistent(layer):
        return Choice("cudnn", f"its own persistent kernel serves here, faster on an H200 ({SHOWN_FASTER})")
    if chosen.name == "stepwise":
        return Choice("cudnn", f"it has this variant, and the persistent kernels are out: {chosen.reason}")
    return chosen


def cudnn_when_compiled(
    device: torch.device, dtype: torch.dtype, variant: str, D: int, H: int, projected: bool, training: bool
) -> bool:
    """Whether `auto` leaves a layer to cuDNN inside of torch.compile, where T and B may be unknown.

    It decides as for COMPILED_FOR. Dynamo does not trace this function, but calls it once and keeps the result.
    """
    spec = LSTMSpec.parse(variant)
    if why_not_cudnn(device, spec) is not None:
        return False
    T, B = COMPILED_FOR
    layer = Layer(spec, T, B, H, D, projected, dtype, matmul_precision(), training)
    return strategy_of("auto", layer, gpu_of(device), cudnn_may=True).name == "cudnn"


cudnn_when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]

COMPILED_FOR = (256, 16)
"""The time steps and rows for which `auto` decides between cuDNN and the kernels inside of torch.compile."""


def why_not_cudnn(device: torch.device, spec: LSTMSpec) -> str | None:
    """What keeps `torch.nn.LSTM`'s own operator from computing a layer with cuDNN; None if nothing does."""
    if device.type != "cuda":
        return f"it computes on CUDA devices, not on {device.type}"
    if spec.peephole is not None:
        return f"it has no peepholes, as {spec.name!r} has"
    if not cudnn_is_on():
        return "cuDNN is not available, or switched off"
    return None


def cudnn_is_on() -> bool:
    """Whether PyTorch has cuDNN and may use it. Dynamo cannot trace the question, and keeps the answer."""
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


cudnn_is_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_strategy(strategy: Any, spec: LSTMSpec) -> None:
    """Raises ValueError for an unknown name, and for a strategy that no device has for the variant."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if strategy == "cudnn" and spec.peephole is not None:
        raise ValueError(f"strategy 'cudnn' computes no peepholes, got the variant {spec.name!r}")


def check_runnable(
    strategy: str, device: torch.device, dtype: torch.dtype, spec: LSTMSpec, beyond_torch: str | None = None
) -> None:
    """Raises RuntimeError with the reason where the strategy that was asked for cannot run on such tensors at all.

    beyond_torch: the arguments of the call that `torch.nn.LSTM` does not have.
    """
    obstacle = None
    if strategy == "cudnn":
        obstacle = why_not_cudnn(device, spec)
        if obstacle is None and (transforms.active() or transforms.forward_mode()):
            obstacle = "torch.func and forward-mode differentiation do not see through torch.nn.LSTM's operator"
        if obstacle is None and beyond_torch is not None:
            obstacle = f"torch.nn.LSTM's operator takes no {beyond_torch}"
        if obstacle is None and dispatch.requested() == "triton":
            obstacle = "backend 'triton' was asked for"
    elif strategy != "auto":
        obstacle = dispatch.why_not_triton(device, dtype)
        if obstacle is None and dispatch.requested() == "torch":
            obstacle = "backend 'torch' was asked for"
    if obstacle is not None:
        raise RuntimeError(f"strategy {strategy!r} cannot run here: {obstacle}")
