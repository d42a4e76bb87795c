"""Launches as if their rows were the last ones of a batch that no memory could hold: offsets pass 2^31 and more.

The programs of the launch become the last ones of a larger grid, and the batch and the row blocks that the kernel is
told become larger by as many. Of each tensor there is only what these programs may touch (`memory.Spread`): an address
that is computed in too few bits leads elsewhere. Where a program has several row blocks the rows of its first blocks,
of its second ones, and so on stand far apart. A grid may have more programs than CUDA allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lstm_triton_kernels.sync import COUNTER_STRIDE
from torch import Tensor

from tests.emulator.memory import Spread
from tests.emulator.values import Array, i8

ROW_AXIS = {
    "hidden_ptr": -3, "unprojected_ptr": -3, "output_ptr": -3, "lengths_ptr": -1, "resets_ptr": -1,
    **{f"norm.{name}": -1 for name in ("mean", "rstd", "mean_c", "rstd_c")},
}  # fmt: skip
"""The axis of the batch rows, of tensors in which it is not the last but one."""

WITHOUT_ROWS = {
    "w_hh_ptr", "w_hr_ptr", "w_ch_ptr", "streamed_ptr", "w_ih_ptr", "bias_ih_ptr", "bias_hh_ptr", "error_ptr",
    "norm.gain", "norm.gain_c", "norm.shift_c",
}  # fmt: skip
BLOCKS = {
    "exchange_ptr", "peephole_exchange_ptr", "projection_exchange_ptr", "counters_ptr", "norm.product_exchange",
    "norm.cell_exchange",
}  # fmt: skip
"""These have an axis of row blocks in its place."""

TIME_STRIDES = {"stride_ht", "stride_gt"}
"""Numbers that grow with the batch; those of a row do not."""


@dataclass
class Far:
    """rows: of the larger batch at most; reached: by kernel and argument the largest offset in elements."""

    rows: int
    reached: dict[tuple[str, str], int] = field(default_factory=dict)

    def launch(
        self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]
    ) -> tuple[tuple[int, int, int], dict[int, Spread], dict[str, Any]]:
        """Return the first program of a launch, and what its tensors and its arguments become."""
        if not {"rows", "BLOCK_B"} & set(arguments):
            return (0, 0, 0), {}, arguments  # it has no rows
        persistent = "rows" in arguments
        axis = 1 if persistent else 0
        rows = arguments["rows"] if persistent else arguments["BLOCK_B"]
        B, programs = arguments["B"], grid[axis]
        turns = -(-arguments["row_blocks"] // programs) if persistent else 1  # row blocks of a program
        more = (self.rows - B) // (turns * rows)  # programs ahead of the first one

        def row(n: Array) -> Array:
            return n + (n // (rows * programs) + 1) * more * rows

        def block(n: Array) -> Array:
            return n + (n // programs + 1) * more

        numbers = dict(B=B + turns * more * rows)
        if persistent:
            numbers["row_blocks"] = arguments["row_blocks"] + turns * more
        spreads: dict[int, Spread] = {}
        rules, norm = arguments.get("rules") or (), arguments.get("norm")
        given = {f"rules.{n}": mask for n, mask in enumerate(rules)}
        given |= {f"norm.{name}": value for name, value in norm._asdict().items()} if norm is not None else {}
        for name, value in (arguments | given).items():
            if name in TIME_STRIDES:
                assert value % B == 0
                numbers[name] = value // B * numbers["B"]
            if not isinstance(value, Tensor) or name in WITHOUT_ROWS or not value.numel():
                continue
            if name == "counters_ptr" and value.numel() == 1:
                continue  # nobody counts
            assert id(value) not in spreads
            if name in BLOCKS:
                counters = (-1, arguments["row_blocks"], COUNTER_STRIDE.value)
                laid_out = value.view(counters) if name == "counters_ptr" else value
                spread = spread_of(laid_out, -2, block, numbers["row_blocks"])
            else:
                # The step kernels' `hidden_ptr` has no axis of directions.
                own = -2 if name == "hidden_ptr" and not persistent else ROW_AXIS.get(name, -2)
                spread = spread_of(value, own, row, numbers["B"])
            spreads[id(value)] = spread
            last = spread.extent // value.element_size() - 1
            self.reached[kernel, name] = max(last, self.reached.get((kernel, name), 0))
        first = (0, more, 0) if persistent else (more, 0, 0)
        return first, spreads, arguments | numbers


def spread_of(tensor: Tensor, axis: int, place: Callable[[Array], Array], count: int) -> Spread:
    """Return how a tensor stands in one with `count` in place of its axis, where `place` says what stands where."""
    axis %= tensor.dim()
    near = far = np.zeros((), i8)
    for d, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        index = np.arange(n, dtype=i8).reshape(-1, *[1] * (tensor.dim() - d - 1))
        near = near + index * stride
        if d < axis and n > 1:
            assert stride % tensor.shape[axis] == 0 and stride >= tensor.shape[axis] * tensor.stride(axis)
        if d < axis:
            stride = stride // tensor.shape[axis] * count
        far = far + (place(index) if d == axis else index) * stride
    order = np.argsort(far, axis=None)
    near, far, width = near.ravel()[order], far.ravel()[order], tensor.element_size()
    begins = np.flatnonzero(np.concatenate([[True], (np.diff(far) != 1) | (np.diff(near) != 1)]))
    length = np.diff(np.append(begins, len(far)))
    return Spread(near[begins] * width, far[begins] * width, length * width, int(far[-1] + 1) * width)
