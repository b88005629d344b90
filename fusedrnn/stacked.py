"""A stack of layers of one direction as one op, for a GPU: there, layers that follow each other run at the same time.

One op a cell runs the layers, and one gives the gradients::

    <cell>_stack(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, int layers, int chunk, bool save,
                 bool tf32=False) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor[] saved)
    <cell>_stack_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0,
                          Tensor[] weights, int layers, int chunk, Tensor y, Tensor[] saved, int[] needs,
                          bool tf32=False) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)

``x [T, N, I]`` is padded, the states are ``[layers, N, _]``, the weights those of all layers in order. A layer begins
with ``chunk`` steps when the one before it has done them, if the GPU has room for both; 0: when it has done all.
``saved`` has every layer's ``y`` but the last, then all ``gates``, then all ``cells``. ``needs`` has a mask as the
layer ops' for each layer; the bits of dx, dh0 and dc0 are read in the first. The functions below are these ops
layer after layer: what they mean, and their fake kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, ops, vmap
from .errors import raises_out_of_memory
from .profiling import ranges_enabled

CHUNK = 64  # steps; of fewer, starting a launch would take as long as the wave wins


def _forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    layers: int,
    chunk: int,
    save: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    _check_states(layers, h0, c0)
    results = []
    for k, own in enumerate(ops.of_layers(weights, layers)):
        results.append(ops.forward[cell](x, _layer(h0, k), _layer(c0, k), own, None, 1, save, tf32))
        x = results[-1][0]
    ys, h_n, c_n, gates, cells = map(list, zip(*results, strict=True))
    saved = [*ys[:-1], *gates, *cells] if save else []
    return ys[-1], torch.cat(h_n), torch.cat(c_n), saved


def _backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    layers: int,
    chunk: int,
    y: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[int],
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    own = ops.of_layers(weights, layers)
    _check_states(layers, h0, c0, dh_n, dc_n)
    if len(saved) + 1 != 3 * layers or len(needs) != layers:
        raise RuntimeError(
            f"fusedrnn: saved, needs: expected what the forward op saved of {layers} layers, and {layers} masks"
        )
    inputs, gates, cells = [x, *saved[: layers - 1], y], saved[layers - 1 : -layers], saved[-layers:]
    none = x.new_empty(0)
    gradients: list[Any] = [(none, none, none, [none] * len(own[0]))] * layers
    masks = layer_needs(needs, layers)
    for k in reversed(range(layers)):
        if not masks[k]:
            break
        upstream = (dy, _layer(dh_n, k), _layer(dc_n, k), None)
        given = (inputs[k], _layer(h0, k), _layer(c0, k), own[k], None, 1, inputs[k + 1], gates[k], cells[k])
        gradients[k] = ops.backward[cell](*upstream, *given, masks[k], tf32)
        dy = gradients[k][0]
    _, dh0, dc0, dweights = zip(*gradients, strict=True)
    every = [w if w.numel() else w.clone() for dw in dweights for w in dw]  # what isn't there, a tensor of its own
    return gradients[0][0], torch.cat(dh0), torch.cat(dc0), every


def layer_needs(needs: Sequence[int], layers: int) -> list[int]:
    """The mask of each layer's own backward op; 0 for those below the first that anything is needed of."""
    bottom = next((k for k in range(layers) if needs[k] | needs[0] & 7), layers)
    own = [needs[k] & ~7 | needs[0] & 6 | (k > bottom or needs[0] & 1) for k in range(bottom, layers)]
    return [0] * bottom + own


def _check_states(layers: int, *states: Tensor | None) -> None:
    if any(s is not None and (s.dim() != 3 or s.shape[0] != layers) for s in states):
        raise RuntimeError(f"fusedrnn: h0, c0: expected a state for each of {layers} layers")


def _layer(state: Tensor | None, k: int) -> Tensor | None:
    return None if state is None or state.numel() == 0 else state[k : k + 1]


class StackedLayers(autograd._Function):
    """``apply(cell, layers, x, h0, c0, *weights) -> y, h_n, c_n, *saved``; no gradient goes through ``saved``.

    A gradient that is to be differentiated again, or a batch of gradients, goes through the layers one by one.
    """

    @staticmethod
    def forward(
        cell: str, layers: int, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, saved = forward[cell](x, h0, c0, weights, layers, CHUNK, True, ops.tf32(x))
        return y, h_n, c_n, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.layers, *tensors = inputs
        y, _, _, *saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*tensors, y, *saved)

    @staticmethod
    @raises_out_of_memory
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, *_: Any) -> tuple[Any, ...]:
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(ctx.needs_input_grad)
        cell, layers, needed = ctx.cell, ctx.layers, ctx.needs_input_grad[2:]
        tensors, (y, *saved) = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        if torch.is_grad_enabled() or vmap.is_legacy(dy, dh_n, dc_n):
            return None, None, *_gradients_by_layers(cell, layers, tensors, needed, dy, dh_n, dc_n)
        x, h0, c0, *weights = tensors
        masks = [sum([8 << i for i, need in enumerate(own) if need]) for own in ops.of_layers(needed[3:], layers)]
        masks[0] |= sum([1 << bit for bit, need in enumerate(needed[:3]) if need])
        dc_n = dc_n if ops.STATES[cell] == 2 else None
        dx, dh0, dc0, dweights = backward[cell](
            dy, dh_n, dc_n, x, h0, c0, weights, layers, CHUNK, y, saved, masks, ops.tf32(x)
        )
        gradients = (dx, dh0, dc0, *dweights)
        return None, None, *[g if need else None for g, need in zip(gradients, needed, strict=True)]


def _gradients_by_layers(
    cell: str,
    layers: int,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    *upstream: Tensor | None,
) -> list[Tensor | None]:
    """``dx, dh0, dc0, *dweights`` of layers that run again, each with a graph of its own."""
    with torch.enable_grad():
        aliases: list[Any] = [_alias(t) for t in tensors]
        x, h0, c0, *weights = aliases
        finals = []
        for k, own in enumerate(ops.of_layers(weights, layers)):
            x, h_n, c_n, *_ = autograd.apply(cell, 1, None, False, x, _layer(h0, k), _layer(c0, k), *own)
            finals.append((h_n, c_n))
        outputs = (x, *map(torch.cat, zip(*finals, strict=True)))
    targets = [t for t, need in zip(aliases, needed, strict=True) if need]
    found = iter(_vjp(outputs, upstream, targets, create_graph=torch.is_grad_enabled()))
    return [next(found) if need else None for need in needed]


def _alias(t: Tensor | None) -> Tensor | None:
    """A new node of the graph for each argument, so that one computed from another, or the same
    tensor given twice, still gets its own partial derivative."""
    return t.view_as(t) if t is not None and t.requires_grad else t


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


def follow_directly(layers: int, directions: int, dropout: bool) -> bool:
    """Whether there are several layers, and a layer's steps are all that the next one waits for."""
    return layers > 1 and directions == 1 and not dropout and not ranges_enabled()


def suits(x: Tensor, batch_sizes: Tensor | None, every_c: bool, recompute: bool) -> bool:
    """Whether layers that follow each other directly are to be one op: on a GPU, where nothing traces or transforms
    it, the input is padded, and nothing is wanted of a layer alone."""
    return (
        x.is_cuda
        and batch_sizes is None
        and not every_c
        and not recompute
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def run(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], layers: int
) -> tuple[Tensor, ...]:
    """``y, h_n, c_n`` of a stack, with a graph where a gradient is due."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights)):
        return StackedLayers.apply(cell, layers, x, h0, c0, *weights)[:3]
    return forward[cell](x, h0, c0, weights, layers, CHUNK, False, ops.tf32(x))[:3]


forward = {cell: getattr(torch.ops.fusedrnn, f"{cell}_stack").default for cell in ops.CELLS}
backward = {cell: getattr(torch.ops.fusedrnn, f"{cell}_stack_backward").default for cell in ops.CELLS}
for _cell in ops.CELLS:
    for _name, _by_layers in ((f"fusedrnn::{_cell}_stack", _forward), (f"fusedrnn::{_cell}_stack_backward", _backward)):
        torch.library.impl(_name, "CPU", partial(_by_layers, _cell))
        torch.library.register_fake(_name, partial(_by_layers, _cell))
