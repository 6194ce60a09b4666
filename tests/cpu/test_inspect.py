"""Gate traces against the modules' own outputs."""

import pytest
import torch
from torch import nn

import fusedlstm
from fusedlstm.inspect import gate_trace, plot_gates

T, B, I, H = 5, 3, 4, 6


def make(kind, **options):
    torch.manual_seed(0)
    return kind(I, H, dtype=torch.float64, **options)


def make_hx(module):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return tuple(torch.randn(rows, B, H, dtype=torch.float64) for _ in "hc")


def output_of_layer(module, layer, x, hx):
    """[T, B, D * H]: what torch.nn.LSTM with the first `layer + 1` layers of `module` returns."""
    rows = (layer + 1) * (2 if module.bidirectional else 1)
    lower = nn.LSTM(I, H, layer + 1, bias=module.bias, bidirectional=module.bidirectional, dtype=torch.float64)
    lower.load_state_dict({name: value for name, value in module.state_dict().items() if name in lower.state_dict()})
    return lower(x, tuple(state[:rows].contiguous() for state in hx))


@pytest.mark.parametrize("kind", [fusedlstm.LSTM, nn.LSTM])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_states_are_the_modules(kind, bidirectional, bias):
    D = 2 if bidirectional else 1
    module = make(kind, num_layers=2, bidirectional=bidirectional, bias=bias, dropout=0.5)
    x, hx = torch.randn(T, B, I, dtype=torch.float64), make_hx(module)
    for layer in range(2):
        output, (h_n, c_n) = output_of_layer(module, layer, x, hx)
        for direction in range(D):
            trace = gate_trace(module, x, hx, layer=layer, direction=direction)
            last = T - 1 if direction == 0 else 0
            torch.testing.assert_close(trace.h, output[..., direction * H : (direction + 1) * H])
            torch.testing.assert_close(trace.h[last], h_n[layer * D + direction])
            torch.testing.assert_close(trace.c[last], c_n[layer * D + direction])


@pytest.mark.parametrize("direction", [0, 1])
def test_gates_make_the_states(direction):
    module = make(fusedlstm.LSTM, bidirectional=True)
    x, (hx, cx) = torch.randn(T, B, I, dtype=torch.float64), make_hx(module)
    i, f, g, o, h, c = gate_trace(module, x, (hx, cx), direction=direction)
    first, others, before = (
        (0, slice(1, None), slice(None, -1)) if direction == 0 else (-1, slice(None, -1), slice(1, None))
    )
    c_prev = torch.empty_like(c)
    c_prev[first], c_prev[others] = cx[direction], c[before]
    torch.testing.assert_close(c, f * c_prev + i * g)
    torch.testing.assert_close(h, o * torch.tanh(c))
    # f and i could be swapped with their weights: one gate by itself, from the parameters.
    suffix = "_l0_reverse" if direction == 1 else "_l0"
    weight_ih, weight_hh, bias_ih, bias_hh = (
        getattr(module, name + suffix)[H : 2 * H] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    preact_f = x[first] @ weight_ih.t() + hx[direction] @ weight_hh.t() + bias_ih + bias_hh
    torch.testing.assert_close(f[first], torch.sigmoid(preact_f))
    assert not any(value.requires_grad for value in (i, f, g, o, h, c))


def test_batch_first_and_unbatched_are_time_major():
    module = make(fusedlstm.LSTM, num_layers=2, bidirectional=True, batch_first=True)
    x, hx = torch.randn(B, T, I, dtype=torch.float64), make_hx(module)
    trace = gate_trace(module, x, hx, layer=1, direction=1)
    torch.testing.assert_close(trace.h.transpose(0, 1), module(x, hx)[0][..., H:])
    alone = gate_trace(module, x[1], tuple(state[:, 1] for state in hx), layer=1, direction=1)
    for name in trace._fields:
        torch.testing.assert_close(getattr(alone, name), getattr(trace, name)[:, 1:2])


def test_no_hx_is_zero():
    module, x = make(nn.LSTM), torch.randn(T, B, I, dtype=torch.float64)
    torch.testing.assert_close(gate_trace(module, x).h, module(x)[0])


def test_errors():
    module, x = make(fusedlstm.LSTM), torch.randn(T, B, I, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"module: expected a fusedlstm.LSTM or a torch.nn.LSTM, got GRU"):
        gate_trace(nn.GRU(I, H), x)
    with pytest.raises(ValueError, match="layer: expected 0 to 0, got 1"):
        gate_trace(module, x, layer=1)
    with pytest.raises(ValueError, match="direction: expected 0 to 0, got 1"):
        gate_trace(module, x, direction=1)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        gate_trace(module, x[..., :2])


def test_plot_draws_the_trace():
    trace = gate_trace(make(fusedlstm.LSTM), torch.randn(T, B, I, dtype=torch.float64))
    figure = plot_gates(trace, sample=1, period=2)
    panels = {axes.get_title()[-2]: axes for axes in figure.axes if axes.get_title()}
    assert sorted(panels) == sorted(trace._fields)
    drawn = {name: torch.from_numpy(axes.images[0].get_array().data.copy()) for name, axes in panels.items()}  # [H, T]
    for name, values in drawn.items():
        expected = getattr(trace, name)[:, 1].t().float()
        torch.testing.assert_close(values.sort(0).values, expected.sort(0).values)
    # Units whose cell state moves early are on top.
    moves = drawn["c"].double().diff(dim=1, prepend=torch.zeros(H, 1, dtype=torch.float64)).abs()
    mean_step = (moves * torch.arange(T)).sum(1) / moves.sum(1)
    assert (mean_step.diff() >= 0).all()
    # Every unit is in the same row of all panels.
    o, c, h = (drawn[name].double() for name in "och")
    torch.testing.assert_close(o * torch.tanh(c), h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "direction"), [(0, 0), (1, 1)])
def test_a_projected_layer(layer, direction):
    """h is what the next layer reads, c has all units; the picture has a panel for each."""
    module = fusedlstm.LSTM(5, 7, num_layers=2, bidirectional=True, proj_size=3)
    x, states = torch.randn(4, 2, 5), (torch.randn(4, 2, 3), torch.randn(4, 2, 7))
    trace = gate_trace(module, x, states, layer=layer, direction=direction)
    assert trace.h.shape == (4, 2, 3) and trace.c.shape == (4, 2, 7)
    output, (h_n, c_n) = module(x, states)
    row, last = 2 * layer + direction, 0 if direction else -1
    torch.testing.assert_close(trace.h[last], h_n[row])
    torch.testing.assert_close(trace.c[last], c_n[row])
    if layer == 1:
        torch.testing.assert_close(trace.h, output.chunk(2, -1)[direction])
    figure = plot_gates(trace)
    titles = [panel.get_title() for panel in figure.axes[:6]]
    assert sum(title.endswith("projected") for title in titles) == 1
    shown = {panel.get_title(): panel.get_ylim() for panel in figure.axes[:6]}
    assert all(limits == ((3, 0) if title.endswith("projected") else (7, 0)) for title, limits in shown.items())


def test_packed_input_is_refused():
    module = fusedlstm.LSTM(5, 7)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 5)])
    with pytest.raises(TypeError, match="input: expected a Tensor, got PackedSequence"):
        gate_trace(module, packed)
