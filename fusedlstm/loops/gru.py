"""GRU. Equations in `fusedlstm.equations.gru`."""

import torch


def forward(at):
    H = at.states[0].size(1)
    n, r, z, n_h = at.gates.chunk(4, -1)
    r_and_z, of_h = at.gates[:, H : 3 * H], at.gates[:, H:]
    # Everything but the product is in its place before the first step.
    bias_r_and_z, bias_n = torch.cat(at.vectors).split([2 * H, H])
    x_r_and_z, x_n = at.preact_x.split([2 * H, H], -1)
    torch.add(x_r_and_z, bias_r_and_z, out=r_and_z)
    n.copy_(x_n)
    n_h.copy_(bias_n)
    n, r, z, n_h, r_and_z, of_h, h_seq = map(at.by_step, (n, r, z, n_h, r_and_z, of_h, *at.states))

    def step(t, state):
        (h,) = state
        at.add_recurrent(of_h[t], h, of_h[t])
        r_and_z[t].sigmoid_()
        n[t].addcmul_(r[t], n_h[t]).tanh_()
        return (torch.lerp(n[t], h, z[t], out=h_seq[t]),)

    return step


def backward(at):
    """Every preactivation's gradient is dh times a factor."""
    n, r, z, n_h = at.gates.chunk(4, -1)
    dn, dr, dz, dn_h = at.dpreact.chunk(4, -1)
    torch.addcmul(torch.ones_like(n[:1]), n, n, value=-1, out=dn).addcmul_(dn, z, value=-1)  # (1 - n^2) (1 - z)
    torch.mul(dn, r, out=dn_h)
    torch.mul(dn_h, n_h, out=dr).addcmul_(dr, r, value=-1)
    torch.sub(at.before(0), n, out=dz).mul_(z).addcmul_(dz, z, value=-1)
    dpreact, dh, z = at.blocks_by_step(at.dpreact), at.by_step(at.dh), at.by_step(z)

    def step(t, dstate):
        dpreact[t].mul_(dh[t].unsqueeze(1))
        return dh[t].mul_(z[t])

    return step
