"""Layer normalisation (Ba et al. 2016) of the products with the weights: what the steps of a backward pass read of it.

Shapes: T time steps, B batch rows, H hidden units, G gate blocks. Needs no triton.
"""

from __future__ import annotations

from typing import NamedTuple

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
