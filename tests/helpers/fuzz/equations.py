"""The family in plain torch operations, for any dtype, with gradients by autograd. It imports nothing of the package.

Whole batches [B, ...] and masks: a sequence that does not have a step keeps its state. Equations: docs/lstm.md,
docs/family.md and the docstrings of the layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, logsigmoid

GATES = {
    "LSTM": 4,
    "GRU": 3,
    "RNN tanh": 1,
    "RNN relu": 1,
    "PeepholeLSTM": 4,
    "CoupledLSTM": 3,
    "LayerNormLSTM": 4,
    "SLSTM": 4,
    "ResetBeforeGRU": 3,
    "LayerNormGRU": 3,
}
STATES = dict.fromkeys(GATES, 1) | {"LSTM": 2, "PeepholeLSTM": 2, "CoupledLSTM": 2, "LayerNormLSTM": 2, "SLSTM": 4}
WITHOUT_KERNELS = ("ResetBeforeGRU",)


class Stack(NamedTuple):
    """A stack of layers. `clip` is a `Clip`."""

    member: str
    hidden: int
    layers: int = 1
    directions: int = 1
    heads: int = 1
    proj: int = 0
    bias: bool = True
    clip: "Clip | None" = None
    zoneout: tuple[float, float] = (0.0, 0.0)  # in evaluation

    def shapes(self, input_size: int) -> list[dict[str, tuple[int, ...]]]:
        """The parameters of each layer and direction, by their names without a suffix."""
        G, H, P = GATES[self.member], self.hidden, self.proj or self.hidden
        found = []
        for layer in range(self.layers):
            own = {"weight_ih": (G * H, self.directions * P if layer else input_size)}
            own["weight_hh"] = (G * H, self.proj or H // self.heads)
            if self.bias:
                own |= {"bias_ih": (G * H,), "bias_hh": (G * H,)}
            if self.proj:
                own["weight_hr"] = (P, H)
            if self.member == "PeepholeLSTM":
                own |= {"weight_ci": (H,), "weight_cf": (H,), "weight_co": (H,)}
            if self.member.startswith("LayerNorm"):
                own |= {"gain_ih": (G * H,), "gain_hh": (G * H,)}
            if self.member == "LayerNormLSTM":
                own |= {"gain_c": (H,), "bias_c": (H,)}
            found += [own] * self.directions
        return found


class Clip:
    """Limits the gradient of a state that enters a step. In a backward of a backward it is off."""

    def __init__(self, limit: float) -> None:
        self.limit, self.on = limit, True

    def __call__(self, x: Tensor) -> Tensor:
        return _Clipped.apply(x, self)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clip):
        ctx.clip = clip
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.clip.limit, ctx.clip.limit) if ctx.clip.on else grad, None


def run(
    stack: Stack,
    x: Tensor,  # [T, B, I]
    states: list[Tensor],  # each [L * D, B, P or H]
    parameters: list[dict[str, Tensor]],  # per layer and direction
    exists: Tensor,  # [T, B] bool: whether a sequence has a step
    resets: Tensor,  # [T, B] bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output [T, B, D * P], the final states, and the states beside h of the last layer, each [T, B, D * H]."""
    finals, beside = [], []
    for layer in range(stack.layers):
        sequences = []
        for direction in range(stack.directions):
            k = layer * stack.directions + direction
            sequence, final = _one(stack, x, [s[k] for s in states], parameters[k], exists, resets, direction == 1)
            sequences.append(sequence)
            finals.append(final)
        x, *beside = (torch.cat(of, -1) for of in zip(*sequences, strict=True))
    return x, [torch.stack(of) for of in zip(*finals, strict=True)], beside


def _one(stack, x, state, p, exists, resets, backwards) -> tuple[list[Tensor], list[Tensor]]:
    """One layer and direction. Returns the sequences of all states, zero where there is no step, and the last ones."""
    T = len(x)
    found = [None] * T
    for t in reversed(range(T)) if backwards else range(T):
        has = exists[t].unsqueeze(1)
        entering = state if stack.clip is None else [stack.clip(s) for s in state]
        # Step t is cut from the one before it in this direction.
        if not backwards:
            cut = resets[t]
        else:
            cut = resets[t + 1] & exists[t + 1] if t + 1 < T else torch.zeros_like(resets[t])
        entering = [torch.where(cut.unsqueeze(1), 0, s) for s in entering]
        new = step(stack, p, x[t], entering)
        found[t] = [torch.where(has, s, 0) for s in new]
        state = [torch.where(has, s, old) for s, old in zip(new, state, strict=True)]
    return [torch.stack(of) for of in zip(*found, strict=True)], state


def step(stack: Stack, p: dict[str, Tensor], x: Tensor, state: list[Tensor]) -> list[Tensor]:
    """One step of every sequence: x [B, I], states [B, P or H]."""
    member, H = stack.member, stack.hidden
    U = _dense(p["weight_hh"], stack)
    a, u = x @ p["weight_ih"].T, state[0] @ U.T
    if member.startswith("LayerNorm"):
        a, u = p["gain_ih"] * _norm(a), p["gain_hh"] * _norm(u)
    if stack.bias:
        a, u = a + p["bias_ih"], u + p["bias_hh"]
    if member == "ResetBeforeGRU":  # the product of n is with r h
        r = (a + u)[:, :H].sigmoid()
        u = u + torch.cat([torch.zeros_like(u[:, : 2 * H]), (r * state[0] - state[0]) @ U[2 * H :].T], -1)
    a, u = a.split(H, -1), u.split(H, -1)
    z = [one + other for one, other in zip(a, u, strict=True)]
    new = _STEPS[member](p, z, a, u, state)
    if stack.proj:
        new[0] = new[0] @ p["weight_hr"].T
    if any(stack.zoneout):
        rates = [stack.zoneout[0]] + [stack.zoneout[1]] * (len(new) - 1)
        new = [rate * old + (1 - rate) * s for rate, old, s in zip(rates, state, new, strict=True)]
    return new


def _dense(weight_hh: Tensor, stack: Stack) -> Tensor:
    """The block-diagonal weight of a layer with heads."""
    if stack.heads == 1:
        return weight_hh
    DH, units = stack.hidden // stack.heads, torch.arange(stack.hidden)
    own = units // DH
    same_head = own.repeat(GATES[stack.member]).unsqueeze(1) == own
    return torch.where(same_head, weight_hh.repeat(1, stack.heads), 0)


def _norm(x: Tensor) -> Tensor:
    if x.dtype != torch.float64:
        return layer_norm(x, x.shape[-1:])  # whose error for one unit, 1e-5 in place of 0, is torch's in that dtype
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _lstm(p, z, a, u, state):
    i, f, g, o = z[0].sigmoid(), z[1].sigmoid(), z[2].tanh(), z[3].sigmoid()
    c = f * state[1] + i * g
    return [o * c.tanh(), c]


def _gru(p, z, a, u, state):
    r, z_ = z[0].sigmoid(), z[1].sigmoid()
    n = (a[2] + r * u[2]).tanh()
    return [(1 - z_) * n + z_ * state[0]]


def _reset_before(p, z, a, u, state):
    n, z_ = z[2].tanh(), z[1].sigmoid()
    return [(1 - z_) * n + z_ * state[0]]


def _peephole(p, z, a, u, state):
    c = state[1]
    i, f = (z[0] + p["weight_ci"] * c).sigmoid(), (z[1] + p["weight_cf"] * c).sigmoid()
    c = f * c + i * z[2].tanh()
    return [(z[3] + p["weight_co"] * c).sigmoid() * c.tanh(), c]


def _coupled(p, z, a, u, state):
    i = z[0].sigmoid()
    c = (1 - i) * state[1] + i * z[1].tanh()
    return [z[2].sigmoid() * c.tanh(), c]


def _layernorm(p, z, a, u, state):
    c = z[1].sigmoid() * state[1] + z[0].sigmoid() * z[2].tanh()
    return [z[3].sigmoid() * (p["gain_c"] * _norm(c) + p["bias_c"]).tanh(), c]


def _slstm(p, z, a, u, state):
    _, c, n, m = state
    kept = logsigmoid(z[1]) + torch.where(n == 0, -torch.inf, m)
    m = torch.maximum(kept, z[0])
    i, f = (z[0] - m).exp(), (kept - m).exp()
    c, n = f * c + i * z[2].tanh(), f * n + i
    return [z[3].sigmoid() * c / n, c, n, m]


_STEPS = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN tanh": lambda p, z, a, u, state: [z[0].tanh()],
    "RNN relu": lambda p, z, a, u, state: [z[0].relu()],
    "PeepholeLSTM": _peephole,
    "CoupledLSTM": _coupled,
    "LayerNormLSTM": _layernorm,
    "SLSTM": _slstm,
    "ResetBeforeGRU": _reset_before,
    "LayerNormGRU": _gru,
}
