"""launch.py through Triton's own just-in-time path, with a driver that only claims to have a GPU: all but the launch.

Proves that every argument and option that a launch passes is one that the installed Triton takes, and that what it
compiles is what `offline` compiles.
"""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import claimed
from fusedlstm.cells import Grads, State, Weights
from fusedlstm.engines import failures, launch, offline
from fusedlstm.plan import candidates, plan, variants
from fusedlstm.plan.devices import DEVICES
from fusedlstm.plan.problem import Problem
from support import recurrence


def tensors(T, B, H, D, dtype):
    def zeros(*shape):
        return torch.zeros(*shape, dtype=dtype)

    weights = Weights([zeros(4 * H, H) for _ in range(D)])
    return zeros(D, T, B, 4 * H), weights, State(zeros(D, B, H), zeros(1, D, B, H))


@pytest.mark.parametrize(("hidden", "directions"), [(64, 1), (512, 2), (1150, 1)])
def test_the_jit_takes_every_argument(claimed_gpu, hidden, directions):
    T, B = 3, 64
    given = tensors(T, B, hidden, directions, torch.bfloat16)
    fwd, bwd = (plan("lstm", B, hidden, "bf16", directions, DEVICES["sm_90"], p) for p in ("fwd", "bwd"))
    saved = launch.recurrence_fwd(recurrence(), *given, plan=fwd)
    grads = Grads(saved.output, saved.c_seq, saved.h_n, saved.c_n)
    launch.recurrence_bwd(recurrence(), grads, saved, *given[1:], plan=bwd)
    for p, (metadata, *grid) in zip((fwd, bwd), (launched[:4] for launched in claimed_gpu), strict=True):
        assert tuple(grid) == p.grid
        assert metadata.launch_cooperative_grid == (not p.local)
        assert metadata.num_warps == p.num_warps
        assert metadata.shared == offline.compile_plan(p).smem_bytes


def test_a_new_length_or_batch_compiles_nothing(claimed_gpu):
    p = plan("lstm", 64, 64, "bf16", 1, DEVICES["sm_90"], "fwd")
    for T, B in ((3, 64), (1, 64), (16, 63), (100, 1)):
        launch.recurrence_fwd(recurrence(), *tensors(T, B, 64, 1, torch.bfloat16), plan=p)
    assert len(claimed_gpu) == 4 and len({metadata.hash for metadata, *_ in claimed_gpu}) == 1


# Sizes of their own: Triton loads a kernel once a process.
@pytest.mark.parametrize(("spilled", "hidden"), [(0, 264), (1, 272), (2, 280), (100, 296)])
def test_a_kernel_that_spills_makes_room_for_the_next_variant(claimed_gpu, monkeypatch, spilled, hidden):
    """Of sizes that nobody compiled before: the first variant that does not spill is launched, or the first of all."""
    loaded = []

    def load_binary(self, name, kernel, shared, device):
        loaded.append(name)
        return 1, 1, 255, 8 if len(loaded) <= spilled else 0, 1024

    monkeypatch.setattr(claimed._Utils, "load_binary", load_binary)
    monkeypatch.setattr(launch, "_variants", {})
    launch._bound.cache_clear()
    limits = DEVICES["sm_90"]
    p = plan("lstm", 16, hidden, "bf16", 1, limits, "fwd", protocol="counter")
    expected = [p, *variants(p, limits)]
    assert len(expected) > 3 and len({q.code for q in expected}) == len(expected)
    given = tensors(3, 16, hidden, 1, torch.bfloat16)
    for _ in range(2):
        launch.recurrence_fwd(recurrence(), *given, plan=p)
    chosen = expected[spilled] if spilled < len(expected) else p
    metadata = [metadata for metadata, *_ in claimed_gpu]
    assert len(metadata) == 2 and len({m.hash for m in metadata}) == 1, "looked for once"
    assert metadata[0].num_warps == chosen.num_warps
    assert metadata[0].shared == offline.compile_plan(chosen, SAVE_GATES=True, SAVE_STATES=True).smem_bytes
    launch._bound.cache_clear()


def test_another_kernel_of_a_plan_that_spilled_is_that_of_the_plan(claimed_gpu, monkeypatch):
    """What saves for the backward spills, and what saves nothing does not."""
    answers = iter([8, 0, 0])  # bytes a thread, kernel by kernel
    monkeypatch.setattr(claimed._Utils, "load_binary", lambda *_: (1, 1, 255, next(answers), 1024))
    monkeypatch.setattr(launch, "_variants", {})
    launch._bound.cache_clear()
    limits = DEVICES["sm_90"]
    tried = candidates(Problem("lstm", 16, 328, "bf16", 1, "fwd", device_limits=limits))
    p = next(p for p in tried if variants(p, limits)[0].num_warps != p.num_warps)
    given = tensors(3, 16, 328, 1, torch.bfloat16)
    for saves in (True, False):
        launch.recurrence_fwd(recurrence(save_gates=saves, save_states=saves), *given, plan=p)
    saving, other = (metadata.num_warps for metadata, *_ in claimed_gpu)
    assert saving != other == p.num_warps
    launch._bound.cache_clear()


def test_a_variant_that_is_refused_is_passed_over(claimed_gpu, monkeypatch):
    """If the plan spills and its first variant does not fit, the second is taken. If nothing fits, it is an error."""
    limits = DEVICES["sm_90"]
    p = plan("lstm", 16, 304, "bf16", 1, limits, "fwd", protocol="counter")
    expected = [p, *variants(p, limits)]
    answers = ["spills", "refused", "clean"]

    def load_binary(self, name, kernel, shared, device):
        answer = answers.pop(0) if answers else "refused"
        if answer == "refused":
            raise OutOfResources(1, 0, "shared memory")
        return 1, 1, 255, 8 if answer == "spills" else 0, 1024

    monkeypatch.setattr(claimed._Utils, "load_binary", load_binary)
    monkeypatch.setattr(launch, "_variants", {})
    launch._bound.cache_clear()
    launch.recurrence_fwd(recurrence(), *tensors(3, 16, 304, 1, torch.bfloat16), plan=p)
    (launched,) = claimed_gpu
    assert launched[0].shared == offline.compile_plan(expected[2]).smem_bytes
    assert launched[0].num_warps == expected[2].num_warps
    with pytest.raises(failures.LaunchError, match="shared memory"):
        other = plan("lstm", 16, 312, "bf16", 1, limits, "fwd", protocol="counter")
        given = tensors(3, 16, 312, 1, torch.bfloat16)
        launch.recurrence_fwd(recurrence(), *given, plan=other)
    launch._bound.cache_clear()
