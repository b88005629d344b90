"""Batches of sequences that don't all fill their input, as the packed rows that the ops run.

A length ends a sequence, and a reset ends one and begins another with a zero state. So padded input
with lengths and resets, and a nested tensor, are batches of more and shorter sequences: *segments*.
Sorted by decreasing length they are a packed batch. A :class:`Segments` knows which row of the input
each packed row is; gathering and scattering by that index is all there is to it, and differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Lengths = Tensor | Sequence[int]


@dataclass(frozen=True)
class Segments:
    """The packed batch that lengths and resets make of N sequences; S segments, D directions."""

    batch_sizes: Tensor  # int64 [steps of the longest segment], on the CPU
    source: Tensor  # [packed rows], the row of the input that each one is
    initial: Tensor  # [D, S], the sequence whose initial state a segment has, or N for zeros
    final: Tensor  # [D, N], the segment whose final state a sequence has, or S + n if it is empty

    def gather(self, rows: Tensor) -> Tensor:
        """The packed rows of ``rows [input rows, F]``."""
        return rows.index_select(0, self.source)

    def scatter(self, packed: Tensor, rows: int) -> Tensor:
        """``[rows, F]`` with the packed rows where they came from, and zeros elsewhere."""
        return packed.new_zeros(rows, packed.shape[1]).index_copy(0, self.source, packed)

    def initial_state(self, state: Tensor) -> Tensor:
        """Of the segments, from ``state [L*D, N, F]`` of the sequences."""
        return _select(torch.cat((state, torch.zeros_like(state[:, :1])), 1), self.initial)

    def final_state(self, state: Tensor, initial: Tensor) -> Tensor:
        """Of the sequences, from ``state [L*D, S, F]`` of the segments; ``initial`` where there is no step."""
        return _select(torch.cat((state, initial.to(state.dtype)), 1), self.final)


def _select(state: Tensor, index: Tensor) -> Tensor:
    """``[L*D, n, F]``, each direction by its own row of ``index [D, m]``."""
    directions = index.shape[0]
    each = [state[d::directions].index_select(1, index[d]) for d in range(directions)]
    return each[0] if directions == 1 else torch.stack(each, 1).flatten(0, 1)


def of_padded(x: Tensor, lengths: Lengths | None, reset: Tensor | None, batch_first: bool, directions: int) -> Segments:
    """The segments of padded ``x [T, N, I]`` (``[N, T, I]`` if ``batch_first``), as rows of ``x.flatten(0, 1)``.

    Raises:
        TypeError: ``lengths`` are no integers, or ``reset`` is no bool tensor.
        RuntimeError: the size of one is wrong, or a length is negative or more than T.
    """
    n, t = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            raise TypeError(f"expected reset to be a bool tensor, got {_kind(reset)}")
        if reset.shape != x.shape[:2]:
            raise RuntimeError(f"Expected reset size {list(x.shape[:2])}, got {list(reset.shape)}")
        reset = (reset if batch_first else reset.t()).cpu()
    if lengths is None:
        lengths = torch.full((n,), t, device="cpu")
    lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"expected lengths to be integers, got {_kind(lengths)}")
    if lengths.shape != (n,):
        raise RuntimeError(f"Expected lengths size {[n]}, got {list(lengths.shape)}")
    if n and not 0 <= int(lengths.min()) <= int(lengths.max()) <= t:
        raise RuntimeError(f"Expected lengths from 0 to {t}, got {lengths.tolist()}")
    sequence = torch.arange(n, device="cpu")
    first_row, row_step = (sequence * t, 1) if batch_first else (sequence, n)
    return _segments(lengths.long(), reset, first_row, row_step, directions, x.device)


def of_nested(x: Any, directions: int) -> Segments:
    """The segments of a jagged nested tensor ``[N, (lengths), I]``, as rows of ``x.values()``."""
    offsets, lengths = x.offsets().cpu(), x.lengths()
    lengths = offsets.diff() if lengths is None else lengths.cpu()
    return _segments(lengths.long(), None, offsets[: lengths.numel()].long(), 1, directions, x.device)


def _segments(
    lengths: Tensor, reset: Tensor | None, first_row: Tensor, row_step: int, directions: int, device: torch.device
) -> Segments:
    """Step t of sequence n is row ``first_row[n] + t * row_step``. ``reset`` is ``[N, T]``; all on the CPU."""
    n = lengths.numel()
    # The segments by sequence and, in it, by time.
    if reset is None:
        sequence = lengths.nonzero().squeeze(1)
        start = torch.zeros_like(sequence)
    else:
        times = torch.arange(reset.shape[1], device="cpu")
        begins = (reset | (times == 0)) & (times < lengths[:, None])
        sequence, start = begins.nonzero(as_tuple=True)
    count = sequence.numel()
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[1:] = sequence[1:] != sequence[:-1]
    last = first.roll(-1)
    length = torch.where(last, lengths[sequence], start.roll(-1)) - start

    order = length.argsort(descending=True, stable=True)
    rank = order.argsort()
    batch_sizes = count - length.bincount().cumsum(0)[:-1]
    segment = torch.arange(count, device="cpu").repeat_interleave(length)
    step = torch.arange(segment.numel(), device="cpu") - (length.cumsum(0) - length)[segment]
    position = (batch_sizes.cumsum(0) - batch_sizes)[step] + rank[segment]
    source = torch.empty_like(position)
    source[position] = (first_row[sequence] + start * row_step)[segment] + step * row_step

    # Backwards in time a sequence begins with its last segment and ends with its first.
    continued = first if reset is None else first & ~reset[sequence, 0]
    initial = torch.stack([torch.where(which, sequence, n)[order] for which in (continued, last)[:directions]])
    final = (count + torch.arange(n, device="cpu")).repeat(directions, 1)
    for to, which in zip(final, (last, first), strict=False):
        to[sequence[which]] = rank[which]
    return Segments(batch_sizes, source.to(device), initial.to(device), final.to(device))


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
