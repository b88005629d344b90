"""RNN, LSTM and GRU: torch.nn's modules, holding the same parameters and running fused layers.

They take torch.nn's arguments, have its attributes, methods, state_dict names, initialisation and
errors, and load and save its state. They derive from ``torch.nn.RNNBase`` but not from torch.nn's
own ``RNN``, ``LSTM`` and ``GRU``, whose instances torch.compile refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .errors import ARGUMENT_ERRORS, check_stored, in_torch_words, pair
from .layer import layer
from .network import States, network
from .ops import autocast_enabled
from .profiling import ranges_enabled
from .rows import Lengths

# Taken now: patch() rebinds the names.
_NN_RNN, _NN_LSTM, _NN_GRU = torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU

_Input = TypeVar("_Input", Tensor, PackedSequence)

CELL = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


class FusedBase(torch.nn.RNNBase):
    """What the three share: weights read by name at every call, and the way into the layers.

    Arguments that ours refuses are handed to torch.nn's forward, to raise its error in its words.
    """

    _torch_forward: Any
    recompute = False  # converted modules have no attribute of their own

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if recompute:
            self.recompute = True

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def _init_flat_weights(self) -> None:
        self._name_weights()
        super()._init_flat_weights()

    def _name_weights(self) -> None:
        self._read_weights = itemgetter(*self._flat_weights_names)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_read_weights", None)  # a restricted unpickler would not take it
        return state

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

    def _plain(self, input: Any, h0: Tensor | None, c0: Tensor | None) -> tuple[Any, ...] | None:
        """The output, h_n and the LSTM's c_n of the plain case, in as few Python steps as it takes: one layer on a
        batch or a PackedSequence. The op checks the arguments. None for other cases."""
        if self.num_layers != 1 or autocast_enabled() or ranges_enabled() or _is_compiling():
            return None
        if type(input) is Tensor and input.dim() == 3 and not input.is_nested:
            x = input.transpose(0, 1) if self.batch_first else input
            if not x.shape[0]:
                return None
            y, *states = self._layer(x, h0, c0, None)
            return y.transpose(0, 1) if self.batch_first else y, *states
        if type(input) is not PackedSequence:
            return None
        x, batch_sizes, order, back = input
        check_stored(h0, c0, order, back)
        if order is not None:
            h0, c0 = (None if s is None else s.index_select(1, order) for s in (h0, c0))
        y, *states = self._layer(x, h0, c0, batch_sizes)
        if back is not None:
            if back.shape[0] != states[0].shape[1]:
                raise RuntimeError(f"Expected unsorted_indices of {states[0].shape[1]} entries, got {back.shape[0]}")
            states = [s.index_select(1, back) for s in states]
        return PackedSequence(y, batch_sizes, order, back), *states

    def _layer(self, x: Tensor, h0: Tensor | None, c0: Tensor | None, batch_sizes: Tensor | None) -> Sequence[Tensor]:
        cell, directions, weights = CELL[self.mode], 2 if self.bidirectional else 1, self._weights()
        if _is_grad_enabled() or forward_ad._current_level >= 0:
            result = layer(cell, x, h0, c0, weights, batch_sizes, directions, False, self.recompute)
        else:
            result = ops.infer(cell, x, h0, c0, weights, batch_sizes, directions)
        return result[: 1 + ops.STATES[cell]]

    def _network(
        self, input: Any, hx: Any, lengths: Lengths | None, reset: Tensor | None, every_c: bool = False
    ) -> tuple[tuple[Any, ...], States]:
        return network(
            CELL[self.mode],
            input,
            hx,
            self._weights_by_name() if _is_compiling() else self._weights(),
            self.num_layers,
            2 if self.bidirectional else 1,
            self.batch_first,
            self.dropout if self.training else 0.0,
            lengths,
            reset,
            every_c,
            self.recompute,
        )

    def _refusal(
        self, input: Any, hx: Any, lengths: Lengths | None, reset: Tensor | None, error: Exception
    ) -> Exception:
        """``error`` in the words of torch.nn, which knows neither lengths nor resets."""
        theirs = self._torch_forward if lengths is None and reset is None else None
        return in_torch_words(theirs, self, input, hx, error)


class _OneState(FusedBase):
    """RNN and GRU: the state is h alone. Each has a ``forward`` of its own, which Python's errors name."""

    def _run(self, input: Any, hx: Tensor | None, lengths: Lengths | None, reset: Tensor | None) -> tuple[Any, Tensor]:
        try:
            if lengths is None and reset is None and (result := self._plain(input, hx, None)):
                return result[0], result[1]
            (output,), (h_n,) = self._network(input, hx, lengths, reset)
            return output, h_n
        except ARGUMENT_ERRORS as error:
            raise self._refusal(input, hx, lengths, reset, error) from None


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
        recompute: whether training keeps states at checkpoints instead of all gates (see
            :func:`fusedrnn.functional.lstm`); also an attribute.

    Inputs: ``input [T, N, I]`` (or ``[T, I]``, or a PackedSequence) and ``hx [L*D, N, H]`` (or
    ``[L*D, H]``), zeros if omitted. Outputs: ``output [T, N, D*H]`` and ``h_n`` shaped as ``hx``.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.nn.RNN does, in its words.
    """

    _torch_forward = staticmethod(_NN_RNN.forward)

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
        *,
        recompute: bool = False,
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
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    def forward(
        self, input: _Input, hx: Tensor | None = None, *, lengths: Lengths | None = None, reset: Tensor | None = None
    ) -> tuple[_Input, Tensor]:
        """Runs the network; arguments, results and errors are torch.nn's (see the class), and ``lengths``
        and ``reset`` those of :func:`fusedrnn.functional.lstm`."""
        return self._run(input, hx, lengths, reset)


class GRU(_OneState):
    """A drop-in for :class:`torch.nn.GRU` (its formulas; reset after the recurrent matmul)::

        r = sigmoid(W_ir x + b_ir + W_hr h_prev + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h_prev + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h_prev + b_hn))
        h = (1 - z) * n + z * h_prev

    Args, inputs, outputs and errors are those of :class:`RNN`, without ``nonlinearity``.
    """

    _torch_forward = staticmethod(_NN_GRU.forward)

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
        *,
        recompute: bool = False,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def forward(
        self, input: _Input, hx: Tensor | None = None, *, lengths: Lengths | None = None, reset: Tensor | None = None
    ) -> tuple[_Input, Tensor]:
        """Runs the network; arguments, results and errors are torch.nn's (see the class), and ``lengths``
        and ``reset`` those of :func:`fusedrnn.functional.lstm`."""
        return self._run(input, hx, lengths, reset)


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
        *,
        recompute: bool = False,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    _torch_forward = staticmethod(_NN_LSTM.forward)
    get_expected_cell_size = _NN_LSTM.get_expected_cell_size
    check_forward_args = _NN_LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = _NN_LSTM.permute_hidden  # type: ignore[assignment]

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Any, tuple[Tensor, Tensor], Any]: ...

    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Runs the network; arguments, results and errors are torch.nn's (see the class), and ``lengths``,
        ``reset`` and ``return_cell_states`` those of :func:`fusedrnn.functional.lstm`."""
        try:
            h0, c0 = pair(hx)
            plain = lengths is None and reset is None and not return_cell_states
            if plain and (result := self._plain(input, h0, c0)):
                return result[0], (result[1], result[2])
            outputs, (h_n, c_n) = self._network(input, hx, lengths, reset, return_cell_states)
            output, *cell_states = outputs
            return output, (h_n, c_n), *cell_states
        except ARGUMENT_ERRORS as error:
            raise self._refusal(input, hx, lengths, reset, error) from None
