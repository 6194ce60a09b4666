"""What a CUDA graph cannot capture is an error that says so. What it can capture needs nothing from the host.

Tensors here are on no device ("meta"), and stand-ins say that they are on a GPU.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlstm import cells, functional, noise, transforms
from fusedlstm.cells import Grads, Recurrence, State, Weights
from fusedlstm.engines import torch_loop
from fusedlstm.layout import Layout, Pieces, spans

GPU = torch.device("cuda", 0)


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


class Input:
    """Of `functional._layout` nothing else is asked."""

    device = GPU


LENGTHS, RESETS = torch.tensor([3, 2]), torch.zeros(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: functional._layout(Input, 2, torch.tensor([2, 2, 1]), None, None),
            "input: .* got a packed batch, whose tables",
        ),
        (lambda: functional._layout(Input, 2, None, LENGTHS, None), "lengths: .* got a tensor on cpu, which is copied"),
        (lambda: functional._layout(Input, 2, None, None, RESETS), "resets: .* got a tensor on cpu, which is copied"),
        (lambda: Pieces.of(Layout(LENGTHS), (3, 2), GPU), "lengths and resets: .* got a loop of torch operations"),
        (lambda: spans(OnGPU(), (5,)), "input: .* got a packed batch for a loop of torch operations"),
        (lambda: functional._has_steps(torch.zeros(1), OnGPU()), "lengths: .* got the engine 'torch'"),
    ],
    ids=["packed", "lengths", "resets", "pieces", "spans", "any length"],
)
def test_what_needs_the_host_is_named(capturing, call, text):
    with pytest.raises(
        RuntimeError, match=f"{text}.*; a padded batch whose lengths and resets are on the device can be"
    ):
        call()


class OnGPU:
    device = GPU


def test_nothing_is_asked_without_a_gpu_or_in_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked"))
    transforms.not_captured("x", torch.device("cpu"), "y")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    transforms.not_captured("x", GPU, "y")


def test_nothing_is_captured_and_nothing_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    transforms.not_captured("x", GPU, "y")


class NoHost(TorchDispatchMode):
    """Fails where a value is read on the host."""

    ASKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        assert name not in self.ASKS, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


class NoCopy(TorchFunctionMode):
    """Fails where values of the host are copied to a device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor), "a copy from the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "layernorm", "slstm", "layernorm_gru"])
def test_a_dense_loop_asks_nothing_of_the_host(cell, directions, noisy):
    """`torch_loop` and the masks of all noise run on tensors of no device. A launch that failed continues with them."""
    of, T, B, H, D = cells.CELLS[cell], 3, 2, 4, directions
    with torch.device("meta"):
        preact_x, hx, cx = (
            torch.empty(D, T, B, of.num_gates * H),
            torch.empty(D, B, H),
            torch.empty(of.num_cell_states, D, B, H),
        )
        weight_hh, vectors = (
            [torch.empty(of.num_gates * H, H)] * D,
            torch.empty(D, of.num_vectors, H) if of.num_vectors else None,
        )
        seed = torch.empty(1, dtype=torch.int64)
        drawn = noise.Noise(seed, (0.2, 0.3, 0.4, 0.5))
    with NoHost(), NoCopy():
        if noisy:
            drawn.of_rows(T * B, 0, H, hx)
            drawn.of_sequences(D, B, H, hx)
            noise.drop_weight(weight_hh[0], 0.5, seed, 0)
            return
        spec, given = Recurrence(of), (Weights(weight_hh, vectors), State(hx, cx))
        saved = torch_loop.recurrence_fwd(spec, preact_x, *given)
        torch_loop.recurrence_bwd(spec, Grads(saved.output, None, hx, cx), saved, *given)


@pytest.mark.parametrize("resets", [False, True])
def test_lengths_and_resets_on_the_device_are_taken_as_they_are(capturing, resets):
    """As tables of a layout; and what the gradients of the parameters read of them."""
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    marks = torch.empty(3, 2, dtype=torch.bool, device="meta") if resets else None
    input = torch.empty(3, 2, 5, device="meta")
    with NoHost(), NoCopy():
        layout = functional._layout(input, 2, None, lengths, marks)
        assert layout.lengths is lengths and (layout.resets is marks)
        for direction in (0, 1):
            layout.states_before(torch.empty(3, 2, 4, device="meta"), torch.empty(2, 4, device="meta"), direction)
            layout.drops_hx((3, 2), direction)
        noise.Batch(layout).of_steps(slice(0, 2), 2)
