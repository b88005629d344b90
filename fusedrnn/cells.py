"""RNNCell, LSTMCell and GRUCell: torch.nn's modules for a single step, as a layer of one step.

Arguments, attributes, state_dict, initialisation and errors are torch.nn's.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from . import ops
from .errors import ARGUMENT_ERRORS, in_torch_words, pair
from .layer import layer
from .network import States, stack
from .ops import autocast_enabled
from .profiling import ranges_enabled

# Their forward refuses, in torch's own words, what ours does not take. patch() rebinds the names.
_NN_RNN_CELL, _NN_LSTM_CELL, _NN_GRU_CELL = torch.nn.RNNCell, torch.nn.LSTMCell, torch.nn.GRUCell

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_read_weights = itemgetter(*_NAMES)
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_RNN = {"tanh": "rnn_tanh", "relu": "rnn_relu"}
_one_step: dict[int, Tensor] = {}  # N -> the batch sizes of one packed step


class _Cell(torch.nn.RNNCellBase):
    """What the three share: weights read by name at every call, and the general step."""

    def _weights(self) -> tuple[Tensor, ...]:
        try:
            weights = _read_weights(self._parameters)
        except KeyError:  # replaced by plain tensors or properties
            return self._weights_by_name()
        return weights if weights[2] is not None and weights[3] is not None else _biased(*weights)

    def _weights_by_name(self) -> tuple[Tensor, ...]:
        return _biased(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    def _plain_step(self, cell: str, x: Tensor, h: Tensor, c: Tensor | None) -> Any:
        """The next state or states in the plain case, in as few Python steps as it takes; None in the others."""
        if autocast_enabled() or ranges_enabled() or _is_compiling():
            return None
        if type(x) is Tensor and x.dim() == 2 and x.shape[0]:
            if not _is_grad_enabled() and forward_ad._current_level < 0:
                return ops.step[cell](x, h, c, self._weights())
            # The rows of x are given as one packed step, so that neither x nor y needs a view.
            sizes = _one_step.get(x.shape[0])
            if sizes is None:
                sizes = _batch_sizes(x.shape[0])
            c0 = None if c is None else c.unsqueeze(0)
            # Not y: that is kept for backward, and mustn't change.
            _, h_n, c_n, _, _ = layer(cell, x, h.unsqueeze(0), c0, self._weights(), sizes, 1)
            return (_of_step(h_n),) if c is None else (_of_step(h_n), _of_step(c_n))
        return None

    def _step(self, cell: str, input: Tensor, states: States | None) -> States:
        """One step of any input torch.nn takes."""
        lead = 3 - input.dim()  # dimensions to add: time, and the batch of a single vector
        expected = (*input.shape[:-1], self.hidden_size)
        if lead not in (1, 2) or input.shape[-1] != self.input_size or any(s.shape != expected for s in states or ()):
            # In eager mode torch.nn says which.
            shapes = ", ".join([str(list(t.shape)) for t in (input, *(states or ()))])
            raise RuntimeError(f"Expected input [N, {self.input_size}], states [N, {self.hidden_size}], got {shapes}")
        if states is not None:
            states = tuple([s[(None,) * lead] for s in states])
        x = input[(None,) * lead]
        weights = self._weights_by_name() if _is_compiling() else self._weights()
        _, finals = stack(cell, x, states, weights, None, 1, 1, 0.0)
        return tuple([_of_step(s) if lead == 1 else s[0, 0] for s in finals])


def _of_step(state: Tensor) -> Tensor:
    """As torch.nn's, it is no view, and may be detached in place (but of a subclass, whose results are views)."""
    return state.squeeze_(0) if type(state) is Tensor else state.squeeze(0)


def _biased(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Tensor, ...]:
    """The weights as the ops take them: without biases, or with both, a missing one as zeros."""
    if b_ih is None:
        return (w_ih, w_hh) if b_hh is None else (w_ih, w_hh, torch.zeros_like(b_hh), b_hh)
    return w_ih, w_hh, b_ih, torch.zeros_like(b_ih) if b_hh is None else b_hh


def _batch_sizes(n: int) -> Tensor:
    with torch.inference_mode(False):
        sizes = torch.tensor([n], device="cpu")
    if type(sizes) is Tensor and not is_functorch_wrapped_tensor(sizes):  # not a tracer's, not a transform's
        _one_step[n] = sizes
    return sizes


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
        try:
            cell = _RNN.get(self.nonlinearity)
            if cell is None:
                raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
            if hx is not None:
                plain = self._plain_step(cell, input, hx, None)
                if plain is not None:
                    return plain[0]
            return self._step(cell, input, hx if hx is None else (hx,))[0]
        except ARGUMENT_ERRORS as error:
            raise in_torch_words(_NN_RNN_CELL.forward, self, input, hx, error) from None


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

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next state; arguments, result and errors are torch.nn's (see the class)."""
        try:
            h, c = pair(hx)
            states = None if h is None else self._plain_step("lstm", input, h, c)
            h, c = self._step("lstm", input, hx) if states is None else states
            return h, c
        except ARGUMENT_ERRORS as error:
            raise in_torch_words(_NN_LSTM_CELL.forward, self, input, hx, error) from None


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
        try:
            if hx is not None:
                plain = self._plain_step("gru", input, hx, None)
                if plain is not None:
                    return plain[0]
            return self._step("gru", input, hx if hx is None else (hx,))[0]
        except ARGUMENT_ERRORS as error:
            raise in_torch_words(_NN_GRU_CELL.forward, self, input, hx, error) from None
