"""What regularises a recurrence: zoneout and the dropouts inside of a step, and the generator of their masks.

| | in training | in evaluation | source |
|---|---|---|---|
| zoneout | a unit's state stays what it was with probability p, each state by itself | p s + (1 - p) s' |
| candidate | what a unit offers to its memory is dropped, at every step anew | nothing |
| recurrent | the h that enters the recurrent product, one mask for all steps of a sequence | nothing |
| weight | elements of `weight_hh`, one mask for a call, divided by 1 - p | nothing | Merity et al. 2017 |

The masks are functions of (seed, recurrence, row or sequence, unit): Philox4x32-10 (Salmon et al. 2011) in counter
mode. So nothing is stored, and forward, backward, recomputation, blocks of steps and all engines see the same ones. A
recurrence is a layer in one direction, a row is where its layout puts a step of a sequence (`fusedlstm.layout`). The
kernels have the same in `fusedlstm.kernels.noise`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedlstm.layout import DENSE, Layout

OF_ROWS, OF_SEQUENCES, OF_WEIGHTS = range(3)  # what a counter counts
RESOLUTION = 24  # bits of a probability


class Noise(NamedTuple):
    """Of the recurrences of one launch."""

    seed: Tensor | None = None  # [1] int64, on the device of the data; None: the expectation
    rates: Sequence[float] = ()  # p of zoneout of h, of the other states, of candidate, of recurrent; none: nothing
    place: Sequence[int] = (0, 0)  # number of the first recurrence, and of the first row

    @property
    def holds(self) -> bool:
        """Whether there is zoneout."""
        return any(self.rates[:2])

    @property
    def drops_candidate(self) -> bool:
        return self._drops(2)

    @property
    def drops_h(self) -> bool:
        return self._drops(3)

    @property
    def in_steps(self) -> bool:
        """Whether a step itself has any."""
        return self.holds or self.drops_candidate

    def _drops(self, k: int) -> bool:
        return self.seed is not None and bool(self.rates) and bool(self.rates[k])

    def of_steps(self, first_row: int) -> "Noise":
        """Of a block of steps that begins there."""
        return self._replace(place=(self.place[0], self.place[1] + first_row))

    def of_rows(
        self, rows: int, direction: int, hidden: int, like: Tensor
    ) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Zoneout of h, of the other states, and the factor of the candidate, of all rows: numbers or [R, H]."""
        if not self.in_steps:
            return 0.0, 0.0, 1.0
        if self.seed is None:
            return *self.rates[:2], 1.0
        unit, stream = torch.arange(hidden, device=like.device), _stream(self.place[0] + direction, OF_ROWS)
        found = [like.new_empty(rows, hidden) for _ in range(3)]
        for begin in range(0, rows, size := max(1, _AT_ONCE // hidden)):
            row = torch.arange(begin, min(rows, begin + size), device=like.device).unsqueeze(1) + self.place[1]
            words = philox(self.seed, unit, row & _MASK, row >> 32, stream)
            for mask, word, rate in zip(found, words, self.rates, strict=False):
                mask[begin : begin + size] = _below(word, rate)
        held_h, held_c, dropped = found
        return held_h, held_c, dropped.neg_().add_(1).mul_(scale(self.rates[2]))

    def of_sequences(self, directions: int, batch: int, hidden: int, dtype: torch.dtype) -> Tensor | None:
        """The factor of the h that enters the recurrent product, [D, B, H]; None: 1."""
        if not self.drops_h:
            return None
        sequence = torch.arange(batch, device=self.seed.device).unsqueeze(1)
        unit = torch.arange(hidden, device=self.seed.device)
        found = [
            ~_below(philox(self.seed, unit, sequence, 0, _stream(self.place[0] + d, OF_SEQUENCES))[0], self.rates[3])
            for d in range(directions)
        ]
        return torch.stack(found).to(dtype) * scale(self.rates[3])


NO_NOISE = Noise()


class Batch(NamedTuple):
    """Which rows a batch has, and what masks they get."""

    layout: Layout = DENSE
    noise: Noise = NO_NOISE

    @classmethod
    def of(cls, tables: Sequence[Tensor | None], rates: Sequence[float] = (), place: Sequence[int] = (0, 0)) -> "Batch":
        """From what is in `flat`."""
        *layout, seed = tables
        return cls(Layout(*layout), Noise(seed, rates, place))

    @property
    def flat(self) -> tuple[list[Tensor | None], Sequence[float], Sequence[int]]:
        """As custom ops take it: lengths, first_row, resets and seed, or None; rates; place."""
        return [*self.layout, self.noise.seed], self.noise.rates, self.noise.place

    def of_steps(self, steps: slice, batch: int) -> "Batch":
        """Of a block of steps of so many sequences."""
        if steps.start is None:  # the only one
            return self
        return Batch(self.layout.of_steps(steps.start, steps.stop), self.noise.of_steps(steps.start * batch))


EVERY_ROW = Batch()


class Rates(NamedTuple):
    """The probabilities of a layer."""

    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    candidate: float = 0.0
    recurrent: float = 0.0
    weight: float = 0.0

    def in_steps(self, training: bool) -> tuple[float, ...]:
        """`Noise.rates`."""
        rates = self[:4] if training else (*self[:2], 0.0, 0.0)
        return rates if any(rates) else ()

    def __str__(self) -> str:
        return ", ".join(f"{name}={rate:g}" for name, rate in self._asdict().items() if rate)


NO_RATES = Rates()


def draw(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device, [1] int64."""
    return torch.randint(1 << 62, (1,), device=device)


def drop_weight(weight: Tensor, rate: float, seed: Tensor, recurrence: int) -> Tensor:
    """`weight` [G*H, DH] with elements dropped with probability `rate`, the others divided by 1 - rate;
    differentiable.
    """
    row = torch.arange(len(weight), device=weight.device).unsqueeze(1)
    column = torch.arange(weight.size(1), device=weight.device)
    dropped = _below(philox(seed, column, row, 0, _stream(recurrence, OF_WEIGHTS))[0], rate)
    return (weight * scale(rate)).masked_fill(dropped, 0)


def scale(rate: float) -> float:
    """1 / (1 - p), and 0 where nothing is left."""
    return 0.0 if rate == 1 else 1 / (1 - rate)


def threshold(rate: float) -> int:
    """Words whose upper bits are below it are hit."""
    return round(rate * (1 << RESOLUTION))


_MASK = 0xFFFFFFFF
_ROUNDS = 10
_AT_ONCE = 1 << 14  # counters: what ten rounds need of them stays in a cache


def philox(seed: Tensor, *counter) -> list[Tensor]:
    """Philox4x32-10: the four words of a counter of four, 32 bits each in int64 tensors; `seed` [1] int64 is the
    key.
    """
    # A number is filled in on the device: a copy from the host waits, and no CUDA graph captures it.
    words = (x if isinstance(x, Tensor) else torch.full((), x, device=seed.device) for x in counter)
    c = list(torch.broadcast_tensors(*words))
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(_ROUNDS):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # wraps, and its bits are right
        c = [(b >> 32) & _MASK ^ c[1] ^ key[0], b & _MASK, (a >> 32) & _MASK ^ c[3] ^ key[1], a & _MASK]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return c


def _stream(recurrence: int, kind: int) -> int:
    return recurrence * 4 + kind


def _below(word: Tensor, rate: float) -> Tensor:
    return word >> (32 - RESOLUTION) < threshold(rate)


def entering(
    output: Tensor,  # [T, B, H] or [R, H]
    hx: Tensor,  # [B, H]
    factor: Tensor,  # [B, H]
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """The h that enters a dropped recurrent product in place of every h."""
    if layout.first_row is None:
        return output * factor, hx * factor
    _, sequence = layout.positions(len(output))
    return output * factor[sequence], hx * factor
