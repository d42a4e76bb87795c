"""On a GPU: the cells of examples/own_cell by their kernels, against the equations in float64."""

import pytest
import torch

from lstm_triton import routing

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from tests.support.gpu import NEEDS_GPU, TYPES
from tests.support.own_cell import CELLS, errors_of_kernels, random_inputs, slstm

pytestmark = NEEDS_GPU

BOUND = {"float64": 1e-12, "float32 ieee": 1e-5, "float32 tf32": 3e-3, "float16": 3e-3, "bfloat16": 2.4e-2}
SHAPES = [(33, 12, 17, 130), (3, 70, 5, 300), (1, 1, 1, 1)]

every_cell = pytest.mark.parametrize("name", CELLS)


@pytest.mark.parametrize("precision", BOUND, indirect=True)
@pytest.mark.parametrize("T, B, I, H", SHAPES)
@every_cell
def test_outputs_and_gradients(name, T, B, I, H, precision):  # noqa: E741
    found = errors_of_kernels(name, T, B, I, H, TYPES[precision], "cuda")
    assert max(found.values()) <= BOUND[precision], found


@pytest.mark.parametrize("bound", [1e2, 1e4])
@pytest.mark.parametrize("exp_forget", [False, True], ids=["sigmoid", "exponential"])
def test_preactivations_of_any_size_are_finite(exp_forget, bound):
    inputs = {key: value.float().cuda() for key, value in random_inputs("slstm", 17, 3, 4, 40).items()}
    given = [inputs[key].requires_grad_() for key in ("x", "h_0", "weight_ih", "weight_hh", "bias")]
    empty = slstm.initial_state(3, 40, torch.float32, "cuda")
    output = slstm.slstm(given[0] * bound, given[1], empty, *given[2:], exp_forget)[0]
    gradients = torch.autograd.grad(output.square().sum(), given)
    assert all(t.isfinite().all() for t in (output, *gradients))
