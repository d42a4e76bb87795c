"""What is refused beside `test_errors`, and tensors that are overwritten before backward: the outcome of `torch.nn`."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec
from tests.support.composes import variant

STANDARD = LSTMSpec()
every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
WITH_PEEPHOLE = [spec for spec in VARIANTS if spec.peephole]


def outcome(call):
    """The shapes of what is returned, or type and message of what is raised."""
    try:
        return [tuple(t.shape) for t in call()]
    except Exception as error:
        return type(error), str(error)


def zeros(*shape):
    return torch.zeros(*shape)


State = namedtuple("State", ["h", "c"])

CELL_CALLS = {
    "a tensor": (zeros(2, 3), zeros(2, 5)),
    "a tensor of both": (zeros(2, 3), zeros(2, 2, 5)),
    "a tensor, unbatched": (zeros(3), zeros(5)),
    "a tensor of both, unbatched": (zeros(3), zeros(2, 5)),
    "no state": (zeros(2, 3), ()),
    "one state": (zeros(2, 3), (zeros(2, 5),)),
    "three states": (zeros(2, 3), (zeros(2, 5),) * 3),
    "four states": (zeros(2, 3), (zeros(2, 5),) * 4),
    "a list": (zeros(2, 3), [zeros(2, 5), zeros(2, 5)]),
    "a list of three": (zeros(2, 3), [zeros(2, 5)] * 3),
    "a named tuple": (zeros(2, 3), State(zeros(2, 5), zeros(2, 5))),
    "no state, unbatched": (zeros(3), ()),
    "one state, unbatched": (zeros(3), (zeros(5),)),
    "one state in a list, unbatched": (zeros(3), [zeros(5)]),
    "three states, unbatched": (zeros(3), (zeros(5),) * 3),
    "None for c": (zeros(2, 3), (zeros(2, 5), None)),
    "a word": (zeros(2, 3), "hc"),
    "a number": (zeros(2, 3), 3),
    "c of another dimension": (zeros(2, 3), (zeros(2, 5), zeros(1, 2, 5))),
    "h of another dimension": (zeros(2, 3), (zeros(1, 2, 5), zeros(2, 5))),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CELL_CALLS)
def test_states_that_are_not_two_have_torchs_outcome_in_every_variant(name, bias):
    x, hx = CELL_CALLS[name]
    expected = outcome(lambda: nn.LSTMCell(3, 5, bias)(x, hx))
    for spec in VARIANTS:
        cell = lstm_triton.LSTMCell(3, 5, bias, **variant(spec))
        assert outcome(lambda cell=cell: cell(x, hx)) == expected, spec.name


LENGTHS = {"list": list, "tuple": tuple, "integers of NumPy": lambda n: list(np.array(n)), "int32": np.int32}


@pytest.mark.parametrize("kind", ["list", "tuple", "integers of NumPy", "int32"])
@every_variant
def test_lengths_in_a_list_are_those_of_a_tensor(spec, kind):
    module, numbers = lstm_triton.LSTM(3, 4, bidirectional=True, **variant(spec)), [4, 1, 3]
    x = torch.randn(4, 3, 3)
    given = torch.tensor(numbers, dtype=torch.int32) if kind == "int32" else LENGTHS[kind](numbers)
    found, (h, c) = module(x, lengths=given)
    expected, (h_n, c_n) = module(x, lengths=torch.tensor(numbers))
    assert torch.equal(found, expected) and torch.equal(h, h_n) and torch.equal(c, c_n)
    assert numbers == [4, 1, 3]
    batch_first = lstm_triton.LSTM(3, 4, batch_first=True, **variant(spec))
    assert not batch_first(x.transpose(0, 1), lengths=tuple(numbers))[0][1, 1:].any()


@pytest.mark.parametrize(
    "lengths, error, words",
    [
        ([3], ValueError, r"Expected lengths size \(2,\), one for each row, got \[1\]"),
        ([], ValueError, r"Expected lengths size \(2,\), one for each row, got \[0\]"),
        ((3, 2, 1), ValueError, r"Expected lengths size \(2,\), one for each row, got \[3\]"),
        ([3, 6], ValueError, "lengths must be from 1 to the 4 steps of the input, got 6 in row 1"),
        ((0, 3), ValueError, "lengths must be from 1 to the 4 steps of the input, got 0 in row 0"),
        ([4, -1], ValueError, "lengths must be from 1 to the 4 steps of the input, got -1 in row 1"),
        ([3.0, 2], TypeError, r"lengths should be integers, got: \[3.0, 2\]"),
        ([True, 2], TypeError, r"lengths should be integers, got: \[True, 2\]"),
        ([None, 2], TypeError, r"lengths should be integers, got: \[None, 2\]"),
        ([[3], [2]], TypeError, r"lengths should be integers, got: \[\[3\], \[2\]\]"),
        (["3", 2], TypeError, r"lengths should be integers, got: \['3', 2\]"),
        (3, TypeError, "lengths should be a list of integers or a Tensor of int32 or int64, got: int"),
        ({3, 2}, TypeError, "lengths should be a list of integers or a Tensor of int32 or int64, got: set"),
        (torch.ones(2), TypeError, "lengths should be a list of integers or a Tensor .*, got: torch.float32"),
    ],
    ids=str,
)
def test_lengths_that_do_not_fit_are_refused(lengths, error, words):
    for options in (dict(), dict(peephole="diagonal")):
        with pytest.raises(error, match=words):
            lstm_triton.LSTM(3, 4, **options)(torch.zeros(4, 2, 3), lengths=lengths)


def test_a_compiled_module_takes_lengths_in_a_list():
    torch._dynamo.reset()
    module, x = lstm_triton.LSTM(3, 4, peephole="diagonal"), torch.randn(4, 3, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in ([4, 1, 3], [2, 4, 4]):
        torch.testing.assert_close(compiled(x, lengths=lengths)[0], module(x, lengths=lengths)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", WITH_PEEPHOLE, ids=lambda spec: spec.name)
def test_cudnn_is_refused_for_peepholes_where_a_module_is_made_or_told(spec):
    words = f"strategy 'cudnn' computes no peepholes, got the variant '{spec.name}'".replace("+", r"\+")
    for kind in (lstm_triton.LSTM, lstm_triton.PeepholeLSTM):
        with pytest.raises(ValueError, match=words):
            kind(3, 4, strategy="cudnn", **variant(spec))
    module = lstm_triton.LSTM(3, 4, **variant(spec))
    module.strategy = "cudnn"
    with pytest.raises(ValueError, match=words):
        module(torch.zeros(2, 1, 3))


@pytest.mark.parametrize("strategy", ["persistent", "stepwise"])
@every_variant
def test_the_kernels_strategies_say_on_a_cpu_that_model_and_input_belong_on_cuda(spec, strategy):
    module = lstm_triton.LSTM(3, 4, strategy=strategy, **variant(spec))
    with pytest.raises(RuntimeError) as caught:
        module(torch.zeros(2, 1, 3))
    assert str(caught.value) == (
        f"strategy '{strategy}' cannot run here: it needs a CUDA device, move model and input there "
        "(model.to('cuda')); CPU tensors only with TRITON_INTERPRET=1, set before the program starts"
    )


# A tensor that is changed between forward and backward.


def gradients(library, dtype, changed=None, options=None, spec=STANDARD):
    """Of every parameter where `changed` was overwritten before backward; or what the error says."""
    torch.manual_seed(0)
    given = variant(spec) if library is lstm_triton else {}
    module = library.LSTM(3, 4, dtype=dtype, **(options or {}), **given)
    x = torch.randn(5, 2, 3, dtype=dtype)
    rows = x.shape[0 if module.batch_first else 1]
    states = torch.randn(2, module.num_layers * (2 if module.bidirectional else 1), rows, 4, dtype=dtype).unbind()
    output, (h_n, c_n) = module(x, states)
    loss = output.sin().sum() + h_n.sum() + c_n.sum()
    with torch.no_grad():
        for name, tensor in dict(input=x, h_0=states[0], c_0=states[1], weight=module.weight_hh_l0).items():
            if name == changed:
                tensor.zero_()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return [p.grad for p in module.parameters()]


WRITTEN_OVER = "one of the variables needed for gradient computation has been modified by an inplace operation"

each_tensor = pytest.mark.parametrize("changed", ["input", "h_0", "c_0", "weight"])
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@each_tensor
@each_type
@pytest.mark.parametrize(
    "options", [dict(batch_first=True), dict(), dict(batch_first=True, num_layers=2, bidirectional=True)], ids=str
)
def test_what_is_overwritten_before_backward_has_torchs_outcome(options, dtype, changed):
    """Where `torch.nn.LSTM` does not read it again, or has a copy, neither does ours."""
    expected = gradients(nn, dtype, changed, options)
    found = gradients(lstm_triton, dtype, changed, options)
    if isinstance(expected, str):
        assert found == expected == WRITTEN_OVER
    else:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found, gradients(lstm_triton, dtype, None, options))


@each_tensor
@each_type
@pytest.mark.parametrize("batch_first", [False, True], ids=["steps first", "batch first"])
@every_variant
def test_no_variant_computes_a_wrong_gradient_from_what_was_overwritten(spec, batch_first, dtype, changed):
    options = dict(batch_first=batch_first)
    found = gradients(lstm_triton, dtype, changed, options, spec)
    if isinstance(found, str):
        assert found == WRITTEN_OVER
    else:
        torch.testing.assert_close(found, gradients(lstm_triton, dtype, None, options, spec))
