"""How many floating-point operations the ops do, for ``torch.utils.flop_counter.FlopCounterMode``.

As torch counts its own: two for each multiply-add of a matrix product, none for the gates' elementwise math.
Every row of x is multiplied with every weight matrix once; backward, each of these products has one for the
gradient of the matrix, if that is needed, and one for the gradient of what it was multiplied with. The tangent and the
adjoint ops have those of the recurrent matrices alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ops, stacked

Shape = Sequence[int]


def _forward(x: Shape, h0: Any, c0: Any, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Of the forward, inference, step, advance and stack ops."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _layer_backward(rows: int, weights: Sequence[Shape], directions: int, needs: int) -> int:
    each = len(weights) // directions
    flops = 0
    for i, w in enumerate(weights):
        if len(w) == 2:
            is_w_ih = i % each == 0  # the others' products lead to earlier steps
            products = (needs >> (3 + i) & 1) + (needs & 1 if is_w_ih else 1)
            flops += 2 * rows * math.prod(w) * products
    return flops


def _backward(
    dy: Any, dh_n: Any, dc_n: Any, dcells: Any, x: Shape, h0: Any, c0: Any, weights: Sequence[Shape],
    batch_sizes: Any, directions: int, y: Any, gates: Any, cells: Any, needs: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _layer_backward(math.prod(x[:-1]), weights, directions, needs)


def _recurrent(x: Shape, h0: Any, c0: Any, weights: Sequence[Shape], batch_sizes: Any, directions: int) -> int:
    each = len(weights) // directions
    products = [math.prod(w) for i, w in enumerate(weights) if len(w) == 2 and i % each]
    return 2 * math.prod(x[:-1]) * sum(products)


def _tangent(*arguments: Any, **_: Any) -> int:
    return _recurrent(*arguments[5:11])


def _adjoint(*arguments: Any, **_: Any) -> int:
    return _recurrent(*arguments[4:10])


def _stack_backward(
    dy: Any, dh_n: Any, dc_n: Any, x: Shape, h0: Any, c0: Any, weights: Sequence[Shape],
    layers: int, chunk: int, y: Any, saved: Any, needs: Sequence[int], *_: Any, **__: Any,
) -> int:  # fmt: skip
    masks, own = stacked.layer_needs(needs, layers), ops.of_layers(weights, layers)
    rows = math.prod(x[:-1])
    return sum(_layer_backward(rows, w, 1, mask) for w, mask in zip(own, masks, strict=True) if mask)


def register() -> None:
    formulas: dict[str, Callable[..., int]] = {"_backward": _backward, "_stack_backward": _stack_backward}
    formulas |= {"_tangent": _tangent, "_adjoint": _adjoint}
    formulas |= dict.fromkeys(("", "_inference", "_step", "_advance", "_stack"), _forward)
    for cell in ops.CELLS:
        for suffix, formula in formulas.items():
            register_flop_formula(getattr(torch.ops.fusedrnn, cell + suffix))(formula)
