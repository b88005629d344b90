"""RNNCell, LSTMCell and GRUCell: torch.nn's modules for a single step, as a layer of one step.

Arguments, attributes, state_dict, initialisation and errors are torch.nn's.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .functional import States, stack

# Their forward refuses, in torch's own words, what ours does not take. patch() rebinds the names.
_NN_RNN_CELL, _NN_LSTM_CELL, _NN_GRU_CELL = torch.nn.RNNCell, torch.nn.LSTMCell, torch.nn.GRUCell

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_read_weights = itemgetter(*_NAMES)
_is_compiling = torch.compiler.is_compiling
_RNN = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


class _Cell(torch.nn.RNNCellBase):
    """What the three share: weights read by name at every call, and the general step."""

    def _weights(self) -> tuple[Tensor, ...]:
        try:
            if _is_compiling():
                raise KeyError
            weights = _read_weights(self._parameters)
        except KeyError:  # replaced by plain tensors or properties
            weights = tuple([getattr(self, name) for name in _NAMES])
        return weights if weights[2] is not None else weights[:2]

    def _step(
        self, cell: str, input: Tensor, states: States | None, weights: tuple[Tensor, ...]
    ) -> States | None:
        """One step of any input torch.nn takes; None for the others."""
        lead = 3 - input.dim()  # dimensions to add: time, and the batch of a single vector
        if lead not in (1, 2) or input.shape[-1] != self.input_size:
            return None
        expected = (*input.shape[:-1], self.hidden_size)
        if states is not None:
            if any(s.shape != expected for s in states):
                return None
            states = tuple([s[(None,) * lead] for s in states])
        x = input[(None,) * lead]
        _, finals = stack(cell, x, states, weights, None, 1, 1, 0.0)
        return tuple([s[(0,) * lead] for s in finals])


class RNNCell(_Cell):
    """A drop-in for :class:`torch.nn.RNNCell`: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    With ``nonlinearity="relu"``, ``max(0, .)`` in place of tanh (formulas of torch.nn.RNNCell).

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether there are ``b_ih`` and ``b_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.

    Inputs: ``input [N, I]`` or ``[I]`` and ``hx [N, H]`` or ``[H]``, zeros if omitted.
    Output: ``h'`` shaped as ``hx``.

    Raises:
        ValueError, RuntimeError: as torch.nn.RNNCell does, in its words.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state; arguments, result and errors are torch.nn's (see the class)."""
        weights = self._weights()
        cell = _RNN.get(self.nonlinearity)
        if cell is not None:
            states = self._step(cell, input, hx if hx is None else (hx,), weights)
            if states is not None:
                return states[0]
        return _NN_RNN_CELL.forward(self, input, hx)  # type: ignore[arg-type]


class LSTMCell(_Cell):
    """A drop-in for :class:`torch.nn.LSTMCell` (its formulas)::

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh)   (each with its rows of the weights)
        g       = tanh(W_ih x + b_ih + W_hh h + b_hh)
        c'      = f * c + i * g
        h'      = o * tanh(c')

    Args are those of :class:`RNNCell` without ``nonlinearity``.

    Inputs: ``input [N, I]`` or ``[I]`` and ``hx``, a pair ``(h, c)``, each ``[N, H]`` or ``[H]``,
    zeros if omitted. Output: ``(h', c')``.

    Raises:
        ValueError, RuntimeError: as torch.nn.LSTMCell does, in its words.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next state; arguments, result and errors are torch.nn's (see the class)."""
        states = self._step("lstm", input, hx, self._weights())
        if states is not None:
            return states[0], states[1]
        return _NN_LSTM_CELL.forward(self, input, hx)  # type: ignore[arg-type]


class GRUCell(_Cell):
    """A drop-in for :class:`torch.nn.GRUCell` (its formulas)::

        r  = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z  = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n  = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h' = (1 - z) * n + z * h

    Args, inputs, output and errors are those of :class:`RNNCell`, without ``nonlinearity``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state; arguments, result and errors are torch.nn's (see the class)."""
        states = self._step("gru", input, hx if hx is None else (hx,), self._weights())
        if states is not None:
            return states[0]
        return _NN_GRU_CELL.forward(self, input, hx)  # type: ignore[arg-type]
