"""Gradients of a layer: an autograd.Function over the ops, differentiable to any order.

First derivatives always come from the kernels. The gradient of a gradient goes through the eager
loops of :mod:`fusedrnn.reference`, whose own graph then serves every higher order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import ops, reference

_HALF = (torch.bfloat16, torch.float16)
_FIXED = 7  # arguments of LayerBackward before dy: constants to its derivative


class _Function(Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Function.apply less the inspect.signature of each call, which costs as much as the rest
        (it fills in default arguments; there are none)."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*args)  # type: ignore[misc]


class Layer(_Function):
    """``apply(cell, directions, batch_sizes, every_c, x, h0, c0, *weights) -> y, h_n, c_n, gates, cells``.

    Arguments and results as in :mod:`fusedrnn.ops`; ``gates`` carries no gradient, ``cells`` if ``every_c``.
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
        return ops.forward[cell](x, h0, c0, weights, batch_sizes, directions, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, directions, batch_sizes, every_c, x, h0, c0, *weights = inputs
        y, _, _, gates, cells = output
        ctx.cell, ctx.directions = cell, directions
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((gates,) if every_c else (gates, cells)))
        ctx.save_for_backward(batch_sizes, x, h0, c0, y, gates, cells, *weights)

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, _: Any, dcells: Any) -> tuple[Any, ...]:
        if dy is None and dh_n is None and dc_n is None and dcells is None:
            return (None,) * len(ctx.needs_input_grad)
        batch_sizes, x, h0, c0, y, gates, cells, *weights = ctx.saved_tensors
        if ctx.cell != "lstm":
            dc_n = None  # c_n is empty; compiled code gives it a zero gradient all the same
        differentiable = torch.is_grad_enabled()  # create_graph=True
        call = LayerBackward.apply if differentiable else LayerBackward.forward
        # y and cells are detached: constants there, not a way back into this layer.
        fixed = (ctx.cell, ctx.directions, batch_sizes, y.detach(), gates, cells.detach(), ctx.needs_input_grad[4:])
        return (None, None, None, None, *call(*fixed, dy, dh_n, dc_n, dcells, x, h0, c0, *weights))


class LayerBackward(_Function):
    """The gradients of :class:`Layer`, themselves differentiable.

    ``apply(cell, directions, batch_sizes, y, gates, cells, needs, dy, dh_n, dc_n, dcells, x,
    h0, c0, *weights) -> dx, dh0, dc0, *dweights``, ``None`` wherever ``needs`` (a bool each) says so.
    """

    @staticmethod
    def forward(
        cell: str,
        directions: int,
        batch_sizes: Tensor | None,
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        needs: tuple[bool, ...],
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dcells: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        mask = sum([1 << bit for bit, need in enumerate(needs) if need])
        dx, dh0, dc0, dweights = ops.backward[cell](
            dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, directions, y, gates, cells, mask
        )
        gradients = (dx, dh0, dc0, *dweights)
        return tuple([g if need else None for g, need in zip(gradients, needs, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        cell, directions, batch_sizes, _, _, _, needs, *tensors = inputs
        ctx.cell, ctx.directions, ctx.needs = cell, directions, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, *tensors)

    @staticmethod
    def backward(ctx: Any, *ggs: Tensor | None) -> tuple[Any, ...]:
        batch_sizes, *tensors = ctx.saved_tensors
        with torch.enable_grad():
            tensors = [_alias(t) for t in tensors]
            dy, dh_n, dc_n, dcells, x, h0, c0, *weights = [_promote(t) for t in tensors]
            layer = getattr(reference, ctx.cell)
            outputs = layer(x, h0, c0, weights, batch_sizes, ctx.directions)
            sources = [t for t, gg in zip(tensors[4:], ggs, strict=True) if gg is not None]
            first = _vjp(outputs, (dy, dh_n, dc_n, dcells), sources, create_graph=True)
        needs = ctx.needs_input_grad[_FIXED:]
        targets = [t for t, need in zip(tensors, needs, strict=True) if need]
        ggs = tuple(gg for gg in ggs if gg is not None)
        second = iter(_vjp(first, ggs, targets, create_graph=torch.is_grad_enabled()))
        return (None,) * _FIXED + tuple(next(second) if need else None for need in needs)


def _alias(t: Tensor | None) -> Tensor | None:
    """A new node of the graph for each argument, so that one computed from another, or the same
    tensor given twice, still gets its own partial derivative."""
    return t.view_as(t) if t is not None and t.requires_grad else t


def _promote(t: Tensor | None) -> Tensor | None:
    """The kernels accumulate in float32, so the loops standing in for them do."""
    return t.float() if t is not None and t.dtype in _HALF else t


def _vjp(
    outputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """torch.autograd.grad, passing over outputs without a graph or an upstream gradient."""
    pairs = [
        (o, g) for o, g in zip(outputs, upstream, strict=True) if o is not None and g is not None and o.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    used, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(used, inputs, gradients, create_graph=create_graph, allow_unused=True)
