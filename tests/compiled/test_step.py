"""The kernels of one step, compiled for sm_80 and sm_90 without a GPU, with the tiles of their plans."""

import re

import pytest
import torch

from bench import kernels
from fusedlstm.cells import Grads, State, Weights
from fusedlstm.engines import launch, offline, stepping
from fusedlstm.plan import step_plan
from fusedlstm.plan.devices import DEVICES
from support import recurrence

# dtype, precision, pass, B, I (0: none), H: a row of the batch, few, many; aligned rows of weights, half aligned, odd.
CASES = [
    ("bf16", "tf32", "fwd", 1, 256, 256),
    ("bf16", "tf32", "fwd", 1, 1024, 1024),
    ("fp32", "ieee", "fwd", 1, 1024, 1024),
    ("bf16", "tf32", "fwd", 16, 400, 1150),
    ("fp32", "tf32", "fwd", 16, 1024, 1024),
    ("bf16", "tf32", "fwd", 4096, 33, 1150),
    ("bf16", "tf32", "fwd", 16, 0, 9001),
    ("fp32", "tf32", "fwd", 1, 0, 9001),
    ("bf16", "tf32", "fwd", 512, 0, 2048),
    ("bf16", "tf32", "bwd", 512, 0, 2048),
    ("fp32", "tf32", "bwd", 128, 0, 1150),
    ("fp32", "ieee", "bwd", 64, 0, 10000),
    ("bf16", "tf32", "bwd", 1, 0, 10000),
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("dtype", "precision", "pass_", "B", "I", "H"), CASES)
def test_compiles_within_the_limits(arch, dtype, precision, pass_, B, I, H):
    p = step_plan("lstm", B, H, dtype, 1, DEVICES[arch], pass_, precision, input_size=I)
    c = offline.compile_step(p, I)
    numbers = kernels.Numbers(*c[:4])
    found = kernels.faults(p, numbers)
    assert not found, f"{numbers}: {found}"
    assert c.smem_bytes <= p.smem_bytes, f"plan expected at most {p.smem_bytes} bytes of shared memory"
    assert not c.counts.keys() & {"ATOM", "ATOMG", "RED", "REDG"}, "nobody waits, and nothing is added up in memory"
    if H % 8 == 0 and I % 8 == 0:  # weights come 16 bytes at a time
        assert re.search(r"LDGSTS\S*\.128|LDG\.E\.128", c.asm["sass"])


def test_inference_stores_no_more_than_the_state():
    """h twice, c once; with gates and states saved, more."""
    p = step_plan("lstm", 16, 256, "bf16", 1, DEVICES["sm_90"], "fwd", input_size=256)
    lean = offline.compile_step(p, 256).asm["ttgir"].count("tt.store")
    full = offline.compile_step(p, 256, SAVE_GATES=True, SAVE_STATES=True).asm["ttgir"].count("tt.store")
    assert (lean, full) == (3, 3 + 4 + 1)


def test_the_jit_takes_every_argument(claimed_gpu):
    T, B, H, D = 2, 16, 64, 2
    fwd, bwd = (step_plan("lstm", B, H, "bf16", D, DEVICES["sm_90"], pass_) for pass_ in ("fwd", "bwd"))

    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16)

    given = Weights([zeros(4 * H, H)] * D), State(zeros(D, B, H), zeros(1, D, B, H))
    saved = launch.recurrence_fwd(recurrence(), zeros(D, T, B, 4 * H), *given, plan=fwd)
    grads = Grads(saved.output, saved.c_seq, saved.h_n, saved.c_n)
    launch.recurrence_bwd(recurrence(), grads, saved, *given, plan=bwd)
    launched = [metadata for metadata, *_ in claimed_gpu]
    assert len(launched) == T + T + 1 and len({kernel.hash for kernel in launched}) == 2
    assert not any(kernel.launch_cooperative_grid for kernel in launched)
    shared = [offline.compile_step(fwd).smem_bytes, offline.compile_step(bwd, HAS_GRAD_C_SEQ=True).smem_bytes]
    assert [launched[0].shared, launched[-1].shared] == shared


def test_a_new_batch_or_layer_compiles_nothing(claimed_gpu, monkeypatch):
    """Neither the batch, nor the place of a layer in the stack, nor a step of a sequence is a constant."""
    p = step_plan("lstm", 16, 64, "bf16", 1, DEVICES["sm_90"], "fwd", input_size=64)
    monkeypatch.setattr(launch, "step_plan_for", lambda *_: p)
    for B in (1, 15, 16, 64):
        zeros = torch.zeros(3, B, 64, dtype=torch.bfloat16)
        parameters = [
            [torch.zeros(256, 64, dtype=torch.bfloat16)] * 2 + [torch.zeros(256, dtype=torch.bfloat16)] * 2
        ] * 3
        spec = recurrence(save_gates=False, save_states=False)
        launch.step_fwd(spec, zeros[0], State(zeros, zeros.unsqueeze(0)), parameters, 1)
    assert len(claimed_gpu) == 12 and len({metadata.hash for metadata, *_ in claimed_gpu}) == 1


def test_nothing_is_specialised_on_sizes_that_vary():
    for kernel in stepping.KERNELS.values():
        for name in ("step", "T", "B", "D"):
            parameter = kernel.params[kernel.arg_names.index(name)]
            assert parameter.do_not_specialize and not parameter.is_constexpr


def test_heads_and_all_that_a_backward_can_be_asked_for_compile():
    for pass_, flags in (("fwd", {}), ("bwd", {"CLIP": True, "HAS_GRAD_C_SEQ": True})):
        p = step_plan("lstm", 64, 768, "bf16", 2, DEVICES["sm_90"], pass_, heads=12)
        assert offline.compile_step(p, **flags).spill_bytes == 0
