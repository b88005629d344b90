"""Under torch.autocast: arguments in its dtype. Each parameter is cast once in a region, as for torch's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autograd import _Function

_marks: dict[tuple[str, torch.dtype], Tensor] = {}


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What autocast does to arguments: float64 and integers stay."""
    return [t.to(dtype) if _is_cast(t, dtype) else t for t in tensors]


def cast_weights(weights: Sequence[Tensor], device: str, dtype: torch.dtype) -> Sequence[Tensor]:
    """:func:`cast`, but a loop of calls shares the copies of parameters. To be called with autocast on.

    Each call has its own way back to the parameters, so that the calls' gradients add up in the parameters' dtype.
    """
    in_transform = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() or in_transform or torch._C._len_torch_dispatch_stack():
        return cast(weights, dtype)
    kept = [w for w in weights if _is_parameter(w) and _is_cast(w, dtype)]
    if not kept:
        return cast(weights, dtype)
    region, copies = _region(device, dtype), []
    for w in kept:
        w_, version, copy = region.get(id(w), (None, None, None))
        if w_ is not w or version != w._version:
            with torch.inference_mode(False):
                copy = w.detach().to(dtype)
            region[id(w)] = w, w._version, copy
        copies.append(copy)
    if torch.is_grad_enabled():
        copies = _Share.apply(copies, *kept)
    shared = dict(zip(map(id, kept), copies, strict=True))
    return cast([shared.get(id(w), w) for w in weights], dtype)


def _is_cast(t: Tensor, dtype: torch.dtype) -> bool:
    return t.is_floating_point() and t.dtype not in (torch.float64, dtype)


def _is_parameter(w: Tensor) -> bool:
    """Whether others may ask for ``w`` again: tensors that are computed for a call would only take memory."""
    return type(w) in (Tensor, torch.nn.Parameter) and w.is_leaf and w.requires_grad and not w.is_inference()


def _region(device: str, dtype: torch.dtype) -> dict[Any, Any]:
    """What is kept until autocast empties its own cache, as it does at the end of a region.

    It hangs on an entry of that cache: on the graph's node of the cast of a parameter without elements.
    """
    with torch.inference_mode(False):  # and so with a graph
        mark = _marks.get((device, dtype))  # of each dtype, which that cache does not tell apart
        if mark is None:
            mark = _marks[device, dtype] = torch.zeros(0, 0, device=device, requires_grad=True)
        empty = mark.detach()
        product: Any = torch.addmm(mark, empty, empty)  # casts mark, and saves nothing
    metadata: dict[Any, Any] = product.grad_fn.next_functions[0][0].metadata
    return metadata


class _Share(_Function):
    """``apply(copies, *parameters)``: the copies, with a way back to the parameters."""

    @staticmethod
    def forward(copies: Sequence[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple([copy.detach() for copy in copies])  # an output is a tensor of one call

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [p.dtype for p in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *[None if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
