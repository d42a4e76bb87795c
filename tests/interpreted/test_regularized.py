"""Regularised steps by the interpreted kernels, against the float64 reference with the same masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec
from tests.support.parity import MASKS, RULES, Case, assert_parity, call, random_inputs, regularized_cases
from tests.support.persistent import LayerCase, concurrently, plan_of
from tests.support.persistent import assert_right as assert_layer_right

# An odd number of cases for each variant, every second one by each strategy: so each meets both, in other variants.
CASES = [case for spec in VARIANTS for case in regularized_cases(spec)]
STEPWISE = [replace(case, strategy="stepwise") for case in CASES[::2]]
PERSISTENT = [replace(case, strategy="persistent", dtype=torch.float32) for case in CASES[1::2]]


@pytest.mark.parametrize("case", STEPWISE, ids=str)
def test_step_by_step(case):
    assert_parity(case, "triton")


@pytest.mark.parametrize("case", PERSISTENT, ids=str)
def test_in_one_launch(case):
    assert_parity(case, "triton")


FULL = LSTMSpec(True, "full", "current")
CLIPPED = RULES[3]._replace(proj_clip=0.25)
ALONE = [
    LayerCase(spec, plan_of(B, H, D, wait=None), T, B, H, P=P, rules=rules, **options)
    for spec in (VARIANTS[0], LSTMSpec(False, "diagonal", "current"), FULL)
    for T, B, H, P, D, rules, options in (
        (4, 19, 11, 0, 2, RULES[3], dict(lengths=True, resets=True)),
        (3, 5, 9, 4, 1, CLIPPED, dict(recompute=True)),
        (4, 3, 7, 0, 2, RULES[4], dict(training=False, resets=True)),
    )
]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_program_with_all_units(case):
    assert_layer_right(case)


# Two row blocks in one program; both directions with two programs of rows; one row block.
CUTS = {
    "in turn": (3, 9, 19, 1, dict(rows=5, row_programs=1, parts=8)),
    "apart": (3, 20, 13, 2, dict(row_programs=2)),
    "one": (4, 3, 13, 1, {}),
}
WAITING = [
    LayerCase(spec, plan_of(B, H, D, wait=wait, **cut), T, B, H, P=P, rules=rules, **options)
    for spec, P, wait, rules, name, options in (
        (VARIANTS[0], 0, "data", RULES[3], "in turn", dict(lengths=True, resets=True)),
        (VARIANTS[0], 7, "counter", CLIPPED, "in turn", dict(resets=True)),
        (VARIANTS[0], 0, "counter", RULES[4], "apart", dict(lengths=True)),
        (VARIANTS[0], 0, "data", RULES[3], "one", dict(recompute=True)),
        (LSTMSpec(True, "diagonal", "current"), 0, "data", RULES[4], "in turn", dict(lengths=True)),
        (LSTMSpec(False, "full"), 0, "counter", RULES[3], "in turn", dict(resets=True)),
        (LSTMSpec(False, "full"), 9, "data", CLIPPED, "one", dict(lengths=True)),
        (FULL, 0, "data", RULES[3], "in turn", dict(lengths=True, resets=True)),
        (FULL, 0, "counter", RULES[4], "one", dict(lengths=True, resets=True)),
        (FULL, 7, "data", RULES[2], "in turn", dict(training=False, resets=True)),
    )
    for T, B, H, D, cut in (CUTS[name],)
]


@pytest.mark.parametrize("case", WAITING, ids=str)
def test_programs_that_wait_for_each_other(case):
    assert_layer_right(case, concurrently(delay=1e-4))


@pytest.mark.parametrize("rules", [RULES[3], RULES[4], CLIPPED], ids=str)
def test_gradients_match_finite_differences(rules):
    """Step by step, along random directions."""
    case = Case(FULL, T=3, B=2, I=2, H=4, proj_size=3 * (rules.proj_clip > 0), rules=rules, strategy="stepwise")
    inputs = tuple(random_inputs(case).values())

    def function(*tensors):
        torch.manual_seed(MASKS)
        return call(case, *tensors)

    with lstm_triton.backend("triton"):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
def test_what_is_not_carried_is_not_kept(strategy):
    """A NaN before a reset, or in another row, does not come through zoneout, forward or backward."""
    lstm = lstm_triton.LSTM(3, 5, zoneout=(1.0, 1.0), strategy=strategy, bidirectional=False)
    x = torch.randn(4, 2, 3)
    x[0, 0, 0] = float("nan")
    x.requires_grad_()
    resets = torch.tensor([[False, False], [False, False], [True, False], [False, False]])
    with lstm_triton.backend("triton"):
        output, (h_n, c_n) = lstm(x, resets=resets)
        output[2:].sum().backward()
    assert not output.isnan()[2:].any() and h_n.isfinite().all() and c_n.isfinite().all()
    assert torch.equal(output[:2], torch.zeros_like(output[:2]))


@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
def test_all_is_dropped_or_kept(strategy):
    """Probabilities of 1 are ones that a mask of 32 bits has."""
    case = Case(VARIANTS[0], T=3, B=2, I=3, H=5, dtype=torch.float32, strategy=strategy)
    rules = RULES[0]._replace(hidden_dropout=1.0), RULES[1]._replace(candidate_dropout=1.0)
    for own in (*rules, RULES[2]._replace(zoneout_h=1.0)):
        assert_parity(replace(case, rules=own), "triton")
