"""Tensors of which a launch knows a larger one: what stands where, and what does not exist."""

import numpy as np
import pytest
import torch

from tests.emulator.far import spread_of
from tests.emulator.memory import FAR, NOWHERE
from tests.emulator.small_kernels import checks, run, tensor_of, zeros


def test_rows_stand_where_those_of_the_larger_tensor_do():
    """Two steps of three rows of four elements: of a hundred the first and the last two."""
    spread = spread_of(torch.zeros(2, 3, 4), 1, lambda row: np.where(row == 0, 0, 97 + row), 100)
    assert spread.near.tolist() == [0, 16, 64]
    assert spread.far.tolist() == [0, 98 * 16, 198 * 16]
    assert spread.length.tolist() == [16, 48, 32] and spread.extent == 200 * 16


def test_columns_of_a_wider_tensor_are_runs_of_their_own():
    spread = spread_of(torch.zeros(2, 2, 8)[:, :, 2:5], 1, lambda row: row + 10, 12)
    assert spread.near.tolist() == [0, 32, 64, 96]
    assert spread.far.tolist() == [10 * 32, 11 * 32, 22 * 32, 23 * 32] and set(spread.length) == {12}


ROW = 2**32 + 5
"""The larger tensor's row that is there, of 32 elements of 4 bytes."""


def copied(row):
    """What a kernel copies from a row of the larger tensor, and what the checks find."""
    values, out = tensor_of(np.arange(1, 33, dtype="i4")).view(1, 32), zeros(32)
    spread = spread_of(values, 0, lambda n: n + ROW, ROW + 1)
    body = f"mov.u64 %d20, {row * 128}; add.s64 %d20, %d20, %d0; mul.wide.u32 %d21, %tid, 4; add.s64 %d20, %d20, %d21;"
    body += "ld.global.b32 %r10, [%d20]; add.s64 %d21, %d21, %d1; st.global.b32 [%d21], %r10;"
    machine = run(body, values, out, spreads={id(values): spread})
    return out, machine


def test_a_row_is_loaded_from_where_it_stands():
    out, machine = copied(ROW)
    assert not checks(machine) and out.tolist() == list(range(1, 33))


@pytest.mark.parametrize("row", [0, ROW - 1, ROW + 1, ROW % 2**32, ROW - 2**31])
def test_another_row_does_not_exist(row):
    out, machine = copied(row)
    assert checks(machine) == ["memcheck"] and not out.any()


def test_an_access_that_only_begins_inside_does_not_exist():
    _, machine = copied(ROW)
    last = FAR + ROW * 128 + 124
    inside, beyond = (int(machine.memory.near(np.array([last]), total)[0]) for total in (4, 8))
    assert inside > 0 and beyond == NOWHERE
