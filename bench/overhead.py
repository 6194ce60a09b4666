"""What `fusedlstm.LSTM` costs over `torch.nn.LSTM` on a CPU, where both run ATen: `python -m bench.overhead`.

The two take turns, and in turns go first; medians over all rounds.
"""

import statistics
import time

import torch
from torch import nn

import fusedlstm


def rounds(calls: dict, count: int) -> dict[str, list[float]]:
    """Seconds of every call, interleaved."""
    seconds = {name: [] for name in calls}
    for turn in range(count + count // 10):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            calls[name]()
            if turn >= count // 10:  # the rounds before warm up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def pair(size: int) -> dict[str, nn.Module]:
    stock = nn.LSTM(size, size)
    ours = fusedlstm.LSTM(size, size)
    ours.load_state_dict(stock.state_dict())
    return {"torch": stock, "fusedlstm": ours}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 32, 128, requires_grad=True)

    def training_step(module):
        module.zero_grad()
        x.grad = None
        module(x)[0].sum().backward()

    found = rounds({name: lambda m=m: training_step(m) for name, m in pair(128).items()}, 200)
    torch_ms, ours_ms = (1e3 * statistics.median(found[name]) for name in ("torch", "fusedlstm"))
    print(f"T100 B32 H128 forward+backward: {torch_ms:.2f} ms, ours {ours_ms:.2f} ms, {ours_ms / torch_ms - 1:+.1%}")

    few = torch.randn(4, 1, 32)  # steps; a single one goes to ATen's cells
    with torch.no_grad():
        found = rounds({name: lambda m=m: m(few) for name, m in pair(32).items()}, 3000)
    torch_us, ours_us = (1e6 * statistics.median(found[name]) for name in ("torch", "fusedlstm"))
    print(f"T4 B1 H32 inference: {torch_us:.1f} us, ours {ours_us:.1f} us, {ours_us - torch_us:+.1f} us a call")


if __name__ == "__main__":
    main()
