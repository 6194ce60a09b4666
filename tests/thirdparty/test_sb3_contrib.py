"""sb3-contrib: RecurrentPPO, two nn.LSTM (actor, critic) that it calls step by step between ends of episodes."""

from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback


class Losses(BaseCallback):
    """After every train(): the mean loss of the critic over its steps."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        values = self.logger.name_to_value
        if "train/value_loss" in values:
            self.losses.append(float(values["train/value_loss"]))


def train(built):
    agent = RecurrentPPO(
        "MlpLstmPolicy",
        "CartPole-v1",
        n_steps=48,
        batch_size=24,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 16, "n_lstm_layers": 2},
    )
    built(agent.policy)
    callback = Losses()
    agent.learn(total_timesteps=4 * 48, callback=callback, log_interval=None)
    return agent.policy, callback.losses


def test_recurrent_ppo(both):
    both(train)
