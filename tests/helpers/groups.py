"""Launches whose programs exchange tiles, forward and backward, against the specification. They test the exchange."""

import torch

from fusedlstm.engines import launch, reference
from support import assert_accurate, cast, recurrence_inputs, tiled, without_padding

T, B, H, D = 4, 20, 40, 2  # per direction: two batch tiles, three programs a group


def run_both(inputs, protocol="counter", **tiles):
    """Forward and backward; (result, exact) of every tensor."""
    options = {"directions": D, "precision": "ieee", "protocol": protocol, **tiles}
    fwd, bwd = (tiled(pass_, B, H, "fp32", block_k=64, **options) for pass_ in ("fwd", "bwd"))
    ours = launch.recurrence_fwd("lstm", **inputs, save_gates=True, save_states=True, plan=fwd)
    exact_inputs = cast(inputs, torch.float64)
    exact = reference.recurrence_fwd("lstm", **exact_inputs)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(ours[k].shape, generator=generator).to(ours[k].device) for k in (0, 4, 1, 2)]
    states = {k: v for k, v in inputs.items() if k != "preact_x"}
    saved = dict(zip(("output", "gates", "c_seq"), (ours[0], *ours[3:]), strict=True))
    ours_bwd = launch.recurrence_bwd("lstm", *shared(grads), **states, **shared(saved), plan=bwd)
    exact_states = {k: v for k, v in exact_inputs.items() if k != "preact_x"}
    exact_saved = dict(zip(saved, (exact[0], *exact[3:]), strict=True))
    exact_bwd = reference.recurrence_bwd("lstm", *cast(grads, torch.float64), **exact_states, **exact_saved)
    pairs = list(zip([*ours, *ours_bwd], [*exact, *exact_bwd], strict=True))
    pairs[3] = tuple(without_padding(gates, inputs["layout"]) for gates in pairs[3])
    return pairs


def shared(tree):
    """Move tensors to memory that forked processes share."""
    for x in tree.values() if isinstance(tree, dict) else tree:
        for tensor in x if isinstance(x, (list, tuple)) else [x]:
            if tensor is not None and not tensor.is_cuda:
                tensor.share_memory_()
    return tree


def assert_right(pairs):
    for k, (ours, exact) in enumerate(pairs):
        assert_accurate(f"tensor {k}", ours, exact.float(), exact)


def dense(device="cpu"):
    return shared(recurrence_inputs(T, B, H, D, torch.float32, device))


def is_caught(run, seeds: int = 4) -> bool:
    """Whether `run` shows wrong numbers or a deadlock with one of some seeds, for a deliberately broken exchange."""
    from fusedlstm.engines import interpreter

    for seed in range(seeds):
        try:
            with interpreter.side_by_side(seed, yield_on_memory=True, patience=20):
                run()
        except (AssertionError, interpreter.Deadlock):
            return True
    return False
