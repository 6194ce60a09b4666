"""Lightning: a LightningModule trains, is saved in the middle, and goes on from the checkpoint to the same weights."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 1)
        self.losses = []

    def training_step(self, batch):
        x, y = batch
        loss = nn.functional.mse_loss(self.head(self.lstm(x)[0][:, -1]).squeeze(-1), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(model, folder, epochs, resume=None):
    x = torch.randn(24, 6, 3, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x.sum((1, 2))), batch_size=8), ckpt_path=resume)
    return trainer


def test_resumed_from_a_checkpoint(both, tmp_path):
    def train(built):
        first = Model()
        built(first)
        trainer = fit(first, tmp_path, 2)
        trainer.save_checkpoint(tmp_path / "middle.ckpt")
        second = Model()
        built(second)
        fit(second, tmp_path, 4, tmp_path / "middle.ckpt")
        fit(first, tmp_path, 4, tmp_path / "middle.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        return second, second.losses

    both(train)
