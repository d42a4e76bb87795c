"""Swapping the LSTMs of a model, and back: nothing changes but the class."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_triton
from lstm_triton import convert

OPTIONS = [
    dict(),
    dict(num_layers=3, dropout=0.4, batch_first=True),
    dict(num_layers=2, bidirectional=True),
    dict(proj_size=3, num_layers=2, bias=False, bidirectional=True),
]


class Tagger(nn.Module):
    """A model with LSTMs at several depths, one of them at two places, a cell, and a list that PyTorch does not see."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(5, 7, 2, dropout=0.3, bidirectional=True), "norm": nn.Tanh()})
        self.step = nn.LSTMCell(14, 6, bias=False)
        self.heads = nn.ModuleList([nn.LSTM(6, 3, proj_size=2), nn.Linear(2, 4)])
        self.again = self.heads[0]
        self.unseen = [self.heads[0]]

    def forward(self, tokens):
        output, _ = self.encoder["lstm"](self.embed(tokens))
        h, _ = self.step(self.encoder["norm"](output[-1]))
        once, states = self.heads[0](h[None])
        twice, _ = self.again(h[None], states)
        return self.heads[1](once + twice + self.unseen[0](h[None])[0])


def tokens():
    return torch.randint(0, 11, (6, 3))


def everything(model):
    """Outputs and all gradients for the same random numbers."""
    torch.manual_seed(3)
    model.zero_grad()
    output = model(torch.arange(18).reshape(6, 3) % 11)
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters())]


def layer_outputs(layer, seed=5):
    """output, h_n, c_n and the gradients of all parameters, for fixed input and random numbers."""
    torch.manual_seed(seed)
    layer.zero_grad()
    x = torch.randn(6, 3, 5, dtype=next(layer.parameters()).dtype)
    output, (h_n, c_n) = layer(x)
    (output.sum() + h_n.square().sum() + c_n.sum()).backward()
    gradients = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    return [output.detach(), h_n.detach(), c_n.detach(), *gradients]


def marked(text):
    """The representation of a module of PyTorch's, once it is this library's."""
    return text.replace(")", ", lstm_triton)")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_every_lstm_of_a_model_is_swapped_and_back():
    model = Tagger()
    expected, names, keys = everything(model), [n for n, _ in model.named_modules()], list(model.state_dict())
    for convert_to, layer, cell in (
        (convert.from_torch, lstm_triton.LSTM, lstm_triton.LSTMCell),
        (convert.to_torch, nn.LSTM, nn.LSTMCell),
    ):
        parameters = dict(model.named_parameters())
        assert convert_to(model) is model
        assert [type(m) for m in (model.encoder["lstm"], model.step, model.heads[0])] == [layer, cell, layer]
        assert model.heads[0] is model.again is model.unseen[0]
        assert [n for n, _ in model.named_modules()] == names and list(model.state_dict()) == keys
        assert all(p is parameters[n] for n, p in model.named_parameters())
        close(everything(model), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_outputs_and_gradients_stay(options):
    layer = nn.LSTM(5, 8, dtype=torch.float64, **options)
    text, expected = repr(layer), layer_outputs(layer)
    ours = convert.from_torch(layer)
    assert type(ours) is lstm_triton.LSTM and repr(ours) == marked(text)
    close(layer_outputs(ours), expected)
    theirs = convert.to_torch(ours)
    assert type(theirs) is nn.LSTM and repr(theirs) == text
    close(layer_outputs(theirs), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_cell_alone_is_swapped(bias):
    cell, x = nn.LSTMCell(5, 8, bias), torch.randn(3, 5)
    text, expected = repr(cell), cell(x)
    for convert_to, kind in ((convert.from_torch, lstm_triton.LSTMCell), (convert.to_torch, nn.LSTMCell)):
        cell = convert_to(cell)
        text_now = marked(text) if kind is lstm_triton.LSTMCell else text
        assert type(cell) is kind and repr(cell) == text_now and ("bias_ih", cell.bias_ih) in cell._parameters.items()
        close(cell(x), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_swapped_module_has_the_attributes_of_one_that_was_built(options):
    ours, theirs = lstm_triton.LSTM(5, 8, **options), nn.LSTM(5, 8, **options)
    assert vars(convert.from_torch(nn.LSTM(5, 8, **options))).keys() == vars(ours).keys()
    assert vars(convert.to_torch(lstm_triton.LSTM(5, 8, **options))).keys() == vars(theirs).keys()
    assert vars(convert.from_torch(nn.LSTMCell(5, 8))).keys() == vars(lstm_triton.LSTMCell(5, 8)).keys()
    assert vars(convert.to_torch(lstm_triton.LSTMCell(5, 8))).keys() == vars(nn.LSTMCell(5, 8)).keys()


def test_an_optimizer_made_before_goes_on():
    models = [Tagger(), Tagger()]
    models[1].load_state_dict(models[0].state_dict())
    for model, swapped in zip(models, (False, True), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for convert_to in (lambda m: m, convert.from_torch, convert.to_torch):
            if swapped:
                convert_to(model)
            everything(model)
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-3, atol=1e-4)


def test_tied_frozen_and_typed_parameters_stay_what_they_are():
    model = nn.ModuleList([nn.LSTM(4, 4, dtype=torch.bfloat16), nn.LSTM(4, 4, device="meta")])
    model[0].weight_ih_l0 = model[0].weight_hh_l0
    model[0].bias_ih_l0.requires_grad_(False)
    gradient = model[0].bias_hh_l0.grad = torch.ones(16, dtype=torch.bfloat16)
    for convert_to in (convert.from_torch, convert.to_torch):
        convert_to(model)
        assert model[0].weight_ih_l0 is model[0].weight_hh_l0
        assert [p.requires_grad for p in model[0].parameters()] == [True, False, True]
        assert model[0].bias_hh_l0.grad is gradient
        assert {p.dtype for p in model[0].parameters()} == {torch.bfloat16}
        assert {p.device.type for p in model[1].parameters()} == {"meta"}
        output, _ = model[1](torch.empty(2, 3, 4, device="meta"))
        assert output.shape == (2, 3, 4)
        assert model[0](torch.zeros(2, 3, 4, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_training_flags_stay_each_its_own():
    model = Tagger()
    model.encoder["lstm"].eval()
    before = {name: module.training for name, module in model.named_modules()}
    for convert_to in (convert.from_torch, convert.to_torch):
        convert_to(model)
        assert {name: module.training for name, module in model.named_modules()} == before


def test_hooks_go_on_being_called_and_removed():
    layer, calls = nn.LSTM(5, 8), []

    def called(name):
        return lambda *args, **kwargs: calls.append(name)

    def failing(module, args, kwargs, output):
        calls.append(("always", sorted(kwargs)))

    handles = [
        layer.register_forward_pre_hook(called("pre")),
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append(("pre", sorted(kwargs))), with_kwargs=True
        ),
        layer.register_forward_hook(called("forward")),
        layer.register_forward_hook(failing, with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(called("backward pre")),
        layer.register_full_backward_hook(called("backward")),
        layer.register_state_dict_pre_hook(called("state pre")),
        layer.register_state_dict_post_hook(called("state")),
        layer.register_load_state_dict_pre_hook(lambda module, *args: calls.append(("load pre", module is layer))),
        layer.register_load_state_dict_post_hook(called("load")),
    ]

    def use():
        calls.clear()
        x = torch.randn(2, 3, 5, requires_grad=True)
        layer(x, hx=(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))[0].sum().backward()
        layer.load_state_dict(layer.state_dict())
        with pytest.raises(RuntimeError):
            layer(torch.zeros(2, 3, 4))
        return list(calls)

    expected = use()
    assert len(expected) == 10 + 3  # the call that failed: both pre-hooks, and the hook that is always called
    for convert_to in (convert.from_torch, convert.to_torch):
        convert_to(layer)
        assert use() == expected
    for handle in handles:
        handle.remove()
    assert use() == []


def test_buffers_submodules_and_attributes_of_the_user_stay():
    layer = nn.LSTM(5, 8, dropout=0.0)
    layer.register_buffer("seen", torch.arange(3))
    layer.register_buffer("scratch", torch.zeros(2), persistent=False)
    layer.add_module("extra", nn.Linear(2, 2))
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    layer.note, layer.batch_first = ["kept"], True
    note, keys = layer.note, list(layer.state_dict())
    for convert_to in (convert.from_torch, convert.to_torch):
        layer = convert_to(layer)
        assert layer.note is note and layer.batch_first is True
        assert list(layer.state_dict()) == keys and "scratch" not in keys
        assert layer.scratch.shape == (2,) and type(layer.extra) is nn.Linear
        assert layer(torch.zeros(3, 6, 5))[1][0].shape == (1, 3, 8)


def test_nothing_is_drawn_allocated_or_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.LSTM(5, 8, dropout=0.5)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for convert_to in (convert.from_torch, convert.to_torch):
            with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
                convert_to(layer)
            assert not any(event.self_cpu_memory_usage for event in profile.events())
            assert layer.dropout == 0.5
    assert torch.equal(torch.get_rng_state(), state)


def test_conversion_keeps_nothing_alive():
    layer = convert.to_torch(convert.from_torch(nn.LSTM(5, 8)))
    parameter = weakref.ref(layer.weight_hh_l0)
    del layer
    gc.collect()
    assert parameter() is None


class Own(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class OwnOfOurs(lstm_triton.LSTM):
    pass


def test_what_is_not_exactly_an_lstm_is_left_alone():
    model = nn.ModuleList([Own(5, 8), torch.ao.nn.quantizable.LSTM(5, 8), nn.GRU(5, 8), nn.RNNCell(5, 8)])
    model.append(torch.jit.script(nn.LSTM(5, 8)))
    before = [type(m) for m in model.modules()]
    assert [type(m) for m in convert.from_torch(model).modules()] == before
    assert [type(m) for m in convert.to_torch(model).modules()] == before
    assert type(convert.to_torch(OwnOfOurs(5, 8))) is OwnOfOurs


@pytest.mark.parametrize("kind", [lstm_triton.CoupledLSTM, lstm_triton.PeepholeLSTM])
def test_our_subclasses_of_the_standard_variant_become_torchs(kind):
    layer = kind(5, 8, coupled=False, peephole=None)
    expected = layer_outputs(layer)
    assert type(convert.to_torch(layer)) is nn.LSTM
    close(layer_outputs(layer), expected)


@pytest.mark.parametrize(
    "module, variant",
    [
        (lstm_triton.CoupledLSTM(5, 8), "coupled"),
        (lstm_triton.PeepholeLSTM(5, 8, peephole="full", output_peephole="current"), "full+current"),
        (lstm_triton.LSTMCell(5, 8, peephole="diagonal"), "diagonal"),
        (OwnOfOurs(5, 8, coupled=True), "coupled"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_variant_that_torch_lacks_is_refused_before_anything_is_changed(module, variant):
    model = nn.ModuleDict({"first": lstm_triton.LSTM(5, 8), "deep": nn.ModuleList([nn.Tanh(), module])})
    before = [(type(m), vars(m).copy()) for m in model.modules()]
    with pytest.raises(ValueError) as caught:
        convert.to_torch(model)
    assert str(caught.value).startswith(f"deep.1 ({type(module).__name__}) is of the variant {variant!r}")
    for m, (kind, attributes) in zip(model.modules(), before, strict=True):
        assert type(m) is kind and vars(m) == attributes
    with pytest.raises(ValueError, match=r"^the module \("):
        convert.to_torch(module)


def test_variants_beside_torchs_layers_do_not_hinder_from_torch():
    model = nn.ModuleList([lstm_triton.CoupledLSTM(5, 8), nn.LSTM(5, 8)])
    convert.from_torch(model)
    assert [type(m) for m in model] == [lstm_triton.CoupledLSTM, lstm_triton.LSTM]


@pytest.mark.parametrize("convert_to, kind", [(convert.from_torch, nn), (convert.to_torch, lstm_triton)])
def test_a_replaced_forward_is_refused_before_anything_is_changed(convert_to, kind):
    model = nn.ModuleList([kind.LSTM(5, 8), kind.LSTM(5, 8)])
    model[1].forward = lambda input, hx=None: (input, hx)
    with pytest.raises(ValueError, match=r"^1 \(LSTM\) has a forward that was set on the instance.*del module.forward"):
        convert_to(model)
    assert type(model[0]) is kind.LSTM
    del model[1].forward
    assert type(convert_to(model)[1]) is not kind.LSTM


def test_an_attribute_that_the_other_class_uses_is_refused():
    layer = nn.LSTM(5, 8)
    layer.strategy = "mine"
    layer.register_buffer("spec", torch.zeros(2))
    with pytest.raises(ValueError, match=r"the module \(LSTM\) has attributes.*rename spec, strategy$"):
        convert.from_torch(layer)
    assert type(layer) is nn.LSTM and layer.strategy == "mine"
    # The other way there is none: this library's module has every name of PyTorch's.
    assert set(dir(nn.LSTM(5, 8))) <= set(dir(lstm_triton.LSTM(5, 8)))


@pytest.mark.parametrize("convert_to", [convert.from_torch, convert.to_torch])
@pytest.mark.parametrize("value", [None, {}, nn.LSTM, torch.zeros(2)], ids=lambda value: type(value).__name__)
def test_what_is_no_module_is_a_type_error(convert_to, value):
    with pytest.raises(TypeError, match=r"module should be a torch\.nn\.Module, got: "):
        convert_to(value)


def test_strategy_and_recompute_are_lost_on_the_way_back():
    layer = lstm_triton.LSTM(5, 8, recompute=True, strategy="stepwise")
    convert.to_torch(layer)
    assert not hasattr(layer, "strategy") and not hasattr(layer, "recompute")
    convert.from_torch(layer)
    assert layer.strategy == "auto" and layer.recompute is False


@pytest.mark.parametrize("convert_to", [convert.from_torch, convert.to_torch])
def test_converted_modules_are_copied_pickled_and_moved(convert_to):
    kind = nn if convert_to is convert.from_torch else lstm_triton
    layer = convert_to(kind.LSTM(5, 8, 2, bidirectional=True))
    expected = layer_outputs(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()):
        assert type(other) is type(layer)
        close(layer_outputs(other), expected)
        with torch.no_grad():
            other.weight_hh_l1.add_(1.0)
        assert not torch.allclose(layer_outputs(other)[0], expected[0])
    assert layer.double()(torch.zeros(6, 3, 5, dtype=torch.float64))[0].dtype == torch.float64


def test_torchs_list_of_weights_is_that_of_the_parameters():
    layer = convert.to_torch(lstm_triton.LSTM(5, 8, 2, bidirectional=True, proj_size=3))
    built = nn.LSTM(5, 8, 2, bidirectional=True, proj_size=3)
    assert layer._flat_weights_names == built._flat_weights_names
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    assert all(ref() is p for ref, p in zip(layer._flat_weight_refs, layer.parameters(), strict=True))
    assert [[id(p) for p in direction] for direction in layer.all_weights] == [
        [id(getattr(layer, name)) for name in direction] for direction in built._all_weights
    ]


def dropped(module):
    """Weight drop, as a parametrization: random in training."""

    class Drop(nn.Module):
        def forward(self, weight):
            return nn.functional.dropout(weight, 0.5, self.training)

    parametrize.register_parametrization(module, "weight_hh_l0", Drop())


REPARAMETRIZED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "weight drop": dropped,
    "two parametrizations": lambda m: [parametrizations.weight_norm(m, f"weight_{n}_l0") for n in ("hh", "ih")],
    "pruning": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.4),
    "the older weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
    "the older spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_computed_weights_are_converted(name, training):
    layer = nn.LSTM(5, 8)
    REPARAMETRIZED[name](layer)
    layer.train(training)
    parameters = dict(layer.named_parameters())
    for convert_to, base in ((convert.from_torch, lstm_triton.LSTM), (convert.to_torch, nn.LSTM)):
        state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
        convert_to(layer)
        assert isinstance(layer, base) and parametrize.type_before_parametrizations(layer) is base
        assert torch.equal(torch.get_rng_state(), random) and list(layer.state_dict()) == list(state)
        torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
        assert all(p is parameters[n] for n, p in layer.named_parameters())
        gradient = computed_gradient(layer, "weight_hh_l0")
        assert gradient.isfinite().all() and gradient.any()


def computed_gradient(layer, name):
    """The gradient that reaches what the weight is computed from."""
    layer.zero_grad()
    layer(torch.randn(6, 3, 5))[0].square().sum().backward()
    return torch.cat([p.grad.flatten() for n, p in layer.named_parameters() if name in n])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [name for name in REPARAMETRIZED if name != "weight drop"])
def test_computed_weights_give_the_same_outputs_and_gradients(name):
    layer = nn.LSTM(5, 8, dtype=torch.float64)
    REPARAMETRIZED[name](layer)
    layer.eval()
    expected = layer_outputs(layer)
    for convert_to in (convert.from_torch, convert.to_torch):
        close(layer_outputs(convert_to(layer)), expected)


@pytest.mark.parametrize("convert_to, kind", [(convert.from_torch, lstm_triton), (convert.to_torch, nn)])
def test_parametrizations_and_pruning_can_be_removed_after_conversion(convert_to, kind):
    layer = (nn if convert_to is convert.from_torch else lstm_triton).LSTM(5, 8)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    close(convert_to(copy.deepcopy(layer))(torch.ones(6, 3, 5))[0], layer(torch.ones(6, 3, 5))[0])
    prune.random_unstructured(layer, "weight_ih_l0", 0.5)
    expected = layer(torch.ones(6, 3, 5))[0]
    convert_to(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    prune.remove(layer, "weight_ih_l0")
    assert type(layer) is kind.LSTM
    assert {n for n, _ in layer.named_parameters()} == {n for n, _ in nn.LSTM(5, 8).named_parameters()}
    close(layer(torch.ones(6, 3, 5))[0], expected)


def test_a_module_compiled_in_place_is_compiled_anew():
    layer, seen = nn.LSTM(5, 8), []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    layer.compile(backend=backend)
    x = torch.randn(4, 3, 5)
    expected = layer(x)[0]
    convert.from_torch(layer)
    before = len(seen)
    close(layer(x)[0], expected)
    assert len(seen) > before
