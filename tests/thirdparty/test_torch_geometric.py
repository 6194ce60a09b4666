"""PyTorch Geometric: LSTMAggregation in SAGEConv, JumpingKnowledge("lstm") and Set2Set, an nn.LSTM each."""

import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import JumpingKnowledge, SAGEConv, Set2Set


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([SAGEConv(5, 8, aggr="lstm"), SAGEConv(8, 8, aggr="lstm")])
        self.jump = JumpingKnowledge("lstm", channels=8, num_layers=2)
        self.pool = Set2Set(8, processing_steps=3)
        self.head = nn.Linear(16, 2)

    def forward(self, graphs):
        x, layers = graphs.x, []
        for conv in self.convs:
            x = conv(x, graphs.edge_index).relu()
            layers.append(x)
        return self.head(self.pool(self.jump(layers), graphs.batch))


def train(built):
    graphs = Batch.from_data_list(
        [
            Data(x=torch.randn(n, 5), edge_index=torch.randint(n, (2, 4 * n)), y=torch.tensor([n % 2]))
            for n in range(3, 9)
        ]
    ).sort(sort_by_row=False)  # LSTMAggregation wants the edges by their target
    model = Net()
    built(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # Adam makes whole steps of the rounding of zero gradients
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(graphs), graphs.y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_graph_classifier(both):
    both(train)
