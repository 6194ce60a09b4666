"""captum: attributions through a classifier in eval mode, where cuDNN's nn.LSTM has no backward."""

import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients, Saliency
from torch import nn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head_of(self.embedding(tokens))

    def head_of(self, embedded):
        return self.head(self.lstm(embedded)[0].mean(1))


def train(built):
    tokens, classes = torch.randint(20, (8, 7)), torch.randint(3, (8,))
    model = Classifier()
    built(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), classes)
        loss.backward()
        optimizer.step()
        numbers.append(loss.item())

    model.eval()
    baseline = torch.zeros_like(tokens)
    by_layer, delta = LayerIntegratedGradients(model, model.embedding).attribute(
        tokens, baseline, target=classes, n_steps=20, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-3, "the attributions do not add up to the difference of the outputs"
    embedded = model.embedding(tokens).detach()
    by_input = IntegratedGradients(model.head_of).attribute(embedded, target=classes, n_steps=20)
    saliency = Saliency(model.head_of).attribute(embedded, target=classes)
    for attribution in (by_layer, by_input, saliency):
        assert attribution.abs().max() > 1e-4
        numbers += attribution.sum((1, 2)).tolist()
    return model, numbers


def test_attributions(both):
    both(train)
