"""Limits of GPUs, which a plan must keep to; and, for estimates alone, the rates of their data sheets."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lstm_triton_kernels.limit import Constants
from lstm_triton_kernels.sizes import Layer


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    - capability: compute capability times ten; multiprocessors; shared_bytes: shared memory of one program, at most
    - clock_ghz, tflop_per_s (dense, by type as in `limit.Constants`), memory_gb_per_s: of the data sheet, boost clock
    - l2_bytes: the capacity of the L2 cache
    - interpreted: whether it is Triton's interpreter
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    clock_ghz: float
    tflop_per_s: Mapping[str, float]
    memory_gb_per_s: float
    l2_bytes: int
    interpreted: bool = False

    def __hash__(self) -> int:
        return hash((self.name, self.capability, self.multiprocessors, self.shared_bytes))


def _rates(half: float, tf32: float, float32: float, float64: float) -> dict[str, float]:
    return {"float16": half, "bfloat16": half, "tf32": tf32, "float32": float32, "float64": float64}


KIB, MIB = 1024, 1024**2
GPUS: dict[str, GPU] = {
    "a100": GPU("A100 SXM 80 GB", 80, 108, 163 * KIB, 1.41, _rates(312, 156, 19.5, 19.5), 2039, 40 * MIB),
    "a10": GPU("A10", 86, 72, 99 * KIB, 1.70, _rates(125, 62.5, 31.2, 0.5), 600, 6 * MIB),
    "rtx3090": GPU("RTX 3090", 86, 82, 99 * KIB, 1.70, _rates(71, 35.6, 35.6, 0.6), 936, 6 * MIB),
    "l4": GPU("L4", 89, 58, 99 * KIB, 2.04, _rates(121, 60, 30.3, 0.5), 300, 48 * MIB),
    "l40s": GPU("L40S", 89, 142, 99 * KIB, 2.52, _rates(362, 183, 91.6, 1.4), 864, 96 * MIB),
    "rtx4090": GPU("RTX 4090", 89, 128, 99 * KIB, 2.52, _rates(165, 82.6, 82.6, 1.3), 1008, 72 * MIB),
    "h100": GPU("H100 SXM", 90, 132, 227 * KIB, 1.83, _rates(989, 494, 67, 67), 3352, 50 * MIB),
    "h200": GPU("H200 SXM", 90, 132, 227 * KIB, 1.83, _rates(989, 494, 67, 67), 4800, 50 * MIB),
    "b200": GPU("B200", 100, 148, 227 * KIB, 1.85, _rates(2250, 1125, 75, 37), 8000, 126 * MIB),
    "rtx5090": GPU("RTX 5090", 120, 170, 99 * KIB, 2.41, _rates(209.5, 104.8, 104.8, 1.6), 1792, 96 * MIB),
}
"""GPUs that plans can be made for where none of them is at hand.

Limits: CUDA C++ Programming Guide. Rates: NVIDIA's data sheets, of half types with float32 accumulation, no sparsity;
capacities of L2: its whitepapers of the architectures and data sheets.
"""


def gpu_key(text: str) -> str:
    """Return the key in `GPUS` of a GPU, from any spelling: "H100", "RTX 4090", "rtx-4090".

    Raises ValueError if it is none of the table.
    """
    key = re.sub(r"[\s_-]", "", text.lower())
    if key not in GPUS:
        raise ValueError(f"unknown GPU {text!r}: choose from {', '.join(GPUS)}")
    return key


def nearest(name: str, capability: int) -> GPU:
    """Return the GPU of the table with that name, as the driver tells it; else that of the nearest capability."""
    words = re.split(r"[\W_]+", name.lower())
    called = {*words, *(a + b for a, b in itertools.pairwise(words))}
    named = [gpu for key, gpu in GPUS.items() if key in called]
    return min(named or GPUS.values(), key=lambda gpu: (abs(gpu.capability - capability), gpu.name))


INTERPRETER = replace(GPUS["h100"], name="Triton's interpreter", multiprocessors=1, interpreted=True)
"""It runs the programs of a launch one after another: none may wait for another."""

L2_BYTES_PER_CLOCK = 40
"""Of each multiprocessor, all of them reading. As `micro` measured it on an H200 (benchmarks/results), at 1.98 GHz."""

WAIT_US = {"counter": {2: 0.74, 128: 0.94}, "data": {2: 0.57, 128: 1.23}}
"""One wait of so many programs for each other, by how they wait, measured as above."""

REGISTER_BYTES = 256 * KIB
"""Of a multiprocessor."""

LAUNCH_US = 1.5
"""A cooperative launch after another, measured as above."""


def nominal_constants(gpu: GPU) -> Constants:
    """Return the constants of the limit from data sheet and assumptions, for estimates where nothing was measured."""
    return Constants(
        copy_gb_per_s=gpu.memory_gb_per_s,
        matmul_tflop_per_s=gpu.tflop_per_s,
        l2_read_gb_per_s=gpu.multiprocessors * L2_BYTES_PER_CLOCK * gpu.clock_ghz,
        launch_us=LAUNCH_US,
        wait_us=WAIT_US,
        multiprocessors=gpu.multiprocessors,
        on_chip_bytes=gpu.shared_bytes + REGISTER_BYTES,
        l2_bytes=gpu.l2_bytes,
    )


def product_us(layer: Layer, gpu: GPU) -> float:
    """Return the time of one step's recurrent product of one direction in a launch, at half of the GPU's full rate."""
    return layer.recurrent_operations / (0.5 * gpu.tflop_per_s[layer.rate] * 1e6)


def share_of(gpu: GPU, lanes: int) -> GPU:
    """Return the GPU that one of so many lanes has: its share of multiprocessors, L2 and bandwidth, see schedule.py."""
    if lanes < 2:
        return gpu
    return replace(
        gpu,
        multiprocessors=max(1, gpu.multiprocessors // lanes),
        l2_bytes=gpu.l2_bytes // lanes,
        memory_gb_per_s=gpu.memory_gb_per_s / lanes,
    )


@functools.lru_cache
def gpu_of(device: torch.device) -> GPU:
    """Return the GPU that a CUDA device is; limits as the driver tells them, rates of the nearest in the table.

    A CPU is Triton's interpreter.
    """
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return replace(
        nearest(properties.name, capability),
        name=properties.name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined] # missing in the stub
        l2_bytes=properties.L2_cache_size,
    )
