"""How torch.vmap maps a layer over one more dimension: the rule of the ops and the Functions.

Where only the data is mapped, the mapped dimension becomes part of the batch and the kernel runs
once. Where a weight is mapped, or its gradient is wanted of each entry, there is a call an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# Where an argument's or a result's batch is: its dimension, or one of these.
ROWS = -2  # of x and y, [T, N, .] or packed [rows, .]
SIZES = "batch_sizes"
NOWHERE = None  # the same for the whole batch
STATES = (ROWS, 1, 1)  # x, h0, c0 or y, h_n, c_n or their gradients
UPSTREAM = (*STATES, 0)  # dy, dh_n, dc_n, dcells
SAVED = (0, 0)  # gates, cells

_MAX_LEVEL = 64


def rule(
    call: Callable[..., Any],
    size: int,
    dims: Any,
    arguments: Sequence[Any],
    places: Any,
    result_places: Sequence[Any],
    one_by_one: bool = False,
) -> tuple[Any, Any]:
    """``call(*arguments)`` for ``size`` mapped entries: the results and their mapped dimensions.

    Args:
        dims: the mapped dimension of each argument, or None; nested as the arguments are.
        places, result_places: where the batch is in each argument and, flat, in each result.
        one_by_one: whether something that has no batch differs from entry to entry.
    """
    if size == 0:
        raise ValueError("fusedrnn: vmap needs a mapped dimension of at least one entry, got 0")
    flat, arguments_spec = tree_flatten(tuple(arguments))
    dims, places = tree_flatten(dims)[0], tree_flatten(tuple(places))[0]
    if one_by_one or any(d is not None and p in (NOWHERE, SIZES) for d, p in zip(dims, places, strict=True)):
        entries = []
        for k in range(size):
            entry = [a if d is None else a.select(d, k) for a, d in zip(flat, dims, strict=True)]
            entries.append(call(*tree_unflatten(entry, arguments_spec)))
        results = tree_map(lambda *each: None if each[0] is None else torch.stack(each), *entries)
        return results, tree_map(lambda r: None if r is None else 0, results)
    folded = [_fold(a, d, p, size) for a, d, p in zip(flat, dims, places, strict=True)]
    found, results_spec = tree_flatten(call(*tree_unflatten(folded, arguments_spec)))
    unfolded = [_unfold(r, p, size) for r, p in zip(found, result_places, strict=True)]
    results, result_dims = zip(*unfolded, strict=True)
    return tree_unflatten(results, results_spec), tree_unflatten(result_dims, results_spec)


def _fold(argument: Any, dim: int | None, place: Any, size: int) -> Any:
    """The argument with the mapped dimension in its batch: entry k of n is batch entry n * size + k."""
    if place is NOWHERE or not isinstance(argument, Tensor):
        return argument
    if place is SIZES:
        return argument * size
    if dim is None and argument.dim() == 1:  # [0], stands for nothing
        return argument
    place %= argument.dim() - (dim is not None)
    if dim is None:
        return argument.repeat_interleave(size, place)
    return argument.movedim(dim, place + 1).flatten(place, place + 1)


def _unfold(result: Any, place: Any, size: int) -> tuple[Any, int | None]:
    """A result with the mapped dimension apart again, and where that is."""
    if not isinstance(result, Tensor) or result.dim() == 1:
        return result, None
    place %= result.dim()
    return result.unflatten(place, (result.shape[place] // size, size)), place + 1


def legacy(mapped_call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """The results for arguments mapped by autograd's own, older vmap (``is_grads_batched``).

    ``mapped_call(size, dims, *arguments)`` gives the results and their mapped dimensions.
    """
    level = next(_legacy_level(a) for a in arguments if is_legacy(a))
    plain = [torch._remove_batch_dim(a, level, 0, 0) if is_legacy(a) else a for a in arguments]
    dims = tree_map(lambda a: 0 if is_legacy(a) else None, list(arguments))
    size = next(p.shape[0] for p, d in zip(plain, dims, strict=True) if d == 0)
    results, result_dims = mapped_call(size, dims, *plain)
    return tree_map(lambda r, d: r if d is None else torch._add_batch_dim(r, d, level), results, result_dims)


def is_legacy(*arguments: Any) -> bool:
    """Whether any of them is mapped by that vmap."""
    return any(isinstance(a, Tensor) and is_legacy_batchedtensor(a) for a in arguments)


def _legacy_level(t: Tensor) -> int:
    """The level of a legacy batched tensor, which torch does not tell: the one that can be removed."""
    for level in range(1, _MAX_LEVEL):
        if not is_legacy_batchedtensor(torch._remove_batch_dim(t, level, 0, 0)):
            return level
    raise RuntimeError("fusedrnn: nested batches of gradients (is_grads_batched) are not supported")
