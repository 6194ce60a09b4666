"""gluonts: DeepAREstimator on synthetic series, trained by Lightning."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from gluonts.dataset.pandas import PandasDataset
from gluonts.torch import DeepAREstimator


class Losses(pl.Callback):
    def __init__(self, built):
        self.built = built
        self.losses = []

    def setup(self, trainer, module, stage):
        self.built(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.module = module
        self.losses.append(outputs["loss"].item())


def test_deepar(both, tmp_path):
    hours = pd.date_range("2024-01-01", periods=96, freq="h")
    series = {str(k): pd.Series(np.sin(np.arange(96) / 4 + k) + 2, index=hours, dtype="float32") for k in range(4)}
    data = PandasDataset(series)

    def train(built):
        callback = Losses(built)
        DeepAREstimator(
            freq="h",
            prediction_length=4,
            context_length=12,
            num_layers=2,
            hidden_size=16,
            lags_seq=[1, 2, 24],
            batch_size=8,
            num_batches_per_epoch=6,
            trainer_kwargs={
                "max_epochs": 2,
                "accelerator": "cpu",
                "callbacks": [callback],
                "default_root_dir": tmp_path,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        ).train(data)
        return callback.module, callback.losses

    both(train)
