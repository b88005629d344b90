"""recompute=True: the same results and gradients as without, in less memory."""

import copy
import pickle

import pytest
import torch
from conftest import assert_close_to_reference
from helpers import VARIANTS
from test_memory import bytes_kept, storages
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

import fusedrnn
from fusedrnn import ops, recompute

pytestmark = pytest.mark.usefixtures("one_thread")

T, N, I, H = 11, 4, 5, 7
LENGTHS = torch.tensor([11, 9, 9, 2])
KINDS = ("padded", "batch_first", "packed", "lengths", "one step", "zero state")


def module_of(name, device="cpu", dtype=torch.float64, library=fusedrnn, **options):
    if name == "lstm_proj":
        options["proj_size"] = 3
    if name.startswith("rnn"):
        options["nonlinearity"] = name.removeprefix("rnn_")
    return getattr(library, name.partition("_")[0].upper())(I, H, **options, device=device, dtype=dtype)


def states_of(module, batch=N):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    like = {"device": module.weight_hh_l0.device, "dtype": module.weight_hh_l0.dtype}
    h = torch.randn(rows, batch, module.proj_size or H, **like)
    return (h, torch.randn(rows, batch, H, **like)) if module.mode == "LSTM" else (h,)


def results(module, x, states, kind="padded", upstream_seed=3):
    """Outputs, and the gradients of a fixed function of all of them."""
    x = x.detach().requires_grad_()
    states = [s.detach().requires_grad_() for s in states]
    given, options = x, {}
    if kind == "packed":
        given = pack_padded_sequence(x, LENGTHS)
    elif kind == "lengths":
        options["lengths"] = LENGTHS.flip(0)
    elif kind == "one step":
        given = x[:1]
    hx = None if kind == "zero state" else tuple(states) if len(states) == 2 else states[0]
    y, finals = module(given, hx, **options)
    outputs = [y.data if isinstance(y, PackedSequence) else y, *(finals if isinstance(finals, tuple) else (finals,))]
    generator = torch.Generator().manual_seed(upstream_seed)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in outputs)
    sources = [x, *(states if hx is not None else ()), *module.parameters()]
    return [t.detach() for t in outputs] + list(torch.autograd.grad(loss, sources))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("name", VARIANTS)
def test_same_as_without(name, bidirectional, kind, device):
    options = {"bidirectional": bidirectional, "num_layers": 2, "batch_first": kind == "batch_first"}
    module = module_of(name, device, **options)
    x = torch.randn(*(N, T) if kind == "batch_first" else (T, N), I, dtype=torch.float64, device=device)
    states = states_of(module)
    expected = results(module, x, states, kind)
    module.recompute = True
    for found, value in zip(results(module, x, states, kind), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_dtypes(name, dtype, device):
    """By the rule for every result: no further from float64 than twice torch.nn."""
    ours = module_of(name, device, dtype, bidirectional=True, recompute=True)
    peers = [module_of(name, device, d, nn, bidirectional=True) for d in (dtype, torch.float64)]
    x, states = torch.randn(T, N, I, device=device, dtype=dtype), states_of(ours)
    found = []
    for module in (ours, *peers):
        module.load_state_dict(ours.state_dict())
        like = module.weight_hh_l0
        values = results(module, x.to(like), [s.to(like) for s in states])
        found.append({str(k): v for k, v in enumerate(values)})
    assert_close_to_reference(*found)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["lstm", "lstm_proj", "gru", "rnn_tanh"])
def test_derivatives_of_both_orders(name, packed, device, monkeypatch):
    monkeypatch.setattr(recompute, "_length", lambda *_: 2)
    module = module_of(name, device, bidirectional=True, recompute=True)
    x = torch.randn(4, 2, I, dtype=torch.float64, device=device, requires_grad=True)
    states = [s.requires_grad_() for s in states_of(module, 2)]

    def run(x, *states):
        data = pack_padded_sequence(x, [4, 2]) if packed else x
        y, finals = module(data, tuple(states) if len(states) == 2 else states[0])
        return y.data if packed else y, *(finals if isinstance(finals, tuple) else (finals,))

    assert gradcheck(run, (x, *states))
    assert gradgradcheck(run, (x, *states))


def test_cell_states(device):
    module = module_of("lstm", device, bidirectional=True)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for module.recompute in (False, True):
        *_, cells = module(x, return_cell_states=True)
        found.append([cells, *torch.autograd.grad(cells.square().sum(), [x, *module.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_only_wanted_gradients(device):
    """Frozen parameters get none, the others are right."""
    module = module_of("gru", device)
    module.weight_ih_l0.requires_grad_(False)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device)
    found = []
    for module.recompute in (False, True):
        module.zero_grad()
        module(x)[0].square().sum().backward()
        assert module.weight_ih_l0.grad is None
        found.append(module.weight_hh_l0.grad)
    torch.testing.assert_close(*found)


def test_batched_gradients_and_transforms(device):
    """torch's batched gradients, torch.func and forward mode see the same layer."""
    module = module_of("lstm", device)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device, requires_grad=True)
    upstream = torch.randn(3, T, N, H, dtype=torch.float64, device=device)
    found = []
    for module.recompute in (False, True):
        y, _ = module(x)
        (batched,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True)
        one_by_one = torch.func.vmap(torch.func.grad(lambda x: module(x)[0].square().sum()))(x.detach().unsqueeze(2))
        _, tangent = torch.func.jvp(lambda x: module(x)[0], (x.detach(),), (upstream[0, ..., :I],))
        found.append((batched, one_by_one, tangent))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_backward_twice(device):
    module = module_of("lstm", device, recompute=True)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device, requires_grad=True)
    y, _ = module(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)


# ---- memory --------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that the results of operators hold at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = WeakTensorKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.alive[t] = None
        self.most = max(self.most, sum(storages(self.alive.keys()).values()))
        return result


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_less_memory(name, packed):
    """Kept between the passes, and at the highest in them, at most half."""
    module = module_of(name, dtype=torch.float32, bidirectional=True, num_layers=2)
    x = torch.randn(256, 4, I)
    given = pack_padded_sequence(x, [256, 200, 100, 50]) if packed else x
    kept, most = [], []
    for module.recompute in (False, True):
        kept.append(bytes_kept(module, given))
        with Peak() as peak:
            y, _ = module(given)
            (y.data if packed else y).sum().backward()
        most.append(peak.most)
    if name.startswith("rnn"):  # which keep no gates
        assert kept[1] <= 1.25 * kept[0]
        return
    assert kept[1] < 0.5 * kept[0]
    assert most[1] < 0.8 * most[0]


@pytest.mark.parametrize(
    "steps, batch, width, chunks", [(100, 8, 5, 10), (100, 1, 64, 1), (100, 2, 32, 4), (1, 1, 9, 1)]
)
def test_chunks(steps, batch, width, chunks, monkeypatch):
    """About sqrt(T) steps, but no fewer than have gates as large as the weights."""
    calls = []
    op = ops.forward["lstm"]
    monkeypatch.setitem(ops.forward, "lstm", lambda *arguments: calls.append(arguments[0]) or op(*arguments))
    fusedrnn.LSTM(width, width, recompute=True)(torch.randn(steps, batch, width))
    assert len(calls) == chunks


# ---- the option ----------------------------------------------------------------------------------


def test_option():
    for kind in (fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN):
        with_it, without = kind(I, H, num_layers=2, recompute=True), kind(I, H, num_layers=2)
        assert with_it.recompute is True
        assert without.recompute is False
        assert repr(without) == repr(getattr(nn, kind.__name__)(I, H, num_layers=2))
        assert repr(with_it) == repr(without)[:-1] + ", recompute=True)"
        assert list(with_it.state_dict()) == list(without.state_dict())
        for copied in (copy.deepcopy(with_it), pickle.loads(pickle.dumps(with_it))):
            assert copied.recompute is True
    converted = fusedrnn.convert(nn.LSTM(I, H))
    assert converted.recompute is False
    converted.recompute = True
    assert "recompute=True" in repr(converted)


def test_functional(device):
    for name in ("lstm", "gru", "rnn_relu"):
        module = module_of(name, device)
        x = torch.randn(T, N, I, dtype=torch.float64, device=device, requires_grad=True)
        options = {"nonlinearity": "relu"} if name == "rnn_relu" else {}
        function = getattr(fusedrnn.functional, name.partition("_")[0])
        y, _ = function(x, list(module.parameters()), recompute=True, **options)
        (found,) = torch.autograd.grad(y.sum(), x)
        (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
        torch.testing.assert_close(found, expected)


def test_inference_is_as_ever(device):
    module = module_of("lstm", device, recompute=True)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device)
    with torch.no_grad():
        found, _ = module(x)
    torch.testing.assert_close(found, module(x)[0])
