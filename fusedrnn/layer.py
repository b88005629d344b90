"""One layer: with a graph where a gradient is due, saving nothing where none is.

To tracers it is an op, ``fusedrnn::<cell>_layer``, composed of the others as ``aten::lstm`` is: what they record
can be differentiated, exported programs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, ops
from .recompute import RecomputedLayer


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
    every_c: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """One layer as the ops take it: ``y, h_n, c_n, gates, cells``.

    Saves nothing if no gradient is due; then ``cells`` is there only if ``every_c``. In transforms of
    torch.func, in forward mode and compiled, ``recompute`` is of no effect.
    """
    forward_mode, transformed = forward_ad._current_level >= 0, torch._C._are_functorch_transforms_active()
    if forward_mode or (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or any(w.requires_grad for w in weights)
            or (h0 is not None and h0.requires_grad)
            or (c0 is not None and c0.requires_grad)
            or transformed  # requires_grad doesn't tell
        )
    ):
        if recompute and not (forward_mode or transformed or torch.compiler.is_compiling()):
            return RecomputedLayer.apply(cell, directions, batch_sizes, every_c, x, h0, c0, *weights)
        return autograd.apply(cell, directions, batch_sizes, every_c, x, h0, c0, *weights)
    return ops.forward[cell](x, h0, c0, weights, batch_sizes, directions, every_c, ops.tf32(x))


def traceable_layer(cell: str, *arguments: Any) -> tuple[Tensor, ...]:
    """:func:`layer`, which a tracer sees as one op (except in transforms, that can't be traced through one)."""
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() and not transformed:
        return _traced[cell](*arguments)
    return layer(cell, *arguments)


_library = torch.library.Library("fusedrnn", "FRAGMENT")
for _cell in ops.CELLS:
    _library.define(
        f"{_cell}_layer(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, int directions,"
        " bool every_c, bool recompute) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
    )
    _library.impl(f"{_cell}_layer", partial(layer, _cell), "CompositeImplicitAutograd")
_traced = {cell: getattr(torch.ops.fusedrnn, f"{cell}_layer").default for cell in ops.CELLS}
