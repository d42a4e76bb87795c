"""gradcheck and gradgradcheck of one small case of a variant on the backend in force."""

from __future__ import annotations

import torch

from lstm_triton import LSTMSpec
from tests.support.parity import Case, call, random_inputs

CHECKED_CASES = {
    "cell": dict(cell=True, B=1, I=2, H=2),
    "layer": dict(T=2, B=1, I=1, H=2),
}


def prepared(spec: LSTMSpec, shape: str) -> tuple[Case, tuple[torch.Tensor, ...]]:
    case = Case(spec, **CHECKED_CASES[shape])
    return case, tuple(random_inputs(case).values())


def first_order(spec: LSTMSpec, shape: str, fast: bool = False) -> None:
    """Raises where a gradient differs from finite differences (fast: along one random direction of each input)."""
    case, inputs = prepared(spec, shape)
    assert torch.autograd.gradcheck(lambda *tensors: call(case, *tensors), inputs, fast_mode=fast)


def second_order(spec: LSTMSpec, shape: str, fast: bool = False) -> None:
    """Raises where a gradient of a gradient differs from finite differences; `fast` as in `first_order`."""
    case, inputs = prepared(spec, shape)
    assert torch.autograd.gradgradcheck(lambda *tensors: call(case, *tensors), inputs, fast_mode=fast)
