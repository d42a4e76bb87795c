"""Regularised steps by the interpreted kernels, against the float64 reference with the same masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec
from tests.support.parity import RULES, Case, assert_parity, regularized_cases
from tests.support.persistent import LayerCase, concurrently, plan_of
from tests.support.persistent import assert_right as assert_layer_right

STEPWISE = [replace(case, strategy="stepwise") for spec in VARIANTS for case in regularized_cases(spec)]


@pytest.mark.parametrize("case", STEPWISE, ids=str)
def test_step_by_step(case):
    assert_parity(case, "triton")


PERSISTENT = [
    replace(case, strategy="persistent", dtype=torch.float32) for spec in VARIANTS for case in regularized_cases(spec)
]


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


WAITING = [
    LayerCase(spec, plan_of(B, H, D, wait=wait, **cut), T, B, H, P=P, rules=rules, **options)
    for spec, P in ((VARIANTS[0], 0), (LSTMSpec(False, "full"), 0), (FULL, 7), (LSTMSpec(False, "diagonal"), 9))
    for wait in ("counter", "data")
    for T, B, H, D, cut, rules, options in (
        # two row blocks in one program
        (4, 9, 19, 1, dict(rows=5, row_programs=1, parts=8), RULES[3], dict(lengths=True, resets=True)),
        # both directions, two programs of rows
        (3, 20, 13, 2, dict(row_programs=2), RULES[4], dict(lengths=True)),
        (3, 9, 13, 1, dict(rows=5, row_programs=1), RULES[2], dict(training=False, resets=True)),
    )
]
WAITING += [
    LayerCase(spec, plan_of(5, 13, wait=wait, **cut), 4, 5, 13, P=6, rules=CLIPPED, resets=True)
    for spec, wait, cut in (
        (VARIANTS[0], "data", dict(rows=3, row_programs=1)),
        (FULL, "counter", dict(rows=3, row_programs=1)),
        (FULL, "data", {}),
    )
]


@pytest.mark.parametrize("case", WAITING, ids=str)
def test_programs_that_wait_for_each_other(case):
    assert_layer_right(case, concurrently(delay=1e-4))


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
