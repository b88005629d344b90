"""Stacks of layers that are one op: on the CUDA kernels a wave of chunks, elsewhere what that op means."""

import helpers
import pytest
import torch
from conftest import FLOORS, on_cuda_kernels, relative_error
from helpers import VARIANTS, assert_same_bits, layer_backward_op, layer_op, make_gradients, make_inputs, variant

import fusedrnn
from fusedrnn import ops, stacked


def stack_inputs(name, layers, device="cpu", dtype=torch.float32, **shape):
    """The arguments of a stack's op up to `layers`, and upstream gradients."""
    first = variant(name, dtype=dtype, **shape)
    cases = [first, *[first.but(I=first.output)] * (layers - 1)]
    inputs = [make_inputs(case, device, seed=i) for i, case in enumerate(cases)]
    gradients = [make_gradients(case, device, seed=100 + i) for i, case in enumerate(cases)]
    together = lambda states: None if states[0] is None else torch.cat(states)  # noqa: E731
    h0, c0 = together([i.h0 for i in inputs]), together([i.c0 for i in inputs])
    dh_n, dc_n = (together([g[j] for g in gradients]) for j in (1, 2))
    weights = [w for i in inputs for w in i.weights]
    return (inputs[0].x, h0, c0, weights, layers), (gradients[-1][0], dh_n, dc_n)


def all_needs(arguments):
    _, h0, c0, weights, layers = arguments
    needs = [sum(8 << i for i in range(len(weights) // layers))] * layers
    return [needs[0] | 1 | (2 if h0 is not None else 0) | (4 if c0 is not None else 0), *needs[1:]]


def results(forward, backward, arguments, upstream, chunk, tf32=False, needs=None):
    """Of both ops (or functions), by name."""
    # Memory that is taken next holds other numbers than those that belong there.
    x, *rest = arguments
    forward(2 * x, *rest, chunk, True, tf32)
    y, h_n, c_n, saved = forward(*arguments, chunk, True, tf32)
    again, *_ = forward(*arguments, chunk, False, tf32)
    needs = all_needs(arguments) if needs is None else needs
    dx, dh0, dc0, dweights = backward(*upstream, *arguments, chunk, y, saved, needs, tf32)
    named = {"y": y, "h_n": h_n, "c_n": c_n, "unsaved y": again, "dx": dx, "dh0": dh0, "dc0": dc0}
    return {**named, **{f"saved{i}": t for i, t in enumerate(saved)}, **{f"d{i}": t for i, t in enumerate(dweights)}}


def by_op(cell):
    found = getattr(torch.ops, helpers.NAMESPACE)
    return getattr(found, f"{cell}_stack"), getattr(found, f"{cell}_stack_backward")


@pytest.fixture
def by_layers(monkeypatch):
    """The functions that say what the ops mean, over the layer ops that are tested."""
    monkeypatch.setattr(ops, "forward", {cell: layer_op(cell).default for cell in ops.CELLS})
    monkeypatch.setattr(ops, "backward", {cell: layer_backward_op(cell).default for cell in ops.CELLS})

    def functions(cell):
        return (lambda *a: stacked._forward(cell, *a)), (lambda *a: stacked._backward(cell, *a))

    return functions


@pytest.fixture
def cuda_kernels(request):
    if not on_cuda_kernels(request.config):
        pytest.skip("needs --device cuda, or the CUDA kernels built for the CPU")


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_wave_is_the_layers_one_by_one(name, dtype, device, capability, by_layers):
    """With all plans, of which clusters alone make a wave: all layers at once (and more rows than clusters), and in two
    groups."""
    cell = name.removesuffix("_proj")
    tf32 = dtype == torch.float32
    shapes = [(3, {"T": 7, "N": 9, "I": 6, "H": 21}), (5, {"T": 4, "N": 17, "I": 3, "H": 18})]
    for layers, shape in shapes if capability == "cluster" else shapes[:1]:
        arguments, upstream = stack_inputs(name, layers, device, dtype, **shape)
        for plan in {capability, ""} if capability == "cluster" else {capability}:
            with fusedrnn.use_plan(plan):
                expected = results(*by_layers(cell), arguments, upstream, 0, tf32)
                for chunk in (0, 1, 2, 3, shape["T"]):
                    found = results(*by_op(cell), arguments, upstream, chunk, tf32)
                    for what, value in expected.items():
                        assert value.shape == found[what].shape, what
                        assert relative_error(found[what], value) <= FLOORS[torch.bfloat16 if tf32 else dtype], (
                            plan,
                            chunk,
                            what,
                        )


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_gradients_that_are_wanted(name, device, by_layers):
    cell = name.removesuffix("_proj")
    (x, h0, c0, weights, layers), upstream = stack_inputs(name, 3, device, torch.bfloat16, T=5, N=2)
    every = all_needs((x, h0, c0, weights, layers))
    for needs in ([1, 0, 0], [0, 0, 0], [0, 0, 8], [0, 16, 0], [2, 0, 0], [every[0], 8, 0], every):
        for states in (True, False):
            if needs[0] & 6 and not states:
                continue
            arguments = (x, h0, c0, weights, layers) if states else (x, None, None, weights, layers)
            for given in (upstream, (upstream[0], None, None), (None, *upstream[1:])):
                found = results(*by_op(cell), arguments, given, 2, needs=needs)
                expected = results(*by_layers(cell), arguments, given, 2, needs=needs)
                for what, value in expected.items():
                    assert value.shape == found[what].shape, (what, needs)
                    assert relative_error(found[what], value) <= FLOORS[torch.bfloat16], (what, needs)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("name", VARIANTS)
def test_no_rows(name, device, by_layers):
    cell = name.removesuffix("_proj")
    for shape in ({"T": 5, "N": 0}, {"T": 0, "N": 2}):
        arguments, upstream = stack_inputs(name, 2, device, **shape)
        found = results(*by_op(cell), arguments, upstream, 2)
        assert_same_bits(found, results(*by_layers(cell), arguments, upstream, 2))


@pytest.mark.parametrize("layers", [0, -1, 2, 4, 2**62])
def test_another_number_of_layers(layers, device):
    """Wherever the ops run, and before anything is made for so many layers."""
    arguments, upstream = stack_inputs("lstm", 3, device, T=2, N=2, I=3, H=4)
    forward, backward = by_op("lstm")
    y, _, _, saved = forward(*arguments, 0, True)
    for wrong in ((*arguments[:4], layers), (*arguments[:3], arguments[3][1:], 3)):
        with pytest.raises(RuntimeError, match="expected"):
            forward(*wrong, 0, True)
        with pytest.raises(RuntimeError, match="expected"):
            backward(*upstream, *wrong, 0, y, saved, [0] * 3)
    with pytest.raises(RuntimeError, match="expected"):
        forward(arguments[0], arguments[1][:2], *arguments[2:], 0, True)
    for wrong_saved, needs in ((saved[1:], [0] * 3), (saved, [0] * 2)):
        with pytest.raises(RuntimeError, match="expected"):
            backward(*upstream, *arguments, 0, y, wrong_saved, needs)


@pytest.mark.usefixtures("cuda_kernels")
def test_wrong_arguments(device):
    (x, h0, c0, weights, layers), upstream = stack_inputs("lstm", 2, device)
    forward, backward = by_op("lstm")
    for arguments in (
        (x, h0, c0, weights[:-1], layers),
        (x, h0, c0, weights, 3),
        (x, h0, c0, weights, 0),
        (x, h0[:1], c0, weights, layers),
        (x, h0, c0[:1], weights, layers),
        (x[0], h0, c0, weights, layers),
        (x, h0, c0, [*weights[4:], *weights[:4]], layers),
    ):
        with pytest.raises(RuntimeError, match="fusedrnn: "):
            forward(*arguments, 2, True)
    y, _, _, saved = forward(x, h0, c0, weights, layers, 2, True)
    with pytest.raises(RuntimeError, match="saved, needs"):
        backward(*upstream, x, h0, c0, weights, layers, 2, y, saved[:-1], [1, 0])
    with pytest.raises(RuntimeError, match="saved, needs"):
        backward(*upstream, x, h0, c0, weights, layers, 2, y, saved, [1])
    with pytest.raises(RuntimeError, match="gates"):
        backward(*upstream, x, h0, c0, weights, layers, 2, y, [saved[0], *saved[3:], *saved[1:3]], [1, 0])


def test_stream_and_graph(device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    module = fusedrnn.LSTM(6, 40, num_layers=3, device=device, dtype=torch.bfloat16)
    x = torch.randn(200, 5, 6, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step():
        output, (h_n, c_n) = module(x)
        gradients = torch.autograd.grad([output, h_n, c_n], [x, *module.parameters()], [output, h_n, c_n])
        return dict(enumerate([output, h_n, c_n, *gradients]))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on another stream than the one that was warm
        captured = step()
    with torch.no_grad():
        x.mul_(2)
    expected = step()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)


# ---- around the op: its autograd.Function, here on a CPU too ---------------------------------------------------------


@pytest.fixture
def own_ops(request):
    if request.config.getoption("--ops") != "fusedrnn":
        pytest.skip("the layers above the ops use fusedrnn's own")


@pytest.fixture
def always_stacked(own_ops, monkeypatch):
    monkeypatch.setattr(stacked, "suits", lambda *_: True)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("own_ops")
def test_opcheck(name, device):
    cell = name.removesuffix("_proj")
    arguments, upstream = stack_inputs(name, 3, device, T=4, N=2)
    for save in (False, True):
        torch.library.opcheck(stacked.forward[cell], (*arguments, 2, save))
    y, _, _, saved = stacked.forward[cell](*arguments, 2, True)
    for needs in (all_needs(arguments), [0, 0, 8], [0, 0, 0]):
        torch.library.opcheck(stacked.backward[cell], (*upstream, *arguments, 2, y, saved, needs))


def modules(device, name="LSTM", **options):
    torch.manual_seed(0)
    module = getattr(fusedrnn, name)(5, 6, num_layers=3, dtype=torch.float64, device=device, **options)
    return module, torch.randn(4, 2, 5, dtype=torch.float64, device=device, requires_grad=True)


def outcome(module, x, hx):
    """Outputs and gradients of a module."""
    output, states = module(x, hx)
    states = states if isinstance(states, tuple) else (states,)
    outputs = [output, *states]
    total = sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum() for o in outputs)
    sources = [t for t in (x, *(hx or ()), *module.parameters()) if t.requires_grad]
    return [o.detach() for o in outputs], torch.autograd.grad(total, sources), states[0].grad_fn.name()


@pytest.mark.usefixtures("own_ops")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_modules_are_the_same(name, device, monkeypatch):
    for options in ({}, {"bias": False}, {"proj_size": 3} if name == "LSTM" else {"batch_first": True}):
        module, x = modules(device, name, **options)
        hx = None
        if name == "LSTM":
            sizes = (options.get("proj_size", 6), 6)
            hx = tuple(torch.randn(3, 2, s, dtype=x.dtype, device=device, requires_grad=True) for s in sizes)
        first_layer = [parameter for parameter, _ in module.named_parameters() if parameter.endswith("_l0")]
        for frozen in ([], ["weight_ih_l1", "weight_hh_l2"], first_layer):
            for parameter in frozen:
                module.get_parameter(parameter).requires_grad_(False)
            x = x.detach().requires_grad_(frozen != first_layer)
            found = []
            for one_op in (False, True):
                monkeypatch.setattr(stacked, "suits", lambda *_, one_op=one_op: one_op)
                outputs, gradients, node = outcome(module, x, hx)
                assert ("StackedLayers" in node) == one_op
                with torch.no_grad():
                    found.append((*outputs, *gradients, module(x, hx)[0]))
            torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("always_stacked")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_higher_derivatives(name, device):
    module, x = modules(device, name)
    parameters = dict(module.named_parameters())
    weights = [parameters[n].detach().requires_grad_() for n in ("weight_hh_l0", "weight_ih_l1", "bias_hh_l2")]

    def function(x, *weights):
        own = dict(zip(("weight_hh_l0", "weight_ih_l1", "bias_hh_l2"), weights, strict=True))
        y, states = torch.func.functional_call(module, own, (x,))
        return y, *(states if name == "LSTM" else [states])

    assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, *weights), fast_mode=True)


@pytest.mark.usefixtures("own_ops")
def test_transforms_go_through_the_layers():
    class OnGPU:
        is_cuda = True

    seen = []

    def function(x):
        seen.append(stacked.suits(OnGPU(), None, False, False))
        return x.sum()

    x = torch.ones(2)
    function(x)
    torch.func.grad(function)(x)
    torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        function(x)
    assert seen == [True, False, False, False]
    assert not stacked.suits(OnGPU(), None, True, False) and not stacked.suits(OnGPU(), None, False, True)
    sizes = torch.tensor([2])
    assert not stacked.suits(OnGPU(), sizes, False, False) and not stacked.suits(x, None, False, False)
