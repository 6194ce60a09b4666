"""The named shapes of the benchmarks. They are plain data and can be imported without torch.

T is the number of steps, B the batch, I the input size and H the hidden size. By default I = H, and there is one layer
and one direction.
"""

import dataclasses
from dataclasses import dataclass

MODES = ("fwdbwd", "infer", "fwd")
GPU_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Shape:
    """One problem.

    Attributes:
        id: A unique name without spaces.
        T, B, I, H: Steps, batch, input size and hidden size (per direction).
        layers, bidirectional: As in `torch.nn.LSTM`.
        proj: The size of the projected h, or 0 without a projection.
        heads: The number of blocks on the diagonal of `weight_hh`. `torch.nn.LSTM` has no heads and runs dense.
        resets: The share of the (t, b) pairs at which the state is reset. `torch.nn.LSTM` runs without resets.
        lengths: The shortest and the longest sequence of a packed batch, or None for a dense one.
        alternating: Whether every second layer runs backwards in time, with its input and output flipped.
        modes, dtypes: What is measured. The dtypes are those on a GPU, because a CPU runs float32.
        sets: The sets of the runner that have the shape ("gpu", "cpu", "rehearsal").
        telling: The place in the order of a run that may be cut short. 0 is first.
        source: Where the sizes come from.
    """

    id: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    heads: int = 1
    resets: float = 0.0
    lengths: tuple[int, int] | None = None
    alternating: bool = False
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = GPU_DTYPES
    sets: tuple[str, ...] = ("gpu",)
    telling: int = 2
    source: str = ""

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def needs(self) -> tuple[str, ...]:
        """What a provider must know beyond a dense stack of full-size layers."""
        features = {
            "projection": self.proj > 0,
            "heads": self.heads > 1,
            "resets": self.resets > 0,
            "packed input": self.lengths is not None,
        }
        return tuple(name for name, needed in features.items() if needed)

    @property
    def one_layer(self) -> "Shape":
        """The first layer alone."""
        return dataclasses.replace(self, layers=1, alternating=False)

    @property
    def layer_inputs(self) -> tuple[int, ...]:
        """Input size of every layer."""
        return (self.I, *[self.directions * (self.proj or self.H)] * (self.layers - 1))

    @property
    def row_lengths(self) -> list[int]:
        """The length of every sequence: evenly from the shortest to the longest of `lengths`, or T."""
        if self.lengths is None:
            return [self.T] * self.B
        shortest, longest = self.lengths
        return [longest - round(b * (longest - shortest) / max(1, self.B - 1)) for b in range(self.B)]

    def flops(self, mode: str) -> float:
        """Floating-point operations of the matrix products; the backward does each twice, for inputs and weights."""
        recurrent = (self.proj or self.H) // self.heads
        rows = sum(self.row_lengths) * 4 * self.H * self.directions
        forward = sum(2.0 * rows * (inputs + recurrent) for inputs in self.layer_inputs)
        return forward * (3 if mode == "fwdbwd" else 1)

    def min_bytes(self, mode: str, itemsize: int) -> float:
        """Fewest bytes moved: input, output and weights once; training also their gradients."""
        D, out = self.directions, self.directions * (self.proj or self.H)
        data = sum(self.row_lengths) * sum(inputs + out for inputs in self.layer_inputs)
        recurrent = (self.proj or self.H) // self.heads
        weights = sum(D * 4 * self.H * (inputs + recurrent) for inputs in self.layer_inputs)
        return float((data + weights) * itemsize * (3 if mode == "fwdbwd" else 1))


def _shape(id: str, T: int, B: int, H: int, I: int | None = None, **kwargs) -> Shape:
    return Shape(id=id, T=T, B=B, I=H if I is None else I, H=H, **kwargs)


BOTH = ("gpu", "cpu")
INFER = ("infer",)
REHEARSAL = ("rehearsal",)

SHAPES: list[Shape] = [
    _shape("S1", 100, 32, 32, sets=BOTH, telling=1, source="small time series"),
    _shape("S2", 365, 256, 64, I=32, telling=1, source="hydrology"),
    _shape("S3", 100, 16, 128, sets=BOTH, telling=1, source="small layer"),
    _shape("S4", 1000, 8, 128, telling=1, source="long and thin"),
    _shape("S5", 512, 64, 160, I=64, telling=0, source="cuDNN's small-H cliff (H 129 to 192, B >= 9)"),
    _shape("S6", 512, 512, 128, telling=1, source="cuDNN small-H with no batch guard"),
    _shape("M1", 100, 64, 512, telling=0, source="PyTorch fastrnns"),
    _shape("M2-B16", 150, 16, 256, sets=BOTH, telling=1, source="DeepBench"),
    _shape("M2-B64", 150, 64, 256, telling=1, source="DeepBench"),
    _shape("M3", 128, 128, 256, resets=0.03, sets=BOTH, telling=1, source="reinforcement learning (TorchRL)"),
    _shape("M3-dense", 128, 128, 256, source="M3 without its resets"),
    _shape("M4", 100, 64, 512, lengths=(30, 99), telling=1, source="fastrnns, variable length"),
    _shape("M5", 40, 16, 512, layers=2, sets=BOTH, telling=1, source="RNN-T prediction net"),
    _shape("F1", 1024, 16, 768, telling=0, source="FlashRNN's figure"),
    # B = 16 and T = 1024 of the sweeps are F1.
    *[_shape(f"F2-B{B}", 1024, B, 768, source="FlashRNN's batch sweep") for B in (2, 8, 32, 64, 128, 256)],
    *[_shape(f"F3-T{T}", T, 16, 768, source="FlashRNN's length sweep") for T in (256, 512, 2048)],
    *[
        _shape(f"F4-{heads}x{768 // heads}", 1024, 16, 768, heads=heads, source="FlashRNN's head sweep")
        for heads in (48, 24, 12, 6, 3)
    ],
    _shape("L1", 50, 128, 1024, telling=0, source="GNMT"),
    _shape("L2", 557, 16, 1024, I=240, layers=2, telling=1, source="RNN-T encoder"),
    _shape(
        "L3", 800, 64, 1024, layers=5, alternating=True, modes=INFER, dtypes=("float16",), source="basecalling (Bonito)"
    ),
    _shape("L3-layer", 800, 64, 1024, modes=INFER, dtypes=("float16",), telling=1, source="one layer of L3"),
    _shape("L4-I400", 70, 80, 1150, I=400, telling=1, source="AWD-LSTM, layer 1 of 3"),
    _shape("L4-I1150", 70, 80, 1150, source="AWD-LSTM, layer 2 of 3"),
    _shape("L4-H400", 70, 80, 400, I=1150, source="AWD-LSTM, layer 3 of 3"),
    _shape("L5", 25, 128, 2048, telling=0, source="DeepBench"),
    _shape("L6", 20, 128, 4096, I=512, proj=512, layers=2, source="ELMo"),
    # DeepSpeech 2 adds the two directions up, so layers 2 to 5 take I = 1024 and the stack is no nn.LSTM.
    _shape("B1-I1312", 750, 64, 1024, I=1312, bidirectional=True, lengths=(250, 750), source="DeepSpeech 2, layer 1"),
    _shape("B1-I1024", 750, 64, 1024, bidirectional=True, lengths=(250, 750), source="DeepSpeech 2, layers 2 to 5"),
    _shape("B1-dense", 750, 64, 1024, bidirectional=True, telling=1, source="B1-I1024 with all lengths 750"),
    _shape("I1-H256", 1, 1, 256, modes=INFER, sets=BOTH, telling=1, source="streaming, one step"),
    _shape("I1-H1024", 1, 1, 1024, modes=INFER, sets=BOTH, telling=1, source="streaming, one step"),
    _shape("I2", 150, 1, 256, modes=INFER, sets=BOTH, telling=1, source="inference of one sequence"),
    _shape("X1-T65536", 65536, 4, 128, source="longer than cuDNN takes (T > 65535)"),
    _shape("X1-T100000", 100000, 4, 128, source="longer than cuDNN takes (T > 65535)"),
    # Without a GPU: small enough to end in seconds on two cores.
    _shape("C1", 100, 32, 128, sets=("cpu",), telling=0, source="the CPU default's cost over torch.nn.LSTM"),
    _shape("C2", 128, 32, 128, sets=("cpu",), telling=0, source="CPU table of the shapes' list"),
    _shape("C3", 70, 16, 1150, I=400, sets=("cpu",), telling=1, source="L4-I400 at B 16"),
    _shape("C4", 512, 1, 64, sets=("cpu",), telling=1, source="long, one sequence"),
    _shape(
        "C5", 64, 16, 128, bidirectional=True, layers=2, sets=("cpu",), telling=1, source="two bidirectional layers"
    ),
    _shape("C6", 128, 32, 128, lengths=(26, 128), sets=("cpu",), telling=0, source="C2 packed, lengths from 20 %"),
    _shape("C7", 64, 64, 512, lengths=(13, 64), sets=("cpu",), telling=0, source="packed, lengths from 20 %"),
    _shape("C8", 128, 4, 128, lengths=(26, 128), sets=("cpu",), telling=1, source="packed, few sequences"),
    _shape("C9", 64, 16, 256, proj=128, sets=("cpu",), telling=1, source="a projection"),
    # The rehearsal of a GPU run, and the tests: small enough for the interpreter.
    _shape("R1", 3, 3, 16, sets=REHEARSAL, telling=0, source="rehearsal of a group of one"),
    _shape("R2", 3, 2, 40, I=4, telling=0, layers=2, alternating=True, modes=INFER, sets=REHEARSAL, source="rehearsal"),
    _shape("R3", 2, 2, 32, heads=2, modes=("fwdbwd",), sets=REHEARSAL, source="rehearsal of heads"),
    _shape("R4", 3, 3, 8, proj=4, lengths=(2, 3), modes=INFER, sets=REHEARSAL, source="rehearsal of a packed batch"),
    _shape("R5", 3, 3, 8, resets=0.3, modes=INFER, sets=REHEARSAL, source="rehearsal of resets"),
]

BY_ID: dict[str, Shape] = {shape.id: shape for shape in SHAPES}


def in_set(name: str) -> list[Shape]:
    """Shapes of "gpu", "cpu", "rehearsal" or "all", most telling first (the file's order within a rank)."""
    shapes = [shape for shape in SHAPES if name == "all" or name in shape.sets]
    return sorted(shapes, key=lambda shape: shape.telling)
