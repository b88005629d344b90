"""ONNX: what ``torch.onnx.export`` makes of the ops, needing the package ``onnxscript``. ::

    torch.onnx.export(
        model, (x,), "model.onnx", dynamo=True, dynamic_shapes={"x": {0: "T", 1: "N"}},
        custom_translation_table=fusedrnn.onnx.translation_table(),
    )

Each layer becomes one ONNX LSTM, GRU (``linear_before_reset=1``, the form torch has) or RNN, of any
length and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import ops

# ONNX's operator, and its gates' positions in torch's order: i o f c of i f g o, z r h of r z n.
_OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh", "Tanh"]}),  # of each direction
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu", "Relu"]}),
}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` for ``torch.onnx.export(..., dynamo=True)``.

    Raises:
        ImportError: onnxscript is missing.

    While exporting, a projected LSTM or a PackedSequence raises NotImplementedError: ONNX has no
    operators for them.
    """
    return {op: _translation(cell) for cell, op in ops.forward.items() if cell in _OPERATORS}


def _translation(cell: str) -> Callable[..., Any]:
    import onnxscript

    op: Any = onnxscript.opset18
    name, order, attributes = _OPERATORS[cell]

    def reorder(weight: Any, hidden: int) -> Any:
        """The rows of each gate in ONNX's order."""
        rows = [gate * hidden + unit for gate in order for unit in range(hidden)]
        return op.Gather(weight, op.Constant(value_ints=rows), axis=0)

    def by_direction(weights: Sequence[Any]) -> Any:
        """``[rows, ...]`` of each direction to ``[D, rows, ...]``."""
        return op.Concat(*[op.Unsqueeze(w, op.Constant(value_ints=[0])) for w in weights], axis=0)

    def layer(x, h0, c0, weights, batch_sizes=None, directions=1, save=False, tf32=False):
        count = len(weights) // directions
        if count % 2:
            raise NotImplementedError("fusedrnn: ONNX has no LSTM with a projection (proj_size)")
        if batch_sizes is not None:
            raise NotImplementedError("fusedrnn: ONNX has no PackedSequence; export a model of padded input")
        hidden = weights[1].shape[1]
        w_ih, w_hh, *biases = [[reorder(w, hidden) for w in weights[k::count]] for k in range(count)]
        bias = by_direction([op.Concat(*both, axis=0) for both in zip(*biases, strict=True)]) if biases else None
        states = (h0, c0)[: ops.STATES[cell]]
        options = {k: v[:directions] if isinstance(v, list) else v for k, v in attributes.items()}
        y, *finals = getattr(op, name)(
            x,
            by_direction(w_ih),
            by_direction(w_hh),
            bias,
            None,
            *states,
            direction="forward" if directions == 1 else "bidirectional",
            hidden_size=hidden,
            **options,
        )
        y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        unused = [op.Constant(value_float=0.0) for _ in range(4 - len(states))]
        return y, *finals[: len(states)], *unused

    return layer
