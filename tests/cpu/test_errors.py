"""Bad input: `torch.nn.LSTM`'s own exception, type and message, and a clear one where it has none.

Of the standard LSTM test_drop_in.py compares every refusal with PyTorch's; here are the variants, the cell, the rest.
"""

import warnings

import numpy as np
import pytest
import torch

import lstm_triton
from lstm_triton import LSTMSpec, functional


def outcome(function):
    """("raised", type, message), or ("returned", shape) where nothing was raised; warnings as a list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = ("returned", tuple(function()[0].shape))
        except Exception as error:
            result = ("raised", type(error), str(error))
    return result, [str(w.message) for w in caught if w.category is UserWarning and "oneDNN" not in str(w.message)]


def test_dropout_may_be_a_number_of_numpy():
    def build(cls):
        return lambda: (cls(3, 4, 2, dropout=np.float32(0.5)).weight_ih_l0,)

    assert outcome(build(lstm_triton.LSTM)) == outcome(build(torch.nn.LSTM))


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


CALLS = {
    "1-D input": (zeros(3), None),
    "4-D input": (zeros(2, 2, 2, 3), None),
    "wrong features": (zeros(2, 2, 4), None),
    "wrong features unbatched": (zeros(2, 4), None),
    "float64 input": (zeros(2, 2, 3, dtype=torch.float64), None),
    "integer input": (zeros(2, 2, 3, dtype=torch.int64), None),
    "input on another device": (zeros(2, 2, 3, device="meta"), None),
    "h_0 on another device": (zeros(2, 2, 3), (zeros(2, 2, 5, device="meta"), zeros(2, 2, 5))),
    "h_0 of wrong size": (zeros(2, 2, 3), (zeros(2, 2, 4), zeros(2, 2, 5))),
    "c_0 of wrong size": (zeros(2, 2, 3), (zeros(2, 2, 5), zeros(2, 2, 4))),
    "states of another batch": (zeros(2, 2, 3), (zeros(2, 3, 5), zeros(2, 3, 5))),
    "states of one layer": (zeros(2, 2, 3), (zeros(1, 2, 5), zeros(1, 2, 5))),
    "2-D states, batched input": (zeros(2, 2, 3), (zeros(2, 5), zeros(2, 2, 5))),
    "3-D states, unbatched input": (zeros(2, 3), (zeros(2, 1, 5), zeros(2, 1, 5))),
    "wrong states, unbatched input": (zeros(2, 3), (zeros(3, 5), zeros(3, 5))),
    "T = 0": (zeros(0, 2, 3), None),
    "T = 0 unbatched": (zeros(0, 3), None),
    "B = 0": (zeros(4, 0, 3), None),
    "good": (zeros(4, 2, 3), (zeros(2, 2, 5), zeros(2, 2, 5))),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("peephole", ["diagonal", "full"])
def test_variants_refuse_the_same(name, peephole):
    theirs, ours = torch.nn.LSTM(3, 5, 2), lstm_triton.LSTM(3, 5, 2, coupled=True, peephole=peephole)
    assert outcome(lambda: ours(*CALLS[name])) == outcome(lambda: theirs(*CALLS[name]))


CELL_CALLS = {
    "3-D input": (zeros(2, 2, 3), None),
    "wrong features": (zeros(2, 4), None),
    "float64 input": (zeros(2, 3, dtype=torch.float64), None),
    "integer input": (zeros(2, 3, dtype=torch.int64), None),
    "h of wrong size": (zeros(2, 3), (zeros(2, 4), zeros(2, 5))),
    "c of wrong size": (zeros(2, 3), (zeros(2, 5), zeros(2, 4))),
    "states of another batch": (zeros(2, 3), (zeros(3, 5), zeros(3, 5))),
    "1-D states, batched input": (zeros(2, 3), (zeros(5), zeros(5))),
    "2-D states, unbatched input": (zeros(3), (zeros(2, 5), zeros(2, 5))),
    "c of wrong size, unbatched": (zeros(3), (zeros(5), zeros(4))),
    "float64 states": (zeros(2, 3), (zeros(2, 5, dtype=torch.float64), zeros(2, 5, dtype=torch.float64))),
    "3-D states": (zeros(2, 3), (zeros(1, 2, 5), zeros(1, 2, 5))),
    "0-D input": (zeros(), (zeros(2, 5), zeros(2, 5))),
    "states of one row": (zeros(2, 3), (zeros(1, 5), zeros(1, 5))),
    "c of another batch": (zeros(2, 3), (zeros(2, 5), zeros(1, 5))),
    "one row of input": (zeros(1, 3), (zeros(2, 5), zeros(2, 5))),
    "a feature less, unbatched": (zeros(2), (zeros(5), zeros(5))),
    "3-D c": (zeros(2, 3), (zeros(2, 5), zeros(1, 2, 5))),
    "good": (zeros(2, 3), (zeros(2, 5), zeros(2, 5))),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CELL_CALLS)
def test_cell_refuses_what_torch_refuses(name, bias):
    theirs, ours = torch.nn.LSTMCell(3, 5, bias), lstm_triton.LSTMCell(3, 5, bias)
    expected = outcome(lambda: theirs(*CELL_CALLS[name]))
    # The words of types are those of its product with a bias; and torch names the operands the other way round.
    if name == "float64 states" or (name == "integer input" and not bias):
        assert outcome(lambda: ours(*CELL_CALLS[name]))[0][:2] == expected[0][:2]
    else:
        assert outcome(lambda: ours(*CELL_CALLS[name])) == expected


@pytest.mark.parametrize(
    "variant, message",
    [
        (dict(peephole="diag"), "peephole must be None, 'diagonal' or 'full', got 'diag'"),
        (dict(peephole=True), "peephole must be None, 'diagonal' or 'full', got True"),
        (dict(peephole="full", output_peephole="next"), "output_peephole must be 'previous' or 'current', got 'next'"),
        (dict(output_peephole="current"), "output_peephole='current' needs a peephole"),
    ],
    ids=str,
)
def test_unknown_variants(variant, message):
    for build in (LSTMSpec, lambda **v: lstm_triton.LSTM(3, 4, **v), lambda **v: lstm_triton.LSTMCell(3, 4, **v)):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            build(**variant)


def test_unknown_variant_name_lists_them():
    with pytest.raises(
        ValueError, match=r"standard, diagonal.*coupled\+full\+current\+norm; .*no-input-gate.*, got 'gru'"
    ):
        LSTMSpec.parse("gru")


def test_functional_names_the_weight_that_does_not_fit():
    weights = [zeros(20, 3), zeros(20, 5), zeros(20), zeros(19)]
    with pytest.raises(RuntimeError, match=r"Expected bias_hh size \(20,\), got \[19\]"):
        functional.lstm(zeros(2, 1, 3), None, weights)
    with pytest.raises(ValueError, match=r"Expected 4 weights .*, got 2"):
        functional.lstm(zeros(2, 1, 3), None, weights[:2])
    with pytest.raises(
        ValueError, match=r"'diagonal' takes weight_ih, weight_hh, weight_ch; given: weight_ih, weight_hh"
    ):
        functional.lstm_cell(zeros(1, 3), None, *weights[:2], peephole="diagonal")
    with pytest.raises(RuntimeError, match=r"Expected weight_ch size \(15,\), got \[20\]"):
        functional.lstm_cell(zeros(1, 3), None, *weights[:2], weight_ch=zeros(20), peephole="diagonal")
    with pytest.raises(ValueError, match="takes"):
        functional.lstm_cell(zeros(1, 3), None, *weights[:2], bias_ih=zeros(20))


def test_a_refused_call_changes_nothing():
    layer = lstm_triton.LSTM(3, 5, 2, peephole="full")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x, states = zeros(2, 2, 4), (zeros(2, 2, 5), zeros(2, 2, 5))
    with pytest.raises(RuntimeError):
        layer(x, states)
    assert not x.any() and not states[0].any() and not states[1].any()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(p.grad is None for p in layer.parameters())
