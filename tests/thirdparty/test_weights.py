"""Weights of Keras, Flax, equinox, xLSTM and FlashRNN: the libraries compute, and our modules must agree."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import equinox
import flax.linen
import jax
import keras
import numpy as np
import pytest
import torch
from flashrnn import flashrnn
from flax import nnx
from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla, sLSTMCellConfig

from fusedlstm import weights

B, T, I, H = 3, 7, 5, 8
ATOL = 1e-14  # a few dozen ulps of numbers around 1, in float64
X = np.random.default_rng(0).normal(size=(B, T, I))

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True)
def float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def drawn(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.4), tree)


def assert_same(kind, layers, expected, x=X, **options):
    """Returns what our module writes for the other library."""
    module = weights.load(kind, *layers, batch_first=True, **options)
    output, _ = module(torch.from_numpy(x))
    np.testing.assert_allclose(output.detach(), np.asarray(expected), rtol=0, atol=ATOL)
    found = weights.dump(kind, module)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(layers), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return found


def built(*layers):
    """Give a stack of Keras random weights. Returns its output."""
    for fill in (True, False):
        y = X
        for layer in layers:
            y = layer(y)
            if fill:
                layer.set_weights(drawn(layer.get_weights()))
    return y.detach()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_keras(name, bidirectional, use_bias):
    layers = [getattr(keras.layers, name)(H, return_sequences=True, use_bias=use_bias) for _ in range(2)]
    layers = [keras.layers.Bidirectional(layer) for layer in layers] if bidirectional else layers
    expected = built(*layers)
    configs = [layer.get_config() for layer in layers]
    kind, given = f"keras.{name}", [layer.get_weights() for layer in layers]
    for layer, arrays in zip(layers, assert_same(kind, given, expected, configs=configs), strict=True):
        layer.set_weights(arrays)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SimpleRNN", {"activation": "tanh"}),
        ("SimpleRNN", {"activation": "relu"}),
        ("GRU", {"reset_after": False}),
        ("GRU", {"reset_after": False, "use_bias": False}),
    ],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_keras_in_float32(name, options, bidirectional):
    """Their matmul is in float32 (Keras 3.15 on torch), so they may be as far from ours as ours in float32 is."""
    layer = getattr(keras.layers, name)(H, return_sequences=True, **options)
    layer = keras.layers.Bidirectional(layer) if bidirectional else layer
    expected, kind, before = built(layer), f"keras.{name}", layer.get_weights()
    given = {"nonlinearity": options["activation"]} if name == "SimpleRNN" else {}
    module = weights.load(kind, before, configs=[layer.get_config()], batch_first=True, **given)
    (arrays,) = weights.dump(kind, module)
    layer.set_weights(arrays)
    for ours, theirs in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    exact, _ = module(torch.from_numpy(X))
    ours, _ = module.float()(torch.from_numpy(X).float())
    scale = exact.abs().max()
    limit = 2 * (ours - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * scale
    assert (expected - exact).abs().max() <= limit


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recurrent_activation": "hard_sigmoid"}, "recurrent_activation to be 'sigmoid', got 'hard_sigmoid'"),
        ({"activation": "relu"}, "activation to be 'tanh', got 'relu'"),
        ({"dropout": 0.1}, "dropout to be 0, got 0.1"),
        ({"recurrent_dropout": 0.1}, "recurrent_dropout to be 0, got 0.1"),
        ({"go_backwards": True}, "go_backwards to be False, got True"),
    ],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_keras_says_what_differs(options, text, bidirectional):
    layer = keras.layers.GRU(H, return_sequences=True, **options)
    if bidirectional:
        backward = keras.layers.GRU(H, return_sequences=True, **{**options, "go_backwards": not layer.go_backwards})
        layer = keras.layers.Bidirectional(layer, backward_layer=backward)
    built(layer)
    with pytest.raises(ValueError, match=text):
        weights.load("keras.GRU", layer.get_weights(), configs=[layer.get_config()])


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"])
def test_linen(name):
    def rnn():
        return flax.linen.RNN(getattr(flax.linen, name)(H, param_dtype=np.float64))

    variables = drawn(rnn().init(jax.random.key(0), X))
    cell = variables["params"]["cell"]
    (back,) = assert_same(f"flax.linen.{name}", [cell], rnn().apply(variables, X))
    assert jax.tree.structure(back) == jax.tree.structure(cell)

    both = flax.linen.Bidirectional(rnn(), rnn())
    variables = drawn(both.init(jax.random.key(0), X))
    cells = tuple(variables["params"][f"{side}_rnn"]["cell"] for side in ("forward", "backward"))
    assert_same(f"flax.linen.{name}", [cells], both.apply(variables, X))


@pytest.mark.parametrize("name", ["OptimizedLSTMCell", "GRUCell", "SimpleCell"])
def test_nnx(name):
    cell = getattr(nnx, name)(I, H, param_dtype=np.float64, dtype=np.float64, rngs=nnx.Rngs(0))
    state = nnx.state(cell, nnx.Param)
    arrays = drawn(nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, arrays)
    nnx.update(cell, state)
    assert_same(f"flax.nnx.{name}", [arrays], nnx.RNN(cell)(jax.numpy.asarray(X)))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_equinox(name, use_bias):
    cell = getattr(equinox.nn, name)(I, H, use_bias=use_bias, dtype=np.float64, key=jax.random.key(0))

    def step(states, x):
        states = jax.vmap(cell)(x, states)
        return states, states[0] if name == "LSTMCell" else states

    h = np.zeros((B, H))
    _, output = jax.lax.scan(step, (h, h) if name == "LSTMCell" else h, X.swapaxes(0, 1))
    module = weights.load(f"equinox.{name}", vars(cell))
    (back,) = weights.dump(f"equinox.{name}", module)
    assert {*back} == {key for key, value in vars(cell).items() if isinstance(value, jax.Array)}
    assert_same(f"equinox.{name}", [{key: vars(cell)[key] for key in back}], output.swapaxes(0, 1))


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("function", ["lstm", "slstm"])
def test_xlstm(function, num_heads):
    def config(backend):
        return sLSTMCellConfig(hidden_size=H, num_heads=num_heads, function=function, backend=backend, dtype="float32")

    cell = sLSTMCell_vanilla(config("vanilla")).double()
    arrays = drawn({name: w.numpy() for name, w in cell.state_dict().items()})
    cell.load_state_dict({name: torch.from_numpy(w) for name, w in arrays.items()})
    x = np.random.default_rng(2).normal(size=(B, T, 4 * H))
    output = cell(torch.from_numpy(x))[0].detach().transpose(1, 2).reshape(B, T, H)
    module = weights.load(f"xlstm.{function}", cell.state_dict(), batch_first=True)
    ours, _ = module(torch.from_numpy(x))
    torch.testing.assert_close(ours.detach(), output, rtol=0, atol=ATOL)

    # The weights of the kernels for CUDA, which lie in another order. The kernels themselves need a GPU.
    of_cuda = sLSTMCell_cuda(config("cuda"), skip_backend_init=True)
    R = of_cuda._recurrent_kernel_ext2int(cell._recurrent_kernel_int2ext(cell._recurrent_kernel_.detach()))
    b = of_cuda._bias_ext2int(cell._bias_int2ext(cell._bias_.detach()))
    same = weights.load(f"xlstm.{function}_cuda", {"_recurrent_kernel_": R, "_bias_": b})
    assert all(torch.equal(w, module.state_dict()[name]) for name, w in same.state_dict().items())


@pytest.mark.parametrize(
    ("function", "gates", "recurrent", "biases"), [("lstm", 4, 4, 4), ("gru", 3, 3, 4), ("elman", 1, 1, 1)]
)
def test_flashrnn(function, gates, recurrent, biases):
    heads, DH = 2, H // 2
    shapes = {"R": (recurrent, heads, DH, DH), "b": (biases, heads, DH), "Wx": (B, T, gates, heads, DH)}
    arrays = drawn({name: np.empty(shape) for name, shape in shapes.items()})
    R, b, Wx = (torch.from_numpy(arrays[name]) for name in shapes)
    states, _ = flashrnn(Wx, R, b, function=function, backend="vanilla", dtype="float32")
    module = weights.load(f"flashrnn.{function}", {"R": R, "b": b}, batch_first=True)
    output, _ = module(Wx.flatten(2))
    torch.testing.assert_close(output.detach(), states[0].reshape(B, T, H), rtol=0, atol=ATOL)
