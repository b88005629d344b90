"""Gradients of a layer: an autograd.Function over the ops, differentiable to any order.

First and second derivatives come from the kernels (second ones by :mod:`fusedrnn.second_order`), and
so does forward mode. Third and higher ones go through the eager loops of :mod:`fusedrnn.reference`,
whose own graph serves any order. :mod:`fusedrnn.vmap` maps all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, is_gradtrackingtensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import ops, reference, vmap
from .errors import raises_out_of_memory
from .second_order import Linearised, promote

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
        cell, directions, batch_sizes, *saved, needs = inputs[:_FIXED]
        ctx.cell, ctx.directions, ctx.needs = cell, directions, needs
        ctx.set_materialize_grads(False)
        keep_batch_sizes(ctx, batch_sizes)
        ctx.save_for_backward(*saved, *inputs[_FIXED:])

    @staticmethod
    @raises_out_of_memory
    def backward(ctx: Any, *ggs: Tensor | None) -> tuple[Any, ...]:
        if all(gg is None for gg in ggs):
            return (None,) * len(ctx.needs_input_grad)
        y, gates, cells, *tensors = ctx.saved_tensors
        batch_sizes, wanted = kept_batch_sizes(ctx), ctx.needs_input_grad[_FIXED:]
        if forward_ad._current_level >= 0 or vmap.is_legacy(*ggs):
            layer = _reference_layer(ctx.cell, ctx.directions, batch_sizes)
            second = _reference_second(layer, ctx.needs, wanted)(*ggs, *tensors)
        else:
            fixed = (ctx.cell, ctx.directions, batch_sizes, y, gates, cells, ctx.needs, wanted)
            second = LayerSecondBackward.apply(*fixed, *ggs, *tensors)
        return (None,) * _FIXED + second

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


class LayerSecondBackward(_Function):
    """The gradients of :class:`LayerBackward`. Their own come from eager loops, whose graph serves every higher order.

    ``apply(cell, directions, batch_sizes, y, gates, cells, needs, wanted, *ggs, dy, dh_n, dc_n, dcells, x, h0, c0,
    *weights)``: ``ggs`` are for LayerBackward's results; of the tensors from ``dy`` on, the gradients that ``wanted``
    (a bool each) asks for are returned.
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
        wanted: tuple[bool, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        count = len(needs)
        ggs, upstream, arguments = tensors[:count], tensors[count:-count], tensors[-count:]
        if not Linearised.possible(arguments):
            reference_layer = _reference_layer(cell, directions, batch_sizes)
            return _reference_second(reference_layer, needs, wanted)(*tensors)
        layer = Linearised(cell, directions, batch_sizes, arguments, (y, gates, cells), ggs)
        of_arguments = wanted[_UPSTREAM:]
        found = layer.gradients(upstream, of_arguments) if any(of_arguments) else [None] * len(of_arguments)
        pairs = zip((*layer.results, *found), (*upstream, *arguments), wanted, strict=True)
        return tuple([g.to(t.dtype) if want else None for g, t, want in pairs])  # type: ignore[union-attr]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.cell, ctx.directions, batch_sizes, _, _, _, ctx.needs, ctx.wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        keep_batch_sizes(ctx, batch_sizes)
        ctx.save_for_backward(*tensors)

    @staticmethod
    @raises_out_of_memory
    def backward(ctx: Any, *gggs: Tensor | None) -> tuple[Any, ...]:
        layer = _reference_layer(ctx.cell, ctx.directions, kept_batch_sizes(ctx))
        wanted = ctx.needs_input_grad[_FIXED + 1 :]
        second = _reference_second(layer, ctx.needs, ctx.wanted)
        third = _gradients_of(second, ctx.saved_tensors, gggs, wanted)
        return (None,) * (_FIXED + 1) + third

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        needs, wanted = arguments[_FIXED - 1 : _FIXED + 1]
        nowhere = (vmap.NOWHERE,) * (len(needs) - 3)
        layer = (*vmap.STATES, *nowhere)
        masks = (vmap.NOWHERE,) * (len(needs) + len(wanted))
        places = (vmap.NOWHERE, vmap.NOWHERE, vmap.SIZES, vmap.ROWS, *vmap.SAVED, *masks)
        places = (*places, *layer, *vmap.UPSTREAM, *layer)
        one_by_one = any(wanted[_UPSTREAM + 3 :])
        apply = LayerSecondBackward.apply
        return vmap.rule(apply, info.batch_size, in_dims, arguments, places, (*vmap.UPSTREAM, *layer), one_by_one)


class DualLayer(Layer):
    """:class:`Layer` in forward mode; apart, as torch.compile refuses a Function that has a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Layer.setup_context(ctx, inputs, output)
        y, _, _, gates, cells = output
        ctx.save_for_forward(y, gates, cells, *inputs[4:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        fixed, tensors, changes = (ctx.cell, ctx.directions, kept_batch_sizes(ctx)), _primals(ctx), tangents[4:]
        x, count = tensors[3], len(tensors)
        if (plain := _plain(*tensors, *changes)) and Linearised.possible(tensors[3:]):
            y, h_n, c_n, cells = Linearised(*fixed, plain[3:count], plain[:3], plain[count:]).results
        else:
            y, h_n, c_n, cells = _jvp(_reference_layer(*fixed), tensors[3:], changes)
        return y.to(x.dtype), h_n.to(x.dtype), c_n.to(x.dtype), None, cells if ctx.every_c else None


class DualLayerBackward(LayerBackward):
    """:class:`LayerBackward` in forward mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        LayerBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[3 : _FIXED - 1], *inputs[_FIXED:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        fixed, needs, tensors = (ctx.cell, ctx.directions, kept_batch_sizes(ctx)), ctx.needs, _primals(ctx)
        changes, count = tangents[_FIXED:], len(tensors)
        plain = _plain(*tensors, *changes)
        if plain is None or not Linearised.possible(tensors[3 + _UPSTREAM :]):
            gradients = _only(needs, _reference_gradients(_reference_layer(*fixed), needs))
            moved = iter(_jvp(gradients, tensors[3:], changes))
            return tuple(next(moved) if need else None for need in needs)
        saved, upstream, arguments = plain[:3], plain[3 : 3 + _UPSTREAM], plain[3 + _UPSTREAM : count]
        of_upstream, of_arguments = plain[count : count + _UPSTREAM], plain[count + _UPSTREAM :]
        parts: list[Sequence[Tensor | None]] = []
        if any(t is not None for t in of_arguments):
            parts.append(Linearised(*fixed, arguments, saved, of_arguments).gradients(upstream, needs))
        if any(t is not None for t in of_upstream):
            parts.append(LayerBackward.forward(*fixed, *saved, needs, *of_upstream, *arguments))
        totals = zip(needs, arguments, *parts, strict=True)
        return tuple(sum(g).to(t.dtype) if need else None for need, t, *g in totals)


def _primals(ctx: Any) -> list[Any]:
    """What was saved for forward mode, without its tangents."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]


def _plain(*tensors: Tensor | None) -> list[Any] | None:
    """The tensors without torch.func's wrappers, for ops whose results nothing outside differentiates or maps.

    None if something does.
    """
    recorded, plain = torch.is_grad_enabled(), []
    for t in tensors:
        while t is not None and is_gradtrackingtensor(t) and not t.requires_grad:
            t = get_unwrapped(t)
            if forward_ad.unpack_dual(t).tangent is not None:
                return None
        if t is not None and (is_functorch_wrapped_tensor(t) or (recorded and t.requires_grad)):
            return None
        plain.append(t)
    return None if vmap.is_legacy(*plain) else plain


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
        x, h0, c0, *weights = map(promote, arguments)
        return getattr(reference, cell)(x, h0, c0, weights, batch_sizes, directions)

    return layer


def _reference_gradients(layer: Callable[..., tuple[Tensor, ...]], needs: Sequence[bool]) -> Callable[..., Any]:
    """``(dy, dh_n, dc_n, dcells, x, h0, c0, *weights) ->`` a gradient each of the last, None unless needed."""

    def gradients(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, arguments = tensors[:_UPSTREAM], tensors[_UPSTREAM:]
        return _gradients_of(layer, arguments, [promote(t) for t in upstream], needs)

    return gradients


def _reference_second(
    layer: Callable[..., tuple[Tensor, ...]], needs: Sequence[bool], wanted: Sequence[bool]
) -> Callable[..., Any]:
    """``(*ggs, dy, dh_n, dc_n, dcells, x, h0, c0, *weights) ->`` a gradient each from dy on, None unless wanted."""

    def second(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ggs, rest = tensors[: len(needs)], tensors[len(needs) :]
        return _gradients_of(_reference_gradients(layer, needs), rest, ggs, wanted)

    return second


def _gradients_of(
    function: Callable[..., Sequence[Tensor | None]],
    arguments: Sequence[Any],
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of ``sum(upstream * function(*arguments))``, in the arguments that are wanted, by torch.func.vjp."""
    given = [g is not None for g in upstream]
    if not any(given) or not any(wanted):
        return (None,) * len(wanted)
    _, pull = _pullback(_only(given, function), arguments, wanted)
    found = iter(pull(_kept(given, upstream)))
    return tuple(next(found) if want else None for want in wanted)


def _pullback(function: Callable[..., Any], arguments: Sequence[Any], wanted: Sequence[bool]) -> Any:
    """torch.func.vjp in the wanted arguments alone: the results, and cotangents -> gradients."""

    def partly(*given: Any) -> Any:
        rest = iter(given)
        return function(*[next(rest) if want else a for a, want in zip(arguments, wanted, strict=True)])

    return torch.func.vjp(partly, *_kept(wanted, arguments))


def _only(wanted: Sequence[bool], function: Callable[..., Sequence[Any]]) -> Callable[..., tuple[Any, ...]]:
    """The function with the wanted results alone."""
    return lambda *arguments: _kept(wanted, function(*arguments))


def _kept(wanted: Sequence[bool], items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(item for item, want in zip(items, wanted, strict=True) if want)


def _jvp(function: Callable[..., Any], primals: Sequence[Tensor | None], tangents: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tangents of the function's results.

    By two vjps, as torch does not nest forward mode: ``u -> J^T u`` is linear, and the transpose of
    its derivative is J.
    """
    with forward_ad._set_fwd_grad_enabled(True):  # for a forward mode outside of this one
        results, pull = _pullback(function, primals, [t is not None for t in tangents])
        _, push = _pullback(pull, [tuple(map(torch.zeros_like, results))], [True])
        return push(tuple(t for t in tangents if t is not None))[0]
