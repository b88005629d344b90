"""Every c_t of an LSTM as a result, with gradients."""

import pytest
import torch
from conftest import assert_close_to_reference
from helpers import (
    DTYPES,
    backward_ours,
    differentiate,
    in_float64,
    make_gradients,
    make_inputs,
    ragged_lengths,
    variant,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"directions": 2}, {"lengths": ragged_lengths(7, 9), "directions": 2}, {}], ids=str
)
@pytest.mark.parametrize("name", ["lstm", "lstm_proj"])
def test_backward_op(name, options, dtype, device, capability):
    """The gradients of all results and every c at once; torch's part is played by the eager loops at the same dtype."""
    case = variant(name, T=7, N=3, I=5, H=19, dtype=dtype, **options)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    gradients[3] = torch.randn(case.rows, case.directions, case.H, dtype=state, device=device)
    for upstream in (gradients, [None, None, None, gradients[3]]):
        found = backward_ours(case, inputs, upstream)
        eager = differentiate(lambda same: reference.lstm(*same.arguments()), inputs, upstream)
        expected = in_float64(case, inputs, upstream)
        assert_close_to_reference(found, *({name: results[name] for name in found} for results in (eager, expected)))


T, N, I, H = 6, 3, 4, 5
LENGTHS = torch.tensor([6, 4, 1])


def step_by_step(module, x, hx):
    """A one-directional torch.nn.LSTM's output, states and the last layer's c after each step."""
    outputs, every_c = [], []
    for t in range(x.shape[0]):
        y, hx = module(x[t : t + 1], hx)
        outputs.append(y)
        every_c.append(hx[1][-1])
    return torch.cat(outputs), hx, torch.stack(every_c)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_against_steps(num_layers, proj_size, device):
    options = {"num_layers": num_layers, "proj_size": proj_size, "device": device, "dtype": torch.float64}
    module, theirs = fusedrnn.LSTM(I, H, **options), torch.nn.LSTM(I, H, **options)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(T, N, I, dtype=torch.float64, device=device)
    hx = [torch.randn(num_layers, N, F, dtype=torch.float64, device=device) for F in (proj_size or H, H)]
    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in hx)]
    results = []
    for run, m in (
        (lambda: module(x, tuple(hx), return_cell_states=True), module),
        (lambda: step_by_step(theirs, x, tuple(hx)), theirs),
    ):
        y, (h_n, c_n), cells = run()
        assert torch.equal(cells[-1], c_n[-1])
        weight = torch.linspace(-1, 1, cells.numel(), dtype=torch.float64, device=device).view_as(cells)
        loss = (cells * weight).sum() + y.square().sum() + (h_n * c_n.sum()).sum()
        results.append([y, h_n, c_n, cells, *torch.autograd.grad(loss, [*leaves, *m.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("kind", ["padded", "batch_first", "unbatched", "packed", "lengths", "reset", "nested"])
def test_every_kind_of_input(kind, bidirectional, device):
    """As shaped as the output, and with gradients; where a sequence ends it is c_n."""
    module = fusedrnn.LSTM(I, H, bidirectional=bidirectional, batch_first=kind == "batch_first", device=device)
    x, options = torch.randn(T, N, I, device=device, requires_grad=True), {}
    given = x
    if kind == "unbatched":
        given = x[:, 0]
    elif kind == "batch_first":
        given = x.transpose(0, 1)
    elif kind == "packed":
        given = pack_padded_sequence(x, LENGTHS)
    elif kind == "nested":
        given = torch.nested.nested_tensor_from_jagged(x[:, 0], torch.tensor([0, 2, T], device=device))
    elif kind == "lengths":
        options["lengths"] = LENGTHS
    elif kind == "reset":
        options["reset"] = torch.arange(T)[:, None] == torch.tensor([1, 2, 7])
    y, (_, c_n), cells = module(given, **options, return_cell_states=True)
    assert type(cells) is type(y)
    if kind == "packed":
        assert torch.equal(cells.batch_sizes, y.batch_sizes)
        y, cells = (torch.nn.utils.rnn.pad_packed_sequence(t)[0] for t in (y, cells))
    elif kind == "nested":
        y, cells = y.values(), cells.values()
    assert cells.shape == y.shape
    if kind == "batch_first":
        cells = cells.transpose(0, 1)
    last = LENGTHS.to(device) - 1 if kind in ("packed", "lengths") else torch.full((N,), T - 1, device=device)
    if kind == "unbatched":
        assert torch.equal(cells[-1, :H], c_n[0])
    elif kind != "nested":
        assert torch.equal(cells[last, range(N)][:, :H], c_n[0])
    (gradient,) = torch.autograd.grad(cells.square().sum(), x)
    assert gradient.any()


def test_without_gradients(device):
    """The same numbers; on the way there nothing is differentiable."""
    module, x = fusedrnn.LSTM(I, H, num_layers=2, device=device), torch.randn(T, N, I, device=device)
    *_, expected = module(x, return_cell_states=True)
    with torch.no_grad():
        *_, found = module(x, return_cell_states=True)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_that_of_the_states(dtype, device):
    module = fusedrnn.LSTM(I, H, device=device, dtype=dtype)
    x = torch.randn(T, N, I, device=device, dtype=dtype)
    _, (_, c_n), cells = module(x, return_cell_states=True)
    assert cells.dtype == dtype
    assert torch.equal(cells[-1], c_n[0])
    cells.sum().backward()
    assert module.weight_hh_l0.grad.any()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 2}], ids=str)
def test_derivatives_of_both_orders(options, device):
    module = fusedrnn.LSTM(2, 3, **options, device=device, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def run(x, *_):
        y, finals, cells = module(x, return_cell_states=True)
        return y, *finals, cells

    assert gradcheck(run, (x, *module.parameters()))
    assert gradgradcheck(run, (x, *module.parameters()))
    assert gradgradcheck(lambda *a: run(*a)[-1], (x, *module.parameters()))


def test_only_an_lstm_has_them(device):
    with pytest.raises(TypeError, match="return_cell_states"):
        fusedrnn.GRU(I, H, device=device)(torch.randn(T, N, I, device=device), return_cell_states=True)


def test_functional(device):
    module, x = fusedrnn.LSTM(I, H, device=device), torch.randn(T, N, I, device=device)
    *_, found = fusedrnn.functional.lstm(x, list(module.parameters()), return_cell_states=True)
    assert torch.equal(found, module(x, return_cell_states=True)[2])
