"""Every kernel on small shapes, forward and backward: what `make gpu-sanitize` runs under compute-sanitizer.

`python -m tests.support.small_launches [counter|data|alone|stepwise ...]` needs a GPU. Nothing is compared here, but
all results must be finite and no launch may time out; the tools look for accesses outside of tensors, races in shared
memory and barriers that not all threads reach.
"""

from __future__ import annotations

import sys

import torch
from lstm_triton_kernels import sequence_persistent
from lstm_triton_kernels.plan import ANY, Preference

import lstm_triton

T, B = 3, 5
SIZES = {"counter": 130, "data": 130, "alone": 12, "stepwise": 130}
"""Hidden units, by how the programs of a persistent launch wait, or of the stepwise strategy. "alone": one program
holds all units, and in the kernels in Gluon exchanges values with itself."""

TYPES = {
    "counter": [(torch.float32, "ieee")],
    "data": [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")],
    "alone": [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")],
    "stepwise": [(torch.bfloat16, "ieee"), (torch.float32, "tf32")],
}
"""The storage, and the precision of float32 products: all that the kernels of that way have but float16."""

PREFERENCES = {"counter": Preference("counter"), "data": Preference("data"), "alone": Preference(block_u=16)}

VARIANTS = (dict(), dict(coupled=True, peephole="diagonal", output_peephole="current"), dict(peephole="full"))


def launch(way: str, dtype: torch.dtype, precision: str, ragged: bool, **variant: object) -> None:
    """One training step of one layer in both directions; ragged: with lengths, resets and every cell state."""
    H = SIZES[way]
    torch.backends.cuda.matmul.fp32_precision = precision
    strategy = "stepwise" if way == "stepwise" else "persistent"
    module = lstm_triton.LSTM(7, H, bidirectional=True, strategy=strategy, device="cuda", dtype=dtype, **variant)
    x = torch.randn(T, B, 7, device="cuda", dtype=dtype, requires_grad=True)
    asked = {}
    if ragged:
        resets = torch.zeros(T, B, dtype=torch.bool, device="cuda")
        resets[1, ::2] = True
        asked = dict(lengths=torch.tensor([3, 1, 2, 3, 2]), resets=resets, return_cell_states=True)
    with sequence_persistent.prefer(PREFERENCES.get(way, ANY)):
        output, (h_n, c_n), *states = module(x, **asked)
        loss = sum(result.float().square().sum() for result in (output, h_n, c_n, *states))
        loss.backward()
    torch.cuda.synchronize()
    lstm_triton.check_launches()
    tensors = (output, h_n, c_n, x.grad, *(parameter.grad for parameter in module.parameters()))
    assert all(tensor is not None and tensor.isfinite().all() for tensor in tensors)


def main(ways: list[str]) -> None:
    """All launches of these ways; prints how many there were."""
    count = 0
    for way in ways:
        for v, variant in enumerate(VARIANTS):
            for n, (dtype, precision) in enumerate(TYPES[way]):
                launch(way, dtype, precision, ragged=(v + n) % 2 == 1, **variant)
                count += 1
    print(f"{count} launches of both passes, all results finite")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:] or list(SIZES))
