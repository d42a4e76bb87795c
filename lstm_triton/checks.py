"""Checks of arguments, with `torch.nn.LSTM`'s own exception and message where it has one.

Pure functions; all of them run before anything is computed.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from lstm_triton_kernels.sizes import SUPPORTED_DTYPES
from lstm_triton_kernels.spec import LSTMSpec
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence


def lstm_arguments(
    input_size: Any, hidden_size: Any, num_layers: Any, bias: Any, batch_first: Any, dropout: Any, bidirectional: Any,
    proj_size: Any,
) -> None:  # fmt: skip
    """The constructor arguments of LSTM.

    Raises TypeError or ValueError as `torch.nn.LSTM` does, and warns as it does of a dropout that has no effect.
    """
    number = isinstance(dropout, numbers.Number) and not isinstance(dropout, bool)
    if not number or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers "
            f"greater than 1, but got dropout={dropout} and num_layers={num_layers}",
            stacklevel=3,
        )
    for name, value, kind in (
        ("bias", bias, bool),
        ("batch_first", batch_first, bool),
        ("input_size", input_size, int),
        ("hidden_size", hidden_size, int),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} should be of type {kind.__name__}, got: {type(value).__name__}")
        if kind is int and value <= 0:
            raise ValueError(f"{name} must be greater than zero")
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")


def forget_bias(value: Any, bias: bool, spec: LSTMSpec) -> None:
    """Raise ValueError for a forget_bias that is neither None nor a number, and without biases or a forget gate."""
    if value is None:
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"forget_bias should be a number or None, got {value!r}")
    if not bias:
        raise ValueError("forget_bias sets biases: it needs bias=True")
    if not spec.forget_gate:
        raise ValueError("forget_bias sets the biases of the forget gate, which forget_gate=False leaves out")


def flag(name: str, value: Any) -> None:
    """Raise TypeError unless the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def not_sharded(weights: Sequence[Tensor], names: Callable[[], Sequence[str]]) -> None:
    """Raise RuntimeError for a parameter that is spread over several processes, as FSDP leaves them between calls."""
    for n, weight in enumerate(weights):
        if type(weight) not in (Tensor, Parameter) and hasattr(weight, "device_mesh"):
            raise RuntimeError(
                f"{names()[n]} is sharded over {weight.device_mesh.size()} processes (a DTensor): call the module "
                "itself, so that its FSDP hooks gather the parameters first, or unshard() it"
            )


def _packed(batch_sizes: Tensor, rows: int) -> None:
    """Raise RuntimeError unless the batch sizes of a PackedSequence with so many rows of data are right."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu" or batch_sizes.dim() != 1:
        raise RuntimeError(
            f"batch_sizes should be a 1-D int64 tensor on the CPU, got {batch_sizes.dim()}-D {batch_sizes.dtype} on "
            f"{batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if sizes[-1] < 1 or any(later > earlier for earlier, later in pairwise(sizes)):
        raise RuntimeError(f"batch_sizes of a PackedSequence must be positive and never increase, got {sizes}")
    if sum(sizes) != rows:
        raise RuntimeError(f"a PackedSequence with batch_sizes of {sum(sizes)} in all has {rows} rows of data")


def lengths(lengths: Any, B: int, packed: bool) -> Tensor | None:
    """Return the lengths of the rows as a tensor, checked but for their values. Raises TypeError or ValueError."""
    if lengths is None:
        return None
    if packed:
        raise ValueError("a PackedSequence has the lengths of its rows: lengths go with a padded input")
    if isinstance(lengths, (list, tuple)):
        if not all(isinstance(n, (int, numbers.Integral)) and not isinstance(n, bool) for n in lengths):
            raise TypeError(f"lengths should be integers, got: {lengths}")
        lengths = torch.tensor(lengths, dtype=torch.int64)
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths should be a list of integers or a Tensor of int32 or int64, got: {kind}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(f"Expected lengths size {(B,)}, one for each row, got {list(lengths.shape)}")
    return lengths


def resets(resets: Any, T: int, B: int, batched: bool, batch_first: bool) -> None:
    """The resets of the states, laid out as the input is. Raises TypeError or ValueError."""
    if resets is None:
        return
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        kind = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets should be a Tensor of bool, got: {kind}")
    expected = (T,) if not batched else (B, T) if batch_first else (T, B)
    if tuple(resets.shape) != expected:
        raise ValueError(f"Expected resets size {expected}, one for each step of each row, got {list(resets.shape)}")


def same_device(device: torch.device, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError in ATen's words ("Input and hidden tensors are not ...") unless all are on the input's."""
    _alike("at", "device", device, states, parameters)


def same_dtype(dtype: torch.dtype, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError in ATen's words unless all are of the input's type."""
    _alike("with", "dtype", dtype, states, parameters)


def _alike(preposition: str, name: str, expected: Any, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for what, tensors in (("hidden", states), ("parameter", parameters)):
        for tensor in tensors:
            found = getattr(tensor, name)
            if found != expected:
                the_same = "at the same device" if name == "device" else f"the same {name}"
                raise RuntimeError(
                    f"Input and {what} tensors are not {the_same}, found input tensor {preposition} {expected} "
                    f"and {what} tensor {preposition} {found}"
                )


def computed_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError for a type that neither the kernels nor the eager steps compute."""
    if dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"an LSTM of {dtype} is not supported here: the library computes {', '.join(map(str, SUPPORTED_DTYPES))}; "
            "complex64 and complex128 only where PyTorch's own operator serves (on a CPU, the standard variant, and "
            "layers of the coupled one; without lengths, resets, cell states and torch.func)"
        )


def weight_shapes(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """The shapes of explicit parameters against what the variant asks for. Raises RuntimeError naming the first off."""
    for name, shape in expected.items():
        if tuple(given[name]) != shape:
            raise RuntimeError(f"Expected {name} size {shape}, got {list(given[name])}")


def lstm_input(input: Tensor | PackedSequence) -> None:
    """Raise ValueError unless the input is (T, B, I) or (T, I), RuntimeError unless it is, packed, (N, I).

    Raises RuntimeError for a PackedSequence that was put together by hand and whose parts do not fit, too.
    """
    if isinstance(input, PackedSequence):
        if input.data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.data.dim()}")
        if not torch.compiler.is_compiling():
            _packed(input.batch_sizes, len(input.data))
    elif input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")


def lstm_state_dimensions(hx: tuple[Tensor, Tensor], batched: bool) -> None:
    """Raise RuntimeError unless there are two states, with the dimensions that go with the input's."""
    if len(hx) < 2:
        raise RuntimeError("lstm expects two hidden states")
    dimensions = 3 if batched else 2
    if hx[0].dim() != dimensions or hx[1].dim() != dimensions:
        raise RuntimeError(
            f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be {dimensions}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )


def lstm_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool) -> None:
    """Raise ValueError for a type other than the weights', where autocast does not see to it."""
    if dtype != weight_dtype and not autocast:
        raise ValueError(
            f"RNN input dtype ({dtype}) does not match weight dtype ({weight_dtype}). "
            f"Convert input: input.to({weight_dtype}), or convert model: model.to({dtype})"
        )


def lstm_features(features: int, input_size: int) -> None:
    """Raise RuntimeError for a wrong number of features."""
    if features != input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {input_size}, got {features}")


def lstm_states(
    hx: tuple[Tensor, Tensor], expected: tuple[tuple[int, int, int], tuple[int, int, int]], batched: bool
) -> None:
    """Raise RuntimeError unless (h_0, c_0) have the expected sizes (D·L, B, P) and (D·L, B, H); unbatched B = 1."""
    for n, (state, size) in enumerate(zip(hx, expected, strict=False)):
        actual = tuple(state.shape) if batched else (state.shape[0], 1, *state.shape[1:])
        if actual != size:
            raise RuntimeError(f"Expected hidden[{n}] size {size}, got {list(actual)}")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")


def sequence_length(T: int) -> None:
    """Raise RuntimeError for an empty sequence."""
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def cell_arguments(input: Tensor, hx: tuple[Tensor, Tensor] | None) -> None:
    """Raise ValueError unless the input is (B, I) or (I,) and each state 1-D or 2-D; and unless there are two states.

    As `torch.nn.LSTMCell`: TypeError for a tensor in place of the two, RuntimeError for another number of them; but of
    the states of an unbatched input it takes the first two.
    """
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is None:
        return
    if isinstance(hx, Tensor) and input.dim() == 2:
        raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    for n, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{n}] to be 1D or 2D, got {state.dim()}D instead")
    if len(hx) != 2 and input.dim() == 2:
        raise RuntimeError("lstm_cell expects two hidden states")


def cell_sizes(input: Tensor, hx: tuple[Tensor, Tensor], input_size: int, hidden_size: int) -> None:
    """input (B, I) and states (B, H). Raises RuntimeError as `torch.nn.LSTMCell` does."""
    if input.size(1) != input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {input_size}")
    for n, state in enumerate(hx):
        if state.size(0) != input.size(0):
            raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{n} batch size {state.size(0)}")
        if state.dim() > 1 and state.size(1) != hidden_size:
            raise RuntimeError(f"hidden{n} has inconsistent hidden_size: got {state.size(1)}, expected {hidden_size}")
        if state.dim() != 2:
            raise RuntimeError(f"hidden{n} should have the dimensions of the input, got {state.dim()}-D")


def cell_dtypes(input: Tensor, others: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless all are of the input's type."""
    for tensor in others:
        if tensor.dtype != input.dtype:
            first, second = (t.type().split(".")[-1].removesuffix("Tensor") for t in (input, tensor))
            raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {first} and {second}")
