"""Training in less memory: a layer that keeps its states at checkpoints and recomputes the gates.

A direction runs in chunks of about sqrt(T) steps; of more, if their gates would take less memory than the
weights, which every chunk reads. Forward keeps the states at their beginnings and nothing else;
backward runs a chunk again, this time keeping its gates, and takes its gradients before the next
chunk's turn: there are never more gates than one chunk's. The second direction is the first one on
sequences that are turned around.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import ops, vmap
from .autograd import Layer, kept_batch_sizes, layer_gradients
from .errors import check_stored, raises_out_of_memory

_Item = TypeVar("_Item")


class RecomputedLayer(Layer):
    """:class:`fusedrnn.autograd.Layer`, with checkpoints ``[D, chunks, N, P (+ H)]`` in the place of ``gates``.

    A gradient that is to be differentiated again, or a batch of gradients, has all gates recomputed at once.
    """

    @staticmethod
    def forward(
        cell: str,
        directions: int,
        batch_sizes: Tensor | None,
        every_c: bool,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        check_stored(x, h0, c0, batch_sizes)
        lead, hidden, projected = x.shape[:-1], weights[1].shape[0] // ops.GATES[cell], weights[1].shape[1]
        widths = [projected, hidden][: ops.STATES[cell]]
        batch = _batch(x, batch_sizes)
        given = [x.new_zeros(directions, batch, w) if s is None else s for s, w in zip((h0, c0), widths, strict=False)]
        state = torch.cat(given, -1)
        chunks = [_chunks(x, batch_sizes, d, weights) for d in range(directions)]
        checkpoints = x.new_empty(directions, len(chunks[0]), *state.shape[1:])
        y = x.new_empty(*lead, directions * projected)
        cells = x.new_empty((lead.numel(), directions, hidden) if every_c else 0, dtype=_accumulator(x))
        for d in range(directions):
            own = _of_direction(weights, d, directions)
            for k, chunk in enumerate(chunks[d]):
                checkpoints[d, k] = state[d]
                now = state[d : d + 1, : chunk.batch]
                h, c = (*now.split(widths, -1), None)[:2]
                y_k, h_n, c_n, _, cells_k = ops.forward[cell](
                    chunk.take(x), h, c, own, chunk.batch_sizes, 1, every_c, ops.tf32(x)
                )
                y.unflatten(-1, (directions, projected))[..., d, :][chunk.rows] = y_k
                now.copy_(torch.cat((h_n, c_n)[: len(widths)], -1))
                if every_c:
                    cells.view(*lead, directions, hidden)[..., d, :][chunk.rows] = cells_k.view(*y_k.shape[:-1], hidden)
        h_n, c_n = (*(s.clone() for s in state.split(widths, -1)), x.new_empty(0))[:2]
        return y, h_n, c_n, checkpoints, cells

    @staticmethod
    @raises_out_of_memory
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, _: Any, dcells: Any) -> tuple[Any, ...]:
        upstream = (dy, dh_n, dc_n, dcells)
        if all(d is None for d in upstream):
            return (None,) * len(ctx.needs_input_grad)
        x, h0, c0, y, checkpoints, _, *weights = ctx.saved_tensors
        batch_sizes = kept_batch_sizes(ctx)
        if torch.is_grad_enabled() or vmap.is_legacy(*upstream):
            with torch.no_grad():
                arguments = (x, h0, c0, weights, batch_sizes, ctx.directions)
                _, _, _, *saved = ops.forward[ctx.cell](*arguments, True, ops.tf32(x))
            return layer_gradients(ctx, (x, h0, c0, y, *saved, *weights), *upstream)
        needs = ctx.needs_input_grad[4:]
        return (None, None, None, None, *_gradients(ctx.cell, batch_sizes, x, checkpoints, weights, needs, *upstream))


def _gradients(
    cell: str,
    batch_sizes: Tensor | None,
    x: Tensor,
    checkpoints: Tensor,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
) -> list[Tensor | None]:
    """``dx, dh0, dc0, *dweights``, None where ``needs`` says so."""
    directions, _, batch, _ = checkpoints.shape
    lead, hidden, projected = x.shape[:-1], weights[1].shape[0] // ops.GATES[cell], weights[1].shape[1]
    widths = [projected, hidden][: ops.STATES[cell]]
    dx = x.new_zeros(x.shape) if needs[0] else None
    ends = zip((dh_n, dc_n), widths, strict=False)
    dstates = [x.new_zeros(directions, batch, w) if d is None else d.clone() for d, w in ends]
    needed = zip(weights, needs[3:], strict=True)
    dweights = [w.new_zeros(w.shape, dtype=_accumulator(w)) if need else None for w, need in needed]
    for d in range(directions):
        own, d_own = _of_direction(weights, d, directions), _of_direction(dweights, d, directions)
        mask = needs[0] | 2 | 4 | sum(8 << i for i, dw in enumerate(d_own) if dw is not None)
        for k, chunk in reversed([*enumerate(_chunks(x, batch_sizes, d, weights))]):
            x_k = chunk.take(x)
            h, c = (*checkpoints[d : d + 1, k, : chunk.batch].split(widths, -1), None)[:2]
            y_k, _, _, *saved = ops.forward[cell](x_k, h, c, own, chunk.batch_sizes, 1, True, ops.tf32(x))
            dy_k = None if dy is None else chunk.take(dy.unflatten(-1, (directions, projected))[..., d, :])
            dcells_k = None if dcells is None else chunk.take(dcells.view(*lead, directions, hidden)[..., d, :])
            dnow = [s[d : d + 1, : chunk.batch] for s in dstates]
            dx_k, dh, dc, dw = ops.backward[cell](
                dy_k, *(*dnow, None)[:2], None if dcells_k is None else dcells_k.reshape(-1, 1, hidden),
                x_k, h, c, own, chunk.batch_sizes, 1, y_k, *saved, mask, ops.tf32(x),
            )  # fmt: skip
            for total, part in zip(dnow, (dh, dc), strict=False):
                total.copy_(part)
            if dx is not None:
                dx[chunk.rows] += dx_k
            for dweight, part in zip(d_own, dw, strict=True):
                if dweight is not None:
                    dweight += part
    dh0, dc0 = (*dstates, None)[:2]
    gradients = (dx, dh0, dc0, *[None if dw is None else dw.to(x.dtype) for dw in dweights])
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


class _Chunk(NamedTuple):
    """Some steps of one direction."""

    rows: slice | Tensor  # of x (if it is padded: its steps), in the order in which the direction takes them
    batch_sizes: Tensor | None
    batch: int  # how many sequences have such a step

    def take(self, t: Tensor) -> Tensor:
        return t[self.rows] if isinstance(self.rows, slice) else t.index_select(0, self.rows)


def _chunks(x: Tensor, batch_sizes: Tensor | None, direction: int, weights: Sequence[Tensor]) -> list[_Chunk]:
    steps = x.shape[0] if batch_sizes is None else batch_sizes.numel()
    if batch_sizes is None:
        offsets = list(range(steps + 1))
        turned = torch.arange(steps - 1, -1, -1, device=x.device) if direction else None
    else:
        offsets = [0, *batch_sizes.cumsum(0).tolist()]
        turned = _turned(batch_sizes).to(x.device) if direction else None
    length = _length(steps, x.shape[:-1].numel(), weights)
    chunks = []
    for begin in range(0, steps, length):
        end = min(begin + length, steps)
        rows = slice(offsets[begin], offsets[end])
        sizes = None if batch_sizes is None else batch_sizes[begin:end]
        chunks.append(_Chunk(rows if turned is None else turned[rows], sizes, _batch(x, sizes)))
    return chunks


def _length(steps: int, rows: int, weights: Sequence[Tensor]) -> int:
    """Steps of a chunk. The gates of so many rows as the weights have columns are as large as they."""
    columns = weights[0].shape[1] + weights[1].shape[1]
    return max(math.isqrt(max(steps - 1, 0)) + 1, columns * steps // max(rows, 1))


def _turned(batch_sizes: Tensor) -> Tensor:
    """For each row of a packed batch whose sequences are turned around, the row that it comes from."""
    offset = batch_sizes.cumsum(0) - batch_sizes
    step = torch.arange(batch_sizes.numel(), device="cpu").repeat_interleave(batch_sizes)
    sequence = torch.arange(step.numel(), device="cpu") - offset[step]
    length = torch.searchsorted(-batch_sizes, -sequence)  # as many steps as there are sizes above its number
    return offset[length - 1 - step] + sequence


def _batch(x: Tensor, batch_sizes: Tensor | None) -> int:
    if batch_sizes is None:
        return x.shape[1]
    return int(batch_sizes[0]) if batch_sizes.numel() else 0


def _of_direction(weights: Sequence[_Item], direction: int, directions: int) -> Sequence[_Item]:
    count = len(weights) // directions
    return weights[direction * count : (direction + 1) * count]


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
