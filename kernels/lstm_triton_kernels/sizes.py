"""The sizes of a layer, its types, and what follows from them: bytes, operations, the rate of its products.

Needs no triton and asks no device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lstm_triton_kernels.spec import LSTMSpec

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the cell state and of every accumulator: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_precision() -> str:
    """How float32 operands are multiplied: "tf32" or "ieee", as PyTorch's own switch for CUDA matmuls says."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def padded_units(H: int) -> int:
    """Return H filled up to whole tiles of any element, as programs of the kernels in Gluon exchange units."""
    return (H + 7) // 8 * 8


def padded_row(H: int) -> int:
    """Return the elements of a row of hidden states of the kernels in plain Triton: every row begins on 16 bytes."""
    return 16 * ceil_div(H, 16)


class Layer(NamedTuple):
    """One layer over a sequence, all its directions, and what is asked of it.

    - spec: the variant; T, B, H, D: time steps, batch rows, hidden units, directions
    - dtype: of the storage; precision: of float32 products, "tf32" or "ieee"
    - I, P: input features, and hidden size after projection; 0 where they do not matter or there is no projection
    - training: whether a backward pass follows; ragged: whether rows have lengths or resets
    - L: layers of the stack that it is in
    """

    spec: LSTMSpec
    T: int
    B: int
    H: int
    D: int
    dtype: torch.dtype
    precision: str = "ieee"
    I: int = 0
    P: int = 0
    training: bool = False
    ragged: bool = False
    L: int = 1

    @property
    def planned(self) -> Layer:
        """The layer without what does not decide about the plans of a pass."""
        return self._replace(T=0, I=0, training=False, L=1)

    @property
    def gates(self) -> int:
        """Gate blocks, G."""
        return len(self.spec.gates)

    @property
    def hidden(self) -> int:
        """Elements of a hidden state: P, or without a projection H."""
        return self.P or self.H

    @property
    def output_current(self) -> bool:
        """Whether a full peephole reads c_t, so that a step has a product with it."""
        return self.spec.full and self.spec.output_current

    @property
    def exchanges(self) -> int:
        """How often in a step what all units have must be known to all.

        Of h, for each product within the step, and for the statistics of each of the two layer normalisations.
        """
        return 1 + self.output_current + (self.P > 0) + 2 * self.spec.layer_norm

    @property
    def matrices(self) -> int:
        """Matrices of a full peephole, Q or 0."""
        return len(self.spec.peephole_gates) if self.spec.full else 0

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the storage type."""
        return self.dtype.itemsize

    @property
    def rate(self) -> str:
        """The name of the rate of its products, as in `limit.Constants`: "bfloat16", "tf32", "float32", ..."""
        name = str(self.dtype).removeprefix("torch.")
        return "tf32" if name == "float32" and self.precision == "tf32" else name

    @property
    def exact(self) -> bool:
        """Whether its products are of float32 without TF32, which tensor cores do not compute."""
        return self.rate == "float32"

    @property
    def recurrent_elements(self) -> int:
        """Elements of the recurrent weights of one direction, W_hh, W_hr and a full peephole."""
        return self.H * (self.hidden * self.gates + self.P + self.H * self.matrices)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of the recurrent weights of one direction."""
        return self.recurrent_elements * self.element_bytes

    @property
    def recurrent_operations(self) -> int:
        """Multiplications and additions with the recurrent weights in one step of one direction."""
        return 2 * self.B * self.recurrent_elements
