"""PyTorch's operators of layer normalisation on rows (..., N), with statistics in the accumulator type.

On a GPU they compute in float32 what is of 16 bits, and so are the mean and the reciprocal deviation. On a CPU these
are of the type of the rows, so the rows are widened there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lstm_triton_kernels.normalize import NORM_EPS
from lstm_triton_kernels.sizes import accumulator_dtype
from torch import Tensor


def widened(t: Tensor) -> Tensor:
    """Return rows (..., N) in a type of which the operators make statistics in the accumulator type."""
    return t if t.device.type == "cuda" else t.to(accumulator_dtype(t.dtype))


def normalized(t: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return rows (..., N) normalised, times the gain (N,), plus the shift (N,), in their type."""
    rows = widened(t)
    gain, shift = (None if p is None else p.to(rows.dtype) for p in (gain, shift))
    return F.layer_norm(rows, t.shape[-1:], gain, shift, NORM_EPS).to(t.dtype)


def moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and reciprocal standard deviation of rows (T, B, N), each (T, B) in the accumulator type."""
    _, mean, rstd = torch.native_layer_norm(widened(t), t.shape[-1:], None, None, NORM_EPS)
    return mean.squeeze(-1), rstd.squeeze(-1)


def product_gradients(
    d: Tensor, product: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a product (T, B, N) and of its gain (N,), from d (T, B, N) of gain · n(product)."""
    assert gain is not None
    given = (widened(d), widened(product), product.shape[-1:], mean[..., None], rstd[..., None], widened(gain), None)
    d_product, d_gain, _ = torch.ops.aten.native_layer_norm_backward(*given, [True, True, False])
    return d_product.to(d.dtype), d_gain.to(d.dtype)
