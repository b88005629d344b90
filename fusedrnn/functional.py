"""Whole recurrent networks as functions: layers, directions, dropout between them, packed batches.

:func:`lstm`, :func:`gru` and :func:`rnn` need no module: they take the weights as a flat sequence
in the order of ``torch.nn.LSTM(...)._flat_weights``, for each layer and in it each direction
``w_ih, w_hh``, then ``b_ih, b_hh`` if there are biases, then ``w_hr`` if ``h`` is projected.

Under :class:`torch.autocast` the input, the states and the weights are cast to the autocast dtype
(float64 ones are left alone) and so is the result; the LSTM's c stays in float32 between the steps
of a call. Calls in one autocast region share the casts of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .network import States, network
from .rows import Lengths


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
        lengths: integers ``[N]`` (one for a single sequence) from 0 to T, how many steps of padded input
            each sequence has. The result is that of packing: nothing is computed for the padding, whose
            output is 0, and the final states are those after the last step (``hx`` where there is none).
            Under torch.compile, as a tensor: the numbers of a list are constants of the graph.
            ``torch.vmap`` maps neither this nor ``reset``.
        reset: bool ``[T, N]`` (``[N, T]`` if ``batch_first``, ``[T]`` for a single sequence): where
            True, the state is zeros before the step, as if a new sequence began there; backwards
            in time, after the step. With both, any device will do; from a GPU they are copied to
            the host, which waits for it.
        return_cell_states: also return c of every step, as is ``output`` for h.
        recompute: train in less memory: keep the states at sqrt(T) checkpoints or fewer instead of the
            gates of every step, and run the steps again in the backward pass. The same gradients
            (16-bit states are rounded at checkpoints), for one more forward pass. Of no effect under
            torch.compile, in transforms of torch.func and in forward mode.

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
    weights = tuple(weights)  # of module.parameters(), too
    if not 0 <= dropout <= 1:
        raise ValueError(f"{cell}: expected a dropout of 0 to 1, the probability of an element being zeroed")
    count, rest = divmod(len(weights), num_layers * directions) if num_layers > 0 else (0, 0)
    if rest or count not in ((2, 3, 4, 5) if cell == "lstm" else (2, 4)):
        raise ValueError(f"{cell}: got {len(weights)} weights for {num_layers} layers of {directions} directions")
    return network(cell, input, hx, weights, num_layers, directions, batch_first, dropout, *options)
