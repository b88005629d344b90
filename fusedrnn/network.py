"""A whole network: any input through all its layers, with dropout between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops, stacked
from .autocast import cast, cast_weights
from .errors import check_dimensions, check_sizes, check_stored, pair
from .layer import layer, traceable_layer
from .ops import autocast_enabled
from .profiling import in_range, ranges_enabled
from .rows import Lengths, Segments, of_nested, of_padded

States = tuple[Tensor, ...]  # (h,) or (h, c)


def network(
    cell: str,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    num_layers: int,
    directions: int,
    batch_first: bool,
    dropout: float,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    every_c: bool = False,
    recompute: bool = False,
) -> tuple[tuple[Any, ...], States]:
    """The functions' and the modules' common part: any input through all layers.

    Returns the outputs (every h of the last layer and, if ``every_c``, every c of it), and the states.
    """
    states: States | None = None
    if hx is not None:
        states = pair(hx) if ops.STATES[cell] == 2 else (hx,)  # type: ignore[assignment]  # hx is not None
    options = (num_layers, directions, dropout, every_c, recompute)
    check_stored(input, states, lengths, reset)
    if isinstance(input, PackedSequence):
        _refuse_lengths(lengths, reset)
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if states is not None and sorted_indices is not None:
            states = tuple([s.index_select(1, sorted_indices) for s in states])
        if sorted_indices is not None:
            batch = sorted_indices.shape[0]
        elif states is not None and torch.compiler.is_compiling():
            batch = states[0].shape[1]  # a tracer knows no values; the op compares the two
        else:
            batch = batch_sizes[0].item()  # type: ignore[assignment]  # symbolic in a tracer, unlike int()
        expected = check_sizes(cell, data, states, weights, num_layers * directions, batch, 2)
        if states is None:
            states = tuple([data.new_zeros(e) for e in expected])
        outputs, finals = stack(cell, data, states, weights, batch_sizes, *options)
        if unsorted_indices is not None:
            finals = tuple([s.index_select(1, unsorted_indices) for s in finals])
        return tuple([PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices) for t in outputs]), finals

    if input.is_nested:
        _refuse_lengths(lengths, reset)
        jagged: Any = input  # torch's annotations lack what only such a tensor has
        if input.layout != torch.jagged or input.dim() != 3 or jagged._ragged_idx != 1:
            raise ValueError("Expected a nested tensor of the jagged layout and shape [N, (lengths), I]")
        data = jagged.values()
        check_stored(data, jagged.offsets(), jagged.lengths())
        expected = check_sizes(cell, data, states, weights, num_layers * directions, input.shape[0], 2)
        if states is None:
            states = tuple([data.new_zeros(e) for e in expected])
        outputs, finals = _by_segments(of_nested(jagged, directions), cell, data, states, weights, *options)
        nested = torch.nested.nested_tensor_from_jagged
        return tuple([nested(t, jagged.offsets(), jagged.lengths()) for t in outputs]), finals

    check_dimensions(cell, input, states)
    batched, batch_dim = input.dim() == 3, 0 if batch_first else 1
    x = input
    if not batched:
        x = x.unsqueeze(batch_dim)
        states = None if states is None else tuple([s.unsqueeze(1) for s in states])
        lengths = None if lengths is None else torch.atleast_1d(torch.as_tensor(lengths))
        reset = None if reset is None else torch.as_tensor(reset).unsqueeze(batch_dim)
    batch = x.shape[batch_dim]
    expected = check_sizes(cell, x, states, weights, num_layers * directions, batch, 3)
    if x.shape[1 - batch_dim] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is None and reset is None:
        outputs, finals = stack(cell, x.transpose(0, 1) if batch_first else x, states, weights, None, *options)
        if batch_first:
            outputs = tuple([t.transpose(0, 1) for t in outputs])
    else:
        parts = of_padded(x, lengths, reset, batch_first, directions)
        if states is None:
            states = tuple([x.new_zeros(e) for e in expected])
        outputs, finals = _by_segments(parts, cell, x.flatten(0, 1), states, weights, *options)
        outputs = tuple([t.unflatten(0, x.shape[:2]) for t in outputs])
    if not batched:
        outputs, finals = tuple([t.squeeze(batch_dim) for t in outputs]), tuple([s.squeeze(1) for s in finals])
    return outputs, finals


def _by_segments(
    parts: Segments, cell: str, x: Tensor, states: States, weights: Sequence[Tensor], *options: Any
) -> tuple[tuple[Tensor, ...], States]:
    """The layers on ``x [rows, I]`` in the order of the input, packed by its segments in between."""
    own = tuple([parts.initial_state(s) for s in states])
    outputs, finals = stack(cell, parts.gather(x), own, weights, parts.batch_sizes, *options)
    finals = tuple([parts.final_state(s, i) for s, i in zip(finals, states, strict=True)])
    return tuple([parts.scatter(t, x.shape[0]) for t in outputs]), finals


def stack(
    cell: str,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    directions: int,
    dropout: float,
    every_c: bool = False,
    recompute: bool = False,
) -> tuple[tuple[Tensor, ...], States]:
    """All the layers on time-major or packed ``x``, under autocast in its dtype; results as in :func:`network`."""
    device = x.device.type
    if autocast_enabled() and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        check_stored(weights)
        weights = cast_weights(weights, device, dtype)
        with torch.autocast(device, enabled=False):
            x, *states_ = cast((x, *(states or ())), dtype)
            return stack(
                cell, x, states and tuple(states_), weights, batch_sizes, num_layers, directions,
                dropout, every_c, recompute,
            )  # fmt: skip
    together = stacked.follow_directly(num_layers, directions, dropout > 0)
    if together and stacked.suits(x, batch_sizes, every_c, recompute):
        h0, c0 = (*(states or ()), None, None)[:2]
        y, h_n, c_n = stacked.run(cell, x, h0, c0, weights, num_layers)
        return (y,), (h_n, c_n)[: ops.STATES[cell]]
    finals: list[States] = []
    for k, own_weights in enumerate(ops.of_layers(weights, num_layers)):
        if k > 0 and dropout > 0:
            x = torch.dropout(x, dropout, True)
        own: States = states or ()
        if num_layers > 1:
            own = tuple([s[k * directions : (k + 1) * directions] for s in own])
        h0, c0 = (*own, None, None)[:2]
        wanted = every_c and k == num_layers - 1
        arguments = (cell, x, h0, c0, own_weights, batch_sizes, directions, wanted, recompute)
        results = in_range(cell, k, layer, arguments) if ranges_enabled() else traceable_layer(*arguments)
        x, h_n, c_n, _, cells = results
        finals.append((h_n, c_n)[: ops.STATES[cell]])
    outputs = (x, cells.to(x.dtype).view(*x.shape[:-1], directions * cells.shape[-1])) if every_c else (x,)
    if num_layers == 1:
        return outputs, finals[0]
    return outputs, tuple([torch.cat(s) for s in zip(*finals, strict=True)])


def _refuse_lengths(lengths: Lengths | None, reset: Tensor | None) -> None:
    if lengths is not None or reset is not None:
        raise ValueError("lengths and reset are for padded input, not for a PackedSequence or a nested tensor")
