"""A recurrent policy learns to remember: policy gradients on batches in which episodes end at any step.

An episode shows one of four cues, then nothing for 4 to 12 steps, and then a bell. The action at the bell must name the
cue, for a reward of 1. The next episode begins at once, so a batch of T steps holds several episodes of each
environment. No information may leak from one episode into the next. The policy is an LSTM whose state is reset where an
episode begins.

The same training runs twice from the same seed. One run passes `resets=` and computes all steps in one call. The other
one is a loop over `torch.nn.LSTMCell`, as people write it by hand. Both print the same learning curve up to rounding.
The rollouts are the same code in both. The time that is printed is that of the updates (forward, backward, optimiser).

    python examples/recurrent_policy.py
"""

import argparse
import statistics
import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Categorical

import fusedlstm

CUES, SHORTEST, LONGEST = 4, 4, 12
BELL = CUES
FEATURES = CUES + 1  # the cues and the bell, each one a light


class Recall:
    """B environments of the task in one. An episode begins with its cue and ends with the bell."""

    def __init__(self, batch: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.cue, self.left = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        self.begins = torch.ones(batch, dtype=torch.bool)  # [B]: whether this step is an episode's first
        self._draw()

    def observe(self) -> Tensor:
        """[B, FEATURES]"""
        lights = torch.zeros(len(self.cue), FEATURES)
        lights[self.begins, self.cue[self.begins]] = 1.0
        lights[self.left == 0, BELL] = 1.0
        return lights

    def step(self, action: Tensor) -> Tensor:
        """Act, [B], and go on; returns the reward, [B]."""
        rings = self.left == 0
        reward = (rings & (action == self.cue)).float()
        self.left -= 1
        self.begins = rings
        self._draw()
        return reward

    def _draw(self) -> None:
        """Cues and waits for the episodes that begin."""
        shape = self.cue.shape
        cue = torch.randint(CUES, shape, generator=self.generator)
        wait = torch.randint(SHORTEST, LONGEST + 1, shape, generator=self.generator) + 1
        self.cue, self.left = torch.where(self.begins, cue, self.cue), torch.where(self.begins, wait, self.left)


class Rollout(NamedTuple):
    """T steps of B environments, and the state of the policy before them."""

    lights: Tensor  # [T, B, FEATURES]
    begins: Tensor  # [T, B] bool
    actions: Tensor  # [T, B]
    rewards: Tensor  # [T, B]
    state: tuple[Tensor, Tensor]  # each [1, B, H]
    last_value: Tensor  # [B], of the step after the last; 0 where it begins an episode


class Policy(nn.Module):
    """An LSTM with a head for actions and one for the value."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lstm = fusedlstm.LSTM(FEATURES, hidden_size)
        self.heads = nn.Linear(hidden_size, CUES + 1)

    def forward(self, output: Tensor) -> tuple[Categorical, Tensor]:
        """From h [..., H] to the distribution of actions and the value [...]."""
        logits, value = self.heads(output).split([CUES, 1], -1)
        return Categorical(logits=logits), value.squeeze(-1)


def in_one_call(lstm: fusedlstm.LSTM, rollout: Rollout) -> Tensor:
    """h of every step, [T, B, H]."""
    return lstm(rollout.lights, rollout.state, resets=rollout.begins)[0]


def in_a_loop(lstm: fusedlstm.LSTM, rollout: Rollout) -> Tensor:
    """The same as it is written by hand; the parameters are those of `lstm`."""
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size, device="meta")
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(lstm, name + "_l0"))
    h, c = (s[0] for s in rollout.state)
    outputs = []
    for lights, begins in zip(rollout.lights, rollout.begins, strict=True):
        keep = (~begins).float().unsqueeze(1)
        h, c = cell(lights, (h * keep, c * keep))
        outputs.append(h)
    return torch.stack(outputs)


@torch.no_grad()
def play(policy: Policy, stream: fusedlstm.Stream, env: Recall, steps: int) -> Rollout:
    """Act for `steps` steps; the stream carries the state on from the rollout before."""
    shape = (1, len(env.cue), policy.lstm.hidden_size)
    state = stream.state or (torch.zeros(shape), torch.zeros(shape))
    seen = []
    for _ in range(steps):
        lights, begins = env.observe(), env.begins
        stream.reset(begins)
        distribution, _ = policy(stream(lights.unsqueeze(0))[0])
        action = distribution.sample()
        seen.append((lights, begins, action, env.step(action)))
    ahead, _ = policy.lstm(env.observe().unsqueeze(0), stream.state)
    last_value = policy(ahead[0])[1] * ~env.begins
    return Rollout(*(torch.stack(x) for x in zip(*seen, strict=True)), state, last_value)


def update(policy: Policy, optimizer, rollout: Rollout, hidden_states, discount: float = 0.9) -> None:
    """One step of advantage actor-critic on a rollout."""
    ends = torch.cat([rollout.begins[1:], torch.zeros_like(rollout.begins[:1])])
    returns, following = [], rollout.last_value
    for reward, end in zip(rollout.rewards.flip(0), ends.flip(0), strict=True):
        following = reward + discount * following * ~end
        returns.append(following)
    returns = torch.stack(returns[::-1])
    distribution, value = policy(hidden_states(policy.lstm, rollout))
    advantage = returns - value
    loss = (
        -(distribution.log_prob(rollout.actions) * advantage.detach()).mean()
        + 0.5 * advantage.square().mean()
        - 0.01 * distribution.entropy().mean()
    )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def train(hidden_states, updates: int, steps: int, batch: int, hidden_size: int, seed: int) -> tuple[list, list]:
    """Returns, of every update, the share of bells that were answered right, and the time in ms."""
    torch.manual_seed(seed)
    policy = Policy(hidden_size)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    env, stream = Recall(batch, torch.Generator().manual_seed(seed)), fusedlstm.Stream(policy.lstm)
    right, times = [], []
    for _ in range(updates):
        rollout = play(policy, stream, env, steps)
        right.append((rollout.rewards.sum() / rollout.lights[..., BELL].sum()).item())
        start = time.perf_counter()
        update(policy, optimizer, rollout, hidden_states)
        times.append(1e3 * (time.perf_counter() - start))
    return right, times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("updates", 240), ("steps", 64), ("batch", 64), ("hidden-size", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args(arguments)
    runs = {"resets=": in_one_call, "a loop over LSTMCell": in_a_loop}
    found = {name: train(states, **vars(args)) for name, states in runs.items()}

    table = Table(title=f"Right at the bell (by chance {1 / CUES:.0%}), mean over the updates of a row")
    table.add_column("updates")
    for name in runs:
        table.add_column(name, justify="right")
    size = max(1, args.updates // 10)
    for first in range(0, args.updates, size):
        last = min(first + size, args.updates)
        means = (statistics.mean(right[first:last]) for right, _ in found.values())
        table.add_row(f"{first + 1} … {last}", *(f"{mean:.1%}" for mean in means))
    table.add_section()
    medians = [statistics.median(times) for _, times in found.values()]
    table.add_row("median update", *(f"{ms:.1f} ms" for ms in medians))
    console = Console()
    console.print(table)
    (ours, _), (by_hand, _) = found.values()
    apart = max(abs(a - b) for a, b in zip(ours, by_hand, strict=True))
    console.print(
        f"The curves are at most {apart:.2%} apart; "
        f"an update by the loop takes {medians[1] / medians[0]:.2f} times as long."
    )


if __name__ == "__main__":
    main()
