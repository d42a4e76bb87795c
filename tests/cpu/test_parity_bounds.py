"""Without a GPU: what the tests on a GPU allow; here PyTorch's own LSTM of the CPU stands where cuDNN's does there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lstm_triton import LSTMSpec
from tests.support import gpu
from tests.support.gpu import FLOOR, TIMES_CUDNN, assert_as_near_as_cudnn, bounds, pooled, pooled_errors, seeds_of
from tests.support.parity import Case, call, call_reference, errors, expected_results, random_inputs, results
from tests.support.rounding import RoundedOperands, operand_rounding, rounded_results, to_tf32

STANDARD, FULL = LSTMSpec(), LSTMSpec(peephole="full")
SMALL = Case(STANDARD, T=3, B=3, I=5, H=7, dtype=torch.float32)


@pytest.fixture(autouse=True)
def nothing_known_before():
    """What is kept from one test to the next may come of what another test has replaced."""
    for kept in (gpu._errors_of_cudnn, gpu._errors_of_rounding, gpu._errors_of_operators, gpu.known):
        kept.cache_clear()


@pytest.fixture
def precision(request):
    """PyTorch's switch for float32 products, which a CPU ignores."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


tf32 = pytest.mark.parametrize("precision", ["tf32"], indirect=True)
both = pytest.mark.parametrize("precision", ["tf32", "ieee"], indirect=True)


# Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "value, nearest",
    [
        (0.0, 0.0),
        (1 + 2**-10, 1 + 2**-10),
        (1 + 2**-11, 1 + 2**-10),
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 - 2**-23, 1.0),
        (1 + 2**-12, 1.0),
        (2 - 2**-12, 2.0),
        (2**-30 * (1 + 2**-11), 2**-30 * (1 + 2**-10)),
        (math.inf, math.inf),
    ],
)
def test_tf32_is_the_nearest_and_of_two_as_near_the_one_away_from_zero(value, nearest, dtype):
    for sign in (1, -1):
        found = to_tf32(torch.tensor([sign * value], dtype=dtype))
        assert found.dtype == dtype and found.item() == sign * nearest


def test_tf32_keeps_nan_whatever_its_bits():
    """Of NaN with the lowest bits, cut off, infinity would remain; of that with all, rounded up, a zero."""
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32)
    assert to_tf32(bits.view(torch.float32)).isnan().all()


def test_operands_have_the_bits_of_the_type():
    x = torch.randn(1000, dtype=torch.float64)
    units = {("float16", "ieee"): 11, ("bfloat16", "tf32"): 8, ("float32", "tf32"): 11, ("float32", "ieee"): 24}
    for (dtype, precision), digits in units.items():
        rounded = operand_rounding(getattr(torch, dtype), precision)(x)
        error = ((rounded - x) / x).abs().max()
        assert rounded.dtype == torch.float64 and 2.0 ** -(digits + 1) < error <= 2.0**-digits
    assert torch.equal(operand_rounding(torch.float64, "tf32")(x), x)


@pytest.mark.parametrize("bias", [True, False])
def test_operands_are_rounded_in_both_passes_and_nothing_else_is(bias):
    """A linear map: the result, and both gradients, by hand."""
    x, w, b, grad = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 5), (3, 5), (3,), (4, 3)))
    leaves = [x.requires_grad_(), w.requires_grad_()]
    with RoundedOperands(to_tf32) as mode:
        y = torch.nn.functional.linear(x, w, b if bias else None)
        assert mode.products == 1
        dx, dw = torch.autograd.grad(y, leaves, grad)
        assert mode.products == 3
    x, w = x.detach(), w.detach()
    assert torch.equal(y.detach(), to_tf32(x) @ to_tf32(w).T + (b if bias else 0))
    torch.testing.assert_close(dx, to_tf32(grad) @ to_tf32(w), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dw, to_tf32(grad).T @ to_tf32(x), rtol=1e-14, atol=1e-14)
    assert not torch.allclose(dx, grad @ w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("product", ["mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"])
def test_every_product_rounds_its_operands(product):
    a, b = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    if "b" in product:
        a, b = a[None], b[None]
    if "v" in product:
        b = b[0]
    if product == "dot":
        a, b = a[0], b[0]
    first = [torch.randn_like(b)] if "add" in product else []
    with RoundedOperands(to_tf32):
        found = getattr(torch, product)(*first, a, b)
    assert torch.equal(found, getattr(torch, product)(*first, to_tf32(a), to_tf32(b)))
    assert not torch.equal(found, getattr(torch, product)(*first, a, b))


@pytest.mark.parametrize("spec, products", [(STANDARD, 2), (LSTMSpec(peephole="diagonal"), 2), (FULL, 5)])
def test_the_products_of_a_variant(spec, products):
    """Each step has those of x and h, and with full peepholes one of c for each gate; each has two gradients."""
    case = replace(SMALL, spec=spec, dtype=torch.float64)
    with RoundedOperands(lambda x: x) as mode:
        expected_results(case, random_inputs(case))
    assert mode.products == 3 * products * case.T


def test_results_are_in_the_type_and_float64_errs_by_nothing():
    for dtype in FLOOR:
        case = replace(SMALL, spec=FULL, dtype=dtype, lengths=True, resets=True, states=True)
        inputs = random_inputs(case)
        found, expected = rounded_results(case, inputs, "ieee"), expected_results(case, inputs)
        assert all(result.dtype == dtype for result in found.values())
        of_rounding = errors(found, expected)
        assert (max(of_rounding.values()) == 0) == (dtype == torch.float64)
        assert max(of_rounding.values()) < {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-6)


# Pooling


def test_pooled_errors_are_the_root_of_the_ratio_of_the_sums_of_squares():
    def tensors(*values):
        return {"a": torch.tensor(values, dtype=torch.float64), "empty": torch.empty(0, dtype=torch.float64)}

    pairs = [(tensors(3.0, 5.0), tensors(3.0, 4.0)), (tensors(2.0, 12.0), tensors(0.0, 12.0))]
    assert pooled(iter(pairs)) == pytest.approx({"a": math.sqrt((1 + 4) / (25 + 144)), "empty": 0.0}, rel=1e-14)
    with pytest.raises(AssertionError):
        pooled([(tensors(1.0), {"other": torch.ones(1)})])


def test_a_result_that_is_not_a_number_is_no_small_error():
    expected = {"a": torch.ones(2, dtype=torch.float64)}
    assert not pooled([({"a": torch.tensor([1.0, math.nan])}, expected)])["a"] <= 1


@pytest.mark.parametrize(
    "seeds, sizes",
    [
        (25, dict(T=8, B=3, I=5, H=7)),
        (64, dict(T=2, B=3, I=5, H=1, bias=False)),
        (4, dict(T=2, B=1, I=300, H=130)),
        (3, dict(T=5, B=6, I=40, H=48, layout="expanded")),
        (1, dict(T=2, B=16, I=16, H=128)),
        (2, dict(T=2, B=16, I=32, H=127)),
    ],
)
def test_inputs_of_as_many_seeds_as_it_takes(seeds, sizes):
    """The smallest results: h_n; h_n; h_n; the gradient of a row that all share; 512 of a bias; 508 of a bias."""
    assert seeds_of(Case(STANDARD, dtype=torch.float32, strategy="stepwise", **sizes)) == seeds


def test_all_errors_are_of_the_same_seeds(monkeypatch):
    """Those of the kernels, and of each that the bounds are made of."""
    asked = []
    pooled_errors = gpu.pooled_errors
    monkeypatch.setattr(gpu, "MOST_SEEDS", 3)
    monkeypatch.setattr(gpu, "pooled_errors", lambda *of: asked.append(of[2]) or pooled_errors(*of))
    assert_as_near_as_cudnn(replace(SMALL, spec=FULL), call)
    assert asked == [3, 3, 3, 3]


# Bounds


@both
def test_each_bound_is_1_5_times_the_largest_that_others_err_by(precision):
    case = replace(SMALL, spec=FULL, T=7, B=12, I=40, H=128, states=True, lengths=True)
    standard = replace(case, spec=STANDARD, states=False, lengths=False)
    inputs = random_inputs(case)
    expected = expected_results(case, inputs)
    others = [errors(rounded_results(case, inputs, precision), expected),
              errors(results(case, inputs, call_reference), expected)]  # fmt: skip
    inputs = random_inputs(standard)
    others.append(errors(results(standard, inputs, gpu.cudnn), expected_results(standard, inputs)))
    assert seeds_of(case) == 1
    found = bounds(case)
    assert set(found) == set(expected) >= {"states", "grad weight_ch_l0"}
    floor = FLOOR[torch.float32]
    wanted = {name: max(1.5 * max(of.get(name, 0) for of in others), floor) for name in expected}
    assert found == pytest.approx(wanted, rel=1e-6) and TIMES_CUDNN == 1.5
    assert (min(found.values()) > 10 * floor) == (precision == "tf32")


def test_pytorchs_operators_and_cudnn_count(monkeypatch):
    """Where they err more than rounding does; the operators, in float32 only and not for what cuDNN has itself."""

    def coarse(case, *tensors):
        return tuple(result * (1 + 0.1) for result in call_reference(case, *tensors))

    def largest(spec, dtype):
        nothing_kept()
        return max(bounds(replace(SMALL, spec=spec, dtype=dtype)).values())

    def nothing_kept():
        for kept in (gpu._errors_of_cudnn, gpu._errors_of_operators):
            kept.cache_clear()

    monkeypatch.setattr(gpu, "MOST_SEEDS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "call_reference", coarse)
        assert largest(FULL, torch.float32) == pytest.approx(0.15, rel=1e-3)
        assert largest(STANDARD, torch.float32) < 1e-4 and largest(FULL, torch.float16) < 0.02
    monkeypatch.setattr(gpu, "cudnn", coarse)
    assert all(largest(spec, torch.float32) == pytest.approx(0.15, rel=1e-3) for spec in (STANDARD, FULL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_in_half_types_what_cudnn_does_not_have_may_err_by_what_it_has_like_it(dtype, monkeypatch):
    """In float32, PyTorch's own operators have it."""
    case = replace(SMALL, spec=LSTMSpec(peephole="diagonal"), dtype=dtype, L=2, bidirectional=True, states=True)
    of_cudnn = {"grad weight_hh_l1_reverse": 0.1, "grad weight_hh_l0": 0.2, "c_n": 0.3}
    monkeypatch.setattr(gpu, "_errors_of_cudnn", lambda *_: of_cudnn)
    found = {name: bound for name, bound in bounds(case).items() if bound > 0.1}
    like = {"grad weight_ch_l1_reverse": 0.15, "grad weight_ch_l0": 0.3, "states": 0.45}
    wanted = {name: 1.5 * error for name, error in of_cudnn.items()} | (like if dtype == torch.float16 else {})
    assert found == pytest.approx(wanted)


def test_a_bound_that_is_infinite_is_none(monkeypatch):
    monkeypatch.setattr(gpu, "cudnn", lambda case, *of: tuple(r * math.inf for r in call_reference(case, *of)))
    with pytest.raises(AssertionError):
        bounds(SMALL)


# What is admitted, and what is refused


def in_float32(case, *tensors):
    """The case computed in float32, and each output stored in its type."""
    return tuple(result.to(case.dtype) for result in call_reference(case, *(tensor.float() for tensor in tensors)))


def wrong_gradient(name, times):
    """A function that is `in_float32` but for one gradient."""

    def function(case, *tensors):
        named = dict(zip(random_inputs(case), tensors, strict=True))
        more = named[name] * (times - 1)
        named[name] = named[name] + (more - more.detach())
        return in_float32(case, *named.values())

    return function


CASES = [
    replace(SMALL, spec=spec, dtype=dtype, **options)
    for spec in (STANDARD, LSTMSpec(coupled=True), LSTMSpec(peephole="diagonal"), FULL)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for options in ({}, dict(bias=False, lengths=True, resets=True, states=True), dict(cell=True))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_right_is_admitted_and_a_gradient_wrong_by_five_percent_is_not(case):
    assert_as_near_as_cudnn(case, in_float32)
    for name in ("x", "h_0", next(name for name in case.parameter_names() if name.startswith("weight_hh"))):
        with pytest.raises(AssertionError, match=rf"\(error, allowed\) {{'grad {name}': [^:]*}}"):
            assert_as_near_as_cudnn(case, wrong_gradient(name, 1.05))


@both
def test_who_rounds_as_tf32_does_is_admitted_where_the_switch_asks_for_tf32(precision):
    """Though PyTorch's LSTM of the CPU does not round, as cuDNN's does not where sizes are not multiples of 4."""

    def function(case, *tensors):
        with RoundedOperands(to_tf32):
            return call_reference(case, *tensors)

    case = replace(SMALL, T=5, B=12, I=33, H=50)
    assert max(pooled_errors(case, lambda case, inputs: results(case, inputs, gpu.cudnn), 1).values()) < 1e-5
    if precision == "tf32":
        assert_as_near_as_cudnn(case, function)
    else:
        with pytest.raises(AssertionError, match="output"):
            assert_as_near_as_cudnn(case, function)


@tf32
def test_who_cuts_operands_off_instead_of_rounding_is_refused(precision):
    """By so much that 1.5 times the error of rounding tells them apart."""
    case = replace(SMALL, T=5, B=12, I=33, H=50)

    def cut(x):
        return (x.float().view(torch.int32) & -(1 << 13)).view(torch.float32).to(x.dtype)

    def function(case, *tensors):
        with RoundedOperands(cut):
            return call_reference(case, *tensors)

    with pytest.raises(AssertionError, match="output"):
        assert_as_near_as_cudnn(case, function)


def test_gates_are_rounded_where_they_are_stored():
    """The gates and what comes back through them, but nothing else: 1/3 is no float16."""
    x = torch.tensor([1 / 3], dtype=torch.float64, requires_grad=True)
    half = operand_rounding(torch.float16, "ieee")
    for activation in (torch.sigmoid, torch.tanh):
        with RoundedOperands(half, stored_gates=True):
            gate = activation(x)
            (gradient,) = torch.autograd.grad(gate, x)
        assert gate.item() == half(activation(x.detach())).item() != activation(x.detach()).item()
        assert gradient.item() == half(gradient).item()
        with RoundedOperands(half):
            assert activation(x).item() == activation(x.detach()).item()


def test_in_half_types_gradients_may_err_by_what_stored_gates_are_rounded(monkeypatch):
    case = replace(SMALL, spec=FULL, dtype=torch.bfloat16)
    plain = bounds(case)
    errors_of_rounding = gpu._errors_of_rounding

    def larger(case, precision, seeds, stored_gates=False):
        found = errors_of_rounding(case, precision, seeds, stored_gates)
        return {name: 1.0 for name in found} if stored_gates else found

    monkeypatch.setattr(gpu, "_errors_of_rounding", larger)
    for name, bound in bounds(case).items():
        assert bound == (TIMES_CUDNN if name.startswith("grad") else plain[name]), name


@pytest.mark.parametrize("name", ["grad weight_hh_l0", "grad bias_ih_l0"])
def test_a_gradient_of_a_parameter_is_a_sum_of_as_many_terms_as_there_are_steps_of_rows(name):
    long = replace(SMALL, T=64, B=256)
    assert gpu.floor(long, name) == 2**-24 * 128 > FLOOR[torch.float32]
    assert gpu.floor(SMALL, name) == gpu.floor(long, "grad x") == gpu.floor(long, "output") == FLOOR[torch.float32]
    assert gpu.floor(replace(long, dtype=torch.bfloat16), name) == FLOOR[torch.bfloat16]
