"""Triton's interpreter, mended where a release of it is wrong."""

from __future__ import annotations

import functools

import numpy as np


def mend() -> None:
    """Let a comparison of scalars stay one when it meets a tensor.

    The interpreter spreads it out as integers of the type that was compared, which the loads of Triton 3.9 refuse as
    a mask (compiled kernels have no such fault).
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    spread = InterpreterBuilder.create_splat
    if getattr(spread, "mended", False):
        return

    @functools.wraps(spread)
    def create_splat(self, ret_ty, arg):
        handle = spread(self, ret_ty, arg)
        return TensorHandle(handle.data.astype(np.bool_), handle.dtype) if arg.data.dtype == np.bool_ else handle

    create_splat.mended = True
    InterpreterBuilder.create_splat = create_splat
