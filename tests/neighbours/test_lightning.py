"""Lightning: its trainer trains the layers as a loop of PyTorch does, and its checkpoints go both ways."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lstm_triton
from lstm_triton import VARIANTS, convert

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


class Model(LightningModule):
    def __init__(self, library=lstm_triton, **options):
        super().__init__()
        self.lstm = library.LSTM(3, 5, 2, batch_first=True, **options)
        self.head = nn.Linear(5, 2)
        self.dtypes = set()

    def training_step(self, batch, _):
        x, y = batch
        output, _ = self.lstm(x)
        self.dtypes.add(output.dtype)
        return nn.functional.cross_entropy(self.head(output[:, -1]).float(), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


DATA = TensorDataset(torch.randn(8, 7, 3, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 2)


def fit(model, precision="32-true", **options):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, precision=precision, **quiet, **options)
    trainer.fit(model, DataLoader(DATA, batch_size=4))
    return trainer


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_trainer_does_what_a_loop_of_pytorch_does(spec, precision):
    model = Model(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    looped = copy.deepcopy(model)
    optimizer = looped.configure_optimizers()
    for batch in DataLoader(DATA, batch_size=4):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = looped.training_step(batch, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit(model, precision)
    assert model.dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}
    torch.testing.assert_close(dict(model.named_parameters()), dict(looped.named_parameters()))


def test_training_is_that_of_torchs_lstm_also_converted():
    theirs = Model(nn)
    ours, converted = Model(), convert.from_torch(copy.deepcopy(theirs))
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours, converted):
        fit(model, gradient_clip_val=0.1, accumulate_grad_batches=2)
    for model in (ours, converted):
        torch.testing.assert_close(dict(model.named_parameters()), dict(theirs.named_parameters()))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_the_parameters_may_be_of_the_trainers_type(precision):
    model = Model(peephole="diagonal")
    fit(model, precision)
    types = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert model.dtypes == {p.dtype for p in model.parameters()} == {types[precision]}


@pytest.mark.parametrize("saved, loaded", [(nn, lstm_triton), (lstm_triton, nn)], ids=["to ours", "to torch"])
def test_checkpoints_go_both_ways(saved, loaded, tmp_path):
    model = Model(saved)
    fit(model).save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    other = Model.load_from_checkpoint(tmp_path / "model.ckpt", library=loaded, weights_only=True)
    assert type(other.lstm) is loaded.LSTM
    torch.testing.assert_close(dict(other.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
