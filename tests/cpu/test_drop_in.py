"""A script with the import replaced: 500 random ones do the same with `lstm_triton` as with `torch.nn`.

What a script may do, the script, and the comparison are in `tests.support.drop_in`.
"""

import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lstm_triton
from lstm_triton import checks
from lstm_triton.layout import Layout
from tests.support.drop_in import (
    FAULTS,
    OPTIONS,
    OUTCOMES,
    REFUSED,
    Configuration,
    differences,
    every_option,
    outcomes,
    possible_forms,
    script,
)


@st.composite
def arguments(draw):
    """The arguments of the constructor."""
    H = draw(st.integers(1, 7))
    return dict(
        input_size=draw(st.integers(1, 6)),
        hidden_size=H,
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3, 1, 0.9])),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.one_of(st.just(0), st.integers(0, H - 1))),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


def plain_or(name, choices):
    """The plain value in most cases, so that a configuration has a few unusual options, and gradients."""
    return st.sampled_from([choices[0]] * (2 if name in ("frozen", "under") else 1) * len(choices) + choices)


def some(names):
    """None of them, one or two."""
    return st.one_of(
        st.just(()),
        st.sampled_from(names).map(lambda name: (name,)),
        st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True).map(tuple),
    )


@st.composite
def configurations(draw):
    given = draw(arguments())
    options = {name: draw(plain_or(name, choices)) for name, choices in OPTIONS.items() if name != "form"}
    faults = draw(some(list(FAULTS)))
    form = draw(st.sampled_from(possible_forms(faults)))
    lengths = ()
    if form.startswith("packed"):
        lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
        if faults and len(set(lengths)) == 1:
            # oneDNN computes these, without a look at sizes: from whatever lies beyond the tensors
            lengths.append(lengths[0] % 6 + 1)
        lengths = tuple(sorted(lengths, reverse=True) if form == "packed in order" else lengths)
    return Configuration(
        given,
        T=max(lengths) if lengths else draw(st.integers(1, 6)),
        B=len(lengths) if lengths else 1 if form == "unbatched" else draw(st.sampled_from([1, 2, 3, 4, 0])),
        lengths=lengths,
        refused=draw(some(list(REFUSED))),
        faults=faults,
        form=form,
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


def compare(configuration, operator=True):
    """Asserts that the script does the same with both imports; returns what was seen."""
    expected = script(torch.nn, configuration)
    assert not configuration.refused or expected["refused construction: error"], "a fault that torch.nn does not refuse"
    assert not configuration.faults or expected["refused call: error"], "a fault that torch.nn does not refuse"
    found = differences(configuration, expected, script(lstm_triton, configuration), operator)
    assert not found, "\n".join(found)
    return expected


def within_our_steps(c):
    """The script without the two things that the steps of this library do in another way than PyTorch's.

    They keep the output for the backward pass, as oneDNN and cuDNN do, so it may not be changed in place; PyTorch's own
    steps in float64 keep something else. And c_n of a single step carries a gradient, of zero, to weight_hr.
    """
    projection_alone = c.frozen == "all but the last parameter" and c.arguments["proj_size"]
    return replace(c, changed="nothing", frozen="nothing" if projection_alone and c.T == 1 else c.frozen)


def compare_many(examples, operator=True, **options):
    """Compares that many random scripts: how often each option, fault and outcome was among them."""
    seen = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, **options)
    @given(configurations())
    def run(configuration):
        c = configuration if operator else within_our_steps(configuration)
        seen.update(outcomes(compare(c, operator)) | c.options() | {*c.refused, *c.faults})

    run()
    return seen


def test_a_script_does_the_same_with_the_import_replaced():
    seen = compare_many(500)
    missing = every_option() - seen.keys()
    assert not missing
    missing = OUTCOMES.keys() - seen.keys()
    assert not missing
    assert seen["gradients"] > 200
    missing = (REFUSED | FAULTS).keys() - seen.keys()
    assert len(missing) < 10  # each has a test of its own below


ARGUMENTS = [
    dict(num_layers=1, bidirectional=False, proj_size=0, dtype=torch.float32),
    dict(num_layers=3, bidirectional=False, proj_size=2, dtype=torch.float64),
    dict(num_layers=1, bidirectional=True, proj_size=0, dtype=torch.float32, batch_first=True),
]


def configuration(arguments, form="padded", **options):
    """The plain script with those arguments, which are not all of them."""
    rest = dict(input_size=3, hidden_size=4, bias=True, batch_first=False, dropout=0.5)
    lengths = {"packed": (2, 4, 1), "packed in order": (4, 2, 1)}.get(form, ())
    return Configuration(
        rest | arguments, T=4, B=1 if form == "unbatched" else 3, lengths=lengths, form=form, **options
    )


@pytest.mark.parametrize("fault", REFUSED)
def test_a_constructor_refuses(fault):
    for arguments in ARGUMENTS:
        compare(configuration(arguments, refused=(fault,)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_refuses(fault):
    for arguments in ARGUMENTS:
        for form in possible_forms([fault]):
            compare(configuration(arguments, form, faults=(fault,)))


def test_the_steps_of_this_library_do_the_same():
    """PyTorch's operator, which else serves the standard variant on the CPU, put aside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lstm_triton.routing, "why_not_operator", lambda *_: "put aside")
        seen = compare_many(100, operator=False)
    assert seen["gradients"] > 40


def another_order(patch):
    patch.setattr(Layout, "user_state", lambda layout, state: state if layout.batched else state.squeeze(1))


def another_seed(patch):
    def drawing(*arguments):
        if arguments[4].dropout > 0:
            torch.rand(1)
        return forward(*arguments)

    forward = lstm_triton.aten.lstm
    patch.setattr(lstm_triton.aten, "lstm", drawing)


def another_warning(patch):
    module = SimpleNamespace(warn=lambda text, **options: warnings.warn(text.replace("adds", "puts"), **options))
    patch.setattr(checks, "warnings", module)


def another_message(patch):
    def refuse(T):
        if T == 0:
            raise RuntimeError("no steps")

    patch.setattr(checks, "sequence_length", refuse)


def another_layout(patch):
    def contiguous(layout, sequence):
        result = user(layout, sequence)
        return result if layout.packed is not None else result.contiguous()

    user = Layout.user_sequence
    patch.setattr(Layout, "user_sequence", contiguous)


def another_gradient(patch):
    def wrong(x, h_0, c_0, weights, options):
        scaled = [w + 1e-4 * (w - w.detach()) for w in weights]  # the same values, other gradients
        return forward(x, h_0, c_0, scaled, options)

    forward = lstm_triton.aten.lstm
    patch.setattr(lstm_triton.aten, "lstm", wrong)


PLANTED = {
    another_order: "call: h_n: relative error",
    another_seed: "random numbers after the call: relative error",
    another_warning: "construction: warnings: .*puts.*, expected .*adds",
    another_message: "refused call: error: .*no steps.*, expected .*Expected sequence length",
    another_layout: "call: output: strides",
    another_gradient: "gradient of weight_[a-z]+_l0: relative error 1.0e-04",
}
"""A fault of this library, and what the comparison says of it."""


@pytest.mark.parametrize("fault, found", PLANTED.items(), ids=[fault.__name__ for fault in PLANTED])
def test_a_planted_fault_is_seen(fault, found):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match=found):
        fault(patch)
        compare_many(500, phases=[Phase.generate], report_multiple_bugs=False)
