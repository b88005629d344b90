"""fusedrnn's modules against torch.nn's: results, gradients, strides and types, over all options and inputs."""

import copy
import itertools

import pytest
import torch
from conftest import assert_close_to_reference
from helpers import DTYPES
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
]
INPUT, HIDDEN, T, N = 4, 6, 5, 3
INPUTS = ["padded", "unbatched", "packed", "packed_unsorted", "packed_equal"]


def make_pair(name, **options):
    """Ours and torch.nn's, made from the same seed."""
    made = []
    for library in (fusedrnn, nn):
        torch.manual_seed(3)
        made.append(getattr(library, name)(INPUT, HIDDEN, **options))
    return made


def make_input(kind, batch_first, dtype=torch.float32):
    if kind == "unbatched":
        return torch.randn(T, INPUT, dtype=dtype)
    if kind == "padded":
        return torch.randn(*((N, T) if batch_first else (T, N)), INPUT, dtype=dtype)
    lengths = {"packed": (5, 3, 1), "packed_unsorted": (2, 5, 4), "packed_equal": (4, 4, 4)}[kind]
    sequences = [torch.randn(length, INPUT, dtype=dtype) for length in lengths]
    return pack_sequence(sequences, enforce_sorted=kind != "packed_unsorted")


def make_states(module, kind, how, dtype=torch.float32):
    """None, given, or given with odd strides."""
    if how == "none":
        return None
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size]
    sizes += [module.hidden_size] if module.mode == "LSTM" else []
    states = []
    for size in sizes:
        state = torch.randn(rows, N, size, dtype=dtype)
        if how == "expanded":
            state = state[:, :1].expand(rows, N, size)
        elif how == "strided":
            state = torch.randn(size, N, rows, dtype=dtype).permute(2, 1, 0)
        states.append(state[:, 0] if kind == "unbatched" else state)
    return tuple(states) if module.mode == "LSTM" else states[0]


def cast(value, dtype, leaves):
    """A copy of an input or state as differentiable leaves, which are put in `leaves`."""
    if value is None:
        return None
    if isinstance(value, PackedSequence):
        return PackedSequence(cast(value.data, dtype, leaves), *value[1:])
    if isinstance(value, tuple):
        return tuple(cast(v, dtype, leaves) for v in value)
    leaves.append(value.detach().to(dtype).requires_grad_())
    return leaves[-1]


def run(module, input, hx, dtype, seed=5):
    """Outputs and all gradients by name, and the raw output."""
    leaves = []
    input, hx = cast(input, dtype, leaves), cast(hx, dtype, leaves)
    module.zero_grad()
    torch.manual_seed(seed)
    output = module(input) if hx is None else module(input, hx)
    y, h = output
    tensors = [y.data if isinstance(y, PackedSequence) else y, *(h if isinstance(h, tuple) else (h,))]
    torch.manual_seed(seed + 1)
    upstream = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in tensors]
    torch.autograd.backward(tensors, upstream)
    found = dict(zip(("y", "h_n", "c_n"), (t.detach() for t in tensors), strict=False))
    found |= {f"d{i}": leaf.grad for i, leaf in enumerate(leaves)}
    return found | {f"d {n}": p.grad for n, p in module.named_parameters()}, output


def layout(value):
    """Type, shape, strides, dtype and flags of an output, however nested."""
    if isinstance(value, torch.Tensor):
        view = value._is_view()
        return value.shape, value.stride(), value.dtype, value.requires_grad, value.is_leaf, view
    return type(value), [layout(v) if v is not None else None for v in value]


def check(pair, input, hx, what=""):
    ours, theirs = pair
    found, output = run(ours, input, hx, input.data.dtype)
    nn_found, nn_output = run(theirs, input, hx, input.data.dtype)
    expected, _ = run(copy.deepcopy(theirs).double(), input, hx, torch.float64)
    assert_close_to_reference(found, nn_found, expected, what=what)
    assert layout(output)[0] == layout(nn_output)[0]
    for mine, other in zip(*(layout(o)[1] for o in (output, nn_output)), strict=True):
        assert mine[:-1] == other[:-1], what  # but for being a view: how torch.nn's h_n came about is its own
    for mine, other in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert mine[0] == other[0] and torch.equal(mine[1], other[1]), what


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "bidirectional"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name, options", KINDS)
def test_all_options(name, options, kind, num_layers, bidirectional):
    for bias, batch_first in itertools.product((True, False), repeat=2):
        shape = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
        pair = make_pair(name, **shape, **options)
        for how in ("none", "given", "expanded", "strided"):
            hx = make_states(pair[1], kind, how)
            check(pair, make_input(kind, batch_first), hx, what=f"{shape} states {how}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, options", KINDS)
def test_dtypes(name, options, dtype):
    if "nonlinearity" in options and dtype.itemsize == 2:
        pytest.skip("rounding chooses the side of a ReLU's kink; test_ops allows for that")
    pair = make_pair(name, num_layers=2, bidirectional=True, dtype=dtype, **options)
    for kind in INPUTS:
        check(pair, make_input(kind, False, dtype), make_states(pair[1], kind, "given", dtype), what=kind)
        check(pair, make_input(kind, False, dtype), None, what=kind)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name, options", KINDS)
def test_dropout_masks_are_torch_nns(name, options, kind):
    """In float64 the results agree to the last digits only if every mask is the same."""
    for p, bidirectional, batch_first in itertools.product((0.3, 1.0), (False, True), (False, True)):
        shape = {"num_layers": 3, "dropout": p, "bidirectional": bidirectional, "batch_first": batch_first}
        ours, theirs = make_pair(name, dtype=torch.float64, **shape, **options)
        input = make_input(kind, batch_first, torch.float64)
        found, _ = run(ours, input, None, torch.float64)
        ours(input)
        after = torch.rand(1)
        expected, _ = run(theirs, input, None, torch.float64)
        theirs(input)
        assert torch.equal(torch.rand(1), after), "the generator has moved on as far"
        assert_close_to_reference(found, None, expected, what=f"{shape} training")
        (found, _), (expected, _) = (run(m.eval(), input, None, torch.float64) for m in (ours, theirs))
        assert_close_to_reference(found, None, expected, what=f"{shape} eval")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", KINDS)
def test_dropout_masks_in_other_dtypes(name, options, dtype):
    """Two layers whose dropped elements show in the second layer's input gradient."""
    pair = make_pair(name, num_layers=2, dropout=0.5, dtype=dtype, **options)
    zeros = []
    for module in pair:
        seen = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t):
            module(make_input("padded", False, dtype))
        width = options.get("proj_size", HIDDEN)
        masks = [t for t in seen if t.shape == (T, N, width) and set(t.unique().tolist()) <= {0.0, 1.0, 2.0}]
        zeros.append([(m == 0) for m in masks])
    assert len(zeros[0]) >= 1 and len(zeros[1]) >= 1
    assert torch.equal(zeros[0][0], zeros[1][0])


@pytest.mark.parametrize("name, options", KINDS)
def test_odd_inputs(name, options):
    """Expanded, strided, sliced, transposed inputs, and an input that needs no gradient."""
    pair = make_pair(name, num_layers=2, **options)
    wide = torch.randn(T, N, 2 * INPUT)
    for x in (
        torch.randn(T, 1, INPUT).expand(T, N, INPUT),
        torch.randn(1, N, INPUT).expand(T, N, INPUT),
        torch.randn(1).expand(T, N, INPUT),
        wide[..., ::2],
        wide[..., 1 : INPUT + 1],
        torch.randn(INPUT, N, T).permute(2, 1, 0),
        torch.randn(T * 2, N, INPUT)[::2],
    ):
        outputs = [module(x) for module in pair]
        for a, b in zip(*(flatten(o) for o in outputs), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


def flatten(output):
    y, h = output
    return [y.data, *(h if isinstance(h, tuple) else (h,))]


@pytest.mark.parametrize("name, options", KINDS)
def test_empty_batch(name, options):
    for bidirectional, batch_first in itertools.product((False, True), repeat=2):
        shape = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": batch_first}
        pair = make_pair(name, **shape, **options)
        x = torch.randn(*((0, T) if batch_first else (T, 0)), INPUT)
        found = []
        for module in pair:
            leaf = x.detach().requires_grad_()
            outputs = flatten(module(leaf))
            sum(t.sum() for t in outputs).backward()
            grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            found.append(([t.shape for t in outputs], leaf.grad.shape, grads))
        assert found[0][:2] == found[1][:2]
        assert all(not g.any() for g in found[0][2])


@pytest.mark.parametrize("name, options", KINDS)
def test_trains_as_torch_nn(name, options):
    """Twenty steps of Adam from the same weights follow the same losses."""
    losses = []
    for module in make_pair(name, num_layers=2, dtype=torch.float64, **options):
        torch.manual_seed(0)
        x, target = torch.randn(T, N, INPUT, dtype=torch.float64), torch.randn(T, N, 1, dtype=torch.float64)
        head = nn.Linear(options.get("proj_size", HIDDEN), 1, dtype=torch.float64)
        optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.02)
        history = []
        for _ in range(20):
            loss = nn.functional.mse_loss(head(module(x)[0]), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < 0.7 * losses[0][0]


# ---- cells ---------------------------------------------------------------------------------------

CELL_KINDS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]


def run_cell(cell, x, hx, dtype):
    leaves = []
    x, hx = cast(x, dtype, leaves), cast(hx, dtype, leaves)
    cell.zero_grad()
    output = cell(x) if hx is None else cell(x, hx)
    tensors = output if isinstance(output, tuple) else (output,)
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in tensors]
    torch.autograd.backward(tensors, upstream)
    found = {f"h{i}": t.detach() for i, t in enumerate(tensors)} | {f"d{i}": leaf.grad for i, leaf in enumerate(leaves)}
    return found | {f"d {n}": p.grad for n, p in cell.named_parameters()}, output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, options", CELL_KINDS)
def test_cells(name, options, dtype):
    for bias, batch, given in itertools.product((True, False), (None, 0, 1, 3), (True, False)):
        pair = make_pair(name, bias=bias, dtype=dtype, **options)
        lead = () if batch is None else (batch,)
        x = torch.randn(*lead, INPUT, dtype=dtype)
        states = tuple(torch.randn(*lead, HIDDEN, dtype=dtype) for _ in range(2 if name == "LSTMCell" else 1))
        hx = None if not given else states if name == "LSTMCell" else states[0]
        found, output = run_cell(pair[0], x, hx, dtype)
        nn_found, nn_output = run_cell(pair[1], x, hx, dtype)
        expected, _ = run_cell(copy.deepcopy(pair[1]).double(), x, hx, torch.float64)
        assert_close_to_reference(found, nn_found, expected, what=f"bias {bias} batch {batch} states {given}")
        outputs = [o if isinstance(o, tuple) else (o,) for o in (output, nn_output)]
        for mine, other in zip(*outputs, strict=True):
            assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("name, options", CELL_KINDS)
def test_cell_with_one_bias(name, options, missing):
    """Each bias is optional by itself."""
    x, state = torch.randn(3, INPUT), torch.randn(3, HIDDEN)
    for given in (None, (state, state) if name == "LSTMCell" else state):
        found = []
        for cell in make_pair(name, dtype=torch.float64, **options):
            setattr(cell, missing, None)
            found.append(run_cell(cell, x, given, torch.float64)[0])
        assert found[0].keys() == found[1].keys()
        for key in found[0]:
            torch.testing.assert_close(found[0][key], found[1][key])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name, options", CELL_KINDS)
def test_cell_states_can_be_detached_in_place(name, options, grad):
    cell = make_pair(name, **options)[0]
    state = None
    for _ in range(3):
        with torch.set_grad_enabled(grad):
            state = cell(torch.randn(3, INPUT), state)
        for s in state if isinstance(state, tuple) else (state,):
            assert s.detach_().grad_fn is None
            s *= torch.ones(HIDDEN, requires_grad=True)


class Tagged(torch.Tensor):
    """A subclass, as libraries for images and points have them."""


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("tagged", ["input", "state"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_tensor_subclasses(name, tagged, grad):
    x, state = (torch.randn(N, n) for n in (INPUT, HIDDEN))
    if not name.endswith("Cell"):
        x, state = x.expand(T, N, INPUT), state[None]
    if tagged == "input":
        x = x.as_subclass(Tagged)
    else:
        state = state.as_subclass(Tagged)
    results = []
    for module in make_pair(name):
        with torch.set_grad_enabled(grad):
            found, *_ = module(x, (state, state) if name.startswith("LSTM") else state)
        found = found[0] if isinstance(found, tuple) else found
        if grad:
            found.sum().backward()
        results.append((found, [p.grad for p in module.parameters()]))
    (ours, gradients), (theirs, expected) = results
    assert type(ours) is type(theirs)
    torch.testing.assert_close((ours, gradients), (theirs, expected))


@pytest.mark.parametrize("name, options", CELL_KINDS)
def test_unrolled_cell(name, options):
    """A loop over time, gradients through all of it, and the second derivative."""
    found = []
    for cell in make_pair(name, dtype=torch.float64, **options):
        torch.manual_seed(0)
        x = torch.randn(T, N, INPUT, dtype=torch.float64, requires_grad=True)
        state, outputs = None, []
        for t in range(T):
            state = cell(x[t], state)
            outputs.append(state[0] if name == "LSTMCell" else state)
        loss = torch.stack(outputs).square().sum()
        first = torch.autograd.grad(loss, [x, *cell.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *cell.parameters()])
        found.append(dict(enumerate([loss.detach(), *(g.detach() for g in first), *second])))
    assert_close_to_reference(found[0], None, found[1])
