"""An ONNX model of a workload: one LSTM, GRU or RNN node a layer, static shapes, float32.

Gate orders: torch.nn has i f g o and r z n; ONNX has i o f c and z r h. ONNX's GRU applies the
reset gate after the matmul, as torch.nn does, if linear_before_reset is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from .workload import Workload

GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def model(work: Workload) -> bytes:
    case, s = work.case, work.case.shape
    directions = 2 if s.bidirectional else 1
    lstm = case.cell == "LSTM"
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def gates(weight: Tensor) -> Tensor:
        parts = weight.float().chunk(len(GATE_ORDER[case.cell]))
        return torch.cat([parts[i] for i in GATE_ORDER[case.cell]])

    def stacked(names: list[str], layer: int) -> np.ndarray:
        """[D, ...]: the weights called `names`, gates reordered, one after another."""
        ends = [f"_l{layer}{end}" for end in ("", "_reverse")[:directions]]
        return torch.stack([torch.cat([gates(work.weights[name + end]) for name in names]) for end in ends]).numpy()

    data = "x"
    for k in range(s.layers):
        inputs = [
            data,
            constant(f"W{k}", stacked(["weight_ih"], k)),
            constant(f"R{k}", stacked(["weight_hh"], k)),
            constant(f"B{k}", stacked(["bias_ih", "bias_hh"], k)),
        ]
        if work.hx:
            assert s.layers == 1, "hx is given only to single steps"
            inputs += ["", "initial_h"] + (["initial_c"] if lstm else [])
        attributes: dict[str, Any] = {"hidden_size": s.h}
        if s.bidirectional:
            attributes["direction"] = "bidirectional"
        if case.cell == "GRU":
            attributes["linear_before_reset"] = 1
        outputs = [f"Y{k}", f"h_n{k}"] + ([f"c_n{k}"] if lstm else [])
        nodes.append(helper.make_node(case.cell, inputs, outputs, **attributes))
        if k + 1 < s.layers:  # [T, D, N, H] -> [T, N, D*H]
            rows = constant(f"rows{k}", np.array([s.t, s.n, directions * s.h]))
            nodes.append(helper.make_node("Transpose", [f"Y{k}"], [f"Yt{k}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"Yt{k}", rows], [f"x{k + 1}"]))
            data = f"x{k + 1}"

    def info(name: str, *size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, size)

    state = (directions, s.n, s.h)
    given = ["initial_h", "initial_c"][: len(work.hx)]
    last = [f"{name}{k}" for name in ("h_n", "c_n")[: 1 + lstm] for k in range(s.layers)]
    graph = helper.make_graph(
        nodes,
        "rnn",
        [info("x", s.t, s.n, s.h)] + [info(name, *state) for name in given],
        [info(f"Y{s.layers - 1}", s.t, directions, s.n, s.h)] + [info(name, *state) for name in last],
        constants,
    )
    opset = [helper.make_opsetid("", 14)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=8)
    return bytes(made.SerializeToString())
