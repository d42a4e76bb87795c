"""The modules are an `RNNBase` and an `RNNCellBase`: code that asks for these, and the way to TorchScript."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import VARIANTS, CoupledLSTM, LSTMSpec, PeepholeLSTM, convert
from tests.support.composes import variant

STANDARD = LSTMSpec()
every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
LIBRARIES = pytest.mark.parametrize("library", [nn, lstm_triton], ids=["torch.nn", "lstm_triton"])


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """A layer, a cell and what is no RNN."""

    def __init__(self, library=lstm_triton, **options):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layer = library.LSTM(3, 4, 2, batch_first=True, bidirectional=True, **options)
        self.cell = library.LSTMCell(8, 5, **options)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens):
        output, _ = self.layer(self.embedding(tokens))
        return self.head(self.cell(output[:, -1])[0])


TOKENS = torch.arange(12).view(3, 4) % 7


def test_layers_and_cells_are_found_by_their_base_class():
    layers = [lstm_triton.LSTM(3, 4), CoupledLSTM(3, 4), PeepholeLSTM(3, 4), convert.from_torch(nn.LSTM(3, 4))]
    for layer in layers:
        assert isinstance(layer, nn.RNNBase) and not isinstance(layer, nn.RNNCellBase)
        assert layer.mode == "LSTM"
        assert not isinstance(layer, nn.LSTM)  # Dynamo does not look into those
    for cell in (lstm_triton.LSTMCell(3, 4), convert.from_torch(nn.LSTMCell(3, 4))):
        assert isinstance(cell, nn.RNNCellBase) and not isinstance(cell, nn.RNNBase)
        assert not isinstance(cell, nn.LSTMCell)
    assert issubclass(lstm_triton.LSTM, nn.RNNBase) and issubclass(lstm_triton.LSTMCell, nn.RNNCellBase)


@LIBRARIES
def test_every_attribute_that_the_base_class_documents_is_there(library):
    layer = library.LSTM(3, 4, 2, bias=False, dropout=0.25, bidirectional=True, batch_first=True, proj_size=2)
    expected = dict(
        mode="LSTM", input_size=3, hidden_size=4, num_layers=2, bias=False, batch_first=True, dropout=0.25,
        bidirectional=True, proj_size=2,
    )  # fmt: skip
    assert {name: getattr(layer, name) for name in expected} == expected
    cell = library.LSTMCell(3, 4, bias=False)
    assert (cell.input_size, cell.hidden_size, cell.bias) == (3, 4, False)


def initialize(module):
    """As in many repositories: models.apply(init_weights)."""
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.RNNBase):
        for name, parameter in module.named_parameters():
            if "weight_ih" in name:
                nn.init.xavier_uniform_(parameter.data)
            elif "weight_hh" in name:
                nn.init.orthogonal_(parameter.data)
            elif "bias" in name:
                nn.init.zeros_(parameter.data)
    elif isinstance(module, nn.RNNCellBase):
        module.weight_hh.data.fill_(0.125)


@every_variant
def test_layers_and_cells_are_initialized_where_a_function_asks_for_the_base_class(spec):
    model = Model(**variant(spec)).apply(initialize)
    W = model.layer.weight_hh_l1_reverse
    torch.testing.assert_close(W.t() @ W, torch.eye(4))
    assert not any(p.any() for name, p in model.layer.named_parameters() if "bias" in name)
    assert (model.cell.weight_hh == 0.125).all()
    model(TOKENS).sum().backward()


def test_a_seed_initializes_as_torchs_model():
    found = []
    for library in (nn, lstm_triton):
        torch.manual_seed(2)
        found.append(Model(library).apply(initialize).state_dict())
    assert list(found[0]) == list(found[1])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@every_variant
def test_state_dict_pickle_and_copy(spec, tmp_path):
    model = Model(**variant(spec))
    expected = model(TOKENS)
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    others.append(torch.load(tmp_path / "model.pt", weights_only=False))
    fresh = Model(**variant(spec))
    fresh.load_state_dict(model.state_dict(), strict=True)
    for other in (*others, fresh):
        assert other.layer.spec == spec and other.cell.spec == spec
        assert torch.equal(other(TOKENS), expected)


def replicated(module, factor):
    """What torch.nn.parallel.replicate does, without devices: tensors that are no parameters."""
    replica = module._replicate_for_data_parallel()
    assert replica._parameters == {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * factor)
    return replica


@every_variant
def test_a_replica_of_data_parallel_has_weights_of_its_own_with_the_gradients_of_the_module(spec):
    layer = lstm_triton.LSTM(3, 4, 2, bidirectional=True, **variant(spec))
    cell = lstm_triton.LSTMCell(3, 4, **variant(spec))
    x = torch.randn(5, 2, 3)
    for module, input in ((layer, x), (cell, x[0])):
        replica, doubled = replicated(module, 2), copy.deepcopy(module)
        with torch.no_grad():
            for parameter in doubled.parameters():
                parameter.mul_(2)
        torch.testing.assert_close(replica(input)[0], doubled(input)[0])
        replica(input)[0].sum().backward()
        doubled(input)[0].sum().backward()
        for parameter, other in zip(module.parameters(), doubled.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, 2 * other.grad)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    layer(x)


@every_variant
def test_a_model_compiles_into_one_graph_and_is_trained(spec):
    model = Model(**variant(spec))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    found = torch.autograd.grad(compiled(TOKENS).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(TOKENS).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_variant
def test_scripting_is_refused_with_a_way_out(spec):
    way = r"lstm_triton.convert.to_torch\(model\)" if spec == STANDARD else "use torch.export, or torch.compile"
    model = Model(**variant(spec))
    for module, kind in ((model, "LSTM"), (model.layer, "LSTM"), (model.cell, "LSTMCell")):
        words = rf"^torch.jit.script does not take {kind} of lstm_triton \({spec.name.replace('+', '.')}\): {way}"
        with pytest.raises(RuntimeError, match=words):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_converted_model_is_scripted():
    model = Model().eval()
    expected = model(TOKENS)
    scripted = torch.jit.script(convert.to_torch(model))
    torch.testing.assert_close(scripted(TOKENS), expected)
    assert type(convert.from_torch(model).layer) is lstm_triton.LSTM


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.LSTMCell, nn.Linear}, dtype=torch.qint8)


def test_a_converted_model_is_quantized_as_torchs():
    if not torch.backends.quantized.engine or torch.backends.quantized.engine == "none":
        pytest.skip("no quantized engine")
    model, theirs = Model().eval(), Model(nn).eval()
    theirs.load_state_dict(model.state_dict())
    expected = quantized(theirs)(TOKENS)
    found = quantized(convert.to_torch(model))
    assert type(found.layer).__module__.startswith("torch.ao.nn.quantized.dynamic")
    torch.testing.assert_close(found(TOKENS), expected, rtol=0, atol=0)
    torch.testing.assert_close(expected, theirs(TOKENS), rtol=0.1, atol=0.05)


@every_variant
def test_without_the_conversion_layers_and_cells_stay_in_floating_point(spec):
    if not torch.backends.quantized.engine or torch.backends.quantized.engine == "none":
        pytest.skip("no quantized engine")
    model = Model(**variant(spec)).eval()
    found = quantized(model)
    assert type(found.head).__module__.startswith("torch.ao.nn.quantized.dynamic")
    assert type(found.layer) is lstm_triton.LSTM and type(found.cell) is lstm_triton.LSTMCell
    found.head = model.head
    torch.testing.assert_close(found(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_a_variant_that_cannot_be_converted_says_so():
    with pytest.raises(ValueError, match=r"layer \(LSTM\) is of the variant 'coupled', which PyTorch does not have"):
        convert.to_torch(Model(coupled=True))
