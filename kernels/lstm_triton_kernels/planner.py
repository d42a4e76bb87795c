"""The planner: every plan of a layer for a GPU, ranked by an estimate, or the reason why there is none.

Pure functions from sizes and a GPU's limits to frozen plans. The estimate is a model of the time of a step, of which
only differences between plans matter. float32 products without TF32 are the kernels' in plain Triton (float32_plan.py);
all others run on tensor cores, by the kernels in Gluon (tensor_core_plan.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from lstm_triton_kernels import float32_plan, tensor_core_plan
from lstm_triton_kernels.gpus import GPU
from lstm_triton_kernels.plan import ANY, PersistentPlan, Preference
from lstm_triton_kernels.sizes import Layer, ceil_div, padded_row

PERSISTENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MOST_TRIES = 4
"""Plans that are compiled at most until one does not spill (settle.py)."""

MOST_SPILLED = 16
"""Spilled registers of a thread up to which a plan is taken. On an H200 a plan that took the place of such a one was
slower than it by far more than the spill costs (benchmarks/NOTES.md)."""

WAITING_MARGIN = 1.2
"""How much longer a plan without waiting may take by estimate, and still be preferred: it leaves the rest of the GPU to
others, and cannot time out."""


def ranked_plans(
    layer: Layer, backward: bool, gpu: GPU, preference: Preference = ANY
) -> tuple[PersistentPlan, ...] | str:
    """Return every plan of a pass that fits the GPU, the fastest by estimate first; a sentence why if there is none.

    A plan without waiting may take a little longer, and still comes first.
    """
    return _ranked_plans(layer.planned, backward, gpu, preference)


@functools.lru_cache(maxsize=4096)
def _ranked_plans(layer: Layer, backward: bool, gpu: GPU, preference: Preference) -> tuple[PersistentPlan, ...] | str:
    obstacle = why_not(layer) or (None if layer.exact else tensor_core_plan.why_not(gpu))
    if obstacle is not None:
        return obstacle
    plans = [plan for plan in candidates(layer, backward, gpu) if preference.admits(plan)]
    if not plans:
        return why_none(layer, gpu, preference)

    def rank(plan: PersistentPlan) -> tuple[object, ...]:
        tile = (plan.streamed, plan.kept, plan.block_u, plan.block_b, plan.block_k, plan.parts, plan.chunks, plan.group)
        return (plan.estimate_us * (1.0 if plan.alone else WAITING_MARGIN), plan.programs, tile)

    return tuple(sorted(plans, key=rank))


def why_not(layer: Layer) -> str | None:
    """Return what rules out a persistent plan on any GPU; None if nothing does."""
    if layer.spec.layer_norm and (obstacle := why_not_normalized(layer)):
        return obstacle
    if layer.dtype not in PERSISTENT_DTYPES:
        return f"{str(layer.dtype).removeprefix('torch.')} has no persistent kernel: its products would spill"
    if layer.B < 1:
        return "there are no rows"
    if layer.H < 1:
        return "there are no units"
    width = padded_row(layer.H) if layer.exact else layer.H
    if layer.B * max(layer.gates * layer.H, layer.D * width) >= 2**31:
        return f"a step of {layer.B} rows and {layer.H} units has more elements than 32-bit offsets reach"
    return None


def why_not_normalized(layer: Layer) -> str | None:
    """Return what rules out a persistent plan with layer normalisation on any GPU; None if nothing does."""
    if layer.exact:
        return "layer normalisation in float32 without TF32 is computed step by step: only the kernels in Gluon have it"
    if layer.spec.full or layer.P:
        other = "a full peephole" if layer.spec.full else "a projection"
        return f"layer normalisation with {other} is computed step by step: no persistent kernel has both"
    return None


def why_none(layer: Layer, gpu: GPU, preference: Preference) -> str:
    """Return the sentence why no plan fits."""
    if preference != ANY:
        return f"no plan is {preference}"
    room = f"{gpu.multiprocessors * gpu.shared_bytes / 2**20:.1f} MiB shared memory"
    if layer.exact:
        room += f" in all and {float32_plan.MOST_CHUNKS} chunks of columns at most"
    else:
        room += f" and {gpu.multiprocessors * tensor_core_plan.REGISTERS / 2**18:.1f} MiB of registers in all"
    programs = ceil_div(layer.H, max(tensor_core_plan.UNITS_STREAMED)) * layer.D
    if not layer.exact and programs > gpu.multiprocessors:
        room += f"; to stream a part of them takes {programs} multiprocessors"
    return (
        f"no tiles of the recurrent weights, {layer.recurrent_bytes * layer.D / 2**20:.1f} MiB, fit "
        f"{gpu.multiprocessors} multiprocessors with room to work, of {room}"
    )


def candidates(layer: Layer, backward: bool, gpu: GPU) -> Iterator[PersistentPlan]:
    """Yield every plan that fits the GPU."""
    return (float32_plan if layer.exact else tensor_core_plan).candidates(layer, backward, gpu)
