"""torchrl: DQNLoss through LSTMModule, which packs the episodes that lie in a batch of rollouts."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import LSTMModule, QValueModule, set_recurrent_mode
from torchrl.objectives import DQNLoss, SoftUpdate

ROLLOUTS, STEPS, HIDDEN, ACTIONS = 4, 12, 8, 3


def rollouts() -> TensorDict:
    """Of a made-up environment; an episode ends with probability 1/4."""
    size = (ROLLOUTS, STEPS)
    done = torch.rand(*size, 1) < 0.25
    state = torch.zeros(*size, 1, HIDDEN)
    observations = torch.randn(ROLLOUTS, STEPS + 1, 4)
    begins = torch.cat([torch.ones(ROLLOUTS, 1, 1, dtype=torch.bool), done], 1)
    return TensorDict(
        {
            "observation": observations[:, :-1],
            "is_init": begins[:, :-1],
            "recurrent_state_h": state,
            "recurrent_state_c": state,
            "action": nn.functional.one_hot(torch.randint(ACTIONS, size), ACTIONS),
            "next": {
                "observation": observations[:, 1:],
                "is_init": begins[:, 1:],
                "recurrent_state_h": state,
                "recurrent_state_c": state,
                "reward": torch.rand(*size, 1),
                "done": done,
                "terminated": done,
            },
        },
        batch_size=size,
    )


def train(built):
    data = rollouts()
    network = TensorDictSequential(
        LSTMModule(input_size=4, hidden_size=HIDDEN, in_key="observation", out_key="features"),
        TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["features"], out_keys=["action_value"]),
        QValueModule(action_space="one-hot"),
    )
    built(network)
    objective = DQNLoss(network, action_space="one-hot", delay_value=True)
    objective.make_value_estimator(gamma=0.9)
    target = SoftUpdate(objective, eps=0.9)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with set_recurrent_mode(True):
            loss = objective(data.clone())["loss"]
        loss.backward()
        optimizer.step()
        target.step()
        losses.append(loss.item())
    return network, losses


# LSTMModule packs what is an instance of torch.nn.LSTM, and gives everything else a mask.
@pytest.mark.parametrize("both", ["patch_torch", "convert, keep_isinstance"], indirect=True)
def test_recurrent_dqn(both):
    both(train)
