"""The plans that the persistent kernels have for a case, and how a results file names them."""

from __future__ import annotations

from collections.abc import Mapping

from lstm_triton_kernels.persistent_plan import PersistentPlan

from benchmarks.suites import STORAGE, TRAINING, Case
from lstm_triton.selection import Layer

Plans = Mapping[str, PersistentPlan | str]
"""By pass, "forward" and in training "backward", the plan; a sentence why where there is none."""


def layer_of(case: Case) -> Layer:
    """The sizes of each layer of the case."""
    precision = "tf32" if case.dtype == "tf32" else "ieee"
    training = case.mode == TRAINING
    sizes = (case.T, case.B, case.H, case.D)
    return Layer(case.spec, *sizes, False, STORAGE[case.dtype], precision, training, ragged=case.ragged)


def obstacle(found: Plans) -> str | None:
    """Why a pass has no plan; None if each has one."""
    return next((f"{name} pass: {plan}" for name, plan in found.items() if isinstance(plan, str)), None)


def in_words(found: Plans) -> str:
    """All passes in a line."""
    texts = {name: plan if isinstance(plan, str) else describe(plan) for name, plan in found.items()}
    return "; ".join(f"{name} {text}" for name, text in texts.items())


def describe(plan: PersistentPlan) -> str:
    """A plan in a few words: `U8 R16/16 K32x8x3 96x1x1 data`.

    Units of a program, rows used of its tile's, columns of a warp's part x parts x chunks (`by` so many where not all
    are read at once), the grid (`of` so many row blocks where a program has several), and the wait, or `alone`.
    """
    columns = f"K{plan.block_k}x{plan.split}x{plan.chunks}"
    columns += f" by {plan.group}" if plan.group < plan.chunks else ""
    grid = f"{plan.unit_programs}x{plan.row_programs}x{plan.directions}"
    grid += f" of {plan.row_blocks}" if plan.blocks_per_program > 1 else ""
    return f"U{plan.block_u} R{plan.rows}/{plan.block_b} {columns} {grid} {plan.wait or 'alone'}"
