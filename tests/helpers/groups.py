"""Launches whose programs exchange tiles, forward and backward, against the specification. They test the exchange."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusedlstm.cells import Grads
from fusedlstm.engines import launch, reference
from support import assert_accurate, cast, recurrence, recurrence_inputs, tiled, without_padding

T, B, H, D = 4, 20, 40, 2  # per direction: two batch tiles, three programs a group


def run_both(inputs, protocol="counter", **tiles):
    """Forward and backward; (result, exact) of every tensor."""
    options = {"directions": D, "precision": "ieee", "protocol": protocol, **tiles}
    fwd, bwd = (tiled(pass_, B, H, "fp32", block_k=64, **options) for pass_ in ("fwd", "bwd"))
    ours = launch.recurrence_fwd(recurrence(), *inputs, plan=fwd)
    exact_inputs = cast(inputs, torch.float64)
    exact = reference.recurrence_fwd(recurrence(), *exact_inputs)
    generator = torch.Generator().manual_seed(2)
    wanted = (ours.output, ours.c_seq, ours.h_n, ours.c_n)
    grads = Grads(*(torch.randn(x.shape, generator=generator).to(x.device) for x in wanted))
    ours_bwd = launch.recurrence_bwd(recurrence(), shared(grads), shared(ours), *inputs[1:], plan=bwd)
    exact_bwd = reference.recurrence_bwd(recurrence(), cast(grads, torch.float64), exact, *exact_inputs[1:])
    pairs = list(zip([*ours, *ours_bwd], [*exact, *exact_bwd], strict=True))
    pairs[3] = tuple(without_padding(gates, inputs.batch.layout) for gates in pairs[3])
    return pairs


def shared(tree):
    """Move tensors to memory that forked processes share."""
    for x in tree_leaves(tree):
        if isinstance(x, Tensor) and not x.is_cuda:
            x.share_memory_()
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
