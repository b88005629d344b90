"""The compiled ops: loads the libraries and tells torch the ops' shapes (fake kernels).

One op a cell, ``fusedrnn::{lstm,gru,rnn_tanh,rnn_relu}``, runs a whole layer in all its directions,
and one, ``fusedrnn::<cell>_backward``, gives its gradients::

    <cell>(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes,
           int directions, bool save, bool tf32=False)
        -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)
    <cell>_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells,
                    Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes,
                    int directions, Tensor y, Tensor gates, Tensor cells, int needs,
                    bool tf32=False)
        -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)

The arguments up to ``batch_sizes`` are those of :func:`fusedrnn.reference.lstm`. With ``save`` the
forward op keeps what the backward op reads: ``gates [rows, D, S, H]``, the S activated gates of
each unit (S + 1 if h is projected: then o tanh(c)), and for the LSTM ``cells [rows, D, H]``, every
c in float32 (float64 for float64); so is its gradient, ``dcells``. ``needs`` is a bit mask of the
gradients asked for: 0 dx, 1 dh0, 2 dc0 (of zero states too, where none were given), 3 + i weight i.
Whatever is not asked for or does not exist is an empty ``[0]`` tensor. ``tf32`` lets a GPU multiply
float32 numbers in TensorFloat-32: :func:`tf32`.

Two ops are linear, and each other's transpose: the change of the states with their arguments, and the gradient of a
loss in every state. Both are for float32 and float64 alone, :mod:`fusedrnn.second_order` uses them::

    <cell>_tangent(Tensor? dwx, Tensor? drh, Tensor? dy, Tensor? dh0, Tensor? dc0,
                   Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes,
                   int directions, Tensor y, Tensor gates, Tensor cells, bool tf32=False)
        -> (Tensor dy, Tensor dh_n, Tensor dc_n, Tensor dcells, Tensor drh)
    <cell>_adjoint(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells,
                   Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes,
                   int directions, Tensor y, Tensor gates, Tensor cells, bool tf32=False)
        -> (Tensor dwx, Tensor drh, Tensor dh, Tensor dc, Tensor dh0, Tensor dc0)

The tangent op's arguments ``dwx [rows, D, G * H]``, ``drh`` and ``dy`` are the changes of ``wx``, of ``rh`` as far as
it comes from the weights (at a constant ``h_prev``), and of ``h`` as far as it comes from the projection's weight; its
result ``drh`` is the whole change of ``rh``. The adjoint op's results are a loss's gradients in ``wx``, ``rh`` and,
shaped as y and as cells, in h and c of every step, and in the initial states; ``drh`` is empty where it is ``dwx``.
Second derivatives are one step's alone: of any steps of one direction, ``[rows, .]``, ::

    <cell>_curvature(Tensor wx, Tensor rh, Tensor h, Tensor? c, Tensor? dwx, Tensor? drh, Tensor? dh,
                     Tensor? dc, Tensor upstream_h, Tensor? upstream_c, Tensor? dupstream_h)
        -> (Tensor dby_wx, Tensor dby_rh, Tensor dby_h, Tensor dby_c, Tensor dh_after)

is how the gradients in ``wx``, ``rh``, ``h`` and ``c``, for those after the step, and the h after the step (before a
projection) change where the arguments and ``upstream_h`` do. ``dby_rh`` is empty where it is ``dby_wx``; ``dby_h`` is
the part that does not flow through rh, empty if there is none.

``<cell>_inference(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, int directions) ->
Tensor[]`` is the forward op on a CPU without saving, and returns only ``y``, ``h_n`` and the LSTM's ``c_n``.

``<cell>_step(Tensor x, Tensor h, Tensor? c, Tensor[] weights) -> Tensor[]`` is a cell's step without saving: ``x [N,
I]``, ``h [N, P]`` and ``c [N, H]`` to the next ``h`` and the LSTM's ``c``.

``<cell>_advance(Tensor x, Tensor(a!) h, Tensor(b!)? c, Tensor[] weights, Tensor? batch_sizes, int layers, Tensor(c!)
y) -> ()`` runs a stack of layers of one direction without saving and without allocating tensors, out of autograd's
sight: the states, ``h [L, N, P]`` and ``c [L, N, H]``, are updated in place, and the last layer's ``y`` is written to.

``<cell>_plan(Tensor like, int N, int H, int P, int directions, bool backward, bool projected, int layers, bool
tf32=False) -> (str name, str reason, int[] numbers)``, on a GPU alone, is for :func:`fusedrnn.explain`.

``segments(Tensor lengths, Tensor? reset, Tensor first_row, Tensor step_row, int directions) -> (Tensor batch_sizes,
Tensor source, Tensor initial, Tensor final)``, all on the CPU, is for :mod:`fusedrnn.rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import vmap

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # G, rows of w_ih per hidden unit
STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}  # h, or h and c
SAVED = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}  # S, values kept per hidden unit

_Item = TypeVar("_Item")

_LIB = Path(__file__).parent / "lib"


def _load() -> None:
    library = _LIB / "libfusedrnn.so"
    if not library.exists():
        raise ImportError(f"fusedrnn's compiled library was not found at {library}; reinstall with pip install .")
    torch.ops.load_library(library)
    cuda = _LIB / "libfusedrnn_cuda.so"
    if torch.version.cuda is not None and cuda.exists():
        torch.ops.load_library(cuda)


autocast_enabled = torch._C._is_any_autocast_enabled


def tf32(x: Tensor) -> bool:
    """Whether an op on ``x`` may multiply in TensorFloat-32: ``torch.backends.cudnn.rnn.fp32_precision``, as
    torch.nn's RNNs on a GPU."""
    return x.is_cuda and x.dtype is torch.float32 and _cudnn_rnn_precision() == "tf32"


def _cudnn_rnn_precision() -> str:
    return torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]


# torch.compiler.assume_constant_result without its import of torch._dynamo, which takes seconds.
_cudnn_rnn_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def infer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
) -> Any:
    """``y, h_n`` and the LSTM's ``c_n`` of a layer, nothing saved, in as few Python steps as it takes."""
    if x.is_cpu:
        return inference[cell](x, h0, c0, weights, batch_sizes, directions)
    return eager[cell](x, h0, c0, weights, batch_sizes, directions, False, tf32(x))


def of_layers(weights: Sequence[_Item], layers: int) -> list[Sequence[_Item]]:
    """What each layer of a stack has of the weights, or of something for each of them."""
    if layers < 1 or not weights or len(weights) % layers:
        raise RuntimeError(f"fusedrnn: weights: expected as many for each of {layers} layers, got {len(weights)}")
    count = len(weights) // layers
    return [weights[k * count : (k + 1) * count] for k in range(layers)]


def _fake_batch(x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> int | torch.SymInt:
    if batch_sizes is None:
        return x.shape[1]
    return torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.shape[1]


def _fake_forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
    save: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if directions not in (1, 2) or len(weights) < 2 * directions:
        raise RuntimeError(f"fusedrnn: directions, weights: got {directions} and {len(weights)}")
    _check_batch_sizes(batch_sizes)
    w_hh = weights[1]
    hidden, projected = w_hh.shape[0] // GATES[cell], w_hh.shape[1]
    *lead, _ = x.shape
    rows = math.prod(lead)
    batch = _fake_batch(x, h0, batch_sizes)
    _check("x", x, x, (*lead, weights[0].shape[1]))
    _check("h0", h0, x, (directions, batch, projected))
    _check("c0", c0, x, (directions, batch, hidden))
    for w in weights:
        _check("weights", w, x, w.shape)
    y = x.new_empty(*lead, directions * projected)
    h_n = x.new_empty(directions, batch, projected)
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    c_n, gates, cells = x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=state)
    if STATES[cell] == 2:
        c_n = x.new_empty(directions, batch, hidden)
        if save:
            cells = x.new_empty(rows, directions, hidden, dtype=state)
    if save:
        has_projection = len(weights) // directions % 2  # then h before the projection is kept too
        gates = x.new_empty(rows, directions, SAVED[cell] + has_projection, hidden)
    return y, h_n, c_n, gates, cells


def _check_batch_sizes(batch_sizes: Tensor | None) -> None:
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError("fusedrnn: batch_sizes: expected a one-dimensional int64 tensor on the CPU")


def _check(name: str, t: Tensor | None, x: Tensor, shape: Sequence[int | torch.SymInt]) -> None:
    if t is None:
        return
    if t.device != x.device or t.dtype != x.dtype:
        raise RuntimeError(f"fusedrnn: {name}: expected {x.dtype} on {x.device}, got {t.dtype} on {t.device}")
    if t.shape != tuple(shape):
        raise RuntimeError(f"fusedrnn: {name}: expected {list(shape)}, got {list(t.shape)}")


def _fake_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    _check_batch_sizes(batch_sizes)
    for t in (dy, dh_n, dc_n, dcells, h0, c0, *weights, y, gates, cells):
        if t is not None and t.device != x.device:
            raise RuntimeError(f"fusedrnn: expected all tensors on {x.device}, got one on {t.device}")

    def gradient(bit: int, *shape: Any) -> Tensor:
        return x.new_empty(shape if needs >> bit & 1 else (0,))

    dweights = [gradient(3 + i, *w.shape) for i, w in enumerate(weights)]
    hidden, projected = weights[1].shape[0] // GATES[cell], weights[1].shape[1]
    batch = _fake_batch(x, h0, batch_sizes) if needs & 6 else 0
    dc0 = gradient(2, directions, batch, hidden) if STATES[cell] == 2 else x.new_empty(0)
    return gradient(0, *x.shape), gradient(1, directions, batch, projected), dc0, dweights


def _fake_tangent(cell: str, *arguments: Any) -> tuple[Tensor, ...]:
    """A tangent op gives what its forward op does, less the gates."""
    x, h0, c0, weights, batch_sizes, directions = arguments[5:11]
    y, h_n, c_n, _, cells = _fake_forward(cell, x, h0, c0, weights, batch_sizes, directions, True)
    return y, h_n, c_n, cells, _fake_gates(x, weights, directions)


def _fake_adjoint(cell: str, *arguments: Any) -> tuple[Tensor, ...]:
    """An adjoint op's results are shaped as what they are gradients of."""
    x, h0, c0, weights, batch_sizes, directions = arguments[4:10]
    y, h_n, c_n, _, cells = _fake_forward(cell, x, h0, c0, weights, batch_sizes, directions, True)
    dwx = _fake_gates(x, weights, directions)
    return dwx, torch.empty_like(dwx) if cell == "gru" else x.new_empty(0), y, cells, h_n, c_n


def _fake_gates(x: Tensor, weights: Sequence[Tensor], directions: int) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), directions, weights[0].shape[0])


def _fake_curvature(cell: str, wx: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    none, h = wx.new_empty(0), wx.new_empty(wx.shape[0], wx.shape[1] // GATES[cell])
    of_gru = (torch.empty_like(wx), torch.empty_like(h)) if cell == "gru" else (none, torch.empty_like(none))
    by_c = torch.empty_like(h) if STATES[cell] == 2 else torch.empty_like(none)
    return torch.empty_like(wx), *of_gru, by_c, h


def _inference(cell: str, *arguments: Any) -> list[Tensor]:
    """An inference op by its forward op."""
    results = forward[cell](*arguments, False)
    return list(results[: 1 + STATES[cell]])


def _step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
    """A step op by the op of a layer."""
    c = None if c is None else c.unsqueeze(0)
    results = infer(cell, x.unsqueeze(0), h.unsqueeze(0), c, weights, None, 1)
    return [t.squeeze(0) for t in results[1 : 1 + STATES[cell]]]


def _advance(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    layers: int,
    y: Tensor,
) -> None:
    """An advance op by its forward op."""
    finals = []
    with torch.no_grad():
        for k, own in enumerate(of_layers(weights, layers)):
            states = [None if s is None else s[k : k + 1] for s in (h, c)]
            arguments = (x, *states, own, batch_sizes, 1, False, tf32(x))
            x, *states = forward[cell](*arguments)[: 1 + STATES[cell]]
            finals.append(states)
        _check("y", y, x, x.shape)
        y.copy_(x)
        for state, new in zip([s for s in (h, c) if s is not None], zip(*finals, strict=True), strict=True):
            state.copy_(torch.cat(new))


def _fake_segments(
    lengths: Tensor, reset: Tensor | None, first_row: Tensor, step_row: Tensor, directions: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_size = torch.library.get_ctx().new_dynamic_size
    longest, rows, count = new_size(), new_size(), new_size()
    final = lengths.new_empty(directions, lengths.shape[0])
    return lengths.new_empty(longest), lengths.new_empty(rows), lengths.new_empty(directions, count), final


def _vmap_segments(info: Any, dims: Any, *arguments: Any) -> Any:
    """The vmap rule of the op of lengths and resets."""
    raise NotImplementedError(
        "fusedrnn: vmap over lengths= or reset= is not supported, as its entries would have different numbers of rows:"
        " map over the input alone, or loop over the entries"
    )


def _vmap_forward(cell: str, info: Any, dims: Any, *arguments: Any) -> Any:
    """The vmap rule of a forward op."""
    weights = [vmap.NOWHERE] * len(arguments[3])
    places: list[Any] = [*vmap.STATES, weights, vmap.SIZES]
    places += [vmap.NOWHERE] * (len(arguments) - len(places))
    return vmap.rule(forward[cell], info.batch_size, dims, arguments, places, (*vmap.STATES, *vmap.SAVED))


def _vmap_inference(cell: str, info: Any, dims: Any, *arguments: Any) -> Any:
    """The vmap rule of an inference op."""
    results, result_dims = _vmap_forward(cell, info, (*dims, None), *arguments, False)
    count = 1 + STATES[cell]
    return list(results[:count]), list(result_dims[:count])


def _vmap_step(cell: str, info: Any, dims: Any, *arguments: Any) -> Any:
    """The vmap rule of a step op, by that of the inference op."""
    *states, weights = arguments
    states = [t if t is None else t.unsqueeze(0) for t in states]
    moved = [d if d is None else d + 1 for d in dims[:3]]
    results, result_dims = _vmap_inference(cell, info, (*moved, dims[3], None, None), *states, weights, None, 1)
    results = [t.squeeze(0 if d != 0 else 1) for t, d in zip(results[1:], result_dims[1:], strict=True)]
    return results, [d - 1 if d else d for d in result_dims[1:]]


def _vmap_backward(cell: str, info: Any, dims: Any, *arguments: Any) -> Any:
    """The vmap rule of a backward op."""
    weights = [vmap.NOWHERE] * len(arguments[7])
    places: list[Any] = [*vmap.UPSTREAM, *vmap.STATES, weights, vmap.SIZES, vmap.NOWHERE, vmap.ROWS, *vmap.SAVED]
    places += [vmap.NOWHERE] * (len(arguments) - len(places))
    one_by_one = arguments[13] >> 3 != 0  # gradients of weights
    return vmap.rule(backward[cell], info.batch_size, dims, arguments, places, (*vmap.STATES, *weights), one_by_one)


_load()
forward = {cell: getattr(torch.ops.fusedrnn, cell).default for cell in CELLS}
# Without OpOverload's Python frame:
eager = {cell: op._op for cell, op in forward.items()}
inference = {cell: getattr(torch.ops.fusedrnn, f"{cell}_inference").default._op for cell in CELLS}
step = {cell: getattr(torch.ops.fusedrnn, f"{cell}_step").default._op for cell in CELLS}
advance = {cell: getattr(torch.ops.fusedrnn, f"{cell}_advance").default._op for cell in CELLS}
backward = {cell: getattr(torch.ops.fusedrnn, f"{cell}_backward").default for cell in CELLS}
tangent = {cell: getattr(torch.ops.fusedrnn, f"{cell}_tangent").default for cell in CELLS}
adjoint = {cell: getattr(torch.ops.fusedrnn, f"{cell}_adjoint").default for cell in CELLS}
curvature = {cell: getattr(torch.ops.fusedrnn, f"{cell}_curvature").default for cell in CELLS}
segments = torch.ops.fusedrnn.segments.default
torch.library.register_fake("fusedrnn::segments", _fake_segments)
torch.library.register_vmap("fusedrnn::segments", _vmap_segments)
_library = torch.library.Library("fusedrnn", "IMPL")
for _cell in CELLS:
    _library.impl(f"{_cell}_advance", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fusedrnn::{_cell}", partial(_fake_forward, _cell))
    torch.library.register_fake(f"fusedrnn::{_cell}_backward", partial(_fake_backward, _cell))
    torch.library.register_fake(f"fusedrnn::{_cell}_tangent", partial(_fake_tangent, _cell))
    torch.library.register_fake(f"fusedrnn::{_cell}_adjoint", partial(_fake_adjoint, _cell))
    torch.library.register_fake(f"fusedrnn::{_cell}_curvature", partial(_fake_curvature, _cell))
    torch.library.register_fake(f"fusedrnn::{_cell}_inference", partial(_inference, _cell))
    torch.library.register_fake(f"fusedrnn::{_cell}_step", partial(_step, _cell))
    torch.library.impl(f"fusedrnn::{_cell}_step", "CUDA", partial(_step, _cell))
    torch.library.register_fake(f"fusedrnn::{_cell}_advance", partial(_advance, _cell))
    torch.library.impl(f"fusedrnn::{_cell}_advance", "CUDA", partial(_advance, _cell))
    torch.library.register_vmap(f"fusedrnn::{_cell}", partial(_vmap_forward, _cell))
    torch.library.register_vmap(f"fusedrnn::{_cell}_inference", partial(_vmap_inference, _cell))
    torch.library.register_vmap(f"fusedrnn::{_cell}_step", partial(_vmap_step, _cell))
    torch.library.register_vmap(f"fusedrnn::{_cell}_backward", partial(_vmap_backward, _cell))
