"""Whether several layers of a stack are computed at the same time, on how many lanes and in chunks of how many steps.

Pure functions of sizes and a GPU, by the discrete simulation of `lstm_triton_kernels.schedule`; times are in
microseconds. `stack.py` computes so. It is asked for with `LSTM.captured(overlap=True)` alone: outside of a CUDA graph
the host would need longer to launch most chunks than the device to compute them, see `Times.host`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from lstm_triton_kernels.gpus import GPU, L2_BYTES_PER_CLOCK, LAUNCH_US, product_us, share_of
from lstm_triton_kernels.plan import PersistentPlan
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.schedule import Schedule, Times, makespan
from lstm_triton_kernels.sizes import Layer

MOST_LANES = 8

CHUNKS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
"""Steps of a chunk. Multiples of 16: so every chunk of a tensor begins on 16 bytes, as the whole tensor does, and one
compiled kernel serves all of them."""

PRODUCT_RATE = 0.5
"""The part of a GPU's full rate at which a matrix product between two layers is expected to run, as `product_us`."""

FASTER = 0.9
"""Layers are overlapped where that takes less than this part of the time of one after another, by simulation."""


class Overlap(NamedTuple):
    """How a pass of a stack is computed.

    - lanes: of which each has its share of the multiprocessors, see `lstm_triton_kernels.schedule`; chunk: steps
    - us, apart_us: of the pass so, and with one layer after another; by simulation
    """

    lanes: int
    chunk: int
    us: float = 0.0
    apart_us: float = 0.0


def why_not(layer: Layer, asked: tuple[str, ...] = (), recompute: bool = False) -> str | None:
    """Return what rules out that layers of such a stack are computed at the same time; None if nothing does.

    asked: as in `routing.route`.
    """
    if layer.L == 1:
        return "there is one layer"
    if layer.D == 2:
        return "a layer of both directions needs all steps of the one before"
    if layer.spec.full:
        return "a full peephole is not cut into chunks"
    if layer.P:
        return "a projection is not cut into chunks"
    if "lengths" in asked:
        return "rows have lengths"
    if "return_cell_states" in asked:
        return "the cell states are returned"
    if "return_gates" in asked:
        return "the gates are returned"
    if regularized := [name for name in asked if name not in ("lengths", "resets", "return_cell_states")]:
        return f"{regularized[0]} is for layers one after another"
    if layer.spec.layer_norm:
        return "layer normalisation is for layers one after another"
    if recompute:
        return "recompute=True computes the gates again, of all steps of one layer after another"
    if layer.T < 2 or layer.B == 0:
        return "there is nothing to cut into chunks"
    return None


@functools.lru_cache(maxsize=4096)
def overlap_of(layer: Layer, backward: bool, gpu: GPU) -> Overlap | str:
    """Return how a pass of a stack of layer.L layers is best overlapped; a sentence where that gains too little.

    layer: the first layer, for which `why_not` has no reason.
    """
    apart = times_of(layer, backward, gpu, 1, layer.T)
    if isinstance(apart, str):
        return apart
    apart_us = makespan(Schedule(layer.L, layer.T, layer.T, 1), apart)
    found: list[Overlap] = []
    for lanes in range(2, min(layer.L, MOST_LANES) + 1):
        for chunk in CHUNKS:
            if chunk >= layer.T:
                break
            times = times_of(layer, backward, gpu, lanes, chunk)
            if isinstance(times, str):
                break
            found.append(Overlap(lanes, chunk, makespan(Schedule(layer.L, layer.T, chunk, lanes), times), apart_us))
    if not found:
        return "no plan fits a share of the multiprocessors, or all steps are one chunk"
    best = min(found, key=lambda overlap: (overlap.us, overlap.lanes, overlap.chunk))
    if best.us >= FASTER * apart_us:
        return (
            f"{best.lanes} layers at a time would take {best.us / apart_us:.2f} of the time of one after another by "
            f"simulation, not less than {FASTER}: with a share of the GPU a step takes longer"
        )
    return best


def times_of(layer: Layer, backward: bool, gpu: GPU, lanes: int, chunk: int) -> Times | str:
    """Return how long the tasks of a pass take on a lane; a sentence where there is no plan for its multiprocessors.

    Before a chunk of a layer stands a matrix product: forward of its input, backward of the gradients of the layer
    above. A launch fills an exchange buffer and loads its weights; backward a product of one step follows.
    """
    share = share_of(gpu, lanes)
    plans = ranked_plans(layer, backward, share)
    if isinstance(plans, str):
        return plans
    rate = PRODUCT_RATE * gpu.tflop_per_s[layer.rate] * 1e6 / lanes
    outside = 2.0 * layer.B * layer.gates * layer.H / rate  # of a step, for each input
    start = 2 * LAUNCH_US + loading_us(plans[0], share)
    if backward:
        start += LAUNCH_US + product_us(layer, gpu) * lanes
    return Times(
        first_product=0.0 if backward else LAUNCH_US + chunk * layer.I * outside,
        product=LAUNCH_US + chunk * layer.H * outside,
        start=start,
        step=plans[0].estimate_us,
    )


def loading_us(plan: PersistentPlan, gpu: GPU) -> float:
    """Return the time in which all programs of a launch load their weights."""
    together = -(-plan.programs // gpu.multiprocessors)
    return together * plan.tile_bytes / (L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
