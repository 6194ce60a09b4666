"""Weights go to other libraries and come back. The equations here are those of the other libraries, in NumPy."""

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves

import fusedlstm
from fusedlstm import weights

T, B, I, H = 6, 3, 5, 6
HEADS, DH = 2, 3
ATOL = 1e-14  # a few dozen ulps of numbers around 1, in float64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(i, f, g, o, c):
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def split(x, count):
    return np.split(x, count, -1)


# One step of each layer. w are its weights, x is [B, I], and the states are [B, H].


def keras_lstm(w, x, h, c):
    kernel, recurrent_kernel, *bias = w
    i, f, c_new, o = split(x @ kernel + h @ recurrent_kernel + sum(bias), 4)
    return lstm(i, f, c_new, o, c)


def keras_gru(w, x, h):
    kernel, recurrent_kernel, *bias = w
    input_bias, recurrent_bias = bias[0] if bias else (0, 0)
    xz, xr, xh = split(x @ kernel + input_bias, 3)
    hz, hr, hh = split(h @ recurrent_kernel + recurrent_bias, 3)
    z = sigmoid(xz + hz)
    return (z * h + (1 - z) * np.tanh(xh + sigmoid(xr + hr) * hh),)


def keras_simple_rnn(w, x, h, activation=np.tanh):
    kernel, recurrent_kernel, *bias = w
    return (activation(x @ kernel + h @ recurrent_kernel + sum(bias)),)


def linen_lstm(w, x, h, c):
    i, f, g, o = (x @ w[f"i{k}"]["kernel"] + h @ w[f"h{k}"]["kernel"] + w[f"h{k}"]["bias"] for k in "ifgo")
    return lstm(i, f, g, o, c)


def linen_gru(w, x, h):
    def of_x(k):
        return x @ w[f"i{k}"]["kernel"] + w[f"i{k}"]["bias"]

    r, z = (sigmoid(of_x(k) + h @ w[f"h{k}"]["kernel"]) for k in "rz")
    n = np.tanh(of_x("n") + r * (h @ w["hn"]["kernel"] + w["hn"]["bias"]))
    return ((1 - z) * n + z * h,)


def linen_simple(w, x, h, activation=np.tanh):
    return (activation(x @ w["i"]["kernel"] + w["i"]["bias"] + h @ w["h"]["kernel"]),)


def nnx_lstm(w, x, h, c):
    y = x @ w["dense_i"]["kernel"] + h @ w["dense_h"]["kernel"] + w["dense_h"]["bias"]
    return lstm(*split(y, 4), c)


def nnx_gru(w, x, h):
    xr, xz, xn = split(x @ w["dense_i"]["kernel"] + w["dense_i"]["bias"], 3)
    hr, hz, hn = split(h @ w["dense_h"]["kernel"], 3)
    r, z = sigmoid(xr + hr), sigmoid(xz + hz)
    return ((1 - z) * np.tanh(xn + r * hn) + z * h,)


def nnx_simple(w, x, h, activation=np.tanh):
    return (activation(x @ w["dense_i"]["kernel"] + w["dense_i"]["bias"] + h @ w["dense_h"]["kernel"]),)


def equinox_lstm(w, x, h, c):
    return lstm(*split(x @ w["weight_ih"].T + h @ w["weight_hh"].T + w.get("bias", 0), 4), c)


def equinox_gru(w, x, h):
    xr, xz, xn = split(x @ w["weight_ih"].T + w.get("bias", 0), 3)
    hr, hz, hn = split(h @ w["weight_hh"].T, 3)
    reset, inp = sigmoid(xr + hr), sigmoid(xz + hz)
    new = np.tanh(xn + reset * (hn + w.get("bias_n", 0)))
    return (new + inp * (h - new),)


def haste_lstm(w, x, h, c):
    i, g, f, o = split(x @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"], 4)
    return lstm(i, f, g, o, c)


def haste_gru(w, x, h):
    return keras_gru([w["kernel"], w["recurrent_kernel"], (w["bias"], w["recurrent_bias"])], x, h)


def haste_layer_norm_gru(w, x, h):
    of_x = split(normed(x @ w["kernel"]) * w["gamma"][0] + w["bias"], 3)
    of_h = split(normed(h @ w["recurrent_kernel"]) * w["gamma"][1] + w["recurrent_bias"], 3)
    z, r = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
    return (z * h + (1 - z) * np.tanh(of_x[2] + r * of_h[2]),)


def haste_indrnn(w, x, h):
    return (np.tanh(x @ w["kernel"] + w["bias"] + h * w["recurrent_scale"]),)


def haste_layer_norm_lstm(w, x, h, c):
    of_x, of_h = normed(x @ w["kernel"]) * w["gamma"][0], normed(h @ w["recurrent_kernel"]) * w["gamma"][1]
    i, g, f, o = split(of_x + of_h + w["bias"], 4)
    _, c = lstm(i, f, g, o, c)
    return sigmoid(o) * np.tanh(normed(c) * w["gamma_h"] + w["beta_h"]), c


def slstm(i, f, z, o, c, n, m):
    """Every gate has its own preactivation. An empty state has n = 0, and then m is i."""
    kept = -np.log1p(np.exp(-f)) + m
    m_new = np.where(n == 0, i, np.maximum(kept, i))
    c = np.exp(kept - m_new) * c + np.exp(i - m_new) * np.tanh(z)
    n = np.exp(kept - m_new) * n + np.exp(i - m_new)
    return sigmoid(o) * c / n, c, n, m_new


def by_head(h):
    return h.reshape(-1, HEADS, DH)


def preactivations(w, x):
    return x @ w["weight_ih"].T if "weight_ih" in w else x


def xlstm(step):
    def run(w, x, h, *states):
        R = w["_recurrent_kernel_"].reshape(HEADS, 4, DH, DH)
        of_h = np.einsum("hgoi,bhi->bgho", R, by_head(h)).reshape(-1, 4 * H)
        return step(*split(preactivations(w, x) + of_h + w["_bias_"], 4), *states)

    return run


def xlstm_cuda(step):
    def run(w, x, h, *states):
        R = w["_recurrent_kernel_"].reshape(HEADS, DH, 4, DH)
        of_h = np.einsum("higo,bhi->bgho", R, by_head(h)).reshape(-1, 4 * H)
        bias = w["_bias_"].reshape(HEADS, 4, DH).transpose(1, 0, 2).reshape(-1)
        return step(*split(preactivations(w, x) + of_h + bias, 4), *states)

    return run


def flashrnn(w, x, h):
    """The input's preactivations, the recurrent ones and the biases by gate, each [B, H]."""
    of_h = np.einsum("ghoi,bhi->gbho", w["R"], by_head(h)).reshape(len(w["R"]), -1, H)
    of_x = preactivations(w, x)
    return split(of_x, of_x.shape[-1] // H), of_h, w["b"].reshape(-1, H)


def flashrnn_lstm(w, x, h, c):
    return lstm(*(a + b + bias for a, b, bias in zip(*flashrnn(w, x, h), strict=True)), c)


def flashrnn_gru(w, x, h):
    (xr, xz, xn), (hg, hr, hz), (bg, br, bz, bn) = flashrnn(w, x, h)
    z = sigmoid(xz + hz + bz)
    return (z * h + (1 - z) * np.tanh(xn + bn + sigmoid(xr + hr + br) * (hg + bg)),)


def flashrnn_elman(w, x, h):
    (of_x,), (of_h,), (bias,) = flashrnn(w, x, h)
    return (np.tanh(of_x + of_h + bias),)


def linen(*biased):
    """A dict for every name: inputs begin with i, states with h. `biased` are the names that have a bias."""

    def shapes(I, *names):
        kernels = {name: {"kernel": (I if name[0] == "i" else H, H)} for name in names}
        return {name: kernel | ({"bias": (H,)} if name in biased else {}) for name, kernel in kernels.items()}

    return shapes


def gates_of(letters):
    return [side + gate for side in "ih" for gate in letters]


def nnx(I, G, biased):
    found = {"dense_i": {"kernel": (I, G * H)}, "dense_h": {"kernel": (H, G * H)}}
    found[biased]["bias"] = (G * H,)
    return found


def haste(I, G, **others):
    return {"kernel": (I, G * H), "recurrent_kernel": (H, G * H), "bias": (G * H,), **others}


# For each kind the number of states, the step, and the shapes of the weights of a layer with I inputs.
KINDS = {
    "keras.LSTM": (2, keras_lstm, lambda I: [(I, 4 * H), (H, 4 * H), (4 * H,)]),
    "keras.GRU": (1, keras_gru, lambda I: [(I, 3 * H), (H, 3 * H), (2, 3 * H)]),
    "keras.SimpleRNN": (1, keras_simple_rnn, lambda I: [(I, H), (H, H), (H,)]),
    "flax.linen.LSTMCell": (2, linen_lstm, lambda I: linen("hi", "hf", "hg", "ho")(I, *gates_of("ifgo"))),
    "flax.linen.OptimizedLSTMCell": (2, linen_lstm, lambda I: linen("hi", "hf", "hg", "ho")(I, *gates_of("ifgo"))),
    "flax.linen.GRUCell": (1, linen_gru, lambda I: linen("ir", "iz", "in", "hn")(I, *gates_of("rzn"))),
    "flax.linen.SimpleCell": (1, linen_simple, lambda I: linen("i")(I, "i", "h")),
    "flax.nnx.OptimizedLSTMCell": (2, nnx_lstm, lambda I: nnx(I, 4, "dense_h")),
    "flax.nnx.GRUCell": (1, nnx_gru, lambda I: nnx(I, 3, "dense_i")),
    "flax.nnx.SimpleCell": (1, nnx_simple, lambda I: nnx(I, 1, "dense_i")),
    "equinox.LSTMCell": (
        2,
        equinox_lstm,
        lambda I: {"weight_ih": (4 * H, I), "weight_hh": (4 * H, H), "bias": (4 * H,)},
    ),
    "equinox.GRUCell": (
        1,
        equinox_gru,
        lambda I: {"weight_ih": (3 * H, I), "weight_hh": (3 * H, H), "bias": (3 * H,), "bias_n": (H,)},
    ),
    "haste.LSTM": (2, haste_lstm, lambda I: haste(I, 4)),
    "haste.GRU": (1, haste_gru, lambda I: haste(I, 3, recurrent_bias=(3 * H,))),
    "haste.IndRNN": (1, haste_indrnn, lambda I: {"kernel": (I, H), "recurrent_scale": (H,), "bias": (H,)}),
    "haste.LayerNormGRU": (
        1,
        haste_layer_norm_gru,
        lambda I: haste(I, 3, recurrent_bias=(3 * H,), gamma=(2, 3 * H)),
    ),
    "haste.LayerNormLSTM": (
        2,
        haste_layer_norm_lstm,
        lambda I: haste(I, 4, gamma=(2, 4 * H), gamma_h=(H,), beta_h=(H,)),
    ),
    **{
        f"xlstm.{name}{backend}": (
            states,
            form(step),
            lambda I, R=R: {"_recurrent_kernel_": R, "_bias_": (4 * H,), "weight_ih": (4 * H, I)},
        )
        for name, states, step in (("lstm", 2, lstm), ("slstm", 4, slstm))
        for backend, form, R in (("", xlstm, (HEADS, 4 * DH, DH)), ("_cuda", xlstm_cuda, (HEADS, DH, 4 * DH)))
    },
    **{
        f"flashrnn.{name}": (
            states,
            step,
            lambda I, G=G, biases=biases: {
                "R": (G, HEADS, DH, DH),
                "b": (biases, HEADS, DH),
                "weight_ih": (G * H, I),
            },
        )
        for name, states, step, G, biases in (
            ("lstm", 2, flashrnn_lstm, 4, 4),
            ("gru", 1, flashrnn_gru, 3, 4),
            ("elman", 1, flashrnn_elman, 1, 1),
        )
    },
}
DENSE = [kind for kind in KINDS if not kind.startswith(("xlstm", "flashrnn", "haste.Ind"))]
RELU = {"keras.SimpleRNN": keras_simple_rnn, "flax.linen.SimpleCell": linen_simple, "flax.nnx.SimpleCell": nnx_simple}


def drawn(shapes, rng=None):
    rng = rng or np.random.default_rng(0)
    if isinstance(shapes, dict):
        return {name: drawn(shape, rng) for name, shape in shapes.items()}
    if isinstance(shapes, list):
        return [drawn(shape, rng) for shape in shapes]
    return rng.normal(size=shapes, scale=0.4)


def pair(kind, forward, backward):
    return [*forward, *backward] if isinstance(forward, list) else (forward, backward)


def run(kind, layers, x, directions=1, step=None):
    """What the other library computes: the output [T, B, D * H], and the final states of all layers."""
    count, of_kind, _ = KINDS[kind]
    step, finals = step or of_kind, []
    for layer in layers:
        halves = [layer]
        if directions == 2:
            halves = [layer[: len(layer) // 2], layer[len(layer) // 2 :]] if isinstance(layer, list) else layer
        outputs = []
        for w, order in zip(halves, (1, -1), strict=False):
            states, found = [np.zeros((B, H)) for _ in range(count)], []
            for x_t in x[::order]:
                states = step(w, x_t, *states)
                found.append(states[0])
            outputs.append(np.stack(found)[::order])
            finals.append(states)
        x = np.concatenate(outputs, -1)
    return x, [np.stack(state) for state in zip(*finals, strict=True)]


def assert_same(module, kind, layers, inputs=I, **options):
    x = np.random.default_rng(1).normal(size=(T, B, inputs))
    expected, finals = run(kind, layers, x, **options)
    output, states = module(torch.from_numpy(x))
    ours = (states,) if len(finals) == 1 else states
    for found, theirs in zip((output, *ours), (expected, *finals), strict=True):
        np.testing.assert_allclose(found.detach(), theirs, rtol=0, atol=ATOL * max(1, abs(theirs).max()))


def assert_equal(found, expected):
    for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_same(kind):
    layer = drawn(KINDS[kind][2](I))
    module = weights.load(kind, layer)
    assert_same(module, kind, [layer])
    assert_equal(weights.dump(kind, module), [layer])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bidirectional_stack_computes_the_same(kind):
    rng, shapes = np.random.default_rng(0), KINDS[kind][2]
    layers = [pair(kind, *(drawn(shapes(size), rng) for _ in "fb")) for size in (I, 2 * H, 2 * H)]
    module = weights.load(kind, *layers)
    assert (module.num_layers, module.bidirectional) == (3, True)
    assert_same(module, kind, layers, directions=2)
    assert_equal(weights.dump(kind, module), layers)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("xlstm", "flashrnn"))])
def test_preactivations_are_the_input_without_weight_ih(kind):
    layer = drawn(KINDS[kind][2](I))
    inputs = len(layer.pop("weight_ih"))
    module = weights.load(kind, layer)
    assert module.input_size == inputs
    assert_same(module, kind, [layer], inputs)


def keras_gru_before(w, x, h):
    """With reset_after=False."""
    kernels, recurrent, bias = split(w[0], 3), split(w[1], 3), split(w[2], 3) if len(w) == 3 else (0, 0, 0)
    z, r = (sigmoid(x @ kernels[k] + h @ recurrent[k] + bias[k]) for k in (0, 1))
    return (z * h + (1 - z) * np.tanh(x @ kernels[2] + (r * h) @ recurrent[2] + bias[2]),)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gru_of_keras_with_the_reset_before_the_product(bias):
    """Its bias tells, or its configuration, which a bidirectional layer has inside."""
    rng, step = np.random.default_rng(0), {"step": keras_gru_before}
    shapes = [[(size, 3 * H), (H, 3 * H), (3 * H,)][: 2 + bias] for size in (I, 2 * H)]
    layers = [drawn(shape * 2, rng) for shape in shapes]
    config = bidirectional(reset_after=False)
    for configs in ([config], []) if bias else ([config], [config["layer"]["config"]]):
        module = weights.load("keras.GRU", *layers, configs=configs)
        assert type(module) is fusedlstm.ResetBeforeGRU and (module.bias, module.bidirectional) == (bias, True)
        assert_same(module, "keras.GRU", layers, directions=2, **step)
        assert_equal(weights.dump("keras.GRU", module), layers)
    module = fusedlstm.ResetBeforeGRU(I, H, 2, bias=bias, dtype=torch.float64)  # with two biases in the place of one
    assert_same(module, "keras.GRU", weights.dump("keras.GRU", module), **step)
    with pytest.raises(TypeError, match="module: expected"):
        weights.dump("haste.GRU", module)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_our_layers_go_there(kind, bias):
    """With two biases of ours in the place of one, and with none."""
    heads = H if kind == "haste.IndRNN" else 1 if kind in DENSE else HEADS
    of = weights.load(kind, drawn(KINDS[kind][2](I)))
    module = type(of)(I, H, 2, bias=bias, bidirectional=True, num_heads=heads, dtype=torch.float64)
    if bias and kind == "flax.nnx.GRUCell":
        with pytest.raises(ValueError, match=r"bias_hh: expected zeros in the rows of n for flax.nnx.GRUCell"):
            weights.dump(kind, module)
        for name, parameter in module.named_parameters():
            if name.startswith("bias_hh"):
                parameter.data[2 * H :] = 0
    layers = weights.dump(kind, module)
    assert_same(module, kind, layers, directions=2)
    assert_same(weights.load(kind, *layers), kind, layers, directions=2)


@pytest.mark.parametrize("kind", ["keras.LSTM", "keras.GRU", "keras.SimpleRNN", "equinox.LSTMCell", "equinox.GRUCell"])
def test_layers_without_bias(kind):
    layer = drawn(KINDS[kind][2](I))
    layer = layer[:2] if isinstance(layer, list) else {k: None if "bias" in k else w for k, w in layer.items()}
    module = weights.load(kind, layer)
    assert not module.bias
    without = layer if isinstance(layer, list) else {k: w for k, w in layer.items() if w is not None}
    assert_same(module, kind, [without])
    assert_equal(weights.dump(kind, module), [without])


@pytest.mark.parametrize("kind", RELU)
def test_rectifier(kind):
    layer = drawn(KINDS[kind][2](I))
    module = weights.load(kind, layer, nonlinearity="relu", configs=[{"activation": "relu"}] if "keras" in kind else [])

    def step(w, x, h):
        return RELU[kind](w, x, h, lambda y: np.maximum(y, 0))

    assert_same(module, kind, [layer], step=step)
    assert_equal(weights.dump(kind, module), [layer])


@pytest.mark.parametrize("cls", [fusedlstm.LSTM, fusedlstm.GRU, fusedlstm.RNN])
def test_heads_become_a_dense_layer_where_there_are_none(cls):
    module = cls(I, H, num_heads=HEADS, dtype=torch.float64)
    kind = {fusedlstm.LSTM: "keras.LSTM", fusedlstm.GRU: "haste.GRU", fusedlstm.RNN: "keras.SimpleRNN"}[cls]
    assert_same(module, kind, weights.dump(kind, module))


def test_zoneout_of_haste_in_evaluation():
    """haste keeps a part of h only: h = p h_prev + (1 - p) h."""
    layer, p = drawn(KINDS["haste.LSTM"][2](I)), 0.3

    def step(w, x, h, c):
        h_new, c = haste_lstm(w, x, h, c)
        return p * h + (1 - p) * h_new, c

    module = weights.load("haste.LSTM", layer, zoneout=(p, 0)).eval()
    assert_same(module, "haste.LSTM", [layer], step=step)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_and_owners(dtype):
    layer = drawn(KINDS["keras.LSTM"][2](I))
    arrays = [w.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for w in layer]
    module = weights.load("keras.LSTM", arrays)
    assert module.weight_ih_l0.dtype == getattr(torch, dtype)
    (back,) = weights.dump("keras.LSTM", module)
    assert back[0].dtype == ("float32" if dtype == "bfloat16" else dtype)
    assert_equal(back, [w.astype("float64") for w in arrays])
    for array in back:
        array.fill(7)  # a copy
    assert_equal(weights.dump("keras.LSTM", module), [w.astype("float64") for w in arrays])
    tensors = [torch.from_numpy(w).to(module.weight_ih_l0.dtype).requires_grad_() for w in layer]
    of_torch = weights.load("keras.LSTM", tensors).state_dict()
    assert all(torch.equal(w, of_torch[name]) for name, w in module.state_dict().items())
    assert weights.load("keras.LSTM", arrays, dtype=torch.float32).weight_ih_l0.dtype == torch.float32


def test_a_default_device_and_parametrizations():
    layer = drawn(KINDS["flax.linen.GRUCell"][2](I))
    with torch.device("meta"):
        module = weights.load("flax.linen.GRUCell", layer)
        assert_equal(weights.dump("flax.linen.GRUCell", module), [layer])
    normed = weight_norm(module, "weight_hh_l0")
    assert_same(normed, "flax.linen.GRUCell", weights.dump("flax.linen.GRUCell", normed))


KERAS = drawn(KINDS["keras.LSTM"][2](I))
GRU = drawn(KINDS["keras.GRU"][2](I))
EQUINOX = drawn(KINDS["equinox.LSTMCell"][2](I))
FLASHRNN = drawn({"R": (4, HEADS, DH, DH), "b": (4, HEADS, DH)})
BEFORE = [*GRU[:2], GRU[2][0]]


def bidirectional(**options):
    one = {"class_name": "LSTM", "config": {"activation": "tanh", **options}}
    return {"merge_mode": "concat", "layer": one, "backward_layer": {"config": {**one["config"], "go_backwards": True}}}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: weights.load("keras.Lstm", KERAS), r"kind: expected one of keras.LSTM, .*, got 'keras.Lstm'$"),
        (lambda: weights.load("flashrnn.slstm", FLASHRNN), r"kind: .*: it keeps n at 1 or more"),
        (lambda: weights.load("keras.LSTM"), r"layers: expected the weights of one layer or more, got none"),
        (
            lambda: weights.load("keras.LSTM", KERAS[:1]),
            r"layers\[0\]: expected kernel, recurrent_kernel, bias, .* 1 a",
        ),
        (
            lambda: weights.load("keras.LSTM", [w.T for w in KERAS]),
            r"layers\[0\], kernel: expected shape \[24, 96\], got \[24, 5\]",
        ),
        (
            lambda: weights.load("keras.LSTM", KERAS, KERAS),
            r"layers\[1\], kernel: expected shape \[6, 24\], got \[5, 24\]",
        ),
        (
            lambda: weights.load("keras.LSTM", KERAS, KERAS[:2]),
            r"layers\[1\]: expected the arrays kernel, recurrent_kernel, bias, got kernel, recurrent_kernel$",
        ),
        (
            lambda: weights.load("keras.LSTM", KERAS + KERAS, [np.zeros((12, 24)), *KERAS[1:]]),
            r"layers\[1\]: expected 2 direction\(s\) as in layers\[0\], got 1",
        ),
        (
            lambda: weights.load("keras.GRU", GRU, configs=[{"reset_after": False}]),
            r"layers\[0\], bias: expected shape \[18\], got \[2, 18\]",
        ),
        (
            lambda: weights.load("keras.GRU", GRU, BEFORE),
            r"layers\[0\], bias: expected shape \[18\], got \[2, 18\]",
        ),
        (
            lambda: weights.load("keras.LSTM", KERAS, configs=[{}, {"recurrent_activation": "hard_sigmoid"}]),
            r"configs\[1\]: expected recurrent_activation to be 'sigmoid', got 'hard_sigmoid'",
        ),
        (
            lambda: weights.load("keras.LSTM", KERAS, configs=[{"recurrent_dropout": 0.2}]),
            r"expected recurrent_dropout to be 0, got 0.2",
        ),
        (lambda: weights.load("keras.LSTM", KERAS, configs=[{"dropout": 0.2}]), r"expected dropout to be 0, got 0.2"),
        (lambda: weights.load("keras.LSTM", KERAS, configs=[{"activation": "relu"}]), r"activation to be 'tanh', got"),
        (
            lambda: weights.load("keras.LSTM", KERAS, configs=[{"go_backwards": True}]),
            r"configs\[0\]: expected go_backwards to be False, got True: flip the input",
        ),
        (
            lambda: weights.load("keras.LSTM", KERAS * 2, configs=[bidirectional() | {"merge_mode": "sum"}]),
            r"configs\[0\]: expected merge_mode to be 'concat', got 'sum'",
        ),
        (
            lambda: weights.load("keras.LSTM", KERAS * 2, configs=[bidirectional(activation="elu")]),
            r"configs\[0\]\['layer'\]: expected activation to be 'tanh', got 'elu'",
        ),
        (
            lambda: weights.load(
                "keras.LSTM", KERAS * 2, configs=[bidirectional() | {"backward_layer": {"config": {"dropout": 0.5}}}]
            ),
            r"configs\[0\]\['backward_layer'\]: expected dropout to be 0, got 0.5",
        ),
        (
            lambda: weights.load("equinox.LSTMCell", EQUINOX | {"gamma": np.ones(H)}),
            r"layers\[0\]: expected the arrays weight_ih, weight_hh, bias, got weight_ih, weight_hh, bias, gamma",
        ),
        (
            lambda: weights.load("equinox.LSTMCell", (EQUINOX, EQUINOX | {"weight_ih": None})),
            r"layers\[0\], backward: expected the arrays .*, got weight_hh, bias",
        ),
        (
            lambda: weights.load("equinox.LSTMCell", EQUINOX | {"weight_hh": np.ones(4)}),
            r"layers\[0\], weight_hh: expected 2 axes, got shape \[4\]",
        ),
        (
            lambda: weights.load("equinox.LSTMCell", EQUINOX | {"weight_ih": np.ones(4)}),
            r"layers\[0\], weight_ih: expected 2 axes, got shape \[4\]",
        ),
        (lambda: weights.load("haste.LSTM", {}), r"layers\[0\]: expected the arrays kernel, .*, got none"),
        (
            lambda: weights.load("flashrnn.lstm", FLASHRNN, FLASHRNN),
            r"layers\[1\]: expected weight_ih with shape \[24, 6\], got none",
        ),
        (
            lambda: weights.dump("keras.LSTM", fusedlstm.LSTM(I, H, proj_size=2)),
            r"proj_size: expected 0 for keras.LSTM, which has no projection, got 2",
        ),
        (
            lambda: weights.dump("flashrnn.elman", fusedlstm.RNN(I, H, nonlinearity="relu")),
            r"nonlinearity: expected 'tanh' for flashrnn.elman, got 'relu'",
        ),
        (
            lambda: weights.dump("haste.IndRNN", fusedlstm.RNN(I, H)),
            r"num_heads: expected hidden_size \(6\) for haste.IndRNN, got 1",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: weights.load("keras.LSTM", EQUINOX), r"layers\[0\]: expected a list of arrays, got dict"),
        (
            lambda: weights.load("keras.LSTM", (KERAS, KERAS)),
            r"layers\[0\]: expected a list of arrays, got one with list",
        ),
        (lambda: weights.load("equinox.LSTMCell", KERAS), r"layers\[0\]: expected a dict of arrays, .*, got list"),
        (
            lambda: weights.dump("keras.LSTM", fusedlstm.PeepholeLSTM(I, H)),
            r"module: expected a LSTM, got PeepholeLSTM",
        ),
    ],
)
def test_wrong_types(call, text):
    with pytest.raises(TypeError, match=text):
        call()


def test_configs_that_agree():
    agrees = {"activation": "tanh", "recurrent_activation": "sigmoid", "recurrent_dropout": 0.0, "units": H}
    module = weights.load("keras.LSTM", KERAS * 2, configs=[bidirectional(**agrees)], batch_first=True)
    assert module.batch_first and module.bidirectional


def test_the_page_has_every_kind():
    text = Path(__file__).parents[2].joinpath("docs", "migrate.md").read_text()
    missing = [kind for kind in itertools.chain(weights.KINDS, weights._ABSENT) if f"`{kind}`" not in text]
    assert not missing
    assert {*weights.KINDS} == {*KINDS}
