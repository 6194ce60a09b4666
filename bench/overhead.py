"""Measure what the host pays for a call and for a launch, on a CPU: `python -m bench.overhead`.

The first part compares `fusedlstm.LSTM` with `torch.nn.LSTM`, where both run ATen. The second part compares a launch of
one of our kernels by `fusedlstm.engines.bound` with one by Triton's `kernel[grid](...)`. Both end in a driver that
launches nothing, so the time of the driver comes on top. The two sides alternate, and each goes first in every second
round. The numbers are medians over all rounds.
"""

import contextlib
import statistics
import time

import torch
import triton
from torch import nn

import fusedlstm
from bench.claimed import DRIVER
from fusedlstm.cells import CELLS, Grads, Recurrence, Saved, State, Weights
from fusedlstm.engines import launch
from fusedlstm.engines.bound import Bound
from fusedlstm.plan import candidates
from fusedlstm.plan.devices import DEVICES
from fusedlstm.plan.problem import Problem


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


def launches(pass_: str, stepped: bool) -> dict:
    """A launch of a bfloat16 loop with H 512 and B 64, or of one of its steps, as Triton does it and as we do."""
    plans = candidates(Problem("lstm", 64, 512, "bf16", 1, pass_, device_limits=DEVICES["sm_90"]))
    plan = next(p for p in plans if (p.schedule == "stepped") == stepped)
    seen = []

    class Recorded(Bound):
        def launcher(self, arguments, varying=None):
            seen.append((self, arguments, varying))
            return lambda *step: None

    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(*shape, dtype=dtype)

    h, c = zeros(1, 64, 512), zeros(1, 1, 64, 512, dtype=torch.float32)
    spec, given = Recurrence(CELLS["lstm"]), (Weights([zeros(2048, 512)]), State(h, c))
    with patched(launch, Recorded), patched(launch.stepping, Recorded):
        if pass_ == "fwd":
            launch.recurrence_fwd(spec, zeros(1, 3, 64, 2048), *given, plan=plan)
        else:
            y, c_seq = zeros(3, 64, 512), zeros(1, 3, 64, 512, dtype=torch.float32)
            saved = Saved(y, h, c, zeros(3, 64, 2048), c_seq)
            launch.recurrence_bwd(spec, Grads(y, None, h, c), saved, *given, plan=plan)
    (recorded, arguments, varying), *_ = seen
    ours = Bound(recorded.kernel, recorded.grid, recorded.constants, recorded.options)
    as_triton = recorded.constants | arguments | recorded.options
    calls = {"triton": lambda: recorded.kernel[recorded.grid](**as_triton)}
    if varying is None:
        return calls | {"fusedlstm": lambda: ours(**arguments)}
    step = ours.launcher(arguments, varying)
    return calls | {"fusedlstm": lambda: step(1)}


@contextlib.contextmanager
def patched(module, bound):
    """Launches of a module go to `bound`, and none is kept."""
    caches = [
        getattr(module, name)
        for name in ("_bound", "_cached_bound")
        if hasattr(getattr(module, name, None), "cache_clear")
    ]
    before, module.Bound = module.Bound, bound
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        module.Bound = before
        for cache in caches:
            cache.cache_clear()


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

    triton.runtime.driver.set_active(DRIVER)
    for stepped, what in ((False, "launch of a loop"), (True, "launch of a step")):
        for pass_ in ("fwd", "bwd"):
            found = rounds(launches(pass_, stepped), 3000)
            triton_us, ours_us = (1e6 * statistics.median(found[name]) for name in ("triton", "fusedlstm"))
            print(
                f"{what}, {pass_}, H512 B64 bf16: Triton {triton_us:.1f} us, ours {ours_us:.1f} us without the driver"
            )


if __name__ == "__main__":
    main()
