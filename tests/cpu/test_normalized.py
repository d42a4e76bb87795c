"""Layer normalisation: its equations, the `torch` backend, what recomputing keeps, and who computes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels import tensor_core_plan
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import NORMALIZED, LSTMWeights
from torch import nn

import lstm_triton
from lstm_triton import LSTMSpec, functional, normalized, reference, routing
from tests.support import parity
from tests.support.parity import Case, assert_parity, call, errors, random_inputs, results

CASES = [case for spec in NORMALIZED for case in (*parity.odd_cases(spec), *parity.regularized_cases(spec)[3::3])]
FULL_CURRENT = LSTMSpec(True, "full", "current", layer_norm=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend_matches_the_reference(case):
    assert_parity(case, "torch")


class Modules(nn.Module):
    """One step from PyTorch's modules, for one variant without peephole or a diagonal one."""

    def __init__(self, spec: LSTMSpec, I: int, H: int) -> None:  # noqa: E741
        super().__init__()
        rows = len(spec.gates) * H
        self.spec = spec
        self.of_input, self.of_hidden = nn.Linear(I, rows, bias=False), nn.Linear(H, rows, bias=False)
        self.norm_input, self.norm_hidden, self.norm_cell = nn.LayerNorm(rows), nn.LayerNorm(rows), nn.LayerNorm(H)
        self.looks = nn.ParameterDict({gate: torch.empty(H) for gate in spec.peephole_gates})
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0)

    def weights(self) -> LSTMWeights:
        """Its parameters as the library names them."""
        return LSTMWeights(
            self.of_input.weight, self.of_hidden.weight, self.norm_input.bias, self.norm_hidden.bias,
            weight_ch=torch.cat([self.looks[gate] for gate in self.spec.peephole_gates]) if self.looks else None,
            weight_ln_ih=self.norm_input.weight, weight_ln_hh=self.norm_hidden.weight,
            weight_ln_c=self.norm_cell.weight, bias_ln_c=self.norm_cell.bias,
        )  # fmt: skip

    def forward(self, x, h, c):
        a = self.norm_input(self.of_input(x)) + self.norm_hidden(self.of_hidden(h))
        a = dict(zip(self.spec.gates, a.chunk(len(self.spec.gates), -1), strict=True))
        for gate in self.spec.previous_gates:
            a[gate] = a[gate] + self.looks[gate] * c
        f = torch.sigmoid(a["f"])
        c = f * c + (1 - f if self.spec.coupled else torch.sigmoid(a["i"])) * torch.tanh(a["g"])
        if self.spec.output_current:
            a["o"] = a["o"] + self.looks["o"] * c
        return torch.sigmoid(a["o"]) * torch.tanh(self.norm_cell(c)), c


@pytest.mark.parametrize("spec", [spec for spec in NORMALIZED if not spec.full], ids=lambda spec: spec.name)
def test_steps_are_those_of_pytorchs_modules(spec):
    torch.manual_seed(0)
    T, B, I, H = 4, 3, 5, 7  # noqa: E741
    step = Modules(spec, I, H).double()
    x, h, c = (torch.randn(*size, dtype=torch.float64) for size in ((T, B, I), (B, H), (B, H)))
    flat = list(step.weights().present().values())
    options = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole, layer_norm=True)
    output, (h_n, c_n) = functional.lstm(x, (h[None], c[None]), flat, **options)
    wanted = []
    for x_t in x:
        h, c = step(x_t, h, c)
        wanted.append(h)
    for actual, expected in ((output, torch.stack(wanted)), (h_n[0], h), (c_n[0], c)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    ours = torch.autograd.grad(output.square().sum(), list(step.parameters()))
    theirs = torch.autograd.grad(torch.stack(wanted).square().sum(), list(step.parameters()))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spec", [NORMALIZED[0], FULL_CURRENT], ids=lambda spec: spec.name)
def test_gradients_match_finite_differences(spec, order):
    """Of three units: normalised, one unit is 0 and two are 1 and -1."""
    case = Case(spec, T=2, B=1, I=1, H=3)
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(lambda *tensors: call(case, *tensors), tuple(random_inputs(case).values()), fast_mode=order == 2)


def recomputing(case, x, h_0, c_0, *weights):
    output, (h_n, c_n) = functional.lstm(
        x, (h_0, c_0), weights, num_layers=case.L, bidirectional=case.bidirectional, recompute=True, **case.variant,
        **case.regularization,
    )  # fmt: skip
    return output, h_n, c_n


@pytest.mark.parametrize("spec", [NORMALIZED[0], FULL_CURRENT], ids=lambda spec: spec.name)
def test_recomputing_keeps_no_steps_and_gives_the_same_gradients(spec):
    case = Case(spec, T=9, B=2, I=3, H=5, L=2, bidirectional=True)
    inputs = random_inputs(case)
    kept = {}
    for function in (call, recomputing):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=numbers: n.append(t.numel()) or t, lambda t: t):
            function(case, *inputs.values())
        kept[function] = sum(numbers)
    arguments = sum(t.numel() for t in inputs.values()) + case.T * case.B * case.D * case.H
    assert kept[recomputing] <= 2 * arguments < kept[call] / 2, kept
    assert max(errors(results(case, inputs, recomputing), results(case, inputs, call)).values()) < 1e-13


def test_recomputed_steps_have_the_masks_of_the_forward_pass():
    case = next(
        case for case in parity.regularized_cases(NORMALIZED[0]) if case.rules.hidden_dropout and not case.states
    )
    case = replace(case, bias=True, proj_size=0, rules=case.rules._replace(proj_clip=0.0))
    inputs = random_inputs(case)

    torch.manual_seed(parity.MASKS)
    again = results(case, inputs, recomputing)
    assert max(errors(again, results(case, inputs, call)).values()) < 1e-13


def test_second_gradients_through_recomputed_steps():
    case = Case(FULL_CURRENT, T=3, B=2, I=2, H=3)
    inputs = random_inputs(case)
    second = {}
    for function in (call, recomputing):
        output = function(case, *inputs.values())[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs["x"], create_graph=True)
        (second[function],) = torch.autograd.grad(gradient.square().sum(), inputs["weight_hh_l0"])
    torch.testing.assert_close(second[recomputing], second[call], rtol=1e-12, atol=1e-14)
    assert second[call].abs().max() > 0


def test_recompute_compiles_into_one_graph():
    torch._dynamo.reset()
    case = Case(NORMALIZED[0], T=3)
    inputs = random_inputs(case)
    compiled = torch.compile(lambda *t: recomputing(case, *t), fullgraph=True, backend="aot_eager")
    actual = results(case, inputs, lambda _, *tensors: compiled(*tensors))
    assert max(errors(actual, results(case, inputs, call)).values()) < 1e-12


# What the kernels share with PyTorch's operators: rows are normalised in bulk, before the steps and after them.


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-13)])
def test_the_gradients_of_a_normalised_product_are_autograds(dtype, bound):
    torch.manual_seed(0)
    product, d = (torch.randn(3, 4, 28, dtype=torch.float64).to(dtype) for _ in range(2))
    gain = torch.randn(28, dtype=torch.float64).to(dtype)
    found = normalized.product_gradients(d, product, *normalized.moments(product), gain)
    wide = [t.double().requires_grad_() for t in (product, gain)]
    wanted = torch.autograd.grad(reference.normalized(wide[0], wide[1], None), wide, d.double())
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == dtype and (actual.double() - expected).norm() <= bound * expected.norm()
    mean, rstd = normalized.moments(product)
    assert mean.shape == rstd.shape == (3, 4) and mean.dtype == rstd.dtype != torch.bfloat16


# Who computes it.

REASON = "layer normalisation {} is computed step by step"
LAYER = Layer(NORMALIZED[0], 64, 16, 768, 1, torch.bfloat16, training=True)
WITHOUT_PLAN = {
    "in float32 without TF32": LAYER._replace(dtype=torch.float32),
    "with a full peephole": LAYER._replace(spec=FULL_CURRENT),
    "with a projection": LAYER._replace(P=64),
}


@pytest.mark.parametrize("spec", [spec for spec in NORMALIZED if not spec.full], ids=lambda spec: spec.name)
def test_the_persistent_kernels_compute_it(spec):
    layer = LAYER._replace(spec=spec)
    found = routing.decide(routing.Facts(layer, GPUS["h100"], no_operator="it has no layer normalisation"))
    assert found.name == "persistent"
    for backward in (False, True):
        plain = LSTMSpec(spec.coupled, spec.peephole, spec.output_peephole)
        plans, others = (
            ranked_plans(layer._replace(spec=own), backward, GPUS["h100"]) for own in (spec, plain)
        )  # fmt: skip
        assert plans[0].estimate_us > others[0].estimate_us and plans[0].streamed == 0


@pytest.mark.parametrize("what", WITHOUT_PLAN)
def test_what_is_computed_step_by_step(what):
    layer, reason = WITHOUT_PLAN[what], REASON.format(what)
    for backward in (False, True):
        assert reason in str(ranked_plans(layer, backward, GPUS["h100"]))
    facts = routing.Facts(layer, GPUS["h100"], no_operator="it has no layer normalisation")
    found = routing.decide(facts)
    assert found.name == "stepwise" and reason in found.reason
    assert routing.decide(facts._replace(strategy="stepwise")).name == "stepwise"
    with pytest.raises(RuntimeError, match=f"strategy 'persistent' cannot run here: {reason}"):
        routing.decide(facts._replace(strategy="persistent"))
    assert routing.decide(facts._replace(no_kernels="no GPU")).name == "eager"
    assert routing.now("kernels", layer, torch.device("cpu")) == "stepwise"


def test_weights_that_do_not_fit_the_chip_are_not_streamed():
    layer = LAYER._replace(H=4096)
    assert "no tiles of the recurrent weights" in str(ranked_plans(layer, False, GPUS["h100"]))
    plain = ranked_plans(layer._replace(spec=LSTMSpec()), False, GPUS["h100"])
    assert plain[0].streamed > 0


def test_statistics_are_read_by_8_lanes_of_two_programs_each():
    loads = tensor_core_plan.statistics_loads
    assert [loads(H, 16) for H in (1, 256, 257, 768)] == [1, 1, 2, 3]
    assert [loads(H, 8) for H in (768, 769)] == [6, 7]


def test_explain_says_so():
    module = lstm_triton.LSTM(64, 128, layer_norm=True, dtype=torch.bfloat16)
    text = str(module.explain(torch.zeros(16, 4, 64, dtype=torch.bfloat16), gpu="h100"))
    assert "persistent" in text and "step by step" not in text
    module = lstm_triton.LSTM(64, 128, layer_norm=True, peephole="full", dtype=torch.bfloat16)
    text = str(module.explain(torch.zeros(16, 4, 64, dtype=torch.bfloat16), gpu="h100"))
    assert "stepwise" in text and REASON.format("with a full peephole") in text
