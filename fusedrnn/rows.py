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

from . import ops

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
    not_integers = lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool
    if not_integers and lengths.numel() > 0:  # an empty list has no dtype of its own
        raise TypeError(f"expected lengths to be integers, got {_kind(lengths)}")
    if lengths.shape != (n,):
        raise RuntimeError(f"Expected lengths size {[n]}, got {list(lengths.shape)}")
    of_sequence, of_step = torch.arange(n, device="cpu"), torch.arange(t, device="cpu")
    if batch_first:
        of_sequence = of_sequence * t
    else:
        of_step = of_step * n
    return _segments(lengths, reset, of_sequence, of_step, directions, x.device)


def of_nested(x: Any, directions: int) -> Segments:
    """The segments of a jagged nested tensor ``[N, (lengths), I]``, as rows of ``x.values()``."""
    offsets, lengths = x.offsets().cpu(), x.lengths()
    lengths = offsets.diff() if lengths is None else lengths.cpu()
    steps = torch.arange(x.values().shape[0], device="cpu")
    return _segments(lengths, None, offsets[:-1].long(), steps, directions, x.device)


def _segments(
    lengths: Tensor, reset: Tensor | None, first_row: Tensor, step_row: Tensor, directions: int, device: torch.device
) -> Segments:
    """Step t of sequence n is row ``first_row[n] + step_row[t]``. ``reset`` is ``[N, T]``; all on the CPU."""
    batch_sizes, *indices = ops.segments(lengths.long(), reset, first_row, step_row, directions)
    return Segments(batch_sizes, *[i.to(device) for i in indices])


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
