"""How long the engines of `routing` take for a layer, by estimate, from what GPUs measured.

Pure functions of sizes and a GPU. Times are in microseconds; a step of a layer is one of all its directions.
"""

from __future__ import annotations

import torch
from lstm_triton_kernels.gpus import GPU, product_us
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.tensor_core_plan import L2_SHARE

CUDNN_PERSISTENT_DTYPES = (torch.float16, torch.float32)
"""Types for which cuDNN has a persistent kernel, see `cudnn_is_persistent`."""

STEPWISE_US = {False: 7.0, True: 10.0}
"""A step forward (False) and backward (True) in two launches, replayed from a CUDA graph, without the time of the
products: as measured on an H200 (benchmarks/NOTES.md)."""

STEPWISE_PRODUCT, STEPWISE_ROWS = 6.0, 128
"""Times the time of `product_us`: the product in such a step, as 64 rows of 1,024 units took it on an H100 and an H200,
at least. Of so many rows; the product of more takes as long as that, or as `product_us` says."""

CUDNN_US = {
    "persistent": {False: 1.3, True: 3.1},
    "persistent, 64 units": {False: 0.4, True: 0.76},
    "persistent, few units": {False: 1.7, True: 2.1},
    "standard": {False: 6.0, True: 12.0},
    "standard, capability 9.0": {False: 8.4, True: 14.1},
    "standard, capability 9.0, packed": {False: 16.0, True: 29.0},
}
"""A step of cuDNN forward (False) and backward (True), without its GEMMs for all steps. As an H100 measured it: of its
persistent kernels the usual time in float16 and, of at most 64 units, in float32 with TF32; of its standard algorithm
the smallest, beside its product (benchmarks/results/h100-80gb-hbm3-2026-11-26-trial-layers*.txt); packed rows
as an H200 measured them (older/h200-2026-11-26-gpu.csv). On other GPUs the standard algorithm is an assumption."""

CUDNN_US_PER_1024, CUDNN_US_PER_ROW = {False: 0.8, True: 1.7}, {False: 0.1, True: 0.17}
"""What 1,024 units add to a step of cuDNN's persistent kernel of many units; its least step for each row; likewise.
Forward also of few units but more than 64, at least: 2,000 rows of 192 took 426 us."""

CUDNN_PRODUCT = 2.5
"""Times the time of `product_us`: the product in a step of cuDNN's standard algorithm, as 128 and 256 rows of 1,024
units in bfloat16 took it (h100-80gb-hbm3-2026-11-26-suites.csv). In TF32 it is one of float32 where 4 does not divide
H."""

CUDNN_LAUNCH_US = {False: 10.0, True: 20.0}
"""What the host needs for a step of cuDNN's standard algorithm, whose kernels it launches one by one. With the GEMMs
for all steps no row of that file took less than 10.5 forward, and 31 with backward."""

HOST_US = {"persistent": {False: 550.0, True: 1750.0}, "operator": {False: 150.0, True: 850.0}}
"""What a call takes the host at least, forward (False) and for its backward pass (True), as measured beside an H100
(older/h100-80gb-hbm3-2026-11-26-gpu.csv, rows of deepbench). Faster hosts need less for both."""

CUDNN_FEW_UNITS = {False: 192, True: 128}
"""Up to how many units PyTorch asks cuDNN for a persistent kernel in every type but float64; backward (True)."""


def passes(layer: Layer) -> dict[str, bool]:
    """Return the passes that are computed, by name: whether it is the backward pass."""
    return {"forward": False, "backward": True} if layer.training else {"forward": False}


def estimate_us(engine: str, layer: Layer, gpu: GPU) -> float:
    """Return the time of a step of a layer by an engine, "persistent", "stepwise" or "operator": an estimate.

    Of all its directions, and of the backward pass as well if that follows; without the products outside of the loop.
    """
    return sum(pass_us(engine, layer, backward, gpu) for backward in passes(layer).values())


def pass_us(engine: str, layer: Layer, backward: bool, gpu: GPU) -> float:
    """Return the time of a step of one pass of a layer, all its directions, by an engine: an estimate.

    Infinite where the persistent kernels have no plan.
    """
    if engine == "persistent":
        plans = ranked_plans(layer, backward, gpu)
        return float("inf") if isinstance(plans, str) else plans[0].estimate_us
    if engine == "stepwise":
        few = layer._replace(B=min(layer.B, STEPWISE_ROWS))
        product = max(STEPWISE_PRODUCT * product_us(few, gpu), product_us(layer, gpu), weights_us(layer, gpu))
        return (STEPWISE_US[backward] + product) * layer.D
    if cudnn_is_persistent(layer, backward):
        return _cudnn_persistent_us(layer, backward) * layer.D
    return _cudnn_standard_us(layer, backward, gpu) * layer.D


def weights_us(layer: Layer, gpu: GPU) -> float:
    """Return the time in which a product of one direction reads its weights from device memory: what L2 does not hold.

    Of a step by itself, between which L2 holds as much of them as of those that a persistent kernel streams.
    """
    return max(0.0, layer.recurrent_bytes - L2_SHARE * gpu.l2_bytes) / (gpu.memory_gb_per_s * 1e3)


def _cudnn_persistent_us(layer: Layer, backward: bool) -> float:
    if CUDNN_FEW_UNITS[backward] < layer.H:
        of_units = CUDNN_US["persistent"][backward] + CUDNN_US_PER_1024[backward] * layer.H / 1024
        return max(of_units, CUDNN_US_PER_ROW[backward] * layer.B)
    if layer.H <= 64:
        return CUDNN_US["persistent, 64 units"][backward]
    few_rows = CUDNN_US["persistent, few units"][backward]
    return few_rows if backward else max(few_rows, CUDNN_US_PER_ROW[backward] * layer.B)


def _cudnn_standard_us(layer: Layer, backward: bool, gpu: GPU) -> float:
    measured = f"standard, capability {gpu.capability / 10}{', packed' if layer.ragged else ''}"
    multiplied = layer._replace(precision="ieee") if layer.rate == "tf32" and layer.H % 4 else layer
    product = max(CUDNN_PRODUCT * product_us(multiplied, gpu), weights_us(layer, gpu))
    step = CUDNN_US.get(measured, CUDNN_US["standard"])[backward] + product
    return max(step, CUDNN_LAUNCH_US[backward])


def call_us(engine: str, layer: Layer, gpu: GPU) -> float:
    """Return the time of a layer of T steps in a call, by an engine, "persistent" or "operator": an estimate.

    Of its recurrence, without the products outside of the loop. The host and the device work at the same time, so that
    the slower of them decides; but cuDNN's standard algorithm is launched step by step, and there the times add up.
    PyTorch's operator computes all layers of a stack in one call, and each has its part of the host's time.
    """
    host = sum(HOST_US[engine][backward] for backward in passes(layer).values())
    device = layer.T * estimate_us(engine, layer, gpu)
    if engine == "persistent":
        return max(host, device)
    host /= layer.L
    by_steps = not all(cudnn_is_persistent(layer, backward) for backward in passes(layer).values())
    return host + device if by_steps else max(host, device)


def asks_for_persistent(layer: Layer, backward: bool) -> bool:
    """Return whether PyTorch asks cuDNN for a persistent kernel for a pass of a stack that begins with this layer.

    As `get_algo` in ATen's native/cudnn/RNN.cpp decides it on a large GPU of compute capability 8.0 or 9.0: for few
    units in every type but float64; for many in float16; never with a projection.
    """
    if layer.P:
        return False
    many = layer.H <= 1024 and layer.H % 128 == layer.I % 128 == 0 and layer.B <= 128 and layer.B % 8 == 0
    one = layer.L == layer.D == 1 and not layer.ragged
    return CUDNN_FEW_UNITS[backward] >= layer.H or (many and one and layer.dtype == torch.float16)


def cudnn_is_persistent(layer: Layer, backward: bool) -> bool:
    """Return whether PyTorch asks cuDNN for a persistent kernel for a pass, and cuDNN has one.

    For bfloat16 it asks as well where there are few units, but the profile of a run shows cuDNN's standard algorithm
    (benchmarks/results, -kernels.json).
    """
    asked = asks_for_persistent(layer, backward) and not layer.ragged
    return asked and layer.dtype in CUDNN_PERSISTENT_DTYPES
