"""Derivatives through autograd, in float64: first order from the kernels, higher orders, and what autograd promises."""

import itertools

import pytest
import torch
from conftest import assert_close_to_reference, relative_error
from helpers import CELLS, VARIANTS, in_float64, make_gradients, make_inputs, variant
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn import functional

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (4, 2, 1)
KINDS = {
    "padded": {},
    "bidirectional": {"directions": 2},
    "nobias": {"bias": False},
    "packed": {"lengths": LENGTHS},
    "packed_bidirectional": {"lengths": LENGTHS, "directions": 2},
    "zerostate": {"states": False},
}


def small_case(name, kind):
    return variant(name, **{"T": 3, "N": 2, "I": 2, "H": 3, "dtype": torch.float64, **KINDS[kind]})


def as_function(case, inputs):
    """(differentiable tensors) -> (outputs), through the public functional interface; and the tensors."""
    states = [t for t in (inputs.h0, inputs.c0) if t is not None]

    def run(x, *rest):
        hx = rest[: len(states)] or None
        weights = rest[len(states) :]
        data = x if case.lengths is None else PackedSequence(x, inputs.batch_sizes)
        options = {"bidirectional": case.directions == 2}
        if case.cell == "lstm":
            y, (h_n, c_n) = functional.lstm(data, weights, hx, **options)
            finals = (h_n, c_n)
        elif case.cell == "gru":
            y, h_n = functional.gru(data, weights, hx and hx[0], **options)
            finals = (h_n,)
        else:
            nonlinearity = case.cell.removeprefix("rnn_")
            y, h_n = functional.rnn(data, weights, hx and hx[0], nonlinearity=nonlinearity, **options)
            finals = (h_n,)
        return (y if case.lengths is None else y.data, *finals)

    return run, [t.requires_grad_() for t in (inputs.x, *states, *inputs.weights)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(name, kind, device):
    case = small_case(name, kind)
    run, tensors = as_function(case, make_inputs(case, device))
    assert gradcheck(run, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradgradcheck(name, kind, device):
    case = small_case(name, kind)
    run, tensors = as_function(case, make_inputs(case, device))
    assert gradgradcheck(run, tensors, fast_mode=kind != "padded")


MODULES = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2}),
    ("GRU", {}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
]


def make_modules(name, seed=0, **options):
    """Ours and torch.nn's, with the same weights."""
    torch.manual_seed(seed)
    theirs = getattr(nn, name)(**options)
    ours = getattr(fusedrnn, name)(**options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def flat(outputs):
    """The tensors of (y, h_n) or (y, (h_n, c_n))."""
    y, h = outputs
    return [y, *h] if isinstance(h, tuple) else [y, h]


@pytest.mark.parametrize("name, options", MODULES)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=lambda f: f.__name__)
def test_two_layers_both_ways(check, name, options, device):
    options = {"input_size": 2, "hidden_size": 3, "num_layers": 2, "bidirectional": True, **options}
    module, _ = make_modules(name, dtype=torch.float64, device=device, **options)
    names = [n for n, _ in module.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def run(x, *weights):
        return flat(torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x))

    assert check(run, (x, *(p.detach().requires_grad_() for p in module.parameters())), fast_mode=True)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=lambda f: f.__name__)
def test_cells(check, name, device):
    cell = getattr(fusedrnn, name)(2, 3, dtype=torch.float64, device=device)
    names = [n for n, _ in cell.named_parameters()]
    shapes = [(2, 2), (2, 3), (2, 3)]
    x, *states = (torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes)

    def run(x, h, c, *weights):
        hx = (h, c) if name == "LSTMCell" else h
        return torch.func.functional_call(cell, dict(zip(names, weights, strict=True)), (x, hx))

    tensors = (x, *states, *(p.detach().requires_grad_() for p in cell.parameters()))
    if name != "LSTMCell":
        tensors[2].requires_grad_(False)
    assert check(run, tensors)


def test_second_order_without_input_features(device):
    """torch.nn's cells allow an input size of 0."""
    cell = fusedrnn.GRUCell(0, 3, dtype=torch.float64, device=device)
    x = torch.zeros(2, 0, dtype=torch.float64, device=device)
    h = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradgradcheck(lambda h: cell(x, h), (h,))


# ---- some gradients, sometimes ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bidirectional", "packed_bidirectional"])
@pytest.mark.parametrize("name", VARIANTS)
def test_frozen_subsets(name, kind, device):
    """Every single tensor alone, and all but it: the same gradients as when everything is wanted."""
    case = small_case(name, kind)
    inputs, upstream = make_inputs(case, device), make_gradients(case, device)
    expected = in_float64(case, inputs, upstream)
    run, tensors = as_function(case, inputs)
    keys = list(inputs.named())
    for i, alone in itertools.product(range(len(tensors)), (True, False)):
        wanted = [(j == i) == alone for j in range(len(tensors))]
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        torch.autograd.backward(run(*leaves), upstream[: 3 if case.cell == "lstm" else 2])
        assert [t.grad is not None for t in leaves] == wanted
        found = {k: t.grad for k, t in zip(keys, leaves, strict=True) if t.grad is not None}
        assert_close_to_reference(found, None, {k: expected[k] for k in found})


@pytest.mark.parametrize("name, options", MODULES)
def test_outputs_require_grad_as_with_torch(name, options, device):
    for freeze, x_needs in itertools.product((True, False), repeat=2):
        modules = make_modules(name, input_size=3, hidden_size=4, device=device, **options)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            flags = []
            for module in modules:
                module.requires_grad_(not freeze)
                x = torch.randn(5, 2, 3, device=device, requires_grad=x_needs)
                with context():
                    outputs = flat(module(x))
                flags.append([(t.requires_grad, t.is_leaf, t.is_inference()) for t in outputs])
            assert flags[0] == flags[1], f"{context.__name__} freeze {freeze} x {x_needs}"


@pytest.mark.parametrize("name, options", MODULES)
def test_eval_mode_backward(name, options, device):
    """What cuDNN refuses: gradients of a module in eval mode, dropout off."""
    shape = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "dropout": 0.5}
    module, theirs = make_modules(name, **shape, **options, dtype=torch.float64)
    module, theirs = module.to(device).eval(), theirs.eval()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    flat(module(x.to(device)))[0].sum().backward()
    flat(theirs(x))[0].sum().backward()
    found = {n: p.grad.cpu() for n, p in module.named_parameters()}
    assert_close_to_reference(found, None, {n: p.grad for n, p in theirs.named_parameters()})


@pytest.mark.parametrize("name, options", MODULES)
def test_backward_twice(name, options, device):
    module, _ = make_modules(name, input_size=3, hidden_size=4, device=device, **options)
    x = torch.randn(5, 2, 3, device=device)
    loss = sum(t.square().sum() for t in flat(module(x)))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in module.parameters()]
    loss.backward(retain_graph=True)
    for p, g in zip(module.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g), "gradients accumulate"
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name, options", MODULES)
def test_first_order_is_the_kernels_with_or_without_a_graph(name, options, device):
    module, _ = make_modules(name, input_size=3, hidden_size=9, device=device, **options)
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    leaves = [x, *module.parameters()]
    loss = sum(t.square().sum() for t in flat(module(x)))
    plain = grad(loss, leaves, retain_graph=True)
    with_graph = grad(loss, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_graph, strict=True))
    assert all(g.requires_grad for g in with_graph)


@pytest.mark.parametrize("name, options", MODULES)
def test_changing_what_backward_reads_is_noticed(name, options, device):
    module, _ = make_modules(name, input_size=3, hidden_size=4, device=device, **options)
    for victim in ("output", "weight", "input"):
        x = torch.randn(5, 2, 3, device=device)
        y, _ = module(x)
        loss = y.square().sum()
        with torch.no_grad():
            {"output": y, "weight": module.weight_hh_l0, "input": x}[victim].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_changing_batch_sizes_is_noticed(recompute, device):
    module = fusedrnn.LSTM(3, 4, device=device, recompute=recompute)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 3, device=device), [3, 2])
    first, second = (module(packed)[0].data.sum() for _ in range(2))
    gradient = grad(first, module.weight_hh_l0, create_graph=True)[0]
    packed.batch_sizes.add_(1)
    for result in (second, gradient.sum()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_batch_sizes_may_be_made_in_inference_mode(device):
    """As with torch.nn, which doesn't keep them for backward either."""
    with torch.inference_mode():
        batch_sizes = torch.tensor([2, 2, 1])
    packed = nn.utils.rnn.PackedSequence(torch.randn(5, 3, device=device), batch_sizes)
    module = fusedrnn.GRU(3, 4, device=device)
    module(packed)[0].data.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_final_states_may_be_changed_in_place(device):
    """As with torch.nn: nothing keeps h_n and c_n."""
    module = fusedrnn.LSTM(3, 4, device=device)
    y, (h_n, c_n) = module(torch.randn(5, 2, 3, device=device))
    expected = grad(y.sum() + h_n.sum(), module.weight_hh_l0, retain_graph=True)[0]
    found = grad(y.sum() + h_n.add_(1).sum() + c_n.mul_(0).sum(), module.weight_hh_l0)[0]
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_states_of_cells_may_be_changed_in_place(name, device):
    """As with torch.nn's: programs mask them between steps where an episode has ended."""
    kind = {"dtype": torch.float64, "device": device}
    x, mask = torch.randn(5, 2, 3, **kind), torch.tensor([[1.0], [0.0]], **kind)
    ours = getattr(fusedrnn, name)(3, 4, **kind)
    theirs = getattr(torch.nn, name)(3, 4, **kind)
    theirs.load_state_dict(ours.state_dict())
    found, expected = [], []
    for cell, gradients in ((ours, found), (theirs, expected)):
        hx = None
        for step in x:
            hx = cell(step, hx)
            states = hx if name == "LSTMCell" else (hx,)
            for state in states:
                state.mul_(mask)
        gradients += grad(sum(state.sin().sum() for state in states), list(cell.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# ---- second order and beyond ---------------------------------------------------------------------


def second_order(module, x, packed):
    """Gradients of |d loss / d (x, weights)|^2, and of its own |d/dx|^2: second and third order."""
    data = x if packed is None else PackedSequence(x, packed)
    y, *finals = flat(module(data))
    y = y if packed is None else y.data
    loss = y.pow(3).sum() + sum(t.sin().sum() for t in finals)
    leaves = [x, *module.parameters()]
    first = grad(loss, leaves, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    second = grad(penalty, leaves, create_graph=True)
    third = grad(sum(g.square().sum() for g in second), leaves)
    return [*first, *second, *third]


@pytest.mark.parametrize("packed", [None, (3, 2, 2, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("name, options", MODULES)
def test_third_order_is_torch_nns(name, options, packed):
    """torch.nn's CPU kernels differentiate to any order; so do ours, to the same values."""
    options = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True, **options}
    modules = make_modules(name, dtype=torch.float64, **options)
    sizes = None if packed is None else torch.tensor(packed)
    x = torch.randn(*((4, 2) if packed is None else (8,)), 3, dtype=torch.float64)
    found, expected = (second_order(m, x.detach().requires_grad_(), sizes) for m in modules)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-11


class Critic(nn.Module):
    """Scores sequences; the usual small network of a WGAN-GP."""

    def __init__(self, rnn, hidden):
        super().__init__()
        self.rnn = rnn
        self.score = nn.Linear(hidden, 1, dtype=torch.float64)

    def forward(self, x):
        return self.score(self.rnn(x)[0][-1]).squeeze(-1)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_penalty_trains(cell):
    """Five steps of a WGAN-GP critic: finite, falling, and step by step torch.nn's losses."""
    name, options = {"lstm": ("LSTM", {}), "gru": ("GRU", {})}.get(cell, ("RNN", {"nonlinearity": cell[4:]}))
    losses = []
    for rnn in make_modules(name, input_size=3, hidden_size=6, dtype=torch.float64, **options):
        torch.manual_seed(1)
        critic = Critic(rnn, 6)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
        real, fake = torch.randn(7, 8, 3, dtype=torch.float64), torch.rand(7, 8, 3, dtype=torch.float64)
        history = []
        for _ in range(5):
            mixed = torch.lerp(real, fake, torch.rand(1, 8, 1, dtype=torch.float64)).requires_grad_()
            slope = grad(critic(mixed).sum(), mixed, create_graph=True)[0]
            penalty = ((slope.square().sum((0, 2)) + 1e-12).sqrt() - 1).square().mean()
            loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history, dtype=torch.float64))
    assert losses[0].isfinite().all()
    assert losses[0][-1] < losses[0][0]
    assert relative_error(losses[0], losses[1]) < 1e-10


@pytest.mark.parametrize("name, options", MODULES)
def test_partial_second_order(name, options):
    """Mixed second derivatives through one output alone, with everything but one input frozen."""
    options = {"input_size": 3, "hidden_size": 4, **options}
    modules = make_modules(name, dtype=torch.float64, **options)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for output in range(3 if name == "LSTM" else 2):
        for leaf in ("x", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
            found = []
            for module in modules:
                module.requires_grad_(False)
                source = x.detach() if leaf == "x" else getattr(module, leaf)
                source.requires_grad_()
                value = flat(module(source if leaf == "x" else x))[output].pow(2).sum()
                first = grad(value, source, create_graph=True)[0]
                found.append(grad(first.square().sum(), source)[0])
            assert relative_error(*found) < 1e-11, f"output {output} by {leaf}"
