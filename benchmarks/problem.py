"""One problem that every provider solves: the weights, the inputs and the gradient of the output.

The same seed gives the same numbers, so providers built apart compute the same function of the same data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lstm_triton_kernels.spec import LSTMWeights, state_dict_name
from torch import Tensor

from benchmarks.suites import STORAGE, TRAINING, Case

CHUNKS = 3
"""Chunks of a stream at least: the second shows that states are carried on, the third that it is not the first's."""

MOST_SETS = 64
"""Sets of inputs that are kept at most; smaller inputs than L2 / 32 stay in the cache, as they would in use."""


@dataclass
class Problem:
    """What a provider gets, all on the device and in the case's type.

    - weights: by state-dict name (a cell's: without layer), shapes as `torch.nn.LSTM`'s and LSTMSpec's
    - inputs: sets of x, (T, B, I), for a cell (B, I), of a stream its chunks; they require gradients in training
    - lengths: (B,) int64 on the CPU, for a ragged case, longest T; else None
    - resets: (T, B) bool, where a row begins anew, for a case with resets; else None
    - grad_output: like the output, (T, B, D·H), for a cell (B, H); with a projection (T, B, D·P)
    """

    case: Case
    device: torch.device
    weights: dict[str, Tensor]
    inputs: list[Tensor]
    lengths: Tensor | None
    resets: Tensor | None
    grad_output: Tensor


def make_problem(case: Case, device: torch.device, cache_bytes: int = 0, seed: int = 0) -> Problem:
    """Return the problem of a case; as many sets of inputs as twice a cache of `cache_bytes` holds, one at least.

    Of a stream CHUNKS at least.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = STORAGE[case.dtype]

    def uniform(*shape: int, bound: float) -> Tensor:
        return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator).to(dtype)

    weights = {
        name: uniform(*shape, bound=case.H**-0.5) for name, shape in weight_shapes(case).items()
    }  # as torch.nn.LSTM draws them
    steps = () if case.cell else (case.T,)
    lengths = resets = None
    if case.ragged:
        lengths = torch.randint(1, case.T + 1, (case.B,), generator=torch.Generator().manual_seed(seed))
        lengths[0] = case.T
    if case.resets:
        chance = torch.rand(case.T, case.B, generator=torch.Generator().manual_seed(seed))
        resets = (chance < case.resets).to(device)
    grad_output = uniform(*steps, case.B, case.D * case.hidden, bound=1.0)
    x = uniform(*steps, case.B, case.I, bound=1.0)
    x_bytes = x.numel() * x.element_size()
    sets = min(MOST_SETS, -(-2 * cache_bytes // x_bytes)) if cache_bytes > x_bytes else 1
    sets = max(sets, CHUNKS) if case.stream else sets
    inputs = [x] + [x[..., torch.randperm(case.I, generator=generator, device=device)] for _ in range(sets - 1)]
    for tensor in inputs:
        tensor.requires_grad_(case.mode == TRAINING)
    return Problem(case, device, weights, inputs, lengths, resets, grad_output)


def weight_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Return state-dict name to shape of every parameter, in `torch.nn.LSTM`'s order."""
    if case.cell:
        return case.spec.parameter_shapes(case.I, case.H)
    return {
        state_dict_name(name, layer, direction): shape
        for layer in range(case.L)
        for direction in range(case.D)
        for name, shape in case.spec.parameter_shapes(
            case.I if layer == 0 else case.D * case.hidden, case.H, proj_size=case.P
        ).items()
    }


def layers_of(case: Case, weights: dict[str, Tensor]) -> list[list[LSTMWeights]]:
    """Return the weights by layer and direction; a cell's as one layer."""
    if case.cell:
        return [[LSTMWeights(**weights)]]
    names = case.spec.parameter_names(projection=case.P > 0)
    return [
        [LSTMWeights(**{name: weights[state_dict_name(name, layer, d)] for name in names}) for d in range(case.D)]
        for layer in range(case.L)
    ]
