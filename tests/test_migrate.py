"""Weights of Keras, ONNX and textbook GRUs: the loaded module gives what the original computes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import fusedrnn

T, N, I, H = 6, 3, 4, 5
ROOT = Path(__file__).resolve().parent.parent
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CLASSES = [(namespace, name) for namespace in (fusedrnn, nn) for name in GATES]
every_class = pytest.mark.parametrize(("namespace", "name"), CLASSES)
rng = np.random.default_rng(0)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def array(*shape):
    return rng.uniform(-1, 1, shape)


# Keras: its documentation's formulas, in its layout.


def keras_weights(gates, bias=True, inputs=I):
    biases = [array(2, gates * H) if gates == 3 else array(gates * H)] if bias else []
    return [array(inputs, gates * H), array(H, gates * H), *biases]


def keras_layer(gates, x, weights):
    """x [N, T, I] -> all h [N, T, H]; the GRU with reset_after=True."""
    kernel, recurrent_kernel, *bias = weights
    bias, recurrent_bias = bias[0] if gates == 3 and bias else (bias[0] if bias else 0, 0)
    h = c = np.zeros((len(x), H))
    outputs = []
    for t in range(x.shape[1]):
        wx = np.split(x[:, t] @ kernel + bias, gates, axis=-1)
        rh = np.split(h @ recurrent_kernel + recurrent_bias, gates, axis=-1)
        if gates == 4:
            i, f, o = (sigmoid(wx[k] + rh[k]) for k in (0, 1, 3))
            c = f * c + i * np.tanh(wx[2] + rh[2])
            h = o * np.tanh(c)
        elif gates == 3:
            z, r = (sigmoid(wx[k] + rh[k]) for k in (0, 1))
            h = z * h + (1 - z) * np.tanh(wx[2] + r * rh[2])
        else:
            h = np.tanh(wx[0] + rh[0])
        outputs.append(h)
    return np.stack(outputs, 1)


def keras_bidirectional(gates, x, weights):
    half = len(weights) // 2
    backwards = keras_layer(gates, x[:, ::-1], weights[half:])[:, ::-1]
    return np.concatenate([keras_layer(gates, x, weights[:half]), backwards], -1)


def run(module, x):
    return module(torch.as_tensor(x))[0].detach().numpy()


@every_class
@pytest.mark.parametrize("bias", [True, False])
def test_keras(namespace, name, bias):
    gates = GATES[name]
    weights, x = keras_weights(gates, bias), array(N, T, I)
    module = getattr(namespace, name)(I, H, batch_first=True, dtype=torch.float64)
    assert fusedrnn.load_keras_weights(module, weights) is module
    np.testing.assert_allclose(run(module, x), keras_layer(gates, x, weights), atol=1e-12)


@every_class
def test_keras_bidirectional_layers(namespace, name):
    gates = GATES[name]
    first = keras_weights(gates) + keras_weights(gates)
    second = keras_weights(gates, inputs=2 * H) + keras_weights(gates, inputs=2 * H)
    module = getattr(namespace, name)(I, H, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    fusedrnn.load_keras_weights(module, first)
    fusedrnn.load_keras_weights(module, second, layer=1)
    x = array(N, T, I)
    expected = keras_bidirectional(gates, keras_bidirectional(gates, x, first), second)
    np.testing.assert_allclose(run(module, x), expected, atol=1e-12)


# ONNX: computed by ONNX Runtime.


def onnx_weights(gates, directions, bias=True):
    W, R = array(directions, gates * H, I), array(directions, gates * H, H)
    return [w.astype(np.float32) for w in (W, R, *([array(directions, 2 * gates * H)] if bias else []))]


def onnx_model(name, x, weights, directions, **attributes):
    names = ["W", "R", "B"][: len(weights)]
    node = helper.make_node(
        name,
        ["X", *names],
        ["Y"],
        hidden_size=H,
        direction="bidirectional" if directions == 2 else "forward",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, (T, directions, N, H))],
        [helper.make_tensor(n, TensorProto.FLOAT, w.shape, w.ravel()) for n, w in zip(names, weights, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def onnx_run(name, x, weights, directions, **attributes):
    """All h of a node: [T, N, D*H]."""
    model = onnx_model(name, x, weights, directions, **attributes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"X": x})
    return y.transpose(0, 2, 1, 3).reshape(T, N, directions * H)


@every_class
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_onnx(namespace, name, directions, bias):
    weights = onnx_weights(GATES[name], directions, bias)
    attributes = {"linear_before_reset": 1} if name == "GRU" else {}
    module = getattr(namespace, name)(I, H, bidirectional=directions == 2)
    assert fusedrnn.load_onnx_weights(module, *weights, **attributes) is module
    x = array(T, N, I).astype(np.float32)
    expected = onnx_run(name, x, weights, directions, **attributes)
    np.testing.assert_allclose(run(module, x), expected, atol=2e-6)


def test_onnx_relu():
    weights, x = onnx_weights(1, 1), array(T, N, I).astype(np.float32)
    module = fusedrnn.load_onnx_weights(fusedrnn.RNN(I, H, nonlinearity="relu"), *weights)
    expected = onnx_run("RNN", x, weights, 1, activations=["Relu"])
    np.testing.assert_allclose(run(module, x), expected, rtol=2e-6, atol=2e-6)


def test_onnx_as_documented(tmp_path, monkeypatch):
    """The program in docs/migration.md."""
    text = (ROOT / "docs" / "migration.md").read_text()
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "model.onnx" in block)
    weights, x = onnx_weights(3, 2), array(T, N, I).astype(np.float32)
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx_model("GRU", x, weights, 2, linear_before_reset=1), "model.onnx")
    found = {"fusedrnn": fusedrnn}
    exec(program, found)
    expected = onnx_run("GRU", x, weights, 2, linear_before_reset=1)
    np.testing.assert_allclose(run(found["gru"], x), expected, atol=2e-6)


def test_loading_into_another_dtype():
    weights = onnx_weights(4, 1)
    module = fusedrnn.load_onnx_weights(fusedrnn.LSTM(I, H, dtype=torch.bfloat16), *weights)
    assert module.weight_ih_l0.dtype == torch.bfloat16
    i, o, f, c = torch.as_tensor(weights[0][0]).chunk(4)
    assert torch.equal(module.weight_ih_l0, torch.cat([i, f, c, o]).bfloat16())


# The two conventions of a GRU's update gate.


def textbook_gru(x, w_ih, w_hh, b_ih, b_hh):
    """h = (1 - z) h_prev + z n, with gates in the order r z n; x [T, N, I]."""
    h = x.new_zeros(x.shape[1], H)
    outputs = []
    for x_t in x:
        wx_r, wx_z, wx_n = (x_t @ w_ih.T + b_ih).chunk(3, -1)
        rh_r, rh_z, rh_n = (h @ w_hh.T + b_hh).chunk(3, -1)
        r, z = (wx_r + rh_r).sigmoid(), (wx_z + rh_z).sigmoid()
        h = (1 - z) * h + z * (wx_n + r * rh_n).tanh()
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("namespace", [fusedrnn, nn])
def test_convert_gru_weights(namespace):
    gru = namespace.GRU(I, H, dtype=torch.float64)
    theirs = [torch.randn_like(p) for p in gru.parameters()]
    converted = fusedrnn.convert_gru_weights(theirs)
    with torch.no_grad():
        for parameter, w in zip(gru.parameters(), converted, strict=True):
            parameter.copy_(w)
    x = torch.randn(T, N, I, dtype=torch.float64)
    torch.testing.assert_close(gru(x)[0], textbook_gru(x, *theirs), rtol=0, atol=1e-12)
    for w, back in zip(theirs, fusedrnn.convert_gru_weights(converted), strict=True):
        assert torch.equal(w, back)


# What can't be loaded.


@pytest.mark.parametrize(
    ("module", "weights", "arguments", "message"),
    [
        (
            fusedrnn.GRU(I, H),
            [array(I, 3 * H), array(H, 3 * H), array(3 * H)],
            {},
            "reset_after=False applies the reset",
        ),
        (fusedrnn.GRU(I, H), keras_weights(3, False), {"reset_after": False}, "reset_after=False applies the reset"),
        (fusedrnn.LSTM(I, H), keras_weights(3), {}, r"weight_ih_l0: expected \[20, 4\], got \[15, 4\]"),
        (
            fusedrnn.LSTM(I, H, bidirectional=True),
            keras_weights(4),
            {},
            "2 or 3 arrays for each of 2 directions, got 3",
        ),
        (fusedrnn.LSTM(I, H, bias=False), keras_weights(4), {}, "the module was made with bias=False"),
        (fusedrnn.LSTM(I, H, proj_size=2), keras_weights(4), {}, "the module has a projection"),
        (fusedrnn.LSTM(I, H), keras_weights(4), {"layer": 1}, "layer 1 of a module with 1"),
    ],
)
def test_keras_errors(module, weights, arguments, message):
    before = {name: p.clone() for name, p in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fusedrnn.load_keras_weights(module, weights, **arguments)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


@pytest.mark.parametrize(
    ("module", "weights", "arguments", "message"),
    [
        (fusedrnn.GRU(I, H), onnx_weights(3, 1), {}, "linear_before_reset=0 applies the reset"),
        (fusedrnn.LSTM(I, H), onnx_weights(4, 2), {}, r"W: expected 1 direction\(s\), got shape \[2, 20, 4\]"),
        (
            fusedrnn.RNN(I, H),
            [w[0] for w in onnx_weights(1, 1)],
            {},
            r"W: expected 1 direction\(s\), got shape \[5, 4\]",
        ),
        (fusedrnn.RNN(I, H + 1), onnx_weights(1, 1), {}, r"weight_ih_l0: expected \[6, 4\], got \[5, 4\]"),
    ],
)
def test_onnx_errors(module, weights, arguments, message):
    before = {name: p.clone() for name, p in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fusedrnn.load_onnx_weights(module, *weights, **arguments)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


@pytest.mark.parametrize("weight", [torch.zeros(4, 2), torch.tensor(1.0)])
def test_convert_gru_weights_errors(weight):
    with pytest.raises(ValueError, match="expected 3H rows"):
        fusedrnn.convert_gru_weights([weight])
