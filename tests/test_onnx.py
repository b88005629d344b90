"""ONNX export: one operator a layer, run by ONNX Runtime at other sizes than it was traced at."""

import onnxruntime
import pytest
import torch
from conftest import assert_close_to_reference
from test_gradients import flat, make_modules
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("GRU", {"bias": False}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("RNN", {"bidirectional": True}),
    ("RNN", {"nonlinearity": "relu"}),
]


class Flat(nn.Module):
    """The module with its states in a row, as ONNX has them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, *states):
        pair = len(states) > 1
        outputs = self.module(x, states if pair else states[0] if states else None)
        return tuple(flat(outputs)) if isinstance(self.module, nn.RNNBase) else outputs


def exported(model, inputs, dynamic_shapes, path):
    """The model as ONNX, written and read; its operators."""
    program = torch.onnx.export(
        model, inputs, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes,
        custom_translation_table=fusedrnn.onnx.translation_table(),
    )  # fmt: skip
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*tensors):
        found = session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))
        return [torch.from_numpy(t) for t in found]

    return run, list(program.model.graph)


def assert_runs(run, model, inputs):
    found, ours, wide = run(*inputs), model(*inputs), model.double()(*(t.double() for t in inputs))
    model.float()
    if torch.is_tensor(ours):
        ours, wide = [ours], [wide]
    named = [dict(enumerate(tensors)) for tensors in (found, ours, wide)]
    assert_close_to_reference(*named)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name, options", OPTIONS)
def test_modules(name, options, states, tmp_path):
    module, _ = make_modules(name, input_size=3, hidden_size=5, **options)
    model = Flat(module).eval()
    layers, directions = module.num_layers, 1 + module.bidirectional
    T, N = (1, 0) if module.batch_first else (0, 1)
    count = (2 if name == "LSTM" else 1) if states else 0

    def inputs(t, n):
        shape = (n, t) if module.batch_first else (t, n)
        return torch.randn(*shape, 3), *[torch.randn(layers * directions, n, 5) for _ in range(count)]

    dynamic = ({T: "T", N: "N"}, *([({1: "N"},) * count] if states else []))
    run, nodes = exported(model, inputs(5, 2), dynamic, tmp_path / "model.onnx")
    recurrent = [n for n in nodes if n.op_type == name]
    assert len(recurrent) == layers
    if name == "GRU":
        assert all(n.attributes["linear_before_reset"].value == 1 for n in recurrent)
    for t, n in ((5, 2), (9, 4), (1, 1)):
        with torch.no_grad():
            assert_runs(run, model, inputs(t, n))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name, tmp_path):
    cell = getattr(fusedrnn, name)(3, 5)
    model, count = Flat(cell).eval(), 2 if name == "LSTMCell" else 1

    def inputs(n):
        return torch.randn(n, 3), *[torch.randn(n, 5) for _ in range(count)]

    run, _ = exported(model, inputs(2), ({0: "N"}, ({0: "N"},) * count), tmp_path / "model.onnx")
    for n in (2, 7):
        with torch.no_grad():
            assert_runs(run, model, inputs(n))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = fusedrnn.GRU(3, 5)

    def forward(self, data, batch_sizes, h):
        return self.module(PackedSequence(data, batch_sizes), h)[0].data


def test_what_onnx_does_not_have(tmp_path):
    projected = Flat(fusedrnn.LSTM(3, 5, proj_size=2)).eval()
    with pytest.raises(torch.onnx.OnnxExporterError, match="no LSTM with a projection"):
        exported(projected, (torch.randn(4, 2, 3),), None, tmp_path / "model.onnx")
    packed = pack_sequence([torch.randn(n, 3) for n in (3, 2)])
    with pytest.raises(torch.onnx.OnnxExporterError, match="no PackedSequence"):
        exported(Packed().eval(), (*packed[:2], torch.randn(1, 2, 5)), None, tmp_path / "model.onnx")
