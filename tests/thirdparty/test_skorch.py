"""skorch: NeuralNetClassifier builds a module with an nn.LSTM, fits it in batches, and clones it."""

import numpy as np
from sklearn.base import clone
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.lstm = nn.LSTM(3, hidden_size, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden_size, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0].mean(1)).softmax(-1)


class Built(Callback):
    def __init__(self, built):
        self.built = built

    def on_train_begin(self, net, **kwargs):
        self.built(net.module_)


def train(built):
    x = np.random.randn(24, 6, 3).astype(np.float32)
    y = (x.sum((1, 2)) > 0).astype(np.int64)
    net = NeuralNetClassifier(
        Net,
        module__hidden_size=8,
        max_epochs=3,
        lr=0.5,
        batch_size=8,
        train_split=None,
        callbacks=[Built(built)],
        verbose=0,
    )
    net = clone(net).fit(x, y)
    return net.module_, [batch["train_loss"] for epoch in net.history for batch in epoch["batches"]]


def test_classifier(both):
    both(train)
