"""Bytes of a training step of one LSTM layer, from its shapes.

T steps, B batch, I input size, H hidden size; `itemsize`, bytes of a value of the layer's dtype. States beside h are
kept in float32 (float64 in float64).

What a step holds has three parts. Inputs and parameters, which were there before, count for nobody. The gradients of
output, input and parameters are results, and every implementation holds them (`gradients`). The rest is the layer's own
(`own_peak`), and the choice of `save` is about that:

- "gates": output, gates and c of all steps, kept from the forward to the backward, and in the backward the gradients of
the
  preactivations of all steps.
- "states": output, and c between blocks of steps. Forward and backward go from block to block: the backward takes the
last
  one first, recomputes its gates and c (one product of all its steps, then an elementwise scan), and forgets them
  again.

Dense or ragged batches of one direction run in blocks. Two directions, which meet in `output` from both ends, and
packed
batches, whose steps have no fixed number of rows, are one block: between forward and backward they keep as little, but
their peak is that of "gates" nearly.

cuDNN, for comparison. `cudnnGetRNNTempSpaceSizes` is known only where cuDNN runs, and no table of it is published. Two
sizes
are: github.com/pytorch/pytorch/issues/2895 prints, for 4 layers of H 320 in float32, 736,000,000 bytes for an LSTM and
864,000,000 for a GRU. Both are whole numbers of values of every unit and step if T * B is 25,000: 23 = 4 * 5 + 3 and
27 = 4 * 6 + 3: for a layer of an LSTM five, which are four gates and c, for one of a GRU six, and the outputs between
layers. T and B are inferred, and other versions may take more, so `cudnn_reserve` is a bound: gates and c are what a
backward that recomputes nothing reads. In half precision c is taken to have two bytes as well, which is to cuDNN's
credit. `make gpu` measures the peaks of `nn.LSTM` and of ours, gradients included.
"""

import itertools

from fusedlstm.autograd import begins_of_blocks


def kept(T: int, B: int, H: int, itemsize: int, save: str = "gates", directions: int = 1) -> int:
    """Bytes that lie between forward and backward, the output among them, but not input and parameters."""
    values, state = T * B * H * directions, max(4, itemsize)
    if save == "gates":
        return values * (itemsize + 4 * itemsize + state)
    return values * itemsize + _borders(T, B, directions) * B * H * state


def gradients(T: int, B: int, I: int, H: int, itemsize: int, directions: int = 1) -> int:
    """Bytes of the gradients of output, input, weights and the two biases, which every implementation holds at the
    end.
    """
    parameters = 4 * H * (I + H + 2) * directions
    return (T * B * (H * directions + I) + parameters) * itemsize


def own_peak(T: int, B: int, H: int, itemsize: int, save: str = "gates", directions: int = 1) -> int:
    """The most bytes at once above inputs, parameters and `gradients`, in forward and backward.

    With `gradients` added it is a bound; nearly reached with "gates", and with "states" where there are two blocks or
    more.
    """
    state = max(4, itemsize)
    begins = begins_of_blocks(T, B) if save == "states" and directions == 1 else [0, T]
    longest = max(end - begin for begin, end in itertools.pairwise(begins))
    unit = B * H * directions  # values of one step
    # Preactivations become gates and c, those become gradients of preactivations: never more than two of the three
    # large ones.
    block = longest * unit * (8 * itemsize + state)
    small = unit * (4 * itemsize + 4 * state)  # h and c that enter a block and leave it, and their gradients
    return T * unit * itemsize + (len(begins) - 2) * unit * state + block + small


def cudnn_reserve(T: int, B: int, H: int, itemsize: int, directions: int = 1) -> int:
    """Bytes that cuDNN keeps of one layer from forward to backward beside the output, at least (see above)."""
    return 5 * T * B * H * directions * itemsize


def _borders(T: int, B: int, directions: int) -> int:
    return len(begins_of_blocks(T, B)) - 2 if directions == 1 else 0
