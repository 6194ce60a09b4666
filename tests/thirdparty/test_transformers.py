"""transformers: its Trainer on Parakeet TDT (speech recognition), whose nn.LSTM predicts from the words so far."""

import torch
from torch.utils.data import Dataset
from transformers import ParakeetForTDT, ParakeetTDTConfig, Trainer, TrainingArguments

BLANK = PAD = 0


class Speech(Dataset):
    """Noise of 64 frames, and four tokens."""

    def __init__(self):
        self.features = torch.randn(16, 64, 16)
        self.labels = torch.randint(1, 12, (16, 4))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        labels = self.labels[k]
        return {
            "input_features": self.features[k],
            "attention_mask": torch.ones(64, dtype=torch.long),
            "decoder_input_ids": torch.cat([torch.tensor([BLANK]), labels]),
            "labels": labels,
        }


class Recorder(Trainer):
    losses: list[float]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def test_speech_recognition(both, tmp_path):
    encoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "subsampling_conv_channels": 4,
        "num_mel_bins": 16,
        "layerdrop": 0.0,
        "initializer_range": 0.3,
    }
    config = ParakeetTDTConfig(
        vocab_size=12,
        blank_token_id=BLANK,
        pad_token_id=PAD,
        decoder_hidden_size=16,
        num_decoder_layers=2,
        durations=[0, 1, 2],
        encoder_config=encoder,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=5,
        learning_rate=0.1,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    def train(built):
        model = ParakeetForTDT(config)
        built(model)
        trainer = Recorder(model, arguments, train_dataset=Speech())
        trainer.losses = []
        trainer.train()
        return model, trainer.losses

    both(train)
