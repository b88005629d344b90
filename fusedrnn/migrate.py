"""Weights from elsewhere: from Keras layers, from ONNX nodes, and from the other convention of a GRU.

The loading functions write into the parameters of a fusedrnn or torch.nn module in place, whatever
its dtype and device, and change nothing if they raise. Arrays may be NumPy's or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_Module = TypeVar("_Module", bound=torch.nn.RNNBase)

# Where PyTorch's gates (i f g o; r z n) are among the other's, by the number of gates.
_KERAS = {4: (0, 1, 2, 3), 3: (1, 0, 2), 1: (0,)}  # i f c o; z r h
_ONNX = {4: (0, 2, 3, 1), 3: (1, 0, 2), 1: (0,)}  # i o f c; z r h

_RESET_BEFORE = "applies the reset gate before the recurrent matmul, which neither torch.nn nor fusedrnn computes"


def load_keras_weights(module: _Module, weights: Sequence[Any], *, layer: int = 0, reset_after: bool = True) -> _Module:
    """Loads what ``get_weights()`` of a Keras ``LSTM``, ``GRU`` or ``SimpleRNN`` gives.

    Keras has one bias, ours two: it goes to ``b_ih`` and ``b_hh`` is zero (a GRU has both there too).

    Args:
        module: an LSTM, GRU or RNN, without projection.
        weights: ``kernel [I, G*H]``, ``recurrent_kernel [H, G*H]`` and, unless ``use_bias=False``,
            ``bias [G*H]``, a GRU's ``[2, G*H]``; of a ``Bidirectional`` layer forward's and then
            backward's.
        layer: which of the module's layers they are for. Keras stacks layers, this loads them one by one.
        reset_after: the Keras GRU's argument, which its weights tell only if they have a bias.

    Returns:
        ``module``.

    Raises:
        ValueError: the weights don't fit the module, or the GRU has ``reset_after=False``.
    """
    gates = _gates(module, layer)
    directions = 2 if module.bidirectional else 1
    count, rest = divmod(len(weights), directions)
    if rest or count not in (2, 3):
        raise ValueError(f"expected 2 or 3 arrays for each of {directions} directions, got {len(weights)}")
    values = []
    for d in range(directions):
        kernel, recurrent_kernel, *biases = (torch.as_tensor(w) for w in weights[d * count : (d + 1) * count])
        if gates == 3 and (not reset_after or (biases and biases[0].dim() == 1)):
            raise ValueError(f"a Keras GRU with reset_after=False {_RESET_BEFORE}")
        bias = biases[0].reshape(-1, biases[0].shape[-1]).unbind() if biases else ()  # 1 or 2 of [G*H]
        values.append([kernel.T, recurrent_kernel.T, *bias])
    return _load(module, layer, values, _KERAS[gates])


def load_onnx_weights(
    module: _Module, W: Any, R: Any, B: Any = None, *, layer: int = 0, linear_before_reset: int = 0
) -> _Module:
    """Loads the weights of an ONNX ``LSTM``, ``GRU`` or ``RNN`` node.

    Args:
        module: an LSTM, GRU or RNN, without projection; bidirectional if the node is.
        W: ``[D, G*H, I]``.
        R: ``[D, G*H, H]``.
        B: ``[D, 2*G*H]``, ``W``'s and ``R``'s biases in a row; ``None`` if the node has none.
        layer: which of the module's layers they are for. A node is one layer.
        linear_before_reset: the GRU node's attribute, with ONNX's default. Only 1 is what ours computes.

    Returns:
        ``module``.

    Raises:
        ValueError: the weights don't fit the module, or the GRU has ``linear_before_reset=0``.
    """
    gates = _gates(module, layer)
    if gates == 3 and not linear_before_reset:
        raise ValueError(f"an ONNX GRU with linear_before_reset=0 {_RESET_BEFORE}")
    directions = 2 if module.bidirectional else 1
    arrays = {"W": torch.as_tensor(W), "R": torch.as_tensor(R)}
    if B is not None:
        arrays["B"] = torch.as_tensor(B)
    for name, array in arrays.items():
        if array.dim() != (2 if name == "B" else 3) or array.shape[0] != directions:
            raise ValueError(f"{name}: expected {directions} direction(s), got shape {list(array.shape)}")
    values = []
    for d in range(directions):
        biases = arrays["B"][d].chunk(2) if "B" in arrays else ()
        values.append([arrays["W"][d], arrays["R"][d], *biases])
    return _load(module, layer, values, _ONNX[gates])


def convert_gru_weights(weights: Iterable[Tensor]) -> list[Tensor]:
    """Translates a GRU's weights between the two conventions of the update gate.

    PyTorch, cuDNN, ONNX and Keras have ``h = (1 - z) * n + z * h_prev``; many textbooks (and the
    paper of Chung et al. 2014) ``h = (1 - z) * h_prev + z * n``. One's z is 1 minus the other's, and
    as ``1 - sigmoid(a) = sigmoid(-a)``, the rows of z change their sign. The same both ways.

    Args:
        weights: any of a GRU's ``w_ih [3H, I], w_hh [3H, H], b_ih [3H], b_hh [3H]``, of any layers
            and directions, with gates in PyTorch's order r z n.

    Returns:
        New tensors, in the order given.

    Raises:
        ValueError: a tensor's first dimension isn't a multiple of 3.

    Example::

        with torch.no_grad():
            for parameter, w in zip(gru.parameters(), convert_gru_weights(theirs)):
                parameter.copy_(w)
    """
    converted = []
    for w in weights:
        if w.dim() == 0 or w.shape[0] % 3:
            raise ValueError(f"expected 3H rows (r, z and n), got shape {list(w.shape)}")
        r, z, n = w.chunk(3)
        converted.append(torch.cat([r, -z, n]))
    return converted


def _gates(module: torch.nn.RNNBase, layer: int) -> int:
    """G of a module that weights can be loaded into."""
    if module.proj_size:
        raise ValueError("the module has a projection (proj_size > 0), these weights don't")
    if not 0 <= layer < module.num_layers:
        raise ValueError(f"layer {layer} of a module with {module.num_layers}")
    return module.get_parameter("weight_hh_l0").shape[0] // module.hidden_size


def _load(module: _Module, layer: int, values: list[list[Tensor]], order: Sequence[int]) -> _Module:
    """Reorders gates and writes, once everything is found to fit: w_ih, w_hh and up to two biases of
    each direction."""
    pairs = []
    for direction, given in zip(("", "_reverse"), values, strict=False):
        if len(given) > 2 and not module.bias:
            raise ValueError("the weights have a bias, the module was made with bias=False")
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if module.bias else ("weight_ih", "weight_hh")
        for k, name in enumerate(names):
            parameter = module.get_parameter(f"{name}_l{layer}{direction}")
            value = given[k] if k < len(given) else torch.zeros_like(parameter)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{name}_l{layer}{direction}: expected {list(parameter.shape)}, got {list(value.shape)}"
                )
            chunks = value.chunk(len(order))
            pairs.append((parameter, torch.cat([chunks[gate] for gate in order])))
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
    return module
