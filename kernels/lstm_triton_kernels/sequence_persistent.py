"""A whole sequence in one launch a pass: buffers, flags and launches of the persistent kernels.

All directions of one layer. Shapes: T time steps, B batch rows, H hidden units, D directions, G gate blocks, Q peephole
blocks. No projection; a full peephole reads c_{t-1} in all its gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton_kernels.cell import variant_constants
from lstm_triton_kernels.gates import INTERPRETED, TRITON_TYPE, operand_precision
from lstm_triton_kernels.gpus import gpu_of
from lstm_triton_kernels.persistent_backward import persistent_backward_kernel
from lstm_triton_kernels.persistent_forward import persistent_forward_kernel
from lstm_triton_kernels.persistent_plan import ANY, PersistentPlan, Preference
from lstm_triton_kernels.plan import accumulator_dtype, matmul_precision
from lstm_triton_kernels.sync import COUNTER_STRIDE, TURNS, unpublish
from lstm_triton_kernels.watch import flags_of, turn


class States(NamedTuple):
    """What the forward pass leaves.

    - hidden: (T + 1, B, D·H), h_t at index t; the last index is the kernel's own
    - h_n, c_n: (D, B, H), in the input's type
    - cells: (D, T + 1, B, H) accumulator type, as `order.steps` says; None unless saved
    """

    hidden: Tensor
    h_n: Tensor
    c_n: Tensor
    cells: Tensor | None


_preferences: list[Preference] = []


@contextmanager
def prefer(preference: Preference) -> Iterator[None]:
    """Inside, plans are as the preference wants them; for measuring one against another. Holds for all threads."""
    _preferences.append(preference)
    try:
        yield
    finally:
        _preferences.pop()


def preference() -> Preference:
    """What is wanted of plans: nothing, outside of `prefer`."""
    return _preferences[-1] if _preferences else ANY


def forward(
    gates: Tensor, h_0: Tensor, c_0: Tensor, w_hh: Tensor, w_ch: Tensor | None, spec: Any, plan: PersistentPlan,
    *, save: bool, save_gates: bool, lengths: Tensor | None = None, resets: Tensor | None = None,
) -> States:  # fmt: skip
    """All steps forward.

    - gates: (D, T, B, G·H), the input side of the gates; with `save_gates` the activated gates take its place
    - h_0, c_0: (D, B, H); w_hh: (D, G·H, H); w_ch: diagonal (D, Q·H), full (D, Q·H, H); all contiguous
    - save: keep every c_t
    - lengths: (B,) int32 or int64, 1 to T, steps of each row; beyond, output and cells are zero, and h_n and c_n are
      the row's last
    - resets: (T, B) uint8: the state is zero before step t of row b where it is not 0
    """
    D, T, B, _ = gates.shape
    H = h_0.shape[2]
    accumulator = accumulator_dtype(gates.dtype)
    hidden = torch.empty(T + 1, B, D * H, dtype=gates.dtype, device=gates.device)
    h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
    one_block = plan.blocks_per_program == 1
    every = save or (spec.full and not plan.alone)
    cells = None
    if every or not one_block:
        cells = torch.empty(D, T + 1 if every else 1, B, H, dtype=accumulator, device=gates.device)
    if plan.wait == "data":
        unpublish(hidden)
        if spec.full:
            assert cells is not None
            unpublish(cells)
    with turn(gates.device) if not plan.alone else nullcontext():
        persistent_forward_kernel[grid(plan, gates.device)](
            gates_ptr=gates,
            hidden_ptr=hidden,
            cells_ptr=cells,
            h_n_ptr=h_n,
            c_n_ptr=c_n,
            h_0_ptr=h_0,
            c_0_ptr=c_0,
            w_hh_ptr=w_hh,
            w_ch_ptr=w_ch,
            SAVE_GATES=save_gates,
            CELLS="all" if every else "none" if cells is None else "one",
            **sequence_arguments(T, B, H, D, plan, lengths, resets, gates, f"the forward pass of {H} units"),
            **dot_constants(gates.dtype, plan),
            **variant(spec),
        )
    return States(hidden, h_n, c_n, cells if save else None)


def backward(
    grad_output: Tensor | None, grad_cells: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None,
    gates: Tensor, cells: Tensor, w_hh: Tensor, w_ch: Tensor | None, spec: Any, plan: PersistentPlan,
    *, lengths: Tensor | None = None, resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All steps backward: the gradients of the pre-activations (D, T, B, G·H), and of c_0 (D, B, H) accumulator type.

    The latter lacks what a full peephole adds at the first step. Gradients of the results, None where zero:

    - grad_output, grad_cells: (T, B, D·H), of h_t and of c_t; grad_h_n, grad_c_n: (D, B, H); all contiguous
    - gates: (D, T, B, G·H), cells: (D, T + 1, B, H), as `forward` saved them; the others as there
    """
    D, T, B, _ = gates.shape
    H = w_hh.shape[2]
    d_gates = torch.empty_like(gates)
    several = plan.blocks_per_program > 1
    dc = (torch.zeros if several else torch.empty)(D, B, H, dtype=cells.dtype, device=gates.device)
    if plan.wait == "data":
        unpublish(d_gates)
    with turn(gates.device) if not plan.alone else nullcontext():
        persistent_backward_kernel[grid(plan, gates.device)](
            d_gates_ptr=d_gates,
            dc_ptr=dc,
            gates_ptr=gates,
            cells_ptr=cells,
            grad_output_ptr=grad_output,
            grad_cells_ptr=grad_cells,
            grad_h_n_ptr=grad_h_n,
            grad_c_n_ptr=grad_c_n,
            w_hh_ptr=w_hh,
            w_ch_ptr=w_ch,
            HAS_GRAD_OUTPUT=grad_output is not None,
            HAS_GRAD_CELLS=grad_cells is not None,
            HAS_GRAD_H_N=grad_h_n is not None,
            HAS_GRAD_C_N=grad_c_n is not None,
            **sequence_arguments(T, B, H, D, plan, lengths, resets, gates, f"the backward pass of {H} units"),
            **dot_constants(gates.dtype, plan),
            **variant(spec),
        )
    return d_gates, dc


def grid(plan: PersistentPlan, device: torch.device) -> tuple[int, int, int]:
    """Programs: parts of the units, groups of row blocks, directions.

    Raises RuntimeError where programs that wait for each other could not all be resident.
    """
    if not plan.alone and device.type == "cuda" and plan.programs > gpu_of(device).multiprocessors:
        raise RuntimeError(
            f"{plan.programs} programs that wait for each other do not fit the {gpu_of(device).multiprocessors} "
            f"multiprocessors of {device}"
        )
    return (plan.unit_programs, plan.row_programs, plan.directions)


def sequence_arguments(
    T: int, B: int, H: int, D: int, plan: PersistentPlan, lengths: Tensor | None, resets: Tensor | None, like: Tensor,
    name: str,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that both passes share: sizes, rows, waits. `name`: what the launch is, for an error."""
    device = like.device
    if plan.wait == "counter":
        counters = torch.zeros(D * plan.row_blocks * COUNTER_STRIDE.value, dtype=torch.int32, device=device)
    else:
        counters = torch.empty(1, dtype=torch.int32, device=device)  # nobody counts
    return dict(
        lengths_ptr=lengths,
        resets_ptr=resets,
        counters_ptr=counters,
        error_ptr=flags_of(device).take(f"{name}, {T} steps of {B} rows, {plan.programs} programs on {device}"),
        T=T,
        B=B,
        H=H,
        rows=plan.rows,
        row_blocks=plan.row_blocks,
        patience=TURNS,
        HAS_LENGTHS=lengths is not None,
        HAS_RESETS=resets is not None,
        ALONE=plan.alone,
        ONE_BLOCK=plan.blocks_per_program == 1,
        WAIT=plan.wait,
        launch_cooperative_grid=not plan.alone,
    )


def dot_constants(dtype: torch.dtype, plan: PersistentPlan) -> dict[str, Any]:
    """Types and tiles of the products."""
    # The interpreter multiplies bfloat16 wrongly (triton 3.8): there the operands are widened first.
    operand = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    return dict(
        DOT=TRITON_TYPE[operand],
        ACC=TRITON_TYPE[accumulator_dtype(dtype)],
        PRECISION=operand_precision(dtype, matmul_precision()),
        CHUNKS=plan.chunks,
        GROUP=plan.group,
        SPLIT=plan.split,
        BLOCK_B=plan.block_b,
        BLOCK_U=plan.block_u,
        BLOCK_K=plan.block_k,
        num_warps=plan.num_warps,
        num_stages=1,
        maxnreg=None if plan.exact else 255,
    )


def variant(spec: Any) -> dict[str, bool]:
    """The compile-time flags of the variant."""
    return dict(FULL=spec.full, **variant_constants(spec))
