"""Conversion with options: peepholes that start at zero, coupled gates, and the report that says what is done."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_triton
from lstm_triton import convert

PEEPHOLES = [("diagonal", "previous"), ("diagonal", "current"), ("full", "previous"), ("full", "current")]
OPTIONS = [
    dict(),
    dict(num_layers=2, bidirectional=True),
    dict(proj_size=3, num_layers=2, bias=False),
]
VARIANTS = [dict(peephole=p, output_peephole=o, coupled=c) for p, o in PEEPHOLES for c in (False, True)]
VARIANTS += [dict(coupled=True)]


def results(layer, seed=7, **asked):
    """output, h_n, c_n (and cell states) for a fixed input, and by name the gradients of all parameters."""
    torch.manual_seed(seed)
    layer.zero_grad()
    x = torch.randn(9, 3, 5, dtype=next(layer.parameters()).dtype)
    output, (h_n, c_n), *cells = layer(x, **asked)
    torch.stack([t.square().sum() for t in (output, h_n, c_n, *cells)]).sum().backward()
    return [output.detach(), h_n.detach(), c_n.detach()], {n: p.grad.clone() for n, p in layer.named_parameters()}


def error(actual, expected):
    """The largest relative difference, by norm, of two lists of tensors."""
    pairs = zip(actual, expected, strict=True)
    return max(((a.double() - e.double()).norm() / e.double().norm()).item() for a, e in pairs)


# Peepholes of zero


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("peephole, output_peephole", PEEPHOLES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_peepholes_of_zero_compute_the_same(dtype, bound, peephole, output_peephole, options):
    layer = nn.LSTM(5, 8, dtype=dtype, **options)
    parameters = dict(layer.named_parameters())
    theirs, of_theirs = results(layer)
    same_engine, of_same_engine = results(convert.from_torch(copy.deepcopy(layer)), return_cell_states=True)
    assert convert.from_torch(layer, peephole=peephole, output_peephole=output_peephole) is layer
    assert type(layer) is lstm_triton.LSTM and layer.spec.peephole == peephole
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    found, of_found = results(layer)
    added = {name for name in of_found if name.startswith("weight_ch")}
    assert of_found.keys() == of_theirs.keys() | added and added
    assert all(not layer.get_parameter(name).any() and of_found[name].any() for name in added)
    assert error(found, theirs) <= bound  # PyTorch's operator sums in another order
    assert error([of_found[name] for name in of_theirs], of_theirs.values()) <= bound
    found, of_found = results(layer, return_cell_states=True)  # which the same engine computes in both variants
    assert all(map(torch.equal, found, same_engine))
    assert error([of_found[name] for name in of_theirs], of_same_engine.values()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_peepholes_of_zero_have_the_same_bits_in_16_bits(dtype):
    layer = nn.LSTM(5, 8, 2, bidirectional=True, dtype=dtype)
    expected, _ = results(convert.from_torch(copy.deepcopy(layer)))
    found, _ = results(convert.from_torch(layer, peephole="diagonal", output_peephole="current"))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_converted_layer_is_as_one_that_was_built(options, variant):
    layer, built = nn.LSTM(5, 8, **options), lstm_triton.LSTM(5, 8, **options, **variant)
    convert.from_torch(layer, **variant)
    assert type(layer) is type(built) and repr(layer) == repr(built) and vars(layer).keys() == vars(built).keys()
    assert list(layer.state_dict()) == list(built.state_dict())
    assert [tuple(p.shape) for p in layer.parameters()] == [tuple(p.shape) for p in built.parameters()]
    assert layer._flat_weights_names == built._flat_weights_names and layer._all_weights == built._all_weights
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter) if "weight_ch" in name else None
    built.load_state_dict(layer.state_dict())
    expected = results(built)[0]
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(map(torch.equal, results(one)[0], expected))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_cell_gets_the_variant(bias, variant):
    cell, built = nn.LSTMCell(5, 8, bias), lstm_triton.LSTMCell(5, 8, bias, **variant)
    x, old = torch.randn(3, 5), cell.weight_hh.detach().clone()
    expected = cell(x)
    convert.from_torch(cell, **variant)
    assert repr(cell) == repr(built) and cell._parameters.keys() == built._parameters.keys()
    assert torch.equal(cell.weight_hh, old[8:] if variant["coupled"] else old)
    built.load_state_dict(cell.state_dict())
    torch.testing.assert_close(cell(x), built(x), rtol=0, atol=0)
    assert torch.allclose(cell(x)[0], expected[0]) is not variant["coupled"]


def test_frozen_and_typed_parameters_stay_so_and_no_number_is_drawn():
    layer, state = nn.LSTM(5, 8, dtype=torch.bfloat16), torch.get_rng_state()
    layer.weight_ih_l0.requires_grad_(False)
    layer.eval()
    convert.from_torch(layer, peephole="full", coupled=True)
    assert torch.equal(torch.get_rng_state(), state) and not layer.training
    assert [p.requires_grad for p in layer.parameters()] == [False, True, True, True, True]
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    far = convert.from_torch(nn.LSTM(5, 8, device="meta"), peephole="diagonal")
    assert far.weight_ch_l0.is_meta and far(torch.empty(2, 3, 5, device="meta"))[0].shape == (2, 3, 8)


def test_an_optimizer_made_before_trains_peepholes_that_are_added_to_it():
    layer = nn.LSTM(5, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    results(layer)
    optimizer.step()
    momentum = optimizer.state[layer.weight_hh_l0]["momentum_buffer"]
    convert.from_torch(layer, peephole="diagonal")
    optimizer.add_param_group(dict(params=[layer.weight_ch_l0]))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    results(layer)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in layer.named_parameters())
    assert optimizer.state[layer.weight_hh_l0]["momentum_buffer"] is momentum


REPARAMETRIZED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "all weights": lambda m: [parametrizations.weight_norm(m, n) for n, p in [*m.named_parameters()] if p.dim() == 2],
    "pruning": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.4),
    "the older weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_computed_weights_get_peepholes_but_cannot_lose_a_gate(name):
    layer = nn.LSTM(5, 8, bias=False, dtype=torch.float64)
    REPARAMETRIZED[name](layer)
    layer.eval()
    parameters, expected = dict(layer.named_parameters()), results(layer)[0]
    words = rf"^the module \(LSTM\) has a weight_{'ih' if name == 'all weights' else 'hh'}_l0 that is computed, by"
    with pytest.raises(ValueError, match=words):
        convert.from_torch(layer, coupled=True)
    convert.from_torch(layer, peephole="diagonal")
    assert parametrize.type_before_parametrizations(layer) is lstm_triton.LSTM
    assert all(layer.get_parameter(n) is p for n, p in parameters.items())
    for _ in range(2):
        found, gradients = results(layer)
        assert error(found, expected) < 1e-14 and all(g.any() for g in gradients.values())
    if parametrize.is_parametrized(layer):  # the older ways keep the computed weight, which is never copied
        assert error(results(copy.deepcopy(layer))[0], expected) < 1e-14


# Coupled


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_coupled_keeps_the_blocks_of_the_other_gates(options):
    layer = nn.LSTM(5, 8, dtype=torch.float64, **options)
    old = {name: value.clone() for name, value in layer.state_dict().items()}
    parameters, expected = dict(layer.named_parameters()), results(layer)[0]
    convert.from_torch(layer, coupled=True)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, old[name] if "weight_hr" in name else old[name][8:])
        assert (layer.get_parameter(name) is parameters[name]) is ("weight_hr" in name)
    assert layer.spec.coupled and error(results(layer)[0], expected) > 1e-3
    # Input gates that are 1 - f, since 1 - s(a) = s(-a): the standard layer that computes what the coupled one does.
    negated = nn.LSTM(5, 8, dtype=torch.float64, **options)
    negated.load_state_dict({n: v if "weight_hr" in n else torch.cat([-v[8:16], v[8:]]) for n, v in old.items()})
    assert error(results(layer)[0], results(negated)[0]) < 1e-14


def test_tied_weights_stay_tied_when_they_lose_a_gate():
    model = nn.ModuleList([nn.LSTM(8, 8), nn.LSTM(8, 8), nn.LSTMCell(8, 8)])
    model[0].weight_ih_l0 = model[0].weight_hh_l0
    model[1].weight_hh_l0 = model[2].weight_hh = model[0].weight_hh_l0
    convert.from_torch(model, coupled=True)
    assert model[0].weight_ih_l0 is model[0].weight_hh_l0 is model[1].weight_hh_l0 is model[2].weight_hh
    assert tuple(model[0].weight_hh_l0.shape) == (24, 8)
    output, _ = model[0](torch.randn(2, 3, 8))
    assert output.shape == (2, 3, 8)


def test_a_weight_shared_with_another_module_cannot_lose_a_gate():
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "head": nn.Linear(8, 32)})
    model["head"].weight = model["lstm"].weight_hh_l0
    with pytest.raises(ValueError, match=r"^lstm \(LSTM\) shares weight_hh_l0 with head.weight, which would not"):
        convert.from_torch(model, coupled=True)
    assert type(model["lstm"]) is nn.LSTM
    convert.from_torch(model, peephole="diagonal")
    assert model["head"].weight is model["lstm"].weight_hh_l0


# Errors and the report


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(peephole="round"), ValueError, "peephole must be None, 'diagonal' or 'full', got 'round'"),
        (dict(output_peephole="current"), ValueError, "output_peephole='current' needs a peephole"),
        (dict(coupled=1), TypeError, "coupled should be of type bool"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [convert.from_torch, convert.report])
def test_a_variant_that_there_is_not_is_refused(function, options, error, words):
    layer = nn.LSTM(5, 8)
    with pytest.raises(error, match=words):
        function(layer, **options)
    assert type(layer) is nn.LSTM


def test_complex_types_have_the_standard_variant_only():
    layer = nn.LSTM(5, 8, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"weight_ih_l0 of torch.complex64, in which only the standard variant is"):
        convert.from_torch(layer, peephole="diagonal")
    assert type(convert.from_torch(layer)) is lstm_triton.LSTM


def test_an_attribute_with_the_name_of_a_new_parameter_is_refused():
    layer = nn.LSTM(5, 8)
    layer.weight_ch_l0 = "mine"
    with pytest.raises(ValueError, match=r"uses itself: rename weight_ch_l0$"):
        convert.from_torch(layer, peephole="diagonal")
    assert layer.weight_ch_l0 == "mine" and type(convert.from_torch(layer)) is lstm_triton.LSTM


class Own(nn.LSTM):
    pass


def zoo():
    """A model with layers of every outcome."""
    model = nn.ModuleDict(
        dict(
            encoder=nn.LSTM(5, 8, 2), cell=nn.LSTMCell(5, 8), own=Own(5, 8), gru=nn.GRU(5, 8), rnn=nn.RNNCell(5, 8),
            ours=lstm_triton.CoupledLSTM(5, 8), linear=nn.Linear(5, 8), patched=nn.LSTM(5, 8),
            quantizable=torch.ao.nn.quantizable.LSTMCell(5, 8),
        )
    )  # fmt: skip
    model["scripted"] = torch.jit.script(nn.LSTM(5, 8))
    model["again"] = model["encoder"]
    model["patched"].forward = lambda input, hx=None: (input, hx)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_the_report_says_what_becomes_of_each_layer_and_changes_nothing():
    model = zoo()
    before = [(type(m), [n for n, _ in m.named_parameters()]) for m in model.modules()]
    convert.report(model, coupled=True)
    report = convert.report(model, peephole="diagonal", output_peephole="current")
    assert [(type(m), [n for n, _ in m.named_parameters()]) for m in model.modules()] == before
    entries = {entry.path: entry for entry in report.entries}
    assert list(entries) == ["encoder", "cell", "own", "gru", "rnn", "ours", "patched", "quantizable", "scripted"]
    assert {path: (entry.outcome, entry.cls) for path, entry in entries.items() if path not in ("own", "scripted")} == {
        "encoder": ("convert", "torch.nn.LSTM"),
        "cell": ("convert", "torch.nn.LSTMCell"),
        "gru": ("leave", "torch.nn.GRU"),
        "rnn": ("leave", "torch.nn.RNNCell"),
        "ours": ("leave", "lstm_triton.CoupledLSTM"),
        "patched": ("refuse", "torch.nn.LSTM"),
        "quantizable": ("leave", "torch.ao.nn.quantizable.modules.rnn.LSTMCell"),
    }
    assert entries["encoder"].reason == "computes the same function; new: weight_ch_l0, weight_ch_l1 of zeros"
    assert entries["cell"].reason == "computes the same function; new: weight_ch of zeros"
    assert entries["own"].reason == "a subclass, which may compute something else"
    assert entries["gru"].reason == entries["rnn"].reason == "not an LSTM"
    assert entries["ours"].reason == "of lstm_triton already, variant 'coupled'"
    assert entries["quantizable"].reason == "a class of its own, for quantization"
    assert entries["scripted"].reason == "scripted from a class LSTM: its program is fixed"
    assert entries["patched"].reason.startswith("has a forward that was set on the instance")
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(entries) and lines[0].split() == ["layer", "class", "outcome", "reason"]
    assert lines[1].split()[:3] == ["encoder", "torch.nn.LSTM", "convert"]
    assert lines[-1] == "2 to convert, 6 left as they are, 1 refused"
    with pytest.raises(ValueError, match=r"^patched \(LSTM\) has a forward that was set on the instance"):
        report.apply()
    assert type(model["encoder"]) is nn.LSTM
    del model["patched"].forward
    report = convert.report(model, peephole="diagonal", output_peephole="current")
    assert report.apply() is model
    assert type(model["encoder"]) is type(model["patched"]) is lstm_triton.LSTM and model["again"] is model["encoder"]
    assert type(model["own"]) is Own and type(model["gru"]) is nn.GRU


def test_a_report_of_coupled_gates_says_that_the_outputs_change():
    report = convert.report(nn.LSTM(5, 8), coupled=True, peephole="full")
    words = (
        "the outputs change: the input gate's weights are dropped, i = 1 - f; new parameters, and weight_ch_l0 of zeros"
    )
    assert report.entries == (("", "torch.nn.LSTM", "convert", words),)
    assert str(report).splitlines()[1].startswith("(the model)")
    assert convert.report(nn.LSTM(5, 8)).entries[0].reason == "computes the same"
    assert convert.report(nn.Linear(2, 2)).entries == ()


def test_a_report_is_applied_once_and_to_what_it_was_made_of():
    layer = nn.LSTM(5, 8)
    report = convert.report(layer, peephole="diagonal")
    report.apply()
    with pytest.raises(RuntimeError, match=r"^the module is no torch.nn.LSTM any more"):
        report.apply()
    model = nn.ModuleList([nn.LSTM(5, 8)])
    report = convert.report(model)
    model[0] = nn.GRU(5, 8)
    with pytest.raises(RuntimeError, match=r"^0 is no torch.nn.LSTM any more"):
        report.apply()
