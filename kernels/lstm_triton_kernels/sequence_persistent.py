"""A whole sequence in one launch a pass: buffers, flags and launches of the persistent kernels.

All directions of one layer. Shapes: T time steps, B batch rows, H hidden units, D directions, G gate blocks, Q peephole
blocks. No projection; a full peephole reads c_{t-1} in all its gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton_kernels.cell import variant_constants
from lstm_triton_kernels.gpus import GPU, gpu_of
from lstm_triton_kernels.operands import product_constants
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.persistent_backward import persistent_backward_kernel
from lstm_triton_kernels.persistent_forward import persistent_forward_kernel
from lstm_triton_kernels.plan import ANY, PersistentPlan, Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.settle import SETTLED, Usage, settled, usage_elsewhere, usage_on_device
from lstm_triton_kernels.sizes import Layer, accumulator_dtype, ceil_div, matmul_precision
from lstm_triton_kernels.spec import LSTMSpec
from lstm_triton_kernels.sync import COUNTER_STRIDE, POLLS, unpublish
from lstm_triton_kernels.tensor_core_plan import exchanged_columns, no_gluon, thread_registers
from lstm_triton_kernels.watch import error_words_of, one_at_a_time

if no_gluon() is None:
    from lstm_triton_kernels.exchanged_backward import exchanged_backward_kernel
    from lstm_triton_kernels.exchanged_forward import exchanged_forward_kernel

_preferences: list[Preference] = []


@contextmanager
def prefer(preference: Preference) -> Iterator[None]:
    """Plan as the preference wants inside of the block, to measure one plan against another. Holds for all threads."""
    _preferences.append(preference)
    try:
        yield
    finally:
        _preferences.pop()


def preference() -> Preference:
    """Return what is wanted of plans: nothing, outside of `prefer`."""
    return _preferences[-1] if _preferences else ANY


class Launch(NamedTuple):
    """One pass that is to be launched, on whatever plan.

    - arguments: makes the kernel's arguments for a plan, buffers for its results included
    - exchanged: names of the buffers through which programs of the plain kernels exchange values
    - flags: what decides, beside the layer, which kernel is compiled
    """

    layer: Layer
    backward: bool
    device: torch.device
    arguments: Callable[[PersistentPlan], dict[str, Any]]
    exchanged: tuple[str, ...]
    flags: tuple[bool, ...]


def forward_launch(
    layer: Layer, gates: Tensor, h_0: Tensor, c_0: Tensor, w_hh: Tensor, w_ch: Tensor | None, order: Order,
    *, save: bool, save_gates: bool,
) -> Launch:  # fmt: skip
    """Return the launch of all steps forward.

    - gates: (D, T, B, G·H), the input side of the gates; with `save_gates` the activated gates take its place
    - h_0, c_0: (D, B, H); w_hh: (D, G·H, H); w_ch: diagonal (D, Q·H), full (D, Q·H, H); all contiguous
    - order: of the first direction; beyond a row's length output and cells are zero, and h_n and c_n are the row's last
    - save: keep every c_t

    Results, by the kernel's names: hidden_ptr (T + 1, B, D, padded_H), h_t at index t, the last index is the kernel's
    own (see `hidden_of`); h_n_ptr, c_n_ptr (D, B, H); with `save` cells_ptr (D, T + 1, B, H) in the accumulator type,
    see order.py.
    """
    D, T, B, H = layer.D, layer.T, layer.B, layer.H

    def arguments(plan: PersistentPlan) -> dict[str, Any]:
        every = save or (layer.spec.full and plan.exact and not plan.alone)
        cells = None
        if every or plan.blocks_per_program > 1:
            slots = T + 1 if every else 1
            cells = torch.empty(D, slots, B, H, dtype=accumulator_dtype(gates.dtype), device=gates.device)
        given: dict[str, Any] = dict(
            gates_ptr=gates,
            cells_ptr=cells,
            h_n_ptr=torch.empty_like(h_0),
            c_n_ptr=torch.empty_like(c_0),
            h_0_ptr=h_0,
            c_0_ptr=c_0,
            w_hh_ptr=w_hh,
            w_ch_ptr=w_ch,
            SAVE_GATES=save_gates,
            CELLS="all" if every else "none" if cells is None else "one",
        )
        name = f"the forward pass of {H} units"
        if not plan.exact:
            given["output_ptr"] = torch.empty(T, B, D, H, dtype=gates.dtype, device=gates.device)
            return given | exchanged_arguments(layer, plan, order, gates.device, name)
        given["hidden_ptr"] = torch.empty(T + 1, B, D, padded(layer, plan), dtype=gates.dtype, device=gates.device)
        given |= dict(padded_H=padded(layer, plan), WORDS=not plan.alone and layer.element_bytes == 2)
        return given | plain_arguments(layer, plan, order, gates.device, name)

    exchanged = ("hidden_ptr", "cells_ptr") if layer.spec.full else ("hidden_ptr",)
    flags = (save, save_gates, *asked(order))
    return Launch(layer, False, gates.device, arguments, exchanged, flags)


def padded(layer: Layer, plan: PersistentPlan) -> int:
    """Return the units of a row of the forward pass's buffer of hidden states: H, filled up where programs exchange it.

    So that every row begins on 16 bytes, and is read in pieces of 16 bytes.
    """
    return layer.H if plan.alone else 16 * ceil_div(layer.H, 16)


def hidden_of(found: dict[str, Any], layer: Layer) -> Tensor:
    """Return every h_t, (T, B, D·H) contiguous, of a forward launch that ran."""
    hidden: Tensor = found["output_ptr"] if "output_ptr" in found else found["hidden_ptr"][: layer.T, ..., : layer.H]
    return hidden.reshape(layer.T, layer.B, layer.D * layer.H).contiguous()


def backward_launch(
    layer: Layer, grad_output: Tensor | None, grad_cells: Tensor | None, grad_h_n: Tensor | None,
    grad_c_n: Tensor | None, gates: Tensor, cells: Tensor, w_hh: Tensor, w_ch: Tensor | None, order: Order,
) -> Launch:  # fmt: skip
    """Return the launch of all steps backward, from the gradients of the results, None where zero.

    - grad_output, grad_cells: (T, B, D·H), of h_t and of c_t; grad_h_n, grad_c_n: (D, B, H); all contiguous
    - gates: (D, T, B, G·H), cells: (D, T + 1, B, H), as the forward pass saved them; the others as there

    Results: d_gates_ptr (D, T, B, G·H), the gradients of the pre-activations; dc_ptr (D, B, H) that of c_0, in the
    accumulator type, without what a full peephole adds at the first step.
    """
    shape = (layer.D, layer.B, layer.H)
    given = [gradient is not None for gradient in (grad_output, grad_cells, grad_h_n, grad_c_n)]

    def arguments(plan: PersistentPlan) -> dict[str, Any]:
        dc = torch.zeros if plan.blocks_per_program > 1 else torch.empty
        given_tensors = dict(
            d_gates_ptr=torch.empty_like(gates),
            dc_ptr=dc(shape, dtype=cells.dtype, device=gates.device),
            gates_ptr=gates,
            cells_ptr=cells,
            grad_output_ptr=grad_output,
            grad_cells_ptr=grad_cells,
            grad_h_n_ptr=grad_h_n,
            grad_c_n_ptr=grad_c_n,
            w_hh_ptr=w_hh,
            w_ch_ptr=w_ch,
            HAS_GRAD_OUTPUT=given[0],
            HAS_GRAD_CELLS=given[1],
            HAS_GRAD_H_N=given[2],
            HAS_GRAD_C_N=given[3],
        )
        name = f"the backward pass of {layer.H} units"
        if not plan.exact:
            return given_tensors | exchanged_arguments(layer, plan, order, gates.device, name)
        words = not plan.alone and layer.element_bytes == 2 and layer.gates * layer.H % 2 == 0
        return given_tensors | dict(WORDS=words) | plain_arguments(layer, plan, order, gates.device, name)

    flags = (*given, *asked(order))
    return Launch(layer, True, gates.device, arguments, ("d_gates_ptr",), flags)


def layer_of(gates: Tensor, H: int, spec: LSTMSpec, order: Order) -> Layer:
    """Return the sizes of a layer with gates (D, T, B, G·H)."""
    D, T, B, _ = gates.shape
    return Layer(spec, T, B, H, D, gates.dtype, matmul_precision(), ragged=order.ragged)


def asked(order: Order) -> tuple[bool, bool]:
    """Return whether rows have lengths, and resets."""
    return order.lengths is not None, order.resets is not None


def plan_of(launch: Launch) -> PersistentPlan:
    """Return the plan that a launch runs on: the first of the ranked ones that compiles without spilling.

    Raises RuntimeError with the reason where there is none.
    """
    wanted = preference()
    plans = ranked_plans(launch.layer, launch.backward, gpu_of(launch.device), wanted)
    if isinstance(plans, str):
        raise RuntimeError(f"strategy 'persistent' cannot run here: {plans}")
    key = (key_of(launch.layer), launch.backward, wanted, launch.device, launch.flags)

    def usage_of(plan: PersistentPlan) -> Usage | None:
        return usage_on_device(kernel_of(launch, plan), plan.grid, launch.arguments(plan))

    return settled(key, plans, usage_of, launch.device)


def plan_that_ran(layer: Layer, backward: bool, wanted: Preference = ANY) -> PersistentPlan | None:
    """Return the plan that was last settled for such a launch in this process; None if there was none."""
    key = (key_of(layer), backward, wanted)
    found = [plan for known, plan in SETTLED.items() if known[:3] == key]
    return found[-1] if found else None


def key_of(layer: Layer) -> Layer:
    """Return the layer without what does not decide about its plans."""
    return layer._replace(T=0, I=0, training=False)


def usages(layer: Layer, backward: bool, gpu: GPU, plans: Sequence[PersistentPlan]) -> list[Usage]:
    """Compile the plans of a layer for a GPU that need not be here. Raises RuntimeError as `usage_elsewhere`."""
    launch = launch_without_data(layer, backward)
    return [
        usage_elsewhere(kernel_of(launch, plan), plan.grid, launch.arguments(plan), gpu.capability) for plan in plans
    ]


def launch_without_data(layer: Layer, backward: bool) -> Launch:
    """Return a launch of two steps on tensors without memory, to compile it; backward with the usual gradients."""
    spec, D, B, H, T = layer.spec, layer.D, layer.B, layer.H, 2

    def empty(*shape: int, dtype: torch.dtype = layer.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    lengths, resets = empty(B, dtype=torch.int64), empty(T, B, dtype=torch.bool)
    order = Order(T, lengths, resets) if layer.ragged else Order(T)
    Q = len(spec.peephole_gates) * H
    w_hh, w_ch = empty(D, layer.gates * H, H), empty(D, Q) if spec.diagonal else empty(D, Q, H) if spec.full else None
    gates, state, sequence = empty(D, T, B, layer.gates * H), empty(D, B, H), empty(T, B, D * H)
    layer = layer._replace(T=T)
    if not backward:
        save = layer.training
        return forward_launch(layer, gates, state, state, w_hh, w_ch, order, save=save, save_gates=save)
    cells = empty(D, T + 1, B, H, dtype=accumulator_dtype(layer.dtype))
    return backward_launch(layer, sequence, None, state, state, gates, cells, w_hh, w_ch, order)


def run(launch: Launch) -> dict[str, Any]:
    """Launch the kernel on its plan and return its arguments, the buffers of its results among them.

    Programs that wait for each other are launched after all such launches before. Raises RuntimeError as `plan_of`.
    """
    plan = plan_of(launch)
    given = launch.arguments(plan)
    if not plan.exact:
        unpublish(given["exchange_ptr"])
        zero_unpublished(given["exchange_ptr"], launch.layer, launch.backward, plan)
    else:
        if plan.wait == "data":
            for name in launch.exchanged:
                unpublish(given[name])
        if not launch.backward and given["padded_H"] > launch.layer.H:
            given["hidden_ptr"][..., launch.layer.H :] = 0
    with one_at_a_time(launch.device) if not plan.alone else nullcontext():
        kernel_of(launch, plan)[grid(plan, launch.device)](**given)
    return given


def kernel_of(launch: Launch, plan: PersistentPlan) -> Any:
    """Return the kernel of a pass on a plan."""
    if not plan.exact:
        return exchanged_backward_kernel if launch.backward else exchanged_forward_kernel
    return persistent_backward_kernel if launch.backward else persistent_forward_kernel


def grid(plan: PersistentPlan, device: torch.device) -> tuple[int, int, int]:
    """Return the numbers of programs: parts of the units, groups of row blocks, directions.

    Raises RuntimeError where programs that wait for each other could not all be resident.
    """
    if not plan.alone and device.type == "cuda" and plan.programs > plan.together * gpu_of(device).multiprocessors:
        raise RuntimeError(
            f"{plan.programs} programs that wait for each other do not fit the {gpu_of(device).multiprocessors} "
            f"multiprocessors of {device}"
        )
    return plan.grid


def exchanged_arguments(
    layer: Layer, plan: PersistentPlan, order: Order, device: torch.device, name: str
) -> dict[str, Any]:
    """Return the arguments that both passes of the kernels in Gluon share. name: what the launch is, for errors."""
    slot = plan.block_b * plan.columns
    return common_arguments(layer, plan, order, device, name) | dict(
        exchange_ptr=torch.empty(layer.D, layer.T + 1, plan.row_blocks, slot, dtype=layer.dtype, device=device),
        KEPT=plan.kept,
        PIECES=plan.chunks // plan.group,
        TILED=plan.tiled,
        ROWS=plan.block_b,
        UNITS=plan.block_u,
        PRECISION=product_constants(layer.dtype, layer.precision)["PRECISION"],
        maxnreg=thread_registers(plan.num_warps, plan.together),
        launch_cooperative_grid=True,
    )


def zero_unpublished(exchange: Tensor, layer: Layer, backward: bool, plan: PersistentPlan) -> None:
    """Set the columns of an exchange buffer to zero that no program publishes."""
    columns, published = plan.columns, exchanged_columns(layer, backward)
    if published == columns:
        return
    if plan.tiled:
        of_lane = 16 // layer.element_bytes
        exchange.view(-1, plan.block_b // 8, columns // of_lane, 8 * of_lane)[:, :, published // of_lane :] = 0
    else:
        exchange.view(-1, columns)[:, published:] = 0


def plain_arguments(
    layer: Layer, plan: PersistentPlan, order: Order, device: torch.device, name: str
) -> dict[str, Any]:
    """Return the arguments that both passes of the plain kernels share. name: what the launch is, for errors."""
    if plan.wait == "counter":
        count = plan.directions * plan.row_blocks * COUNTER_STRIDE.value
        counters = torch.zeros(count, dtype=torch.int32, device=device)
    else:
        counters = torch.empty(1, dtype=torch.int32, device=device)  # nobody counts
    return common_arguments(layer, plan, order, device, name) | dict(
        counters_ptr=counters,
        ALONE=plan.alone,
        WAIT=plan.wait,
        GROUP=plan.group,
        PARTS=plan.parts,
        H_DIVISOR=math.gcd(layer.H, 16),
        BLOCK_B=plan.block_b,
        BLOCK_U=plan.block_u,
        BLOCK_K=plan.block_k,
        num_stages=1,
        launch_cooperative_grid=not plan.alone,
        **product_constants(layer.dtype, layer.precision),
    )


def common_arguments(
    layer: Layer, plan: PersistentPlan, order: Order, device: torch.device, name: str
) -> dict[str, Any]:
    """Return the arguments that all kernels share."""
    text = f"{name}, {order.T} steps of {layer.B} rows, {plan.programs} programs on {device}"
    return dict(
        lengths_ptr=order.lengths,
        resets_ptr=order.reset_bytes,
        error_ptr=error_words_of(device).take(text),
        T=order.T,
        B=layer.B,
        H=layer.H,
        rows=plan.rows,
        row_blocks=plan.row_blocks,
        max_polls=POLLS,
        pause=plan.pause,
        HAS_LENGTHS=order.lengths is not None,
        HAS_RESETS=order.resets is not None,
        ONE_BLOCK=plan.blocks_per_program == 1,
        FULL=layer.spec.full,
        CHUNKS=plan.chunks,
        WARPS=plan.num_warps,
        num_warps=plan.num_warps,
        **variant_constants(layer.spec),
    )
