"""RNN, LSTM and GRU: torch.nn's modules, holding the same parameters and running fused layers.

They take torch.nn's arguments, have its attributes, methods, state_dict names, initialisation and
errors, and load and save its state. They derive from ``torch.nn.RNNBase`` but not from torch.nn's
own ``RNN``, ``LSTM`` and ``GRU``, whose instances torch.compile refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .functional import States, autocast_enabled, layer, network

# Their methods keep torch's own checks and messages. Taken now: patch() rebinds the name.
_NN_LSTM = torch.nn.LSTM

_CELL = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
_eager = ops.eager
_lstm = _eager["lstm"]
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


class FusedBase(torch.nn.RNNBase):
    """What the three share: weights read by name at every call, and the way into the layers."""

    def _init_flat_weights(self) -> None:
        self._name_weights()
        super()._init_flat_weights()

    def _name_weights(self) -> None:
        self._read_weights = itemgetter(*self._flat_weights_names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_weights()

    def _weights(self) -> Sequence[Tensor]:
        try:
            return self._read_weights(self._parameters)
        except KeyError:  # WeightDrop, parametrizations: plain tensors or properties
            return self._weights_by_name()

    def _weights_by_name(self) -> Sequence[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def _network(self, input: Any, hx: Any) -> tuple[Any, States]:
        return network(
            _CELL[self.mode],
            input,
            hx,
            self._weights_by_name() if _is_compiling() else self._weights(),
            self.num_layers,
            2 if self.bidirectional else 1,
            self.batch_first,
            self.dropout if self.training else 0.0,
            self._check,
        )

    def _check(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        self._update_flat_weights()
        if states is None:
            self.check_input(input, batch_sizes)
        else:
            hidden: Any = states if len(states) == 2 else states[0]
            self.check_forward_args(input, hidden, batch_sizes)


class _OneState(FusedBase):
    """RNN and GRU: the state is h alone."""

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """Runs the network; arguments, results and errors are torch.nn's (see the class)."""
        # The plain case, in as few Python steps as it takes: they are most of a small step's time.
        if (
            hx is not None
            and type(input) is Tensor
            and self.num_layers == 1
            and not _is_compiling()
        ):
            weights = self._weights()
            shape = input.shape
            directions = 2 if self.bidirectional else 1
            if (
                not self.batch_first
                and len(shape) == 3
                and shape[0]
                and shape[2] == self.input_size
                and hx.shape == (directions, shape[1], self.hidden_size)
                and input.dtype is weights[0].dtype
                and not autocast_enabled()
            ):
                cell = _CELL[self.mode]
                if _is_grad_enabled():
                    result = layer(cell, input, hx, None, weights, None, directions)
                else:
                    result = _eager[cell](input, hx, None, weights, None, directions, False)
                return result[0], result[1]
        output, (h_n,) = self._network(input, hx)
        return output, h_n


class RNN(_OneState):
    """A drop-in for :class:`torch.nn.RNN`: ``h = tanh(W_ih x + b_ih + W_hh h_prev + b_hh)``.

    With ``nonlinearity="relu"``, ``max(0, .)`` in place of tanh (formulas of torch.nn.RNN).

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, layers on top of one another.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: whether input and output are ``[N, T, .]``; the state never is.
        dropout: probability of zeroing an element between layers in training.
        bidirectional: D = 2: also runs backwards in time, the outputs side by side.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.

    Inputs: ``input [T, N, I]`` (or ``[T, I]``, or a PackedSequence) and ``hx [L*D, N, H]`` (or
    ``[L*D, H]``), zeros if omitted. Outputs: ``output [T, N, D*H]`` and ``h_n`` shaped as ``hx``.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn.RNN does, in its words.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class GRU(_OneState):
    """A drop-in for :class:`torch.nn.GRU` (its formulas; reset after the recurrent matmul)::

        r = sigmoid(W_ir x + b_ir + W_hr h_prev + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h_prev + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h_prev + b_hn))
        h = (1 - z) * n + z * h_prev

    Args, inputs, outputs and errors are those of :class:`RNN`, without ``nonlinearity``.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class LSTM(FusedBase):
    """A drop-in for :class:`torch.nn.LSTM` (its formulas)::

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h_prev + b_hh)   (each with its rows of the weights)
        g       = tanh(W_ih x + b_ih + W_hh h_prev + b_hh)
        c       = f * c_prev + i * g
        h       = o * tanh(c)            (then W_hr h, if proj_size > 0)

    Args are those of :class:`RNN` without ``nonlinearity``, and:
        proj_size: P, features of h after a projection; 0 for none (P = H).

    Inputs: ``input [T, N, I]`` (or ``[T, I]``, or a PackedSequence) and ``hx``, a pair
    ``(h_0 [L*D, N, P], c_0 [L*D, N, H])`` (or without N), zeros if omitted. Outputs: ``output
    [T, N, D*P]`` and ``(h_n, c_n)`` shaped as ``hx``. c is float32 inside for the 16-bit dtypes.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn.LSTM does, in its words.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    get_expected_cell_size = _NN_LSTM.get_expected_cell_size
    check_forward_args = _NN_LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = _NN_LSTM.permute_hidden  # type: ignore[assignment]

    @overload
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self, input: Any, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Runs the network; arguments, results and errors are torch.nn's (see the class)."""
        if (  # as in _OneState
            hx is not None
            and type(input) is Tensor
            and self.num_layers == 1
            and not _is_compiling()
        ):
            weights = self._weights()
            h0, c0 = hx[0], hx[1]
            shape = input.shape
            hidden = self.hidden_size
            directions = 2 if self.bidirectional else 1
            if (
                not self.batch_first
                and len(shape) == 3
                and shape[0]
                and shape[2] == self.input_size
                and h0.shape == (directions, shape[1], self.proj_size or hidden)
                and c0.shape == (directions, shape[1], hidden)
                and input.dtype is weights[0].dtype
                and not autocast_enabled()
            ):
                if _is_grad_enabled():
                    result = layer("lstm", input, h0, c0, weights, None, directions)
                else:
                    result = _lstm(input, h0, c0, weights, None, directions, False)
                return result[0], (result[1], result[2])
        output, (h_n, c_n) = self._network(input, hx)
        return output, (h_n, c_n)
