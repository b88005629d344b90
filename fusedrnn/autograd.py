"""Gradients of a layer: an autograd.Function over the ops, differentiable to any order.

First derivatives always come from the kernels. The gradient of a gradient goes through the eager
loops of :mod:`fusedrnn.reference`, whose own graph then serves every higher order, and so does
forward-mode differentiation. :mod:`fusedrnn.vmap` maps all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import ops, reference, vmap
from .errors import raises_out_of_memory

_HALF = (torch.bfloat16, torch.float16)
_FIXED = 7  # arguments of LayerBackward before dy: constants to its derivative
_UPSTREAM = 4  # dy, dh_n, dc_n, dcells


class _Function(Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Function.apply less the inspect.signature of each call, which costs as much as the rest
        (it fills in default arguments; there are none)."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


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
        return ops.forward[cell](x, h0, c0, weights, batch_sizes, directions, True, ops.tf32(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, directions, batch_sizes, every_c, x, h0, c0, *weights = inputs
        y, _, _, gates, cells = output
        ctx.cell, ctx.directions, ctx.every_c = cell, directions, every_c
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((gates,) if every_c else (gates, cells)))
        keep_batch_sizes(ctx, batch_sizes)
        ctx.save_for_backward(x, h0, c0, y, gates, cells, *weights)

    @staticmethod
    @raises_out_of_memory
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, _: Any, dcells: Any) -> tuple[Any, ...]:
        if dy is None and dh_n is None and dc_n is None and dcells is None:
            return (None,) * len(ctx.needs_input_grad)
        return layer_gradients(ctx, ctx.saved_tensors, dy, dh_n, dc_n, dcells)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        weights = (vmap.NOWHERE,) * (len(arguments) - 7)
        places = (vmap.NOWHERE, vmap.NOWHERE, vmap.SIZES, vmap.NOWHERE, *vmap.STATES, *weights)
        return vmap.rule(apply, info.batch_size, in_dims, arguments, places, (*vmap.STATES, *vmap.SAVED))


def keep_batch_sizes(ctx: Any, batch_sizes: Tensor | None) -> None:
    """For backward, but not by save_for_backward: hooks on saved tensors may cast what they get."""
    ctx.batch_sizes = batch_sizes
    # Tensors made in inference mode have no version.
    ctx.version = None if batch_sizes is None or batch_sizes.is_inference() else batch_sizes._version


def kept_batch_sizes(ctx: Any) -> Tensor | None:
    batch_sizes: Tensor | None = ctx.batch_sizes
    if ctx.version is not None and batch_sizes._version != ctx.version:  # type: ignore[union-attr]
        raise RuntimeError("fusedrnn: batch_sizes, needed for the gradient, has been modified by an inplace operation")
    return batch_sizes


def layer_gradients(ctx: Any, saved: Sequence[Any], dy: Any, dh_n: Any, dc_n: Any, dcells: Any) -> tuple[Any, ...]:
    """Of the arguments of a :class:`Layer` with context ``ctx``, from what its forward saved."""
    x, h0, c0, y, gates, cells, *weights = saved
    # Compiled code gives a zero gradient to what has none.
    if ops.STATES[ctx.cell] == 1:
        dc_n = None
    if not ctx.every_c:
        dcells = None
    differentiable = torch.is_grad_enabled()  # create_graph=True
    call = _apply_backward if differentiable else LayerBackward.forward
    # y and cells are detached: constants there, not a way back into this layer.
    batch_sizes, needs = kept_batch_sizes(ctx), ctx.needs_input_grad[4:]
    fixed = (ctx.cell, ctx.directions, batch_sizes, y.detach(), gates, cells.detach(), needs)
    arguments = (*fixed, dy, dh_n, dc_n, dcells, x, h0, c0, *weights)
    if not torch.compiler.is_compiling() and vmap.is_legacy(dy, dh_n, dc_n, dcells):
        return (None, None, None, None, *vmap.legacy(partial(LayerBackward.mapped, call), arguments))
    return (None, None, None, None, *call(*arguments))


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
            dy, dh_n, dc_n, dcells, x, h0, c0, weights, batch_sizes, directions, y, gates, cells, mask, ops.tf32(x)
        )
        gradients = (dx, dh0, dc0, *dweights)
        return tuple([g if need else None for g, need in zip(gradients, needs, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        cell, directions, batch_sizes, _, _, _, needs, *tensors = inputs
        ctx.cell, ctx.directions, ctx.needs = cell, directions, needs
        ctx.set_materialize_grads(False)
        keep_batch_sizes(ctx, batch_sizes)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *ggs: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        layer = _reference_layer(ctx.cell, ctx.directions, kept_batch_sizes(ctx))
        needs = ctx.needs_input_grad[_FIXED:]
        if any(t is not None and is_functorch_wrapped_tensor(t) for t in tensors):
            # Perhaps of a transform that has ended: then their history is not autograd's to see.
            gradients, pull = _pullback(_reference_gradients(layer, ctx.needs), tensors, needs)
            wanted = [gg for gg, need in zip(ggs, ctx.needs, strict=True) if need]
            second = iter(pull(_zeros_for_none(wanted, gradients)))
        else:
            with torch.enable_grad():
                tensors = [_alias(t) for t in tensors]
                outputs = layer(*tensors[_UPSTREAM:])
                sources = [t for t, gg in zip(tensors[_UPSTREAM:], ggs, strict=True) if gg is not None]
                first = _vjp(outputs, [_promote(t) for t in tensors[:_UPSTREAM]], sources, create_graph=True)
            targets = [t for t, need in zip(tensors, needs, strict=True) if need]
            ggs = tuple(gg for gg in ggs if gg is not None)
            second = iter(_vjp(first, ggs, targets, create_graph=torch.is_grad_enabled()))
        return (None,) * _FIXED + tuple(next(second) if need else None for need in needs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return LayerBackward.mapped(_apply_backward, info.batch_size, in_dims, *arguments)

    @staticmethod
    def mapped(call: Callable[..., Any], size: int, dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """The vmap rule, for ``call`` with the arguments of :meth:`forward`."""
        needs = arguments[_FIXED - 1]
        weights = (vmap.NOWHERE,) * len(needs[3:])
        places = (vmap.NOWHERE, vmap.NOWHERE, vmap.SIZES, vmap.ROWS, *vmap.SAVED, *(vmap.NOWHERE,) * len(needs))
        places = (*places, *vmap.UPSTREAM, *vmap.STATES, *weights)
        results = (*vmap.STATES, *weights)
        return vmap.rule(call, size, dims, arguments, places, results, one_by_one=any(needs[3:]))


class DualLayer(Layer):
    """:class:`Layer` in forward mode; apart, as torch.compile refuses a Function that has a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Layer.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        layer = _reference_layer(ctx.cell, ctx.directions, kept_batch_sizes(ctx))
        y, h_n, c_n, cells = _jvp(layer, (x, *rest), tangents[4:])
        return y.to(x.dtype), h_n.to(x.dtype), c_n.to(x.dtype), None, cells if ctx.every_c else None


class DualLayerBackward(LayerBackward):
    """:class:`LayerBackward` in forward mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        LayerBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[_FIXED:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        layer = _reference_layer(ctx.cell, ctx.directions, kept_batch_sizes(ctx))
        gradients = _reference_gradients(layer, ctx.needs)
        moved = iter(_jvp(gradients, ctx.saved_tensors, tangents[_FIXED:]))
        return tuple(next(moved) if need else None for need in ctx.needs)


def apply(*arguments: Any) -> tuple[Tensor, ...]:
    """:class:`Layer`'s ``apply``, in forward mode :class:`DualLayer`'s."""
    forward_mode = forward_ad._current_level >= 0
    if (forward_mode or torch._C._are_functorch_transforms_active()) and torch.compiler.is_compiling():
        torch._dynamo.graph_break("torch.compile does not transform autograd.Functions")
    return (DualLayer if forward_mode else Layer).apply(*arguments)


def _apply_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    return (LayerBackward if forward_ad._current_level < 0 else DualLayerBackward).apply(*arguments)


def _reference_layer(cell: str, directions: int, batch_sizes: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    """``(x, h0, c0, *weights) -> y, h_n, c_n, cells`` in eager loops, computed in float32 or better."""

    def layer(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        x, h0, c0, *weights = map(_promote, arguments)
        return getattr(reference, cell)(x, h0, c0, weights, batch_sizes, directions)

    return layer


def _reference_gradients(layer: Callable[..., tuple[Tensor, ...]], needs: Sequence[bool]) -> Callable[..., Any]:
    """``(dy, dh_n, dc_n, dcells, x, h0, c0, *weights) ->`` the gradients that are needed."""

    def gradients(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        outputs, pull = _pullback(layer, arguments[_UPSTREAM:], needs)
        return pull(_zeros_for_none([_promote(t) for t in arguments[:_UPSTREAM]], outputs))

    return gradients


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


def _pullback(function: Callable[..., Any], arguments: Sequence[Any], wanted: Sequence[bool]) -> Any:
    """torch.func.vjp in the wanted arguments alone: the results, and cotangents -> gradients."""

    def partly(*given: Any) -> Any:
        rest = iter(given)
        return function(*[next(rest) if want else a for a, want in zip(arguments, wanted, strict=True)])

    return torch.func.vjp(partly, *[a for a, want in zip(arguments, wanted, strict=True) if want])


def _zeros_for_none(upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(o) if g is None else g for g, o in zip(upstream, outputs, strict=True))


def _jvp(function: Callable[..., Any], primals: Sequence[Tensor | None], tangents: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tangents of the function's results.

    By two vjps, as torch does not nest forward mode: ``u -> J^T u`` is linear, and the transpose of
    its derivative is J.
    """
    with forward_ad._set_fwd_grad_enabled(True):  # for a forward mode outside of this one
        primals = [None if p is None else forward_ad.unpack_dual(p).primal for p in primals]
        results, pull = _pullback(function, primals, [t is not None for t in tangents])
        _, push = _pullback(pull, [tuple(map(torch.zeros_like, results))], [True])
        return push(tuple(t for t in tangents if t is not None))[0]
