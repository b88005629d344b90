"""Memory: inference keeps nothing, training keeps no more than torch.nn, and nothing is ever lost."""

import gc
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import VARIANTS, layer_backward_op, layer_op, make_gradients, make_inputs, needs_of, variant
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn

KINDS = [("LSTM", {}), ("LSTM", {"proj_size": 20}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")


def storages(tensors):
    """Each storage once: address -> bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def bytes_kept(module, x):
    """What autograd keeps of one call, without what is there anyway: input, weights and outputs."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, h = module(x)
    there = storages([x.data, y.data, *(h if isinstance(h, tuple) else (h,)), *module.parameters()])
    return sum(n for address, n in storages(kept).items() if address not in there)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", KINDS)
def test_training_keeps_no_more_than_torch_nn(name, options, dtype, packed):
    for shape in ({}, {"num_layers": 2, "bidirectional": True}):
        sizes = []
        for library in (fusedrnn, nn):
            module = getattr(library, name)(24, 40, dtype=dtype, **shape, **options)
            x = torch.randn(30, 16, 24, dtype=dtype)
            sizes.append(bytes_kept(module, pack_sequence(list(x)) if packed else x))
        assert sizes[0] <= sizes[1], f"{shape}: {sizes[0] / sizes[1]:.2f} of torch.nn's"


class Calls(TorchDispatchMode):
    """Notes the arguments and results of our ops."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fusedrnn":
            self.seen.append((func, args, result))
        return result


@pytest.mark.parametrize("name, options", KINDS)
def test_inference_saves_nothing(name, options):
    module = getattr(fusedrnn, name)(24, 40, num_layers=2, bidirectional=True, **options)
    x = torch.randn(5, 3, 24)
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    for context in contexts.values():
        with context(), Calls() as calls:
            module(x)
        assert len(calls.seen) == 2
        for _, args, result in calls.seen:
            assert args[-1] is False
            assert all(t.numel() == 0 for t in result[3:])
    frozen = module.requires_grad_(False)
    with Calls() as calls:
        frozen(x)
    assert all(args[-1] is False for _, args, _ in calls.seen), "nothing needs a gradient"


@pytest.mark.parametrize("name, options", KINDS)
def test_only_wanted_gradients_are_computed(name, options):
    """Frozen weights and an input without gradient cost the backward op nothing: `needs` says so."""
    module = getattr(fusedrnn, name)(24, 40, **options)
    for n, p in module.named_parameters():
        p.requires_grad_(n == "weight_hh_l0")
    y, _ = module(torch.randn(5, 3, 24))
    with Calls() as calls:
        y.sum().backward()
    ((func, args, result),) = calls.seen
    assert func._schema.name.endswith("_backward")
    assert args[-1] == 8 << 1
    dx, dh0, dc0, dweights = result
    assert [t.numel() > 0 for t in (dx, dh0, dc0, *dweights)] == [i == 4 for i in range(3 + len(dweights))]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(call, repeat) -> int:
    """Bytes that `repeat` calls leave behind, after as many to warm up; the least of a few tries."""
    least = None
    for _ in range(3):
        for _ in range(repeat):
            call()
        gc.collect()
        before = resident()
        for _ in range(repeat):
            call()
        gc.collect()
        grown = resident() - before
        least = grown if least is None else min(least, grown)
        if least < 1 << 20:
            break
    return least


def train(module, x):
    """All results and gradients of a call."""
    y, (h_n, c_n) = module(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    return y.detach(), h_n.detach(), c_n.detach(), *grads


@pytest.mark.usefixtures("one_thread")
def test_large_results_take_the_place_of_earlier_ones(device):
    """And never that of one that somebody still has; torch.nn's results are of memory of their own."""
    make = lambda library: library.LSTM(256, 256, device=device)  # noqa: E731
    module, inputs = make(fusedrnn), [torch.randn(70, 64, 256, device=device, requires_grad=True) for _ in range(3)]
    expected = make(nn)
    expected.load_state_dict(module.state_dict())
    with ThreadPoolExecutor(3) as threads:  # each gives back what another may take
        for _ in range(2):
            found = list(threads.map(lambda x: train(module, x), inputs))
    for x, results in zip(inputs, found, strict=True):
        for ours, theirs in zip(results, train(expected, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    y = found[0][0]
    assert torch.equal(pickle.loads(pickle.dumps(y)), y)
    assert torch.equal(y.clone().share_memory_(), y) and y.numpy(force=True)[0, 0, 0] == y[0, 0, 0]


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch makes no tensor of our memory")
def test_memory_is_released():
    """What results had, once they are gone; no more than once."""
    fusedrnn.release_memory()
    y, _ = fusedrnn.LSTM(8, 64)(torch.randn(400, 16, 8))
    size = y.untyped_storage().nbytes()
    assert fusedrnn.release_memory() < size, "y is still there"
    del y, _
    assert fusedrnn.release_memory() > 6 * size, "of y, c and the gates"
    assert fusedrnn.release_memory() == 0


@linux
@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch makes no tensor of our memory")
@pytest.mark.parametrize("N, T, H", [(8, 64, 256), (16, 128, 256)])
def test_steady_training_takes_no_fresh_memory(N, T, H):
    """Of results of a few hundred KB or MB, malloc gives some back to the system at every step, as it happens."""
    program = f"""
import resource, torch, fusedrnn
torch.set_num_threads(1)
modules, x = [fusedrnn.LSTM({H}, {H}), fusedrnn.GRU({H}, {H})], torch.randn({T}, {N}, {H}, requires_grad=True)
for module in modules:
    for step in range(15):
        if step == 5:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        module(x)[0].sum().backward()
        module.zero_grad()
        x.grad = None
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 200, f"{{faults}} in 10 steps"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@linux
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_ops_leak_nothing(name, packed):
    """Each call makes more than 100 KB; of a hundred, 1 MB may stay for the allocator's sake."""
    lengths = tuple(sorted((1 + n * 7 % 20 for n in range(16)), reverse=True)) if packed else None
    for dtype in (torch.float32, torch.bfloat16):
        case = variant(name, T=20, N=16, I=32, H=64, directions=2, lengths=lengths, dtype=dtype)
        inputs, gradients = make_inputs(case), make_gradients(case)
        op, backward = layer_op(case.cell), layer_backward_op(case.cell)

        def call(case=case, inputs=inputs, gradients=gradients, op=op, backward=backward):
            op(*inputs.arguments(), False)
            y, _, _, gates, cells = op(*inputs.arguments(), True)
            backward(*gradients, *inputs.arguments(), y, gates, cells, needs_of(inputs))

        assert growth(call, 100) < 1 << 20


@linux
def test_refused_calls_leak_nothing():
    case = variant("lstm", T=20, N=16, I=32, H=64)
    inputs = make_inputs(case)
    good = inputs.arguments()
    bad = [
        (*good[:1], good[1][:, :3].clone(), *good[2:]),
        (*good[:3], good[3][:-1], *good[4:]),
        (*good[:4], torch.tensor([16] * 19 + [17]), 1),
        (good[0].clone().half(), *good[1:]),
    ]

    def call():
        for arguments in bad:
            with pytest.raises(RuntimeError):
                layer_op("lstm")(arguments[0].clone(), *arguments[1:], True)

    assert growth(call, 200) < 1 << 20


@linux
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name, options", KINDS)
def test_modules_leak_nothing(name, options):
    """Training steps, double backward, graphs thrown away unused; memory and objects."""
    module = getattr(fusedrnn, name)(32, 64, 2, **options)
    x = torch.randn(20, 16, 32, requires_grad=True)

    def train():
        torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
        module(x)

    def penalise():
        y, _ = module(x[:3])
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        module.zero_grad()
        x.grad = None

    assert growth(train, 50) < 1 << 20
    assert growth(penalise, 10) < 1 << 20
    penalise()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(20):
        train()
        penalise()
    gc.collect()
    assert len(gc.get_objects()) <= before + 20


class Kept:
    """Stands for a saved tensor."""

    def __init__(self, t):
        self.t = t.detach()  # with its graph it would be a cycle


@pytest.mark.parametrize("name, options", KINDS)
def test_a_graph_is_freed_without_the_garbage_collector(name, options):
    """No reference cycle: saved tensors go with the last reference to the outputs."""
    module = getattr(fusedrnn, name)(8, 40, **options)
    alive = weakref.WeakSet()

    def keep(t):
        kept = Kept(t)
        alive.add(kept)
        return kept

    gc.collect()
    gc.disable()
    try:
        with saved_tensors_hooks(keep, lambda kept: kept.t):
            outputs = module(torch.randn(5, 3, 8))
        assert len(alive) > 0
        del outputs
        assert len(alive) == 0
    finally:
        gc.enable()
