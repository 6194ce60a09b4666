"""Bytes of a training step of one LSTM layer, from its shapes.

T is the number of steps, B the batch, I the input size and H the hidden size. `itemsize` is the number of bytes of a
value in the dtype of the layer. States beside h are kept in float32 (float64 in float64).

The memory of a step has three parts. Inputs and parameters are there before, and are not counted. The gradients of
output, input and parameters are results, and every implementation holds them (`gradients`). The rest belongs to the
layer (`own_peak`), and depends on `save`:

- "gates": output, gates and c of all steps are kept from the forward to the backward. The backward also holds the
  gradients of the preactivations of all steps.
- "states": output, and c between blocks of steps, are kept. The backward takes one block after another, beginning with
  the last. It computes the gates and c of the block again, by one product of all its steps and an elementwise scan, and
  then drops them.

Dense and ragged batches of one direction run in blocks. Two directions are one block, because they meet in `output`
from both ends. Packed batches are one block too, because their steps have no fixed number of rows. They keep as little
between forward and backward, but their peak is nearly that of "gates".

The numbers of cuDNN are a bound. `cudnnGetRNNTempSpaceSizes` needs a running cuDNN, and no table of it is published.
Two sizes are known: github.com/pytorch/pytorch/issues/2895 prints, for 4 layers of H 320 in float32, 736,000,000 bytes
for an LSTM and 864,000,000 for a GRU. If T * B is 25,000, these are 23 and 27 values per unit and step. 23 = 4 * 5 + 3
and 27 = 4 * 6 + 3. So a layer of an LSTM has five values, which are four gates and c, and a layer of a GRU has six. The
other three are the outputs between layers. T and B are inferred, and other versions may need more. `cudnn_reserve` is a
bound, because gates and c are what a backward reads that recomputes nothing. In half precision c counts as two bytes,
in favour of cuDNN. `make gpu` measures the peaks of `nn.LSTM` and of ours, gradients included.
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
    """Bytes of the gradients of output, input, weights and two biases. Every implementation holds them at the end."""
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
