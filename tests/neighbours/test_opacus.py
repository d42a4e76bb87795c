"""opacus: what it does with the layers as they are, and the gradients of rows that the example registers with it."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import VARIANTS, convert

pytest.importorskip("opacus")

from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample import wrap_model
from opacus.validators import ModuleValidator

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "neighbours" / "with_opacus.py"))
OutputLSTM, gradients_of_rows = EXAMPLE["OutputLSTM"], EXAMPLE["gradients_of_rows"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]

every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
B, T, I, H = 4, 7, 3, 5  # noqa: E741


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, OutputLSTM, gradients_of_rows)


def layer_of(spec, **options):
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    return OutputLSTM(I, H, dtype=torch.float64, **variant, **options)


def loss_of(output):
    return output.sin().square().sum()


def by_opacus(layer, x, **options):
    """The gradients of the rows, (B, *shape), by name."""
    hooked = GradSampleModule(layer, loss_reduction="sum", batch_first=layer.batch_first, **options)
    loss_of(hooked(x)).backward()
    found = {name: p.grad_sample for name, p in layer.named_parameters() if p.requires_grad}
    hooked.remove_hooks()
    return found


def row_by_row(layer, x):
    weights = dict(layer.named_parameters())
    rows = x.split(1, 0 if layer.batch_first else 1)
    gradients = [torch.autograd.grad(loss_of(layer(row)), list(weights.values())) for row in rows]
    return dict(zip(weights, map(torch.stack, zip(*gradients, strict=True)), strict=True))


@every_variant
@pytest.mark.parametrize("way", ["one after another", "all at once"])
def test_gradients_of_rows_are_those_of_each_row_by_itself(spec, way, registered):
    for batch_first in (True, False):
        layer = layer_of(spec, num_layers=2, bidirectional=True, batch_first=batch_first, bias=batch_first)
        x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=torch.float64)
        found = by_opacus(layer, x, force_functorch=way == "one after another")
        expected = row_by_row(layer, x)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_all_at_once_it_is_one_call_of_each_layer(registered, monkeypatch):
    calls = []
    lstm = lstm_triton.functional.lstm
    monkeypatch.setattr(lstm_triton.functional, "lstm", lambda x, *a, **o: calls.append(x.shape) or lstm(x, *a, **o))
    by_opacus(layer_of(VARIANTS[0], num_layers=2, batch_first=True), torch.randn(B, T, I, dtype=torch.float64))
    assert calls == [(B, T, I), (T, B, 4 * H), (T, B, 4 * H)]  # the forward pass, and each layer


def test_frozen_parameters_have_no_gradient(registered):
    layer = layer_of(VARIANTS[0], batch_first=True)
    layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(B, T, I, dtype=torch.float64)
    expected = row_by_row(copy.deepcopy(layer).requires_grad_(), x)
    found = by_opacus(layer, x)
    assert list(found) == ["weight_ih_l0", "bias_ih_l0", "bias_hh_l0"]
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("T", [1, 2])
def test_one_step_and_no_rows(T, registered):
    for B in (1, 0):  # Poisson sampling may draw no row
        layer = layer_of(lstm_triton.LSTMSpec(peephole="diagonal"), batch_first=True)
        found = gradients_of_rows(
            layer, [torch.randn(B, T, I, dtype=torch.float64)], torch.randn(B, T, H, dtype=torch.float64)
        )
        assert {name: found[p].shape for name, p in layer.named_parameters()} == {
            name: (B, *p.shape) for name, p in layer.named_parameters()
        }


@pytest.mark.parametrize("options", [dict(proj_size=2), dict(layer_norm=True), dict(dropout=0.5), dict(cell_clip=1.0)])
def test_what_is_not_computed_all_at_once_is_refused(options):
    layer = OutputLSTM(I, H, 2, batch_first=True, **options)
    with pytest.raises(NotImplementedError, match="only plain layers"):
        gradients_of_rows(layer, [torch.randn(B, T, I)], torch.randn(B, T, layer.proj_size or H))


@pytest.mark.parametrize("options", [dict(proj_size=2), dict(layer_norm=True), dict(cell_clip=0.1)])
def test_opacus_computes_these_row_after_row(options):
    layer = OutputLSTM(I, H, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(B, T, I, dtype=torch.float64)
    found, expected = by_opacus(layer, x), row_by_row(layer, x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


class Model(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(H, 2)

    def forward(self, x):
        output = self.lstm(x)
        return self.head((output if isinstance(output, torch.Tensor) else output[0])[:, -1])


def test_a_layer_that_returns_states_is_left_alone_and_stops_at_the_first_backward_pass():
    model = Model(lstm_triton.LSTM(I, H, batch_first=True))
    assert ModuleValidator.validate(model) == []
    assert type(ModuleValidator.fix(model).lstm) is lstm_triton.LSTM
    hooked = GradSampleModule(model)
    with pytest.raises(TypeError):
        hooked(torch.randn(B, T, I)).sum().backward()


def test_converted_it_becomes_the_lstm_of_opacus():
    model, x = Model(lstm_triton.LSTM(I, H, batch_first=True)), torch.randn(B, T, I)
    expected = model(x)
    fixed = ModuleValidator.fix_and_validate(convert.to_torch(model))
    assert type(fixed.lstm).__name__ == "DPLSTM"
    torch.testing.assert_close(fixed(x), expected)
    back = Model(OutputLSTM(I, H, batch_first=True))
    assert back.load_state_dict(fixed.state_dict(), strict=False).missing_keys == []  # opacus has its own names, too
    torch.testing.assert_close(back(x), expected)


@pytest.mark.parametrize("known", [True, False], ids=["all at once", "one after another"])
def test_norms_of_ghost_clipping_are_those_of_the_gradients_of_rows(known, request):
    if known:
        request.getfixturevalue("registered")
    layer = layer_of(lstm_triton.LSTMSpec(peephole="full"), batch_first=True)
    x = torch.randn(B, T, I, dtype=torch.float64)
    hooked = wrap_model(layer, grad_sample_mode="ghost", batch_first=True, loss_reduction="sum", max_grad_norm=1.0)
    loss_of(hooked(x)).backward()
    found = {name: p._norm_sample for name, p in layer.named_parameters()}
    hooked.remove_hooks()
    expected = {name: gradient.flatten(1).norm(dim=1) for name, gradient in row_by_row(layer, x).items()}
    torch.testing.assert_close(found, expected)


def test_a_step_of_private_training_is_that_of_clipped_gradients(registered):
    limit, lr = 0.05, 0.5
    x, y = torch.randn(6, T, I), torch.randint(2, (6,))
    model = Model(OutputLSTM(I, H, batch_first=True, coupled=True))
    before = copy.deepcopy(model)
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr), noise_multiplier=0.0, max_grad_norm=limit,
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6),
        poisson_sampling=False,
    )  # fmt: skip
    nn.functional.cross_entropy(private(x), y).backward()
    optimizer.step()

    clipped = []
    for row, target in zip(x.split(1), y.split(1), strict=True):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(before(row), target), list(before.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > limit
        clipped.append([gradient * limit / (norm + 1e-6) for gradient in gradients])
    for parameter, old, *gradients in zip(model.parameters(), before.parameters(), *clipped, strict=True):
        torch.testing.assert_close(parameter, old - lr * torch.stack(gradients).mean(0))
