"""torch.compile, torch.export and AOTInductor: whole graphs, any length and batch, eager's own bits."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close_to_reference
from test_gradients import MODULES, flat, make_modules
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import ops

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
STACKED = {"num_layers": 2, "bidirectional": True}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name, device, **options):
    return make_modules(name, input_size=3, hidden_size=4, **options)[0].to(device)


def results(run, module, *tensors, training=True):
    """Outputs and, in training, all gradients."""
    tensors = [t.clone().requires_grad_(training and t.is_floating_point()) for t in tensors]
    module.zero_grad()
    with torch.set_grad_enabled(training):
        outputs = run(*tensors)
    if not training:
        return list(outputs)
    sum(t.sin().sum() for t in outputs).backward()
    leaves = [*(t for t in tensors if t.requires_grad), *module.parameters()]
    return [*outputs, *(t.grad for t in leaves)]


def assert_compiles(run, module, inputs, training):
    """In one graph, and for sizes of any number in two: of the first sizes, then of all."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for tensors in inputs:
        found, expected = (results(f, module, *tensors, training=training) for f in (compiled, run))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, options", MODULES)
def test_padded(name, options, training, device):
    module = make(name, device, **STACKED, batch_first=True, **options)
    inputs = [(torch.randn(*shape, 3, device=device),) for shape in ((5, 2), (7, 3), (9, 4), (2, 8))]
    assert_compiles(lambda x: flat(module(x)), module, inputs, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_packed(name, states, training, device):
    """By way of the data and batch_sizes: torch.compile does not trace pack_padded_sequence itself."""
    module = make(name, device, **STACKED)
    inputs = []
    for lengths in ((5, 3, 2), (6, 4, 3, 2), (9, 9), (7, 5, 1, 1, 1)):
        packed = pack_sequence([torch.randn(length, 3, device=device) for length in lengths])
        state = (torch.randn(4, len(lengths), 4, device=device),) if states else ()
        inputs.append((packed.data, packed.batch_sizes, *state))

    def run(data, batch_sizes, *states):
        hx = None
        if states:
            hx = (*states, *states) if name == "LSTM" else states[0]
        y, *finals = flat(module(PackedSequence(data, batch_sizes), hx))
        return y.data, *finals

    assert_compiles(run, module, inputs, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, training, device):
    module = make(name, device)

    def run(x, h):
        hx = (h, h.cos()) if name == "LSTMCell" else h
        steps = []
        for _ in range(2):
            hx = module(x, hx)
            steps += hx if name == "LSTMCell" else [hx]
        return steps

    inputs = [(torch.randn(n, 3, device=device), torch.randn(n, 4, device=device)) for n in (2, 3, 5)]
    assert_compiles(run, module, inputs, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["lengths", "reset", "both"])
@pytest.mark.parametrize("name, options", MODULES)
def test_lengths(name, options, given, training, device):
    """Their packed rows, of a number that is known at run time alone, are in the graph."""
    module = make(name, device, **STACKED, **options)
    inputs = []
    for t, lengths in ((5, (5, 0, 2)), (7, (1, 7, 7, 3)), (9, (9, 9)), (3, (0, 0, 0, 1, 2))):
        x = torch.randn(t, len(lengths), 3, device=device)
        inputs.append((x, torch.tensor(lengths), torch.rand(t, len(lengths)) < 0.3))

    def run(x, lengths, reset):
        lengths, reset = lengths if given != "reset" else None, reset if given != "lengths" else None
        return flat(module(x, lengths=lengths, reset=reset))

    assert_compiles(run, module, inputs, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, options", MODULES)
def test_nested(name, options, training, device):
    module = make(name, device, **STACKED, **options)
    inputs = []
    for lengths in ((5, 1, 2), (1, 7, 7, 3), (9, 9), (3, 1, 1, 1, 2)):
        offsets = torch.tensor((0, *lengths), device=device).cumsum(0)
        inputs.append((torch.randn(sum(lengths), 3, device=device), offsets))

    def run(values, offsets):
        y, *finals = flat(module(torch.nested.nested_tensor_from_jagged(values, offsets)))
        return y.values(), *finals

    assert_compiles(run, module, inputs, training)


def test_one_graph_for_marked_dimensions(device):
    module = make("LSTM", device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for shape in ((5, 2), (7, 3), (30, 40)):
        x = torch.randn(*shape, 3, device=device)
        torch._dynamo.mark_dynamic(x, (0, 1))
        assert torch.equal(compiled(x)[0], module(x)[0])
    assert counter.frame_count == 1


def test_autocast(device):
    module = make("LSTM", device, **STACKED)

    def run(x):
        with torch.autocast(device.type, torch.bfloat16):
            return flat(module(x))

    inputs = [(torch.randn(*shape, 3, device=device),) for shape in ((5, 2), (7, 3))]
    assert_compiles(run, module, inputs, training=True)


def test_patched_program(device):
    """torch.compile looks torch.nn's names up and refuses their instances, unless told not to."""
    assert not torch._dynamo.config.allow_rnn
    with fusedrnn.patch():
        with fusedrnn.patch():
            module = nn.Sequential(nn.LSTM(3, 4, 2)).to(device)
        inputs = [(torch.randn(*shape, 3, device=device),) for shape in ((5, 2), (7, 3))]
        assert_compiles(lambda x: flat(module(x)), module, inputs, training=True)
    assert not torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    assert_compiles(lambda x: flat(module(x)), module, inputs, training=True)


@pytest.mark.parametrize("name, options", MODULES)
def test_stream(name, options, device):
    """In the graph of whatever uses it, a step or a chunk at a time; goes on where eager code left it."""
    module = make(name, device, num_layers=2, **options)
    streams = [fusedrnn.Stream(module, 2) for _ in range(2)]
    runs = [lambda x, s=s: s(x).cos() for s in streams]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(runs[0], fullgraph=True, backend=counter)
    for shape in ((2, 3), (2, 3), (5, 2, 3), (7, 2, 3), (2, 3)):
        x = torch.randn(shape, device=device)
        assert torch.equal(compiled(x), runs[1](x))
        assert torch.equal(runs[0](x), runs[1](x))
    streams[0].reset()
    streams[1].reset()
    assert torch.equal(compiled(x), runs[1](x))
    assert counter.frame_count <= 3
    with torch.autocast(device.type, dtype=torch.bfloat16):  # changes nothing
        found, expected = compiled(x), runs[1](x)
    assert found.dtype == expected.dtype == torch.float32 and torch.equal(found, expected)


WRONG = {
    "features": (lambda m, x: m(x[..., :2]), "Expected 3, got 2"),
    "dtype": (lambda m, x: m(x.double()), r"input dtype \(torch.float64\) does not match"),
    "dimensions": (lambda m, x: m(x[None]), "Expected input to be 2D or 3D, got 4D"),
    "state": (lambda m, x: m(x, x.new_zeros(1, 3, 4)), r"Expected hidden size \(1, 2, 4\), got \[1, 3, 4\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what, device):
    """In a graph a wrong call is what the compiler reports; else it is eager code's, with torch.nn's error."""
    call, message = WRONG[what]
    module, x = make("GRU", device), torch.randn(5, 2, 3, device=device)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(call, fullgraph=True, backend="aot_eager")(module, x)
    with pytest.raises((RuntimeError, ValueError), match=message) as found:
        torch.compile(call, backend="aot_eager")(module, x)
    assert not isinstance(found.value, torch._dynamo.exc.TorchDynamoException)


def test_wrong_arguments_of_a_cell(device):
    cell = torch.compile(make("GRUCell", device), fullgraph=True, backend="aot_eager")
    message = r"Expected input \[N, 3\], states \[N, 4\], got \[2, 5\], \[2, 4\]"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        cell(torch.randn(2, 5, device=device), torch.zeros(2, 4, device=device))


@pytest.mark.parametrize("lengths", [None, [5, 3]], ids=str)
@pytest.mark.parametrize("name, options", MODULES)
def test_make_fx_with_symbolic_sizes(name, options, lengths, device):
    module = make(name, device, **options).requires_grad_(False)
    x = torch.randn(5, 2, 3, device=device)

    def run(x):
        return flat(module(x, lengths=lengths))

    graph = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    for given in (x, torch.randn(7, 2, 3, device=device)):
        assert all(torch.equal(a, b) for a, b in zip(graph(given), run(given), strict=True))


def test_transforms_run_outside_of_the_graph(device):
    """Dynamo can't trace torch.func's transforms of an autograd.Function, which is what runs where gradients are on."""
    module = make("LSTM", device)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x = torch.randn(4, 5, 2, 3, device=device)

    def loss(parameters, x):
        return functional_call(module, parameters, x)[0].pow(2).sum()

    for transformed in (
        lambda: vmap(module)(x),
        lambda: vmap(grad(loss), (None, 0))(parameters, x),
        lambda: jvp(lambda x: module(x)[0], (x[0],), (x[1],)),
    ):
        found, expected = (tree_leaves(f()) for f in (torch.compile(transformed, backend="aot_eager"), transformed))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name, options", MODULES)
def test_vmap_without_gradients(name, options, device):
    module = make(name, device, **STACKED, **options)
    inputs = [(torch.randn(4, *shape, 3, device=device),) for shape in ((5, 2), (7, 3))]
    assert_compiles(lambda x: vmap(lambda x: tuple(flat(module(x))))(x), module, inputs, training=False)


def test_inductor(device):
    module = make("GRU", device, **STACKED)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for shape in ((5, 2), (7, 3)):
        x = torch.randn(*shape, 3, device=device)
        found, expected = (results(lambda x, m=m: flat(m(x)), module, x) for m in (compiled, module))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- ahead of time ---------------------------------------------------------------------------------


class Tagger(nn.Module):
    """What is exported: layers of ours among others."""

    def __init__(self, name, **options):
        super().__init__()
        self.rnn = getattr(fusedrnn, name)(3, 4, **STACKED, **options)
        self.score = nn.Linear(2 * options.get("proj_size", 4), 2)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.score(y)


class PackedTagger(Tagger):
    def forward(self, data, batch_sizes):
        y, _ = self.rnn(PackedSequence(data, batch_sizes))
        return self.score(y.data)


def ops_of(program):
    return [n.target for n in program.graph.nodes if getattr(n.target, "namespace", None) == "fusedrnn"]


def assert_trains_the_same(program, model, *inputs):
    """The exported program's outputs, and its parameters' gradients, are the model's."""
    exported = program.module()
    found, expected = exported(*inputs), model(*inputs)
    assert torch.equal(found, expected)
    parameters = dict(exported.named_parameters())
    for name, p in model.named_parameters():
        pairs = ((found, parameters[name]), (expected, p))
        gradients = [torch.autograd.grad(y.sin().sum(), of, retain_graph=True)[0] for y, of in pairs]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name, options", MODULES)
def test_export(name, options, strict, gradients, device, tmp_path):
    model = Tagger(name, **options).to(device)
    dynamic = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    with torch.set_grad_enabled(gradients):
        program = export(model, (torch.randn(5, 2, 3, device=device),), dynamic_shapes=dynamic, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert len(ops_of(program)) == 2
    for shape in ((5, 2), (9, 4)):
        x = torch.randn(*shape, 3, device=device)
        assert_trains_the_same(program, model, x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_export_packed(name, strict, device):
    model = PackedTagger(name).to(device)
    pack = lambda lengths: pack_sequence([torch.randn(n, 3, device=device) for n in lengths])[:2]  # noqa: E731
    with torch.no_grad():
        program = export(model, pack((5, 3, 2)), dynamic_shapes=({0: Dim.DYNAMIC},) * 2, strict=strict)
    for lengths in ((5, 3, 2), (8, 3, 2, 2)):
        assert_trains_the_same(program, model, *pack(lengths))


class TaggerOfLengths(Tagger):
    def forward(self, x, lengths):
        y, _ = self.rnn(x, lengths=lengths)
        return self.score(y)


@pytest.mark.parametrize("strict", [False, True])
def test_export_lengths(strict, device):
    model = TaggerOfLengths("LSTM").to(device)
    example = (torch.randn(5, 3, 3, device=device), torch.tensor([5, 3, 2]))
    dynamic = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "lengths": {0: Dim.DYNAMIC}}
    program = export(model, example, dynamic_shapes=dynamic, strict=strict)
    for t, lengths in ((5, (0, 5, 1)), (9, (3, 9))):
        assert_trains_the_same(program, model, torch.randn(t, len(lengths), 3, device=device), torch.tensor(lengths))


@pytest.mark.parametrize("recompute", [False, True])
def test_exported_once_gradients_of_any_order(recompute, device):
    """The exported node is the layer itself: it can be differentiated twice, and recomputes if the module does."""
    module = fusedrnn.LSTM(3, 4, recompute=recompute, device=device, dtype=torch.float64)
    x = torch.randn(4, 2, 3, device=device, dtype=torch.float64, requires_grad=True)
    exported = export(module, (x,)).module()

    def second(run):
        (dx,) = torch.autograd.grad(run(x)[0].sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    assert torch.equal(second(exported), second(module))


RUN_PACKAGE = """
import sys, torch, torch._inductor.codecache  # which torch 2.10 would not find
inputs, outputs, package, *libraries = sys.argv[1:]
for library in libraries:
    torch.ops.load_library(library)
run = torch._inductor.aoti_load_package(package)
torch.save([run(x) for x in torch.load(inputs)], outputs)
assert "fusedrnn" not in sys.modules
"""


def test_aot_inductor(device, tmp_path):
    """A package runs where there is only the ops' library, at other sizes than it was compiled at."""
    model = Tagger("LSTM").to(device).requires_grad_(False)
    sizes = {0: Dim("T", min=2, max=64), 1: Dim("N", min=2, max=64)}
    program = export(model, (torch.randn(5, 2, 3, device=device),), dynamic_shapes={"x": sizes})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    xs = [torch.randn(*shape, 3, device=device) for shape in ((5, 2), (9, 4))]
    torch.save(xs, inputs)
    names = ["libfusedrnn", *(["libfusedrnn_cuda"] if device.type == "cuda" else [])]
    libraries = [str(ops._LIB / f"{name}.so") for name in names]
    command = [sys.executable, "-c", RUN_PACKAGE, str(inputs), str(outputs), package, *libraries]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for x, found in zip(xs, torch.load(outputs), strict=True):
        assert_right(found, model, x)
    if device.type == "cpu":
        x = torch.linspace(-1, 1, 9 * 4 * 3).reshape(9, 4, 3)
        printed = run_in_cpp(tmp_path, package, libraries[0], *x.shape)
        assert_right(torch.tensor([float(number) for number in printed.split()]).reshape(9, 4, 2), model, x)


def assert_right(found, model, x):
    reference = copy.deepcopy(model).double()(x.double())
    assert_close_to_reference({"y": found}, {"y": model(x)}, {"y": reference})


def run_in_cpp(folder, *arguments):
    """What examples/aot_inductor.cpp prints."""
    torch_folder, source = Path(torch.__file__).parent, Path(__file__).parent.parent / "examples/aot_inductor.cpp"
    words = [os.environ.get("CXX", "c++"), "-std=c++20", source, "-o", folder / "run"]
    words += [f"-I{torch_folder / inside}" for inside in ("include", "include/torch/csrc/api/include")]
    words += [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-Wl,--no-as-needed"]
    subprocess.run([*words, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    command = [str(word) for word in (folder / "run", *arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
