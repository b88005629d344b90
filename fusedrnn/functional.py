"""Whole recurrent networks as functions: layers, directions, dropout between them, packed batches.

:func:`lstm`, :func:`gru` and :func:`rnn` need no module: they take the weights as a flat sequence
in the order of ``torch.nn.LSTM(...)._flat_weights``, for each layer and in it each direction
``w_ih, w_hh``, then ``b_ih, b_hh`` if there are biases, then ``w_hr`` if ``h`` is projected.

Under :class:`torch.autocast` the input, the states and the weights are cast to the autocast dtype
(float64 ones are left alone) and so is the result; the LSTM's c stays in float32 between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import autograd, ops
from .profiling import in_range, ranges_enabled
from .recompute import RecomputedLayer
from .rows import Lengths, Segments, of_nested, of_padded

States = tuple[Tensor, ...]  # (h,) or (h, c)

# What wrong arguments raise; other exceptions pass (checkpointing stops a forward with one).
ARGUMENT_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

autocast_enabled = torch._C._is_any_autocast_enabled


@overload
def lstm(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = ...,
    bidirectional: bool = ...,
    batch_first: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    lengths: Lengths | None = ...,
    reset: Tensor | None = ...,
    return_cell_states: Literal[False] = ...,
    recompute: bool = ...,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]: ...


@overload
def lstm(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = ...,
    bidirectional: bool = ...,
    batch_first: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    lengths: Lengths | None = ...,
    reset: Tensor | None = ...,
    return_cell_states: Literal[True],
    recompute: bool = ...,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor], Tensor | PackedSequence]: ...


def lstm(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    return_cell_states: bool = False,
    recompute: bool = False,
) -> Any:
    """A multi-layer LSTM, ``torch.nn.LSTM`` without the module.

    For each layer, with ``*`` elementwise (formulas of :class:`torch.nn.LSTM`)::

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h_prev + b_hh)   (each with its rows of the weights)
        g       = tanh(W_ih x + b_ih + W_hh h_prev + b_hh)
        c       = f * c_prev + i * g
        h       = o * tanh(c)            (then W_hr h, if projected)

    Args:
        input: ``[T, N, I]``, ``[N, T, I]`` if ``batch_first``, ``[T, I]`` for a single sequence, a
            ``PackedSequence``, or a nested tensor of the jagged layout ``[N, (lengths), I]``
            (whatever ``batch_first`` says). float32, float64, bfloat16 or float16, as all the others.
        weights: ``w_ih [4H, I], w_hh [4H, P][, b_ih [4H], b_hh [4H]][, w_hr [P, H]]`` of each layer
            and direction; gates in the order i f g o. P is H unless projected; after the first
            layer I is ``D * P``.
        hx: initial ``(h_0 [L*D, N, P], c_0 [L*D, N, H])``, without N for a single sequence; zeros
            by default. L layers, D directions.
        num_layers, bidirectional, batch_first: as in :class:`torch.nn.LSTM`.
        dropout: probability of zeroing an element between layers, if ``training``.
        lengths: integers ``[N]`` from 0 to T, how many steps of padded input each sequence has. The
            result is that of packing: nothing is computed for the padding, whose output is 0, and
            the final states are those after the last step (``hx`` where there is none).
        reset: bool ``[T, N]`` (``[N, T]`` if ``batch_first``, ``[T]`` for a single sequence): where
            True, the state is zeros before the step, as if a new sequence began there; backwards
            in time, after the step. With both, any device will do; from a GPU they are copied to
            the host, which waits for it.
        return_cell_states: also return c of every step, as is ``output`` for h.
        recompute: train in less memory: keep the states at about sqrt(T) checkpoints instead of the
            gates of every step, and run the steps again in the backward pass. The same gradients
            (16-bit states are rounded at checkpoints), for one more forward pass.

    Returns:
        ``output`` (as the input, with ``D * P`` features) and ``(h_n, c_n)``, shaped as ``hx``; with
        ``return_cell_states`` also the last layer's c (as the input, with ``D * H`` features).

    Raises:
        ValueError: the input's number of dimensions, its dtype (unlike the weights'), or the number
            of weights is wrong; ``lengths`` or ``reset`` for input that isn't padded.
        TypeError: ``lengths`` are no integers, ``reset`` no bool tensor.
        RuntimeError: sizes disagree, a length is not from 0 to T, or the sequence is empty.
    """
    outputs, (h_n, c_n) = _call(
        "lstm", input, hx, weights, num_layers, bidirectional, batch_first, dropout * training,
        lengths, reset, return_cell_states, recompute,
    )  # fmt: skip
    output, *cell_states = outputs
    return output, (h_n, c_n), *cell_states


def gru(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A multi-layer GRU, ``torch.nn.GRU`` without the module.

    For each layer, with ``*`` elementwise (formulas of :class:`torch.nn.GRU`; the reset gate acts
    after the recurrent matmul)::

        r = sigmoid(W_ir x + b_ir + W_hr h_prev + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h_prev + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h_prev + b_hn))
        h = (1 - z) * n + z * h_prev

    Args, results and errors are those of :func:`lstm`, with three gates in the order r z n, no
    projection, no cell states, and ``hx`` a tensor ``h_0 [L*D, N, H]``; returns ``output, h_n``.
    """
    (output,), (h_n,) = _call(
        "gru", input, hx, weights, num_layers, bidirectional, batch_first, dropout * training,
        lengths, reset, False, recompute,
    )  # fmt: skip
    return output, h_n


def rnn(
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A multi-layer Elman RNN, ``torch.nn.RNN`` without the module.

    For each layer ``h = tanh(W_ih x + b_ih + W_hh h_prev + b_hh)``, or ``max(0, .)`` if
    ``nonlinearity`` is ``"relu"`` (formula of :class:`torch.nn.RNN`).

    Args, results and errors are those of :func:`gru`, with one "gate"; another ``nonlinearity``
    than ``"tanh"`` or ``"relu"`` is a ValueError.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell = f"rnn_{nonlinearity}"
    (output,), (h_n,) = _call(
        cell, input, hx, weights, num_layers, bidirectional, batch_first, dropout * training,
        lengths, reset, False, recompute,
    )  # fmt: skip
    return output, h_n


def in_torch_words(forward: Any, module: Any, input: Any, hx: Any, error: Exception) -> Exception:
    """What torch.nn's ``forward`` raises for the arguments that gave ``error``, or else that."""
    transformed = torch._C._are_functorch_transforms_active()  # torch.nn knows fewer of them
    nested = isinstance(input, Tensor) and input.is_nested  # and none of these
    if transformed or nested or isinstance(error, torch.OutOfMemoryError):
        return error
    try:
        with torch.no_grad():
            if isinstance(module, torch.nn.RNNBase) and isinstance(input, PackedSequence):
                # torch.nn's forward reads out of bounds for some of these.
                if hx is None:
                    module.check_input(input.data, input.batch_sizes)
                else:
                    module.check_forward_args(input.data, hx, input.batch_sizes)
            elif _has_its_shapes(module):  # nor does it look at the weights' shapes
                forward(module, input, hx)
    except Exception as theirs:
        return theirs
    return error


def _has_its_shapes(module: Any) -> bool:
    """Whether the weights of a multi-layer module have the shapes that its attributes say."""
    if not isinstance(module, torch.nn.RNNBase):
        return True
    hidden, directions = module.hidden_size, 2 if module.bidirectional else 1
    rows, projected = ops.GATES.get(module.mode.lower(), 1) * hidden, module.proj_size or hidden
    for name in module._flat_weights_names:
        width = module.input_size if "_l0" in name else directions * projected
        shapes = {
            "weight_ih": (rows, width),
            "weight_hh": (rows, projected),
            "weight_hr": (projected, hidden),
        }
        if getattr(module, name).shape != shapes.get(name[:9], (rows,)):
            return False
    return True


def pair(hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """``(h_0, c_0)`` of an LSTM's ``hx``: two tensors, or none at all."""
    if hx is None:
        return None, None
    h, c = hx
    if h is None or c is None or isinstance(hx, Tensor):
        raise TypeError(f"expected hx to be a pair of tensors (h_0, c_0), got {type(hx).__name__}")
    return h, c


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
    if forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or any(w.requires_grad for w in weights)
            or (h0 is not None and h0.requires_grad)
            or (c0 is not None and c0.requires_grad)
            or torch._C._are_functorch_transforms_active()  # requires_grad doesn't tell of them
        )
    ):
        if recompute and not (
            forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
            or torch.compiler.is_compiling()
        ):
            return RecomputedLayer.apply(cell, directions, batch_sizes, every_c, x, h0, c0, *weights)
        return autograd.apply(cell, directions, batch_sizes, every_c, x, h0, c0, *weights)
    return ops.forward[cell](x, h0, c0, weights, batch_sizes, directions, every_c, ops.tf32(x))


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
        states = tuple(hx) if cell == "lstm" else (hx,)
    options = (num_layers, directions, dropout, every_c, recompute)
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
        if input.layout != torch.jagged or input.dim() != 3 or isinstance(input.shape[1], int):
            raise ValueError("Expected a nested tensor of the jagged layout and shape [N, (lengths), I]")
        data = input.values()
        expected = check_sizes(cell, data, states, weights, num_layers * directions, input.shape[0], 2)
        if states is None:
            states = tuple([data.new_zeros(e) for e in expected])
        outputs, finals = _by_segments(of_nested(input, directions), cell, data, states, weights, *options)
        nested = torch.nested.nested_tensor_from_jagged
        return tuple([nested(t, input.offsets(), input.lengths()) for t in outputs]), finals

    _check_dimensions(cell, input, states)
    batched, batch_dim = input.dim() == 3, 0 if batch_first else 1
    x = input
    if not batched:
        x = x.unsqueeze(batch_dim)
        states = None if states is None else tuple([s.unsqueeze(1) for s in states])
        lengths = None if lengths is None else torch.as_tensor(lengths).unsqueeze(0)
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
        with torch.autocast(device, enabled=False):
            x, *states_ = _cast((x, *(states or ())), dtype)
            weights = _cast(weights, dtype)
            return stack(
                cell, x, states and tuple(states_), weights, batch_sizes, num_layers, directions,
                dropout, every_c, recompute,
            )  # fmt: skip
    count = len(weights) // num_layers
    finals: list[States] = []
    for k in range(num_layers):
        if k > 0 and dropout > 0:
            x = torch.dropout(x, dropout, True)
        own: States = states or ()
        if num_layers > 1:
            own = tuple([s[k * directions : (k + 1) * directions] for s in own])
        h0, c0 = (*own, None, None)[:2]
        own_weights = weights[k * count : (k + 1) * count]
        wanted = every_c and k == num_layers - 1
        arguments = (cell, x, h0, c0, own_weights, batch_sizes, directions, wanted, recompute)
        results = in_range(cell, k, layer, arguments) if ranges_enabled() else layer(*arguments)
        x, h_n, c_n, _, cells = results
        finals.append((h_n, c_n) if cell == "lstm" else (h_n,))
    outputs = (x, cells.to(x.dtype).view(*x.shape[:-1], directions * cells.shape[-1])) if every_c else (x,)
    if num_layers == 1:
        return outputs, finals[0]
    return outputs, tuple([torch.cat(s) for s in zip(*finals, strict=True)])


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What autocast does to arguments: float64 and integers stay."""
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def _refuse_lengths(lengths: Lengths | None, reset: Tensor | None) -> None:
    if lengths is not None or reset is not None:
        raise ValueError("lengths and reset are for padded input, not for a PackedSequence or a nested tensor")


def _check_dimensions(cell: str, x: Tensor, states: States | None) -> None:
    """torch.nn's errors about the number of dimensions of the input and the states."""
    dim = x.dim()
    if dim not in (2, 3):
        name, tail = ("RNN", "D tensor") if cell.startswith("rnn") else (cell.upper(), "D")
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}{tail} instead")
    if states is not None and any(s.dim() != dim for s in states):
        which = "batched 3-D" if dim == 3 else "unbatched 2-D"
        if cell == "lstm":
            raise RuntimeError(
                f"For {which} input, hx and cx should also be {dim}-D "
                f"but got ({states[0].dim()}-D, {states[1].dim()}-D) tensors"
            )
        raise RuntimeError(f"For {which} input, hx should also be {dim}-D but got {states[0].dim()}-D tensor")


def check_sizes(
    cell: str,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    rows: int,
    batch: int,
    dim: int,
) -> list[tuple[int, int, int]]:
    """torch.nn's errors about the input's dtype and all sizes. Returns the shapes of the states."""
    w_ih, w_hh = weights[0], weights[1]
    if x.dtype != w_ih.dtype and not autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.dim() != dim:
        raise RuntimeError(f"input must have {dim} dimensions, got {x.dim()}")
    if x.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {x.shape[-1]}")
    expected = [(rows, batch, w_hh.shape[1])]
    if cell == "lstm":
        expected.append((rows, batch, w_ih.shape[0] // 4))
    if states is not None and len(states) != len(expected):
        raise RuntimeError("lstm expects two hidden states")
    for k, (s, e) in enumerate(zip(states or (), expected, strict=False)):
        if s.shape != e:
            name = f"hidden[{k}]" if cell == "lstm" else "hidden"
            raise RuntimeError(f"Expected {name} size {e}, got {list(s.shape)}")
    return expected


def _call(
    cell: str,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    *options: Any,
) -> tuple[tuple[Any, ...], States]:
    directions = 2 if bidirectional else 1
    count, rest = divmod(len(weights), num_layers * directions)
    if rest or count not in ((2, 3, 4, 5) if cell == "lstm" else (2, 4)):
        raise ValueError(f"{cell}: got {len(weights)} weights for {num_layers} layers of {directions} directions")
    return network(cell, input, hx, weights, num_layers, directions, batch_first, dropout, *options)
