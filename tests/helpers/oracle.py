"""An LSTM in NumPy float64, forward and backward. It shares no code and no layout with the package.

One sequence element at a time, one gate at a time, loops instead of broadcasts: slow and plain.
"""

import numpy as np


def _sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def lstm_layer(x, h, c, w_ih, w_hh, b_ih, b_hh):
    """x [T, B, I]; h, c [B, H]. Returns all h, the last h and c, and a tape for `lstm_layer_gradients`."""
    T, B, _ = x.shape
    H = h.shape[1]
    tape, outputs = [], np.zeros((T, B, H))
    h, c = h.copy(), c.copy()
    for t in range(T):
        h_new, c_new = np.zeros_like(h), np.zeros_like(c)
        activations = {}
        for b in range(B):
            for u in range(H):
                total = [
                    w_ih[k * H + u] @ x[t, b] + w_hh[k * H + u] @ h[b] + b_ih[k * H + u] + b_hh[k * H + u]
                    for k in range(4)
                ]
                i, f, g, o = _sigma(total[0]), _sigma(total[1]), np.tanh(total[2]), _sigma(total[3])
                c_new[b, u] = f * c[b, u] + i * g
                h_new[b, u] = o * np.tanh(c_new[b, u])
                activations[b, u] = (i, f, g, o)
        tape.append((h, c, c_new, activations))
        h, c = h_new, c_new
        outputs[t] = h
    return outputs, h, c, tape


def lstm_layer_gradients(x, w_ih, w_hh, tape, d_outputs, d_h, d_c):
    """Gradients of x, h_0, c_0, w_ih, w_hh and of either bias."""
    T = len(x)
    H = d_h.shape[1]
    d_x, d_w_ih, d_w_hh, d_b = np.zeros_like(x), np.zeros_like(w_ih), np.zeros_like(w_hh), np.zeros(4 * H)
    d_h, d_c = d_h.copy(), d_c.copy()
    for t in reversed(range(T)):
        h_before, c_before, c_after, activations = tape[t]
        d_h = d_h + d_outputs[t]
        d_h_before, d_c_before = np.zeros_like(d_h), np.zeros_like(d_c)
        for (b, u), (i, f, g, o) in activations.items():
            squashed = np.tanh(c_after[b, u])
            cell = d_c[b, u] + d_h[b, u] * o * (1 - squashed**2)
            total = [
                cell * g * i * (1 - i),
                cell * c_before[b, u] * f * (1 - f),
                cell * i * (1 - g**2),
                d_h[b, u] * squashed * o * (1 - o),
            ]
            d_c_before[b, u] = cell * f
            for k in range(4):
                row = k * H + u
                d_w_ih[row] += total[k] * x[t, b]
                d_w_hh[row] += total[k] * h_before[b]
                d_b[row] += total[k]
                d_x[t, b] += total[k] * w_ih[row]
                d_h_before[b] += total[k] * w_hh[row]
        d_h, d_c = d_h_before, d_c_before
    return d_x, d_h, d_c, d_w_ih, d_w_hh, d_b
