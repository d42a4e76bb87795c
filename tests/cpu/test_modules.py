"""The modules beside `torch.nn.LSTM` and `torch.nn.LSTMCell`: results, checkpoints, options, initial values."""

import copy
import pickle

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, CoupledLSTM, LSTMCell, LSTMSpec, PeepholeLSTM

OPTIONS = [
    dict(),
    dict(num_layers=3),
    dict(bidirectional=True, num_layers=2),
    dict(batch_first=True),
    dict(proj_size=3, num_layers=2),
    dict(bias=False, batch_first=True, bidirectional=True),
]


def pair(**options):
    """`torch.nn.LSTM` and ours with its state dict."""
    theirs = torch.nn.LSTM(5, 8, **options)
    ours = lstm_triton.LSTM(5, 8, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def test_cell_is_torch_nn_lstm_cell():
    theirs, ours = torch.nn.LSTMCell(5, 8), LSTMCell(5, 8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for batch in ((), (3,), (0,)):
        for hx in (None, (torch.randn(*batch, 8), torch.randn(*batch, 8))):
            x = torch.randn(*batch, 5)
            for actual, wanted in zip(ours(x, hx), theirs(x, hx), strict=True):
                assert actual.shape == wanted.shape
                torch.testing.assert_close(actual, wanted)


def test_a_state_dict_of_the_standard_variant_loads_into_torch():
    theirs, ours = pair(num_layers=2, bidirectional=True)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_a_layer_is_its_cell_step_by_step(spec):
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    layer = lstm_triton.LSTM(5, 8, dtype=torch.float64, **variant)
    cell = LSTMCell(5, 8, dtype=torch.float64, **variant)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}, strict=True)
    x, h, c = torch.randn(6, 3, 5).double(), torch.randn(3, 8).double(), torch.randn(3, 8).double()
    output, (h_n, c_n) = layer(x, (h[None], c[None]))
    for x_t, output_t in zip(x, output, strict=True):
        h, c = cell(x_t, (h, c))
        torch.testing.assert_close(h, output_t, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(h, h_n[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(c, c_n[0], rtol=1e-12, atol=1e-13)


def test_subclasses_change_defaults_only():
    assert CoupledLSTM(3, 4).spec == LSTMSpec(coupled=True)
    assert PeepholeLSTM(3, 4).spec == LSTMSpec(peephole="diagonal")
    assert PeepholeLSTM(3, 4, peephole="full", output_peephole="current").spec == LSTMSpec(False, "full", "current")
    assert CoupledLSTM(3, 4, peephole="full").spec == LSTMSpec(True, "full")
    x = torch.randn(2, 1, 3)
    coupled = CoupledLSTM(3, 4)
    plain = lstm_triton.LSTM(3, 4, coupled=True)
    plain.load_state_dict(coupled.state_dict(), strict=True)
    assert torch.equal(coupled(x)[0], plain(x)[0])


def test_initial_values():
    layer = lstm_triton.LSTM(3, 100, peephole="diagonal")
    for parameter in layer.parameters():
        assert 0.09 < parameter.abs().max() <= 0.1
    layer.reset_parameters(bound=1.0)
    for parameter in layer.parameters():
        assert 0.95 < parameter.abs().max() <= 1.0
    torch.manual_seed(5)
    theirs = torch.nn.LSTM(3, 4, 2)
    torch.manual_seed(5)
    ours = lstm_triton.LSTM(3, 4, 2)
    for (name, a), (other, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_its_ends(p):
    ours = lstm_triton.LSTM(5, 8, 2, dropout=p, coupled=True)
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(ours(x)[0], ours(x)[0])
    if p == 0.0:
        torch.testing.assert_close(ours(x)[0], ours.eval()(x)[0])


def test_device_and_dtype_are_those_asked_for():
    layer = lstm_triton.LSTM(3, 4, device="meta", dtype=torch.float16, peephole="full", proj_size=2)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    output, (h_n, c_n) = layer(torch.empty(5, 2, 3, device="meta", dtype=torch.float16))
    assert output.shape == (5, 2, 2) and h_n.shape == (1, 2, 2) and c_n.shape == (1, 2, 4)
    assert LSTMCell(3, 4, dtype=torch.float64).weight_ih.dtype == torch.float64


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_half_and_double_change_the_type_of_everything(spec):
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    layer, x = lstm_triton.LSTM(3, 4, bidirectional=True, **variant), torch.randn(5, 2, 3)
    exact = copy.deepcopy(layer).double()(x.double())[0]
    output, (h_n, c_n) = layer.half()(x.half())
    output.sum().backward()
    assert {t.dtype for t in (output, h_n, c_n, *layer.parameters(), layer.weight_hh_l0.grad)} == {torch.float16}
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=3e-3)


def test_copies_and_pickles():
    layer = lstm_triton.LSTM(3, 4, 2, peephole="diagonal")
    x = torch.randn(2, 1, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert not torch.equal(other(x)[0], layer(x)[0])


def test_pytorch_s_private_list_of_weights_can_be_set_as_old_code_does():
    layer = lstm_triton.LSTM(3, 4, 2)
    raw = layer.weight_hh_l1
    x = torch.randn(5, 2, 3)
    before = layer(x)[0]
    layer._flat_weights = layer._flat_weights
    assert layer.weight_hh_l1 is raw and torch.equal(layer(x)[0], before)
    del layer.weight_hh_l1
    layer.register_parameter("raw", raw)
    layer.weight_hh_l1 = raw * 0
    dropped = [w * 0 if name == "weight_hh_l1" else w for name, w in zip(layer._flat_weights_names, layer._flat_weights,
                                                                         strict=True)]  # fmt: skip
    layer._flat_weights = dropped
    assert not torch.equal(layer(x)[0], before)
    del layer.weight_hh_l1
    with pytest.raises(AttributeError, match="no attribute 'weight_hh_l1'"):
        layer(x)


def test_repr_shows_what_is_not_a_default():
    assert repr(lstm_triton.LSTM(3, 4)) == "LSTM(3, 4, lstm_triton)"
    text = repr(lstm_triton.LSTM(3, 4, 2, batch_first=True))
    assert text == "LSTM(3, 4, num_layers=2, batch_first=True, lstm_triton)"
    text = repr(lstm_triton.LSTM(3, 4, coupled=True, peephole="full", output_peephole="current"))
    assert text == "LSTM(3, 4, coupled=True, peephole='full', output_peephole='current', lstm_triton)"
    text = repr(LSTMCell(3, 4, bias=False, peephole="diagonal"))
    assert text == "LSTMCell(3, 4, bias=False, peephole='diagonal', lstm_triton)"


def test_the_exercise():
    """Two layers, an unbatched sequence, states (L, H), weights from U(-1, 1); coupled and peephole as subclasses."""
    for cls in (lstm_triton.LSTM, CoupledLSTM, PeepholeLSTM):
        lstm = cls(5, 10, 2)
        lstm.reset_parameters(bound=1.0)
        outputs, (hidden_state, cell_state) = lstm(torch.zeros(6, 5), (torch.zeros(2, 10), torch.zeros(2, 10)))
        assert len(outputs) == 6 and outputs[0].shape == (10,)
        assert hidden_state.shape == cell_state.shape == (2, 10)
        assert torch.equal(outputs[-1], hidden_state[-1])


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_autocast_computes_and_returns_its_type(spec):
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    layer = lstm_triton.LSTM(3, 4, proj_size=2, **variant)
    x = torch.randn(5, 2, 3)
    expected, _ = layer(x)
    (wanted,) = torch.autograd.grad(expected.sum(), layer.weight_ih_l0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, (h_n, c_n) = layer(x)
        output.float().sum().backward()  # inside: the backward pass must not cast again either
    assert {output.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
    gradient = layer.weight_ih_l0.grad
    assert gradient.dtype == torch.float32
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    assert (gradient - wanted).norm() < 0.02 * wanted.norm()
