"""A recurrence as a loop of torch operations, with the backward written out: for a CPU, where no kernel runs.

Serves what ATen serves badly there, packed sequences of different lengths, or not at all: all cell states, clipped gradients
of the states, lengths and resets inside a compiled graph. What makes it fast is that nothing is done at a
step that can be done for all steps at once: beside the recurrent product a step has only operations on states, in place,
on views that are made beforehand; factors that do not depend on the gradients of later steps are one operation each; and
the gradients of the weights are one product outside. Heads are a batch in the recurrent product. Equations as in `fusedlstm.reference`; names and layouts as there.
"""

import math

import torch
from torch import Tensor

from fusedlstm import cells, heads
from fusedlstm.layout import Layout, Pieces, spans
from fusedlstm.reference import steps_of


def recurrence_fwd(
    cell: str,
    preact_x: Tensor,  # [D, T, B, G*H] or packed [D, R, G*H]
    weight_hh: list[Tensor],  # D times [G*H, DH]; none if preact_x has the recurrent part already
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    layout: Layout,
    save_gates: bool,
    save_states: bool,
    vectors: Tensor | None = None,  # [D, V, H]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps forward; returns what `recurrence.recurrence_fwd` does."""
    assert cell == cells.LSTM.name
    D, *leading, GH = preact_x.shape
    H = hx.size(-1)
    if layout.name == "ragged" or layout.resets is not None:
        pieces, packed = _pieces(layout, leading, hx.device)
        preact_x = preact_x.flatten(1, -2).index_select(1, pieces.rows)
        output, h_n, c_n, gates, c_seq = recurrence_fwd(
            cell, preact_x, weight_hh, _enter(pieces, hx), _enter(pieces, cx[0])[None], packed, save_gates, save_states
        )
        return (
            _unpacked(output, pieces, leading),
            _leave(pieces, h_n, hx),
            _leave(pieces, c_n[0], cx[0])[None],
            _unpacked(gates, pieces, leading) if save_gates else gates,
            _unpacked(c_seq[0], pieces, leading)[None] if save_states else c_seq,
        )
    steps = spans(layout.first_row, leading)
    R = sum(n for _, n in steps)
    output, c_seq = preact_x.new_empty(R, D, H), preact_x.new_empty(R, D, H)
    gates = preact_x.new_empty(R, D, GH)
    h_n, c_n = hx.clone(), cx[0].clone()  # rows beyond a step's keep what they have
    for d in range(D):
        weight = weight_hh[d] if weight_hh else None
        _lstm_fwd(preact_x[d].reshape(R, GH), weight, h_n[d], c_n[d], steps, d, output, gates, c_seq)
    return (
        output.view(*leading, D * H),
        h_n,
        c_n.unsqueeze(0),
        gates.view(*leading, D * GH) if save_gates else gates.new_empty(0),
        c_seq.view(1, *leading, D * H) if save_states else c_seq.new_empty(0),
    )


def _lstm_fwd(preact_x, weight_hh, h_n, c_n, steps, d, output, gates, c_seq) -> None:
    """One direction: fills its part of output, gates and c_seq; h_n and c_n [B, H] come with hx and cx."""
    sizes = [n for _, n in steps]
    H = h_n.size(-1)
    output, gates, c_seq = output[:, d], gates[:, d], c_seq[:, d]
    i, f, g, o = (x.split(sizes) for x in gates.chunk(4, -1))
    i_and_f = gates[:, : 2 * H].split(sizes)
    preact_x, gates, c_seq, output = (x.split(sizes) for x in (preact_x, gates, c_seq, output))
    add_recurrent = _recurrent_product(weight_hh, H)
    scratch = torch.empty_like(h_n)
    h, c, before = h_n, c_n, len(h_n)
    for t in steps_of(len(steps), d):
        n = sizes[t]
        if n < before:  # some ended
            h_n[n:before], c_n[n:before] = h[n:], c[n:]
            h, c = h[:n], c[:n]
        elif n > before:  # in reverse some begin
            h, c = torch.cat([h, h_n[before:n]]), torch.cat([c, c_n[before:n]])
        add_recurrent(preact_x[t], h, gates[t])
        i_and_f[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = torch.mul(f[t], c, out=c_seq[t]).addcmul_(i[t], g[t])
        h = torch.mul(torch.tanh(c, out=scratch[:n]), o[t], out=output[t])
        before = n
    h_n[:before], c_n[:before] = h, c


def _recurrent_product(weight_hh: Tensor | None, H: int):
    """A function of preact [B, 4H], h [B, H] and out [B, 4H] that writes preact + h U^T; preact alone without weights."""
    if weight_hh is None:
        return lambda preact, h, out: out.copy_(preact)
    DH = weight_hh.size(1)
    if DH == H:
        weight_t = weight_hh.t()
        return lambda preact, h, out: torch.addmm(preact, h, weight_t, out=out)
    G, n = len(weight_hh) // H, H // DH
    by_head = weight_hh.reshape(G, n, DH, DH).permute(1, 3, 0, 2).reshape(n, DH, G * DH)

    def add(preact, h, out):
        B = len(h)
        product = torch.bmm(h.view(B, n, DH).transpose(0, 1), by_head).view(n, B, G, DH)
        torch.add(preact.view(B, G, n, DH), product.permute(1, 2, 0, 3), out=out.view(B, G, n, DH))

    return add


def recurrence_bwd(
    cell: str,
    grad_output: Tensor | None,  # [T, B, D*H] or packed [R, D*H]
    grad_c_seq: Tensor | None,  # [S, T, B, D*H] or [S, R, D*H]
    grad_h_n: Tensor,  # [D, B, H]
    grad_c_n: Tensor,  # [S, D, B, H]
    weight_hh: list[Tensor],  # D times [G*H, DH]
    hx: Tensor,  # [D, B, H]
    cx: Tensor,  # [S, D, B, H]
    output: Tensor,  # [T, B, D*H] or [R, D*H]
    gates: Tensor,  # [T, B, D*G*H] or [R, D*G*H]
    c_seq: Tensor,  # [S, T, B, D*H] or [S, R, D*H]
    layout: Layout,
    clip: float | None,
    vectors: Tensor | None = None,  # [D, V, H]
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps backward; returns what `recurrence.recurrence_bwd` does."""
    assert cell == cells.LSTM.name
    *leading, _ = output.shape
    D, _, H = hx.shape
    if layout.name == "ragged" or layout.resets is not None:
        pieces, packed = _pieces(layout, leading, hx.device)
        own = (None if x is None else _packed(x, pieces) for x in (grad_output, output, gates))
        grad_output, output, gates = own
        grad_c_seq, c_seq = (None if x is None else _packed(x[0], pieces)[None] for x in (grad_c_seq, c_seq))
        grad_preact, grad_h, grad_c = recurrence_bwd(
            cell,
            grad_output,
            grad_c_seq,
            _left(pieces, grad_h_n),
            _left(pieces, grad_c_n[0])[None],
            weight_hh,
            _enter(pieces, hx),
            _enter(pieces, cx[0])[None],
            output,
            gates,
            c_seq,
            packed,
            clip,
        )
        return (
            _unpacked(grad_preact, pieces, leading),
            _entered(pieces, grad_h, grad_h_n),
            _entered(pieces, grad_c[0], grad_c_n[0])[None],
        )
    steps = spans(layout.first_row, leading)
    R = sum(n for _, n in steps)
    GH = gates.size(-1) // D
    grad_preact = gates.new_empty(R, D, GH)
    grad_hx, grad_cx = torch.zeros_like(hx), grad_c_n.clone()
    dh = gates.new_zeros(R, D, H) if grad_output is None else grad_output.reshape(R, D, H).clone()
    gates, c_seq = gates.view(R, D, GH), c_seq.view(R, D, H)
    dc_seq = None if grad_c_seq is None else grad_c_seq.reshape(R, D, H)
    for d in range(D):
        _lstm_bwd(
            gates[:, d], c_seq[:, d], cx[0, d], weight_hh[d], grad_h_n[d], None if dc_seq is None else dc_seq[:, d],
            steps, d, clip, dh[:, d], grad_preact[:, d], grad_hx[d], grad_cx[0, d],
        )  # fmt: skip
    return grad_preact.view(*leading, D * GH), grad_hx, grad_cx


def _lstm_bwd(gates, c_seq, cx, weight_hh, grad_h_n, dc_seq, steps, d, clip, dh, dpreact, grad_hx, grad_cx) -> None:
    """One direction: fills dpreact [R, 4H] and grad_hx [B, H]; dh [R, H] and grad_cx [B, H] come with gradients."""
    sizes = [n for _, n in steps]
    H = cx.size(-1)
    i, f, g, o = gates.chunk(4, -1)
    tanh_c = torch.tanh(c_seq)

    # h = o tanh(c), so dc grows by dh times
    dc_of_dh = tanh_c.square().neg_().add_(1).mul_(o)
    # and each preactivation's gradient is dc (of i, f, g) or dh (of o) times
    di, df, dg, do = dpreact.chunk(4, -1)
    torch.mul(g, i, out=di).addcmul_(di, i, value=-1)
    c_before = _states_before(c_seq, cx, steps, d)
    torch.mul(c_before, f, out=df).addcmul_(df, f, value=-1)
    torch.mul(g, g, out=dg)
    torch.addcmul(i, i, dg, value=-1, out=dg)
    torch.mul(tanh_c, o, out=do).addcmul_(do, o, value=-1)

    # A final h is the output of a last step.
    ends = [0] * len(cx)
    for first, n in steps if d == 0 else steps[:1]:
        ends[:n] = range(first, first + n)
    if len(dh):
        dh.index_add_(0, torch.tensor(ends, dtype=torch.int64, device=dh.device), grad_h_n)

    difg = dpreact[:, : 3 * H].unflatten(1, (3, H)).split(sizes)
    dh, do, dpreact, dc_of_dh, f = (x.split(sizes) for x in (dh, do, dpreact, dc_of_dh, f))
    dc_seq = None if dc_seq is None else dc_seq.split(sizes)
    order = list(steps_of(len(steps), d))
    for k in range(len(order) - 1, -1, -1):
        t, n = order[k], sizes[order[k]]
        dc = grad_cx[:n]
        if dc_seq is not None:
            dc += dc_seq[t]
        dc.addcmul_(dh[t], dc_of_dh[t])
        difg[t].mul_(dc.unsqueeze(1))
        do[t].mul_(dh[t])
        dc.mul_(f[t])
        # The gradient of h goes to the step before, or to hx for those that begin here.
        n_prev = min(n, sizes[order[k - 1]]) if k > 0 else 0
        if clip is not None:
            dc.clamp_(-clip, clip)
            through = heads.recurrent_backward(dpreact[t], weight_hh, H).clamp_(-clip, clip)
            if n_prev:
                dh[order[k - 1]][:n_prev] += through[:n_prev]
            grad_hx[n_prev:n] = through[n_prev:]
            continue
        if n_prev:
            _add_recurrent_backward(dh[order[k - 1]][:n_prev], dpreact[t][:n_prev], weight_hh)
        if n_prev < n:
            _add_recurrent_backward(grad_hx[n_prev:n], dpreact[t][n_prev:], weight_hh)


def _add_recurrent_backward(grad_h: Tensor, dpreact: Tensor, weight_hh: Tensor) -> None:
    """grad_h [B, H] += dpreact [B, 4H] U."""
    if weight_hh.size(1) == grad_h.size(1):
        grad_h.addmm_(dpreact, weight_hh)
    else:
        grad_h += heads.recurrent_backward(dpreact, weight_hh, grad_h.size(1))


def _states_before(seq: Tensor, initial: Tensor, steps: list[tuple[int, int]], d: int) -> Tensor:
    """The state that entered every row, [R, H]: that of the step before, or `initial` [B, H] where a sequence begins."""
    pieces: list[Tensor] = [None] * len(steps)
    first_prev, n_prev = 0, 0
    for t in steps_of(len(steps), d):
        first, n = steps[t]
        pieces[t] = seq[first_prev : first_prev + min(n, n_prev)]
        if n > n_prev:
            pieces[t] = torch.cat([pieces[t], initial[n_prev:n]])
        first_prev, n_prev = first, n
    return torch.cat(pieces) if pieces else seq


def _pieces(layout: Layout, leading: list[int], device: torch.device) -> tuple[Pieces, Layout]:
    """The uncut pieces of a batch, and how these lie."""
    pieces = Pieces.of(layout, tuple(leading), device)
    return pieces, Layout.of_packed(pieces.batch_sizes, len(pieces.enters[0]), device)


def _packed(seq: Tensor, pieces: Pieces) -> Tensor:
    return pieces.gather(seq.flatten(0, -2))


def _unpacked(seq: Tensor, pieces: Pieces, leading: list[int]) -> Tensor:
    return pieces.scatter(seq, math.prod(leading)).unflatten(0, leading)


def _enter(pieces: Pieces, state: Tensor) -> Tensor:
    """[D, B, H] -> [D, pieces, H]"""
    return torch.stack([pieces.enter(s, d) for d, s in enumerate(state)])


def _leave(pieces: Pieces, state: Tensor, initial: Tensor) -> Tensor:
    """[D, pieces, H] -> [D, B, H]"""
    return torch.stack([pieces.leave(s, i, d) for d, (s, i) in enumerate(zip(state, initial, strict=True))])


def _left(pieces: Pieces, grad: Tensor) -> Tensor:
    """The gradient of `_leave`: [D, B, H] -> [D, pieces, H]."""
    n = len(pieces.enters[0])
    found = grad.new_zeros(len(grad), n + grad.size(1), grad.size(2))
    for d, g in enumerate(grad):
        found[d, pieces.leaves[d]] = g
    return found[:, :n]


def _entered(pieces: Pieces, grad: Tensor, grad_final: Tensor) -> Tensor:
    """The gradient of `_enter`, [D, pieces, H] -> [D, B, H], and of `_leave` where a sequence has no steps."""
    n, B = grad.size(1), grad_final.size(1)
    found = grad.new_zeros(len(grad), B + 1, grad.size(2))
    for d, g in enumerate(grad):
        empty = (pieces.leaves[d] >= n).unsqueeze(1)
        found[d, :B] = torch.where(empty, grad_final[d], 0)
        found[d, pieces.enters[d]] = g
    return found[:, :B].contiguous()
