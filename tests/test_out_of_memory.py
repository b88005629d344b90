"""Where there is no memory: an error that says so, nothing changed, and everything works again afterwards."""

import subprocess
import sys

import pytest
import torch

import fusedrnn
from fusedrnn import modules, ops

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the process' memory as Linux does")

# Calls run here with no more address space than the process has, and as much more as is asked for.
LIMITED = """
import resource
from pathlib import Path
import torch, fusedrnn

torch.set_num_threads(1)
torch.manual_seed(0)


def with_memory(more, call):
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def without_memory(call, more=0):
    fusedrnn.release_memory()
    try:
        with_memory(more, call)
    except RuntimeError as error:
        message = str(error)
    assert "allocate" in message or "out of memory" in message, message  # unbound where nothing was raised


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def refuse(*_):
    raise AssertionError("torch.nn was tried")


fusedrnn.LSTM._torch_forward = fusedrnn.GRU._torch_forward = staticmethod(refuse)
T, N, H = 2000, 16, 64
"""


def run(program):
    done = subprocess.run([sys.executable, "-c", LIMITED + program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("more", [0, 20 << 20])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_module(name, more):
    run(f"""
module = fusedrnn.{name}(H, H, 2)
x, h = torch.randn(T, N, H), torch.randn(2, N, H)
hx = (h, h.clone()) if "{name}" == "LSTM" else h
before = [t.clone() for t in (x, h, *module.parameters())]
expected = module(x, hx)[0]
without_memory(lambda: module(x, hx), {more})
with torch.no_grad():
    without_memory(lambda: module(x, hx), {more} // 2)
same((x, h, *module.parameters()), before)
same([module(x, hx)[0]], [expected])
""")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("more", [0, 1 << 20])
def test_backward(more, recompute):
    run(f"""
module = fusedrnn.LSTM(H, H, recompute={recompute})
x = torch.randn(T, N, H, requires_grad=True)
leaves = [x, *module.parameters()]
y, _ = module(x)
dy = torch.ones_like(y)
expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
without_memory(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), {more})
without_memory(lambda: y.backward(dy, retain_graph=True), {more})
assert all(t.grad is None for t in leaves)
same(torch.autograd.grad(y, leaves, dy), expected)
""")


@pytest.mark.parametrize("half", [False, True])
def test_stream(half):
    run(f"""
dtype = torch.float16 if {half} else torch.float32
stream = fusedrnn.Stream(fusedrnn.LSTM(H, H, 2, dtype=dtype), N)
x = torch.randn(T, N, H, dtype=dtype)
stream(x)
states = stream.state
expected = stream(x).clone()
stream.state = states
longer = torch.cat((x, x))
without_memory(lambda: stream(longer))
same(stream.state, states)
assert torch.equal(stream(x), expected)
""")


@pytest.mark.parametrize(
    ("layers", "inputs", "hidden", "more"), [(1, 256, 64, 0), (2, 1, 64, 0), (2, 1, 1024, 25 << 20)]
)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_advance_op(name, layers, inputs, hidden, more):
    """In the last case there is enough for the first layer, whose input has one feature, but not for the second."""
    run(f"""
op, gates = getattr(torch.ops.fusedrnn, "{name}_advance").default, {ops.GATES[name]}
layers, I, H, more = {layers}, {inputs}, {hidden}, {more}
T, N = (32, 1) if more else (T, N)
x, y = torch.randn(T, N, I), torch.full((T, N, H), 7.0)
weights = [torch.randn(gates * H, k) for width in [I, H][:layers] for k in (width, H)]
h = torch.randn(layers, N, H)
c = h.clone() if "{name}" == "lstm" else None
before = [t.clone() for t in (x, h, y, *weights)]
if more:
    with_memory(more, lambda: op(x, h[:1].clone(), c if c is None else c[:1].clone(), weights[:2], None, 1, y.clone()))
without_memory(lambda: op(x, h, c, weights, None, layers, y), more)
same((x, h, y, *weights), before)
assert c is None or torch.equal(c, before[1])
""")


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="there results are of torch's own memory")
def test_kept_memory_makes_room():
    """What ops keep for later ones is given up before one fails."""
    run("""
module = fusedrnn.GRU(H, H).requires_grad_(False)
x = torch.randn(2 * T, N, H)
module(x)
x = torch.randn(2 * T + T // 4, N, H)  # its results fit nowhere
with_memory(8 << 20, lambda: module(x))
without_memory(lambda: module(x), 8 << 20)
""")


# ---- on a GPU ------------------------------------------------------------------------------------

NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


def fails(*_):
    raise RuntimeError(NO_MEMORY)


def test_torch_raises_the_type(monkeypatch):
    """An op raises RuntimeErrors alone; modules and gradients, torch's own."""
    module, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    monkeypatch.setattr(modules._NN_LSTM, "forward", None)
    y, _ = module(x)
    recomputed, _ = fusedrnn.LSTM(3, 4, recompute=True)(x)
    monkeypatch.setitem(ops.forward, "lstm", fails)
    monkeypatch.setitem(ops.backward, "lstm", fails)
    for call in (lambda: module(x), y.sum().backward, recomputed.sum().backward):
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\."):
            call()
