"""The cells as plain eager PyTorch loops: the specification of every kernel in this package.

These functions take the arguments of the ops (see :mod:`fusedrnn.ops`), work in any floating dtype
and on any device, and are differentiable to any order. They are slow. The tests compare the kernels
with them in float64, and third and higher derivatives are taken through them.

Symbols: T steps, N batch, D directions, I input size, H hidden size, P = size of h (H, or the
projection's size), G gates of a cell (in PyTorch's order), ``wx = x W_ih^T + b_ih`` and
``rh = h_prev W_hh^T + b_hh``. The formulas are those of the torch.nn documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

Results = tuple[Tensor, Tensor, Tensor, Tensor]  # y, h_n, c_n, cells
State = tuple[Tensor, ...]  # (h,) or (h, c), each [rows, P or H]
Step = Callable[[Tensor, Tensor, State], State]  # (wx, rh, previous state) -> state


def lstm_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """``c = f c_prev + i g``, ``h = o tanh(c)`` (Hochreiter & Schmidhuber 1997; Gers 2000)."""
    i, f, g, o = (wx + rh).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """``h = (1 - z) n + z h_prev``, reset after the matmul (Cho 2014, arXiv:1406.1078 v1)."""
    wx_r, wx_z, wx_n = wx.chunk(3, -1)
    rh_r, rh_z, rh_n = rh.chunk(3, -1)
    r = (wx_r + rh_r).sigmoid()
    z = (wx_z + rh_z).sigmoid()
    n = (wx_n + r * rh_n).tanh()
    return ((1 - z) * n + z * state[0],)


def rnn_tanh_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """``h = tanh(wx + rh)`` (Elman 1990)."""
    return ((wx + rh).tanh(),)


def rnn_relu_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """``h = max(0, wx + rh)`` (Le, Jaitly & Hinton 2015, arXiv:1504.00941)."""
    return ((wx + rh).relu(),)


def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    directions: int = 1,
) -> Results:
    """One LSTM layer, with or without projection.

    Args:
        x: ``[T, N, I]``, or packed ``[rows, I]`` with ``batch_sizes``.
        h0: ``[D, N, P]``; ``None`` is zeros.
        c0: ``[D, N, H]``; ``None`` is zeros.
        weights: of each direction ``w_ih [4H, I], w_hh [4H, P]``, then ``b_ih [4H], b_hh [4H]`` if
            there are biases, then ``w_hr [P, H]`` if ``h`` is projected.
        batch_sizes: int64 ``[T]``, not increasing: how many sequences run at each step.
        directions: 1, or 2 to run the second one backwards in time.

    Returns:
        ``y`` (``[T, N, D*P]`` or ``[rows, D*P]``), ``h_n [D, N, P]``, ``c_n [D, N, H]`` and
        ``cells [rows, D, H]``, every c.
    """
    return _layer(lstm_step, 4, x, h0, c0, weights, batch_sizes, directions)


def gru(
    x: Tensor,
    h0: Tensor | None,
    c0: None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    directions: int = 1,
) -> Results:
    """One GRU layer: as :func:`lstm` with ``G = 3``, no ``c`` (``c_n`` and ``cells`` are empty, ``[0]``)."""
    return _layer(gru_step, 3, x, h0, c0, weights, batch_sizes, directions)


def rnn_tanh(
    x: Tensor,
    h0: Tensor | None,
    c0: None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    directions: int = 1,
) -> Results:
    """One Elman layer with tanh: as :func:`gru` with ``G = 1``."""
    return _layer(rnn_tanh_step, 1, x, h0, c0, weights, batch_sizes, directions)


def rnn_relu(
    x: Tensor,
    h0: Tensor | None,
    c0: None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    directions: int = 1,
) -> Results:
    """One Elman layer with ReLU: as :func:`gru` with ``G = 1``."""
    return _layer(rnn_relu_step, 1, x, h0, c0, weights, batch_sizes, directions)


def _layer(
    step: Step,
    gates: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
) -> Results:
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    batch = x.shape[1] if batch_sizes is None else sizes[0]
    rows = x.flatten(0, -2)
    count = len(weights) // directions
    outputs, finals, every_c = [], [], []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * count : (d + 1) * count]
        b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
        w_hr = rest[-1] if len(rest) % 2 else None
        h = x.new_zeros(batch, w_hh.shape[1]) if h0 is None else h0[d]
        state: State = (h,)
        if step is lstm_step:
            c = x.new_zeros(batch, w_hh.shape[0] // gates) if c0 is None else c0[d]
            state = (h, c)
        wx = linear(rows, w_ih, b_ih).split(sizes)
        states: list[State] = [state] * len(sizes)
        for t in reversed(range(len(sizes))) if d == 1 else range(len(sizes)):
            n = sizes[t]
            running = tuple(s[:n] for s in state)
            new = step(wx[t], linear(running[0], w_hh, b_hh), running)
            if w_hr is not None:
                new = (linear(new[0], w_hr), *new[1:])
            states[t] = new
            # Rows from n on have ended (backwards in time: have not begun) and keep their state.
            state = tuple(torch.cat((a, s[n:])) for a, s in zip(new, state, strict=True))
        over_time = [torch.cat(s) for s in zip(*states, strict=True)] or [s[:0] for s in state]
        outputs.append(over_time[0])
        every_c += over_time[1:]
        finals.append(state)
    y = torch.cat(outputs, -1)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    h_n, *c_n = (torch.stack(s) for s in zip(*finals, strict=True))
    if not c_n:
        return y, h_n, x.new_empty(0), x.new_empty(0)
    return y, h_n, c_n[0], torch.stack(every_c, 1)
