"""bound.py: what is kept between launches is what Triton itself would have found; and launches that fail."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from bench import overhead
from bench.claimed import DRIVER
from fusedlstm.cells import State, Weights
from fusedlstm.engines import failures, launch, stepping
from fusedlstm.engines.bound import Bound
from fusedlstm.kernels.norms import row_statistics_kernel
from fusedlstm.kernels.recompute import recompute_kernel
from fusedlstm.plan import plan, step_plan
from fusedlstm.plan.devices import DEVICES
from support import recurrence

KERNELS = [*launch.KERNELS.values(), *stepping.KERNELS.values(), recompute_kernel, row_statistics_kernel]


@triton.jit(do_not_specialize=["n", "x"])
def kernel(a_ptr, n, b_ptr, ADD: tl.constexpr, x):
    tl.store(b_ptr + tl.arange(0, 4), tl.load(a_ptr + tl.arange(0, 4)) + n + x + ADD)


def bound(of=kernel):
    return Bound(of, (2, 3), {"ADD": 1}, {"num_warps": 2})


def arguments(offset_a, offset_b, dtype, n, x):
    memory = torch.zeros(64, dtype=dtype)
    return {"a_ptr": memory[offset_a:], "b_ptr": memory[offset_b:], "n": n, "x": x}


def test_it_launches_what_triton_itself_would_launch(claimed_gpu):
    """Pointers that are and are not divisible by 16, dtypes, 32 and 64 bits, a float and an integer; each twice."""
    launch = bound()
    offsets, dtypes = ((0, 0), (1, 0), (0, 1), (4, 4)), (torch.float32, torch.bfloat16)
    numbers = ((1, 1.0), (16, 0.0), (2**31, 1.0), (3, 2), (0, 2**40))
    for (a, b), dtype, (n, x) in [*itertools.product(offsets, dtypes, numbers)] * 2:
        given = arguments(a, b, dtype, n, x)
        launch(**given)
        kernel[2, 3](**given, ADD=1, num_warps=2)
        ours, theirs = claimed_gpu[-2:]
        assert ours[0].hash == theirs[0].hash
        assert ours[1:4] == theirs[1:4] == (2, 3, 1)
        # The stream, the function and the packed metadata come first. Then come metadata of the launch, which are new
        # objects, two hooks and the arguments.
        assert ours[4:7] == theirs[4:7] and [*map(id, ours[10:])] == [*map(id, theirs[10:])]
    assert len(launch._runs) > 8, "what differs is told apart"


def test_a_second_launch_asks_triton_for_nothing(claimed_gpu, monkeypatch):
    launch, given = bound(), arguments(0, 0, torch.float32, 1, 1.0)
    launch(**given)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **kwargs: pytest.fail("Triton was asked"))
    launch(**given)
    varied = launch.launcher(given, "n")
    varied(5)
    varied(7)
    names = kernel.arg_names
    assert [arguments[-len(names) :][names.index("n")] for arguments in claimed_gpu] == [1, 1, 5, 7]


def test_hooks_before_a_run_are_called(claimed_gpu):
    launch, seen = bound(), []
    kernel.add_pre_run_hook(lambda **kwargs: seen.append(kwargs["n"]))
    try:
        launch(**arguments(0, 0, torch.float32, 1, 1.0))
        launch.launcher(arguments(0, 0, torch.float32, 1, 1.0), "n")(2)
    finally:
        kernel.pre_run_hooks.clear()
    assert seen == [1, 2] and len(claimed_gpu) == 2


@pytest.mark.parametrize("of", KERNELS, ids=lambda k: k.__name__)
def test_no_kernel_is_specialised_on_a_number(of):
    """Else a launch would have to look at every value, as Triton does."""
    for parameter in of.params:
        is_pointer = parameter.name.endswith("_ptr")
        assert is_pointer or parameter.is_constexpr or parameter.do_not_specialize, parameter.name
        assert not (is_pointer and (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment))
        assert not parameter.annotation or parameter.is_constexpr, (
            "a type of its own would be no part of what we look at"
        )


def refuse(text):
    def launched(*arguments):
        raise RuntimeError(text)

    return launched


@pytest.mark.parametrize("text", failures.REFUSED)
@pytest.mark.parametrize("prefix", ["Triton Error [CUDA]: ", "Triton Error [HIP]:  Code: 720, Messsage: "])
def test_a_refused_launch_says_what_was_asked(claimed_gpu, monkeypatch, text, prefix):
    monkeypatch.setattr(DRIVER, "launched", refuse(prefix + text))
    launch = Bound(kernel, (2, 3), {"ADD": 1}, {"num_warps": 2, "launch_cooperative_grid": True}, "a plan")
    asked = (
        r"cannot launch kernel \(a plan\): 6 program\(s\) of 2 warps, all at once \(cooperative\), "
        "0 KiB of shared memory"
    )
    with pytest.raises(failures.LaunchError, match=asked) as raised:
        launch(**arguments(0, 0, torch.float32, 1, 1.0))
    assert str(raised.value.__cause__) == prefix + text and text in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Triton Error [CUDA]: unspecified launch failure",
        "Triton Error [CUDA]: device-side assert triggered",
        "Triton Error [CUDA]: out of memory",
        "Triton Error [CUDA]: operation not permitted when stream is capturing",
    ],
)
def test_an_error_of_a_kernel_that_ran_is_left_alone(claimed_gpu, monkeypatch, text):
    monkeypatch.setattr(DRIVER, "launched", refuse(text))
    with pytest.raises(RuntimeError, match=text.split(": ")[1]) as raised:
        bound()(**arguments(0, 0, torch.float32, 1, 1.0))
    assert not isinstance(raised.value, failures.LaunchError)


@triton.jit(do_not_specialize=["n", "x"])
def does_not_compile(a_ptr, n, b_ptr, ADD: tl.constexpr, x):
    tl.static_assert(ADD == 2)


def test_what_does_not_compile_or_fit_is_a_failed_launch(claimed_gpu, monkeypatch):
    given = arguments(0, 0, torch.float32, 1, 1.0)
    with pytest.raises(failures.LaunchError, match="does_not_compile: 6 program.*CompileTimeAssertionFailure"):
        bound(does_not_compile)(**given)
    with pytest.raises(KeyError, match="no_such_option"):  # ours, and no failure of a launch
        Bound(kernel, (1,), {"ADD": 3}, {"no_such_option": 1})(**given)
    monkeypatch.setattr("triton.compiler.compiler.max_shared_mem", lambda device: 1024)
    p = plan("lstm", 64, 512, "bf16", 1, DEVICES["sm_100"], "fwd")
    zeros = torch.zeros(1, 3, 64, 4 * 512, dtype=torch.bfloat16)
    weights = Weights([torch.zeros(4 * 512, 512, dtype=torch.bfloat16)])
    state = State(zeros[:, 0, :, :512], zeros[:, :1, :, :512])
    text = r"recurrence_fwd_kernel \(lstm fwd, hidden 512, .* KiB of shared memory each.*OutOfResources"
    with pytest.raises(failures.LaunchError, match=text):
        launch.recurrence_fwd(recurrence(save_gates=False), zeros, weights, state, plan=p)


def test_a_step_that_is_launched_anew_sees_another_step(claimed_gpu):
    T, B, H = 4, 16, 64
    p = step_plan("lstm", B, H, "bf16", 1, DEVICES["sm_90"], "fwd")
    zeros = torch.zeros(1, T, B, 4 * H, dtype=torch.bfloat16)
    weights = Weights([zeros[0, 0, :1, :H].expand(4 * H, H)])
    state = State(zeros[0, :1, :, :H], zeros[:, :1, :, :H])
    launch.recurrence_fwd(recurrence(), zeros, weights, state, plan=p)
    names = stepping.KERNELS["fwd"].arg_names
    assert [arguments[-len(names) :][names.index("step")] for arguments in claimed_gpu] == list(range(T))


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_what_the_benchmark_times_is_the_same_launch(claimed_gpu, pass_, stepped):
    for call in overhead.launches(pass_, stepped).values():
        call()
    (theirs, *_), (ours, *_) = claimed_gpu
    assert ours.hash == theirs.hash
    assert stepped == (ours.name in ("step_fwd_kernel", "step_bwd_kernel"))
