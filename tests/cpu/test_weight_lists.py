"""PyTorch's private lists of an LSTM's weights, as code in many repositories uses them: `torch.nn.LSTM`'s outcome."""

import copy
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, convert
from tests.support.composes import variant

OPTIONS = [dict(), dict(num_layers=2, bidirectional=True), dict(bias=False, num_layers=2), dict(proj_size=2)]
STANDARD = LSTMSpec()
LIBRARIES = pytest.mark.parametrize("library", [nn, lstm_triton], ids=["torch.nn", "lstm_triton"])


def names_by_hand(module):
    """By layer and direction, in the order of the state dict."""
    found = []
    for layer in range(module.num_layers):
        for suffix in ["", "_reverse"][: 2 if module.bidirectional else 1]:
            kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * module.bias
            kinds += ["weight_hr"] * (module.proj_size > 0) + ["weight_ch"] * (module.spec.peephole is not None)
            found.append([f"{kind}_l{layer}{suffix}" for kind in kinds])
    return found


def check_lists(module):
    """The lists name and hold every parameter."""
    assert module._all_weights == names_by_hand(module)
    assert module._flat_weights_names == [name for names in module._all_weights for name in names]
    assert list(dict(module.named_parameters())) == module._flat_weights_names
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    held = [weight for weights in module.all_weights for weight in weights]
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_names_are_by_layer_and_direction(spec, options):
    module = lstm_triton.LSTM(3, 4, **options, **variant(spec))
    check_lists(module)
    if spec == STANDARD:
        theirs = nn.LSTM(3, 4, **options)
        assert module._all_weights == theirs._all_weights
        assert module._flat_weights_names == theirs._flat_weights_names
        assert [len(weights) for weights in module.all_weights] == [len(weights) for weights in theirs.all_weights]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_copies_have_lists_of_their_own(spec, options):
    module = lstm_triton.LSTM(3, 4, **options, **variant(spec))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(copy.copy(module))):
        check_lists(other)
        assert other._flat_weights is not module._flat_weights
        assert not {id(weight) for weight in other._flat_weights} & {id(weight) for weight in module._flat_weights}
    check_lists(module)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conversion_keeps_the_lists(options):
    module = nn.LSTM(3, 4, **options)
    names = module._all_weights
    check_lists(convert.from_torch(module))
    convert.to_torch(module)
    assert module._all_weights == names
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))


# What code does to the lists, one thing after the other.

X = torch.linspace(-1, 1, 18).view(3, 2, 3)


def replaced(name, factor):
    def change(module):
        if name in module._parameters:
            setattr(module, name, nn.Parameter(getattr(module, name).detach() * factor))

    return change


def loaded(assign):
    def load(module):
        module.load_state_dict({name: w * 0.7 for name, w in module.state_dict().items()}, assign=assign)

    return load


def set_entry(n, factor):
    def change(module):
        module._flat_weights[n] = getattr(module, module._flat_weights_names[n]).detach() * factor

    return change


def set_all(module):
    module._flat_weights = [getattr(module, name) * 0.3 for name in module._flat_weights_names]


def made_again(module):
    """A line of many repositories."""
    module._flat_weights = [
        (lambda wn: getattr(module, wn) if hasattr(module, wn) else None)(wn) for wn in module._flat_weights_names
    ]


def called_functionally(module):
    functional_call(module, {name: w * 1.3 for name, w in module.named_parameters()}, (X,))


def scaled_in_place(module):
    for parameter in module.parameters():
        parameter.data.mul_(0.9)


def computed(module):
    """A computed weight in place of the parameter."""
    module._parameters.pop("weight_hh_l0", None)
    module.weight_hh_l0 = torch.full((16, 4), 0.1)


def data_replaced(module):
    module.weight_ih_l0.data = module.weight_ih_l0.data * 1.5


CHANGES = {
    "first entry set": set_entry(0, 0.5),
    "second entry set": set_entry(1, 0.0),
    "all entries set": set_all,
    "list made again": made_again,
    "first parameter replaced": replaced("weight_ih_l0", 2),
    "second parameter replaced": replaced("weight_hh_l0", 3),
    "to double and back": lambda module: module.double().float(),
    "state dict loaded": loaded(False),
    "state dict assigned": loaded(True),
    "called functionally": called_functionally,
    "scaled in place": scaled_in_place,
    "called": lambda module: module(X),
    "parameter removed": lambda module: module._parameters.pop("weight_hh_l0", None),
    "computed weight": computed,
    "data replaced": data_replaced,
    "flattened": lambda module: module.flatten_parameters(),
    "copied": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
}
SEQUENCES = [*itertools.permutations(CHANGES, 2), *list(itertools.permutations(CHANGES, 3))[::97]]


def outcomes(library, sequence, call_between):
    """After each change the output, or that it or the call failed."""
    torch.manual_seed(0)
    module, found = library.LSTM(3, 4), []
    for name in sequence:
        try:
            result = CHANGES[name](module)
            module = result if name in ("copied", "pickled") else module
        except Exception:
            found.append("error in the change")
        if call_between or name is sequence[-1]:
            try:
                found.append(module(X)[0].detach())
            except Exception:
                found.append("error in the call")
    return found


@pytest.mark.parametrize("call_between", [True, False], ids=["calls between", "one call"])
@pytest.mark.parametrize("first", CHANGES)
def test_changes_have_torchs_outcome(first, call_between):
    for sequence in [(first,), *(sequence for sequence in SEQUENCES if sequence[0] == first)]:
        expected = outcomes(nn, sequence, call_between)
        found = outcomes(lstm_triton, sequence, call_between)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same = a == b if isinstance(b, str) or isinstance(a, str) else torch.allclose(a, b, atol=1e-6)
            assert same, sequence


@pytest.mark.parametrize("change", ["first entry set", "second entry set", "all entries set"])
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_an_entry_that_was_set_is_used_by_every_variant(spec, change):
    module = lstm_triton.LSTM(3, 4, **variant(spec))
    before = module(X)[0]
    CHANGES[change](module)
    weights = list(module._flat_weights)
    found = module(X)[0]
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, lstm_triton.functional.lstm(X, None, weights, **variant(spec))[0])
    called_functionally(module)
    torch.testing.assert_close(module(X)[0], before)


def test_a_missing_weight_is_named():
    module = lstm_triton.LSTM(3, 4, peephole="diagonal")
    del module.weight_ch_l0
    made_again(module)
    with pytest.raises(AttributeError, match="no attribute 'weight_ch_l0'"):
        module(X)


def test_computed_weights_are_not_kept_and_asked_once_a_call():
    module = lstm_triton.LSTM(3, 4)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    asked = []
    module.parametrizations.weight_hh_l0[0].register_forward_hook(
        lambda *arguments: asked.append(weakref.ref(arguments[2]))
    )
    module(X)
    assert len(asked) == 1 and asked[0]() is None
    copy.deepcopy(module)(X)  # not possible where a tensor with a graph is kept


# Idioms of many repositories.


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_weights_are_initialized_by_their_names(spec):
    lstm = lstm_triton.LSTM(3, 4, 2, bidirectional=True, **variant(spec))
    for names in lstm._all_weights:
        for name in names:
            if "weight_ch" in name:
                nn.init.constant_(getattr(lstm, name), 0.5)
            elif "weight" in name:
                nn.init.orthogonal_(getattr(lstm, name))
            else:
                nn.init.constant_(getattr(lstm, name), 0.0)
    W = lstm.weight_hh_l1_reverse
    torch.testing.assert_close(W.t() @ W, torch.eye(4))
    assert not any(bias.any() for name, bias in lstm.named_parameters() if "bias" in name)
    for weights in lstm.all_weights:
        for weight in weights:
            assert weight.requires_grad and weight.grad_fn is None


@LIBRARIES
def test_the_bias_of_the_forget_gate_is_filled_by_its_name(library):
    lstm = library.LSTM(3, 4, 2)
    for names in lstm._all_weights:
        for name in filter(lambda n: "bias" in n, names):
            bias = getattr(lstm, name)
            n = bias.size(0)
            start, end = n // 4, n // 2
            bias.data[start:end].fill_(1.0)
    assert all((b[4:8] == 1).all() and not (b[:4] == 1).any() for n, b in lstm.named_parameters() if "bias" in n)
    lstm.double()
    assert lstm(X.double())[0].dtype == torch.float64


class WeightDrop(nn.Module):
    """The recurrent weights dropped at each call, the raw ones trained: AWD-LSTM's, in several repositories."""

    def __init__(self, module, names=("weight_hh_l0",), p=0.5, how="setattr"):
        super().__init__()
        self.module, self.names, self.p, self.how = module, names, p, how
        module.flatten_parameters = lambda *args, **kwargs: None
        for name in names:
            raw = getattr(module, name)
            del module._parameters[name]
            self.register_parameter(f"{name}_raw", nn.Parameter(raw.data))
            if how == "setattr":
                setattr(module, name, raw.clone())

    def forward(self, *arguments):
        for name in self.names:
            dropped = nn.functional.dropout(getattr(self, f"{name}_raw"), p=self.p, training=self.training)
            if self.how == "setattr":
                setattr(self.module, name, dropped)
            else:
                self.module._flat_weights[self.module._flat_weights_names.index(name)] = dropped
        return self.module(*arguments)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("how", ["setattr", "list"])
def test_dropped_weights_are_used_and_the_raw_ones_trained(how, training):
    results = []
    for library in (nn, lstm_triton):
        torch.manual_seed(0)
        model = WeightDrop(library.LSTM(3, 4, 2), ("weight_hh_l0", "weight_hh_l1"), how=how).train(training)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        outputs = []
        for _ in range(3):
            optimizer.zero_grad()
            output = model(X)[0]
            output.square().sum().backward()
            optimizer.step()
            outputs.append(output.detach())
        assert model.weight_hh_l0_raw.grad.abs().sum() > 0
        results.append([*outputs, *model.parameters()])
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[1][0], results[1][1])


@LIBRARIES
def test_weights_tied_through_the_list_are_used(library):
    lstm, other = library.LSTM(3, 4), library.LSTM(3, 4)
    with torch.no_grad():
        expected = other(X)[0]
    lstm._flat_weights = [weight for weights in other.all_weights for weight in weights]
    torch.testing.assert_close(lstm(X)[0], expected)
    lstm(X)[0].sum().backward()
    assert other.weight_hh_l0.grad is not None and lstm.weight_hh_l0.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm._init_flat_weights()
    assert not torch.allclose(lstm(X)[0], expected)
