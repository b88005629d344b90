"""The derivative of a layer along a direction, and the gradient of its gradient, by the kernels.

A layer takes ``s_t = F(wx_t, rh_t, s_{t-1})`` step by step, where s is the state (h and the LSTM's c), ``wx = x W_ih^T
+ b_ih``, ``rh = h_prev W_hh^T + b_hh`` and F is the cell, element by element. Where the arguments change by ``dx, dW,
...``, the states change by ``ds_t = dF (dwx_t, drh_t, ds_{t-1})``: that is the tangent op. A loss whose gradients in y
are ``g_t`` has the gradients ``a_t = g_t + (dF)^T a_{t+1}`` in the states, and ``(dF)^T a_t`` in wx and rh: that is the
adjoint op.

The gradient of a gradient, along those changes, is that of ``sum(g * ds)`` (Pearlmutter 1994). In g it is ``ds``. In
the arguments, each step adds what its own second derivative makes of ``a_t`` and the changes, and the adjoint op
carries that to the steps before. Second derivatives of F concern one step alone: the curvature op takes those of all
steps at once. The rest is matrix products of all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ops

_HALF = (torch.bfloat16, torch.float16)


def promote(t: Tensor | None) -> Any:
    """At least float32, in which the kernels accumulate."""
    return t.float() if t is not None and t.dtype in _HALF else t


class Linearised:
    """A layer and how its results change with its arguments.

    Args:
        arguments, changes: ``x, h0, c0, *weights`` as the ops take them; what doesn't change is None.
        saved: ``y, gates, cells`` of the forward op.

    Attributes:
        results: the changes of ``y, h_n, c_n, cells``.
    """

    def __init__(
        self,
        cell: str,
        directions: int,
        batch_sizes: Tensor | None,
        arguments: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        changes: Sequence[Tensor | None],
    ) -> None:
        x, h0, c0, *weights = map(promote, arguments)
        dx, dh0, dc0, *dweights = map(promote, changes)
        y, gates, cells = map(promote, saved)
        self._cell, self._tf32 = cell, ops.tf32(x)
        self._layer = (x, h0, c0, weights, batch_sizes, directions, y, gates, cells)
        with self._full_precision():
            self._directions = [_Direction(cell, d, self._layer, (dx, dh0, dc0, dweights)) for d in range(directions)]
            dwx, drh, dy = map(_side_by_side, zip(*[own.sources() for own in self._directions], strict=True))
        dy = None if dy is None else dy.view_as(y)
        *self.results, self._drh = ops.tangent[cell](dwx, drh, dy, dh0, dc0, *self._layer, self._tf32)

    def _full_precision(self) -> torch.autocast:
        """For products in a backward pass that runs under autocast."""
        return torch.autocast(self._layer[0].device.type, enabled=False)

    @staticmethod
    def possible(arguments: Sequence[Any]) -> bool:
        """Not of a layer without any rows or hidden units."""
        x, _, _, _, w_hh, *_ = arguments
        return bool(x.shape[:-1].numel() and w_hh.shape[0])

    def gradients(self, upstream: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Those of ``sum(upstream * results)`` in ``x, h0, c0, *weights`` that are wanted."""
        with self._full_precision():
            return self._gradients(upstream, wanted)

    def _gradients(self, upstream: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
        dy, _, _, dcells = self.results
        dwx, drh, dh, dc, *_ = self._adjoint(*map(promote, upstream))
        steps = [own.by_itself((dwx, drh, dh, dc), (self._drh, dy, dcells)) for own in self._directions]
        starts, before = zip(*[zip(*step, strict=True) for step in steps], strict=True)
        before_h, before_c = (*map(_side_by_side, zip(*before, strict=True)), None)[:2]
        dwx, drh, dh, _, *dstarts = self._adjoint(before_h.view_as(dy), None, None, before_c)  # type: ignore[union-attr]
        for total, own in zip(dstarts, zip(*starts, strict=True), strict=False):
            total += torch.stack(own)
        wants = ops.of_layers(wanted[3:], len(self._directions))
        parts = [
            own.gradients((dwx, drh, dh), wanted[0], Weights.of(want))
            for own, want in zip(self._directions, wants, strict=True)
        ]
        dx = sum([p[0] for p in parts[1:]], parts[0][0]).view_as(self._layer[0]) if wanted[0] else None
        found = [
            dx,
            *dstarts,
            *[dw for (_, own), want in zip(parts, wants, strict=True) for dw in own.listed(len(want))],
        ]
        return [g if want else None for g, want in zip(found, wanted, strict=True)]

    def _adjoint(self, *upstream: Tensor | None) -> list[Tensor]:
        """The adjoint op's results, drh also where it is dwx."""
        dwx, drh, *rest = ops.adjoint[self._cell](*upstream, *self._layer, self._tf32)
        return [dwx, drh if drh.numel() else dwx, *rest]


class Weights(NamedTuple):
    """Of one direction, or something for each of them."""

    w_ih: Any
    w_hh: Any
    b_ih: Any
    b_hh: Any
    w_hr: Any

    @staticmethod
    def of(listed: Sequence[Any]) -> Weights:
        """From those there are, as the ops take them."""
        b_ih, b_hh = listed[2:4] if len(listed) > 3 else (None, None)
        return Weights(listed[0], listed[1], b_ih, b_hh, listed[-1] if len(listed) % 2 else None)

    def listed(self, count: int) -> list[Any]:
        """As the ops take them, if there are ``count``."""
        return [*self[:2], *(self[2:4] if count > 3 else ()), *(self[4:] if count % 2 else ())]


class _Direction:
    """One direction of a layer: all its steps side by side, a row each."""

    def __init__(self, cell: str, d: int, layer: Sequence[Any], changes: Sequence[Any]) -> None:
        x, h0, c0, weights, batch_sizes, directions, y, gates, cells = layer
        dx, self._dh0, self._dc0, dweights = changes
        self._cell, self._d, self._count = cell, d, directions
        self._before = _Before(y, batch_sizes, reverse=d == 1)
        self._x, self._dx = x.flatten(0, -2), None if dx is None else dx.flatten(0, -2)
        self._w, self._dw = (Weights.of(ops.of_layers(each, directions)[d]) for each in (weights, dweights))
        self._h_prev, self._c_prev = self._states_before(h0, c0, y, cells)
        self._h_full: Any = None if self._w.w_hr is None else gates[:, d, -1]  # h before the projection
        self._dwx = _change(self._x, self._dx, self._w.w_ih, self._dw.w_ih, self._dw.b_ih)

    def sources(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The tangent op's ``dwx, drh, dy``."""
        drh = _change(self._h_prev, None, None, self._dw.w_hh, self._dw.b_hh)
        return self._dwx, drh, _change(self._h_full, None, None, self._dw.w_hr, None)

    def by_itself(self, adjoint: Sequence[Tensor], changes: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What each step by itself adds to the gradients in the h (and c) before it: in the starts, and in the rows.

        Args:
            adjoint: a loss's gradients in all ``wx, rh, y, cells``.
            changes: those of ``rh, y, cells``.
        """
        w, dw = self._w, self._dw
        self._by_wx, self._by_rh = (t[:, self._d] for t in adjoint[:2])
        self._by_h, by_c = self._states(*adjoint[2:])
        self._dh_prev, dc_prev = self._states_before(self._dh0, self._dc0, *changes[1:])
        by_full = self._by_h if w.w_hr is None else self._by_h @ w.w_hr
        self._wx, rh, h, c, self._dh_full = ops.curvature[self._cell](
            linear(self._x, w.w_ih, w.b_ih), linear(self._h_prev, w.w_hh, w.b_hh), self._h_prev, self._c_prev,
            self._dwx, changes[0][:, self._d], self._dh_prev, dc_prev,
            by_full, by_c, None if dw.w_hr is None else self._by_h @ dw.w_hr,
        )  # fmt: skip
        self._rh = rh if rh.numel() else self._wx
        through_rh = _pull(self._rh, w.w_hh, self._by_rh, dw.w_hh)
        return [self._before.give(s) for s in (through_rh + h if h.numel() else through_rh, c) if s.numel()]

    def gradients(self, carried: Sequence[Tensor], want_x: bool, wanted: Weights) -> tuple[Any, Weights]:
        """In x and the weights; ``carried`` is what came from later steps to ``wx, rh, y``."""
        wx, rh = self._wx.add_(carried[0][:, self._d]), self._rh
        if rh is not wx:
            rh.add_(carried[1][:, self._d])
        dweights = Weights(
            _outer(wx, self._x, self._by_wx, self._dx) if wanted.w_ih else None,
            _outer(rh, self._h_prev, self._by_rh, self._dh_prev) if wanted.w_hh else None,
            wx.sum(0) if wanted.b_ih else None,
            rh.sum(0) if wanted.b_hh else None,
            _outer(self._of_y(carried[2]), self._h_full, self._by_h, self._dh_full) if wanted.w_hr else None,
        )
        return _pull(wx, self._w.w_ih, self._by_wx, self._dw.w_ih) if want_x else None, dweights

    def _of_y(self, y: Tensor) -> Tensor:
        return y.flatten(0, -2).unflatten(-1, (self._count, -1))[:, self._d]

    def _states(self, y: Tensor, cells: Tensor) -> tuple[Tensor, Tensor | None]:
        """h and, if there is one, c."""
        return self._of_y(y), cells[:, self._d] if cells.dim() > 1 else None

    def _states_before(
        self, h0: Tensor | None, c0: Tensor | None, y: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The states before each step."""
        h, c = self._states(y, cells)
        h_prev = self._before.take(None if h0 is None else h0[self._d], h)
        return h_prev, None if c is None else self._before.take(None if c0 is None else c0[self._d], c)


class _Before:
    """Which state each row of a direction goes on from: a start or another row's."""

    def __init__(self, y: Tensor, batch_sizes: Tensor | None, reverse: bool) -> None:
        self._reverse, self._index = reverse, None
        self._batch = y.shape[-2] if batch_sizes is None else int(batch_sizes[0])
        if batch_sizes is not None:
            first = batch_sizes.cumsum(0) - batch_sizes
            step = torch.arange(len(batch_sizes), device="cpu").repeat_interleave(batch_sizes)
            entry = torch.arange(y.shape[:-1].numel(), device="cpu") - first[step]
            before = step + 1 if reverse else step - 1
            sizes = torch.cat((batch_sizes, batch_sizes.new_zeros(1)))  # the last one for no such step
            follows = entry < sizes[before]
            self._index = torch.where(follows, self._batch + first[before * follows] + entry, entry).to(y.device)

    def take(self, start: Tensor | None, rows: Tensor) -> Tensor:
        """The states before each row, from the starts ``[N, .]`` (None for zeros) and the states of all rows."""
        start = rows.new_zeros(self._batch, rows.shape[1]) if start is None else start
        if self._index is not None:
            return torch.cat((start, rows)).index_select(0, self._index)
        return torch.cat((rows[self._batch :], start) if self._reverse else (start, rows[: -self._batch]))

    def give(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of :meth:`take`: what there is for the starts and for the rows."""
        none = before.new_zeros(self._batch, before.shape[1])
        if self._index is not None:
            given = torch.cat((none, torch.zeros_like(before))).index_copy_(0, self._index, before)
            return given[: self._batch], given[self._batch :]
        if self._reverse:
            return before[-self._batch :], torch.cat((none, before[: -self._batch]))
        return before[: self._batch], torch.cat((before[self._batch :], none))


def _change(a: Any, da: Tensor | None, w: Any, dw: Tensor | None, db: Tensor | None) -> Tensor | None:
    """That of ``a w^T + b``; None if there is none."""
    terms = [] if da is None else [linear(da, w)]
    if dw is not None:
        terms.append(linear(a, dw, db))
    elif db is not None:
        terms.append(db.expand(len(a), -1))
    return sum(terms[1:], terms[0]) if terms else None


def _pull(second: Tensor, w: Tensor, first: Tensor, dw: Tensor | None) -> Tensor:
    """The gradient in a of ``sum(second * (a w^T)) + sum(first * (a dw^T))``."""
    return second @ w if dw is None else torch.addmm(second @ w, first, dw)


def _outer(second: Tensor, a: Tensor, first: Tensor, da: Tensor | None) -> Tensor:
    """The gradient in w of ``sum(second * (a w^T)) + sum(first * (da w^T))``."""
    return second.T @ a if da is None else torch.addmm(second.T @ a, first.T, da)


def _side_by_side(parts: Sequence[Tensor | None], dim: int = 1) -> Tensor | None:
    """One dimension more, for the directions; None is zeros, or None if all are."""
    some = next((p for p in parts if p is not None), None)
    if some is None or len(parts) == 1:
        return None if some is None else some.unsqueeze(dim)
    return torch.stack([torch.zeros_like(some) if p is None else p for p in parts], dim)
