"""What was found once: small calls, which `make test` makes again. Add what `make fuzz` prints."""

from fuzz.bad import Bad
from fuzz.cases import Case

RIGHT = [
    # Not faults of ours: the norm of one unit, the branch of a maximum that a rounding decides, and a sum of three
    # numbers that cancel, behind a tanh that is nearly 1.
    Case("RNN tanh", "auto", "float32", T=20, H=3, lengths=(1,), hx="given"),
    Case(member="LayerNormLSTM", backend="reference", dtype="float16", T=3, form="unbatched", resets=1.0, scale=0.01),
    Case(member="SLSTM", backend="reference", dtype="float16", T=8, B=17, I=33, H=33, heads=33, loss="output"),
]
WRONG = [
    # A parameter with other sizes: the process ended, or the number of heads was another one.
    Bad("weight_hh", "nothing", "CoupledLSTM", "torch", form="unbatched"),
    Bad("weight_ih", "nothing", "SLSTM", "auto", form="batch_first"),
    Bad("weight_hh", "one column", "RNN tanh", "torch", is_cell=True),
    Bad("weight_hh", "a row less", "LSTM", "auto", form="unbatched", layers=2, bidirectional=True),
    Bad("weight_ih", "0-D", "LSTM", "torch", form="unbatched", layers=2),
    Bad("bias_ih", "one row", "CoupledLSTM", "auto", is_cell=True),
    Bad("bias_hh", "0-D", "LayerNormLSTM", "auto", form="unbatched"),
    Bad("bias_hh", "an axis more", "PeepholeLSTM", "reference", form="batch_first"),
    Bad("bias_hh", "double", "RNN relu", "reference", is_cell=True),
    Bad("bias_ih", "half", "LSTM", "torch", form="batch_first"),
    Bad("weight_hh", "on meta", "LayerNormLSTM", "torch", form="unbatched", bidirectional=True),
    Bad("weight_ci", "half", "PeepholeLSTM", "auto"),
    # The order of a packed batch.
    Bad("packed", "one order", "GRU", "torch", form="packed in any order"),
    Bad("packed", "orders that differ", "CoupledLSTM", "torch", form="packed in any order"),
    Bad("packed", "sorted_indices: meta", "CoupledLSTM", "torch", form="packed in any order"),
    Bad("packed", "unsorted_indices: meta", "SLSTM", "torch", form="packed"),
    Bad("packed", "sorted_indices: a list", "LayerNormLSTM", "torch", form="packed in any order"),
    Bad("packed", "batch_sizes: a list", "SLSTM", "torch", form="packed in any order"),
    Bad("packed", "no data", "CoupledLSTM", "auto", form="packed"),
    # What is no tensor, or none with strides.
    Bad("input", "None", "LSTM", "torch", form="batch_first"),
    Bad("input", "an array", "RNN tanh", "auto", is_cell=True),
    Bad("input", "nested strided", "LayerNormLSTM", "auto"),
    Bad("input", "sparse", "LSTM", "torch", is_cell=True, form="unbatched"),
    Bad("input", "oneDNN's", "PeepholeLSTM", "torch", is_cell=True),
    Bad("packed", "sparse data", "GRU", "reference", form="packed in any order"),
    Bad("hx", "a number", "LSTM", "reference", form="packed"),
    Bad("hx", "an iterator", "LayerNormLSTM", "torch", form="batch_first"),
    Bad("hx", "sparse, state 0", "RNN tanh", "auto", form="packed"),
    Bad("hx", "nested strided, state -1", "PeepholeLSTM", "torch", form="packed"),
    Bad("lengths", "sparse", "RNN relu", "torch", form="batch_first"),
    Bad("resets", "sparse", "RNN tanh", "torch"),
    # Numbers that no float holds.
    Bad("grad_clip of a call", "10^400", "LayerNormLSTM", "auto", form="unbatched"),
    Bad("grad_clip of the constructor", "10^400", "SLSTM", "torch"),
    Bad("zoneout of the constructor", "10^400", "LSTM", "reference"),
    Bad("weight_dropout of the constructor", "10^400", "PeepholeLSTM"),
]
