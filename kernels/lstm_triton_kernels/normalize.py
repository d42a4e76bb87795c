"""Layer normalisation (Ba et al. 2016) of the products with the weights: what the steps of a backward pass read of it.

Shapes: T time steps, B batch rows, H hidden units, G gate blocks. Needs no triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lstm_triton_kernels.order import Order

NORM_EPS = 1e-5
"""Added to a variance before its root is taken: the default of `torch.nn.LayerNorm`."""


class Products(NamedTuple):
    """The products W_hh h_{t-1} of all steps of one direction, and how they are normalised: (p - mean) rstd.

    - values: (T, B, G·H) in the storage type; mean, rstd: (T, B) in the accumulator type
    - d_cell: (2, B, H) accumulator type, out, zero before: by row, the sums over all steps of the gradients of the
      normalised cell state times the normalised cell state, and of these gradients. Their sums over all rows are the
      gradients of weight_ln_c and bias_ln_c
    """

    values: Tensor
    mean: Tensor
    rstd: Tensor
    d_cell: Tensor

    def part(self, now: slice) -> Products:
        """Return those of some of the steps; d_cell is the same memory."""
        return Products(self.values[now], self.mean[now], self.rstd[now], self.d_cell)

    def flipped(self, order: Order) -> Products:
        """Return those of flipped sequences, see `Order.flip`; d_cell is the same memory."""
        return Products(order.flip(self.values), order.flip(self.mean), order.flip(self.rstd), self.d_cell)


class KernelNorm(NamedTuple):
    """The argument `norm` of a persistent kernel, all directions; all None where nothing is normalised.

    - gain: (D, G·H), gain_c, shift_c: (D, H): weight_ln_hh, weight_ln_c and bias_ln_c, which may be None
    - product_exchange, cell_exchange: (D, T, row_blocks, rows · `row_statistics.line_elements`) float32, in which
      programs exchange statistics of rows: all ones, but zero behind the last group of units

    Backward also

    - products: (D, T, B, G·H), mean, rstd: (D, T, B), as of `Products`
    - mean_c, rstd_c: (D, T, B), as these, of c~
    - d_cell: (D, 2, B, H) as of `Products`, out; zero before, unless a program has one row block
    """

    gain: Any = None
    gain_c: Any = None
    shift_c: Any = None
    product_exchange: Any = None
    cell_exchange: Any = None
    products: Any = None
    mean: Any = None
    rstd: Any = None
    mean_c: Any = None
    rstd_c: Any = None
    d_cell: Any = None


NO_NORM = KernelNorm()
"""Of a layer that is not normalised."""
