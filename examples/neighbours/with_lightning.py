"""A LightningModule with this library's LSTM: trained in bfloat16, checkpointed, resumed.

Nothing needs to be changed: the variant is in the hyperparameters that a checkpoint keeps. It runs on the GPU if there
is one.

    pip install lightning
    python examples/neighbours/with_lightning.py
"""

import importlib.util
import logging
import sys
import tempfile
import warnings
from pathlib import Path

if importlib.util.find_spec("lightning") is None:
    sys.exit("This example needs lightning, which is not installed: pip install lightning")

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lstm_triton

FEATURES, HIDDEN, CLASSES = 6, 24, 3


class Classifier(LightningModule):
    """Name the class of each row, of ragged length, from the last hidden state.

    - options: of `lstm_triton.LSTM`; they are hyperparameters, which a checkpoint keeps
    """

    def __init__(self, **options):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = lstm_triton.LSTM(FEATURES, HIDDEN, batch_first=True, **options)
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.losses, self.dtypes = [], set()

    def forward(self, x, lengths):
        output, (h_n, _) = self.lstm(x, lengths=lengths)
        self.dtypes.add(output.dtype)
        return self.head(h_n[-1])

    def training_step(self, batch, _):
        x, lengths, y = batch
        loss = F.cross_entropy(self(x, lengths), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader_of(rows):
    """Return batches of x (B, T, I), lengths (B,) and the class of each row: which of three features is larger."""
    y, lengths = torch.randint(CLASSES, (rows,)), torch.randint(4, 13, (rows,))
    x = torch.randn(rows, 12, FEATURES) + 0.7 * F.one_hot(y, FEATURES)[:, None]
    x[torch.arange(12) >= lengths[:, None]] = float("nan")  # padding may hold anything
    return DataLoader(TensorDataset(x, lengths, y), batch_size=32)


def trainer_of(epochs):
    """Return a trainer on the GPU if there is one, which writes nothing by itself."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(max_epochs=epochs, precision="bf16-mixed", **quiet)


def main():
    """Train, save, load, and train on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    seed_everything(0)
    loader = loader_of(512)

    print("1. Training with precision bf16-mixed")
    model = Classifier(peephole="diagonal", zoneout=(0.05, 0.1))
    trainer = trainer_of(epochs=3)
    trainer.fit(model, loader)
    print(f"   loss {model.losses[0]:.3f} at first, {model.losses[-1]:.3f} at last")
    print(f"   the LSTM computed in {model.dtypes}, its parameters are {model.lstm.weight_hh_l0.dtype}")
    assert model.losses[-1] < 0.6 * model.losses[0] and model.dtypes == {torch.bfloat16}
    assert model.lstm.weight_hh_l0.dtype == torch.float32

    print("2. A checkpoint holds the variant and the weights")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        loaded = Classifier.load_from_checkpoint(path, weights_only=True)
        x, lengths, _ = next(iter(loader))
        model.to(loaded.device)
        largest = (model.eval()(x, lengths) - loaded.eval()(x, lengths)).abs().max().item()
        print(f"   {loaded.lstm}: largest difference of the outputs {largest:.1e}")
        assert largest == 0 and loaded.lstm.spec == model.lstm.spec

        print("3. Training goes on from it")
        resumed = trainer_of(epochs=5)
        resumed.fit(loaded.train(), loader, ckpt_path=path, weights_only=True)
    print(f"   epochs {trainer.current_epoch} to {resumed.current_epoch}, loss {loaded.losses[-1]:.3f} at last")
    assert len(loaded.losses) == 2 * len(loader) and loaded.losses[-1] < model.losses[len(loader)]


if __name__ == "__main__":
    main()
