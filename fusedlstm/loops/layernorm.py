"""LSTM with layer normalisation. Equations in `fusedlstm.equations.layernorm`."""

import torch
from torch.nn.functional import layer_norm

from fusedlstm.loops.lstm import candidate_factor
from fusedlstm.norms import EPS, aten_backward


def forward(at):
    *gains, gain_c, bias_c = at.vectors
    H, gain = len(gain_c), torch.cat(gains)
    weight_t = at.weight_hh.t()
    i, f, g, o, m = map(at.by_step, at.gates[:, : 5 * H].chunk(5, -1))
    i_and_f, gates, u = map(at.by_step, (at.gates[:, : 2 * H], at.gates[:, : 4 * H], at.gates[:, 5 * H :]))
    preact, h_seq, c_seq = map(at.by_step, (at.preact_x, *at.states))

    def step(t, state):
        h, c = state
        n = layer_norm(torch.mm(h, weight_t, out=u[t]), (4 * H,), gain, eps=EPS)
        torch.add(preact[t], n, out=gates[t])
        i_and_f[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = torch.mul(f[t], c, out=c_seq[t]).addcmul_(i[t], g[t])
        torch.tanh(layer_norm(c, (H,), gain_c, bias_c, EPS), out=m[t])
        return torch.mul(o[t], m[t], out=h_seq[t]), c

    return step


def backward(at):
    """All gradients but those through norms are dc or dh times a factor that stands in their place."""
    *gains, gain_c, _ = at.vectors
    H, gain = len(gain_c), torch.cat(gains)
    i, f, g, o, m = at.gates[:, : 5 * H].chunk(5, -1)
    di, df, dg, do, dm = at.dpreact[:, : 5 * H].chunk(5, -1)
    torch.mul(g, i, out=di).addcmul_(di, i, value=-1)
    torch.mul(at.before(1), f, out=df).addcmul_(df, f, value=-1)
    candidate_factor(i, g, out=dg)
    torch.mul(m, o, out=do)
    torch.addcmul(o, do, m, value=-1, out=dm)
    do.addcmul_(do, o, value=-1)
    norm_c, norm_u = _Norm(at, at.states[1], gain_c), _Norm(at, at.gates[:, 5 * H :], gain)
    of_c = at.blocks_by_step(at.dpreact[:, : 3 * H])
    of_h = at.blocks_by_step(at.dpreact[:, 3 * H : 5 * H])
    dpreact, du, dm, dh, f = map(at.by_step, (at.dpreact[:, : 4 * H], at.dpreact[:, 5 * H :], dm, at.dh, f))

    def step(t, dstate):
        (dc,) = dstate
        of_h[t].mul_(dh[t].unsqueeze(1))
        dc.add_(norm_c.backward(t, dm[t]))
        of_c[t].mul_(dc.unsqueeze(1))
        du[t].copy_(norm_u.backward(t, dpreact[t]))
        dc.mul_(f[t])

    return step


class _Norm:
    """The backward of a norm with a gain. Statistics are taken step by step: of all at once they need two buffers of all rows."""

    def __init__(self, at, x, gain):
        self.gain, self.shape, self.by_step = gain, x.shape[1:], at.by_step(x)

    def backward(self, t, grad):
        """The gradient of x at step t."""
        x = self.by_step[t].contiguous()
        _, mean, rstd = torch.native_layer_norm(x, self.shape, self.gain, None, EPS)
        return aten_backward(grad, x, self.shape, mean, rstd, self.gain, None, [True, False, False])[0]
