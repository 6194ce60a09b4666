"""What a call does on a GPU, operation by operation: what it needs, and nothing else."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fusedlstm
from fake_gpu import DEVICE, backward

LSTM, GRU = fusedlstm.LSTM, fusedlstm.GRU
FP32, BF16 = torch.float32, torch.bfloat16

ZEROS = "zeros"  # h_0 and c_0, which nobody gave
INPUT = "add addmm"  # both biases in one, the input product
CX = "_to_copy"  # c_0 in float32: of half precision
TABLES = "_to_copy _to_copy"  # lengths and rows of a packed batch, from the host
NO_GRADS = "zeros_like zeros_like"  # of h_n and c_n
# Biases, recurrent weights (those of the first steps and of the others), input, input weights, and the second bias.
PRODUCTS = "sum mm addmm_ mm mm clone"
# The rows before every packed row, a column of zeros' worth of h for them, and one product.
PACKED_PRODUCTS = "sum arange searchsorted sub index sub eq sub clamp_min index add add where cat index mm mm mm clone"
# A GRU's second bias is in its step; the gates of the input's weights and biases are kept in another order.
GRU_PRODUCTS = "sum mm addmm_ sum cat mm mm cat cat"

CASES = {
    # name: (class, dtype, layout, layers, forward in inference and in training, backward)
    "fp32": (LSTM, FP32, "dense", 1, (ZEROS, INPUT, "recurrence_fwd"), (NO_GRADS, "recurrence_bwd", PRODUCTS)),
    "bf16": (LSTM, BF16, "dense", 1, (ZEROS, INPUT, CX, "recurrence_fwd"), (NO_GRADS, CX, "recurrence_bwd", PRODUCTS)),
    "packed": (
        LSTM, BF16, "packed", 1,
        (ZEROS, TABLES, INPUT, CX, "recurrence_fwd"),
        (NO_GRADS, CX, "recurrence_bwd", PACKED_PRODUCTS),
    ),
    # The initial states of sequences without steps, which nothing may use.
    "lengths": (
        LSTM, BF16, "lengths", 1,
        (ZEROS, INPUT, CX, "recurrence_fwd"),
        (NO_GRADS, CX, "recurrence_bwd", "le masked_fill masked_fill", PRODUCTS),
    ),
    "GRU, fp32": (GRU, FP32, "dense", 1, (ZEROS, "addmm recurrence_fwd"), ("zeros_like recurrence_bwd", GRU_PRODUCTS)),
    "GRU, bf16": (GRU, BF16, "dense", 1, (ZEROS, "addmm recurrence_fwd"), ("zeros_like recurrence_bwd", GRU_PRODUCTS)),
    # Of the upper layer the sum of its biases; the recurrent weights as one; what the exchange by data needs.
    # select_backward: autograd's, of the last layer's rows among those of all.
    "wave, fp32": (
        LSTM, FP32, "dense", 2,
        (ZEROS, INPUT, "add stack fill_ recurrence_fwd"),
        ("select_backward", NO_GRADS, "stack fill_ recurrence_bwd", PRODUCTS, "sum mm addmm_ mm clone"),
    ),
    "one step": (
        LSTM, BF16, "one step", 1,
        (ZEROS, "step_fwd"),
        (NO_GRADS, CX, "recurrence_bwd", "sum mm mm mm clone"),
    ),
}  # fmt: skip


def counts(*operations: str) -> list[str]:
    """In no order: that of independent products is not told."""
    return sorted(" ".join(operations).split())


@pytest.mark.parametrize("case", CASES)
def test_operations_of_a_call(gpu, case):
    cls, dtype, layout, layers, forward, after = CASES[case]
    module = cls(10, 64, layers, device=DEVICE, dtype=dtype, backend="triton")
    leading, keywords = {"packed": (9,), "one step": (1, 3)}.get(layout, (5, 3)), {}
    x = torch.empty(*leading, 10, device=DEVICE, dtype=dtype, requires_grad=True)
    given = PackedSequence(x, torch.tensor([3, 3, 2, 1])) if layout == "packed" else x
    if layout == "lengths":
        keywords["lengths"] = torch.empty(3, device=DEVICE, dtype=torch.int32)

    gpu.operations.clear()
    with torch.inference_mode():
        module(given, **keywords)
    assert counts(*gpu.operations) == counts(*forward)

    gpu.operations.clear()
    output = module(given, **keywords)[0]
    assert counts(*gpu.operations) == counts(*forward)

    gpu.operations.clear()
    output = output.data if layout == "packed" else output
    backward([output], [torch.empty_like(output)])
    assert counts(*gpu.operations) == counts(*after)
