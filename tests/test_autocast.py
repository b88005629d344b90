"""torch.autocast: which dtypes come out, what is kept in float32, and training with a scaled loss."""

import copy
import re

import pytest
import torch
from conftest import FLOORS
from test_gradients import MODULES, flat, make_modules
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {})]
AUTOCAST = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def run(module, x, batch_sizes=None):
    """Outputs and gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    outputs = tree_leaves(module(x if batch_sizes is None else PackedSequence(x, batch_sizes)))
    outputs = [t for t in outputs if torch.is_tensor(t) and t.is_floating_point()]
    sum(t.float().sin().sum() for t in outputs).backward()
    return outputs, [x.grad, *(p.grad for p in module.parameters())]


@AUTOCAST
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("name, options", [*MODULES, *CELLS])
def test_as_with_everything_cast(name, options, kind, dtype, device):
    """Results in autocast's dtype, to the same bits as of a module in that dtype; gradients in the parameters' own."""
    is_cell = name.endswith("Cell")
    if is_cell and kind == "packed":
        pytest.skip("cells take no packed sequence")
    layers = {} if is_cell else {"num_layers": 2, "bidirectional": True}
    module = make_modules(name, input_size=3, hidden_size=8, **layers, **options)[0].to(device)
    low = copy.deepcopy(module).to(dtype)
    sizes = None if kind == "padded" else torch.tensor([2, 2, 1])
    x = torch.randn(*((4, 3) if is_cell else (5, 2, 3) if sizes is None else (5, 3)), device=device)
    with torch.autocast(device.type, dtype):
        outputs, gradients = run(module, x, sizes)
    expected, low_gradients = run(low, x.to(dtype), sizes)
    assert {t.dtype for t in outputs} == {dtype}
    assert {t.dtype for t in gradients} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(torch.equal(a, b.float()) for a, b in zip(gradients, low_gradients, strict=True))


@AUTOCAST
@pytest.mark.parametrize("name, options", [*MODULES, *CELLS])
def test_float64_and_disabled_regions_are_left_alone(name, options, dtype, device):
    shape = (4, 3) if name.endswith("Cell") else (5, 2, 3)
    for parameters, enabled in ((torch.float64, True), (torch.float32, False)):
        module, _ = make_modules(name, input_size=3, hidden_size=4, dtype=parameters, **options)
        module.to(device)
        x = torch.randn(*shape, dtype=parameters, device=device)
        with torch.autocast(device.type, dtype), torch.autocast(device.type, dtype, enabled=enabled):
            found, gradients = run(module, x)
        assert {t.dtype for t in (*found, *gradients)} == {parameters}
        expected, _ = run(module, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@AUTOCAST
def test_mixed_inputs(dtype, device):
    """A layer after an autocast one gets its dtype as input; states of float32 are cast as well."""
    module, state = fusedrnn.LSTM(3, 4, device=device), torch.randn(1, 2, 4, device=device)
    x = torch.randn(5, 2, 3, device=device)
    with torch.autocast(device.type, dtype):
        mixed, _ = module(x.to(dtype), (state, state.to(dtype)))
        plain, _ = module(x, (state, state))
        function, _ = fusedrnn.functional.lstm(x, list(module.parameters()), (state, state))
    assert mixed.dtype == dtype
    assert torch.equal(mixed, plain)
    assert torch.equal(function, plain)
    with pytest.raises(ValueError) as torchs:
        nn.LSTM(3, 4, device=device)(x.to(dtype))
    with pytest.raises(ValueError, match=re.escape(str(torchs.value))):
        module(x.to(dtype))


@AUTOCAST
def test_c_is_summed_in_float32(dtype, device):
    """c grows by 0.001 a step; in 16 bits it would stop growing where that is less than half of its spacing."""
    module = fusedrnn.LSTM(1, 1, device=device)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0.copy_(torch.tensor([30.0, 30.0, 0.001, 30.0]))  # i = f = o = 1, g = tanh(0.001)
    steps = 6000
    with torch.autocast(device.type, dtype), torch.no_grad():
        _, (_, c) = module(torch.zeros(steps, 1, 1, device=device))
    assert c.item() == pytest.approx(steps * 0.001, rel=FLOORS[dtype])


def cell_loop(cell, x, steps):
    """The sum of the last states of a loop that truncates its graph at every step."""
    h = torch.zeros(x.shape[0], cell.hidden_size, device=x.device)
    total = 0
    for _ in range(steps):
        total = total + cell(x, h.detach()).float().sum()
    return total


@pytest.mark.parametrize("call", ["cell", "layer"])
def test_calls_share_the_weights(call, device):
    """A loop of steps keeps one copy of them for backward, not one a step; so does torch.nn's."""
    x, kept = torch.randn(2, 64, device=device), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    name = "LSTMCell" if call == "cell" else "LSTM"
    module, theirs = make_modules(name, input_size=64, hidden_size=64)
    bytes_kept = []
    for m in (module.to(device), theirs.to(device)):
        kept.clear()
        state = (torch.zeros(*(() if call == "cell" else (1,)), 2, 64, device=device),) * 2
        with saved_tensors_hooks(keep, lambda t: t), torch.autocast(device.type, torch.bfloat16):
            for _ in range(20):
                state = m(x, state) if call == "cell" else m(x[None], state)[1]
        state[0].float().sum().backward()
        bytes_kept.append(sum(kept.values()))
    weights = 2 * sum(p.numel() for p in module.parameters())
    assert weights < bytes_kept[0] < 3 * weights
    assert bytes_kept[0] < 1.5 * bytes_kept[1]


def test_gradients_of_calls_are_summed_in_float32(device):
    """In bfloat16 a sum of equal numbers would stop at 256 of them."""
    cell, x = fusedrnn.RNNCell(3, 4, device=device), torch.rand(2, 3, device=device)
    gradients = []
    for steps in (1, 600):
        with torch.autocast(device.type, torch.bfloat16):
            loss = cell_loop(cell, x, steps)
        gradients.append(torch.autograd.grad(loss, cell.weight_ih)[0])
    torch.testing.assert_close(gradients[1], 600 * gradients[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("first", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_shared_weights_are_the_current_ones(first, device):
    """Whatever the first call of a region was, later ones have gradients; and a changed parameter is seen."""
    cell, x = fusedrnn.GRUCell(3, 4, device=device), torch.randn(2, 3, device=device)

    def check():
        expected = copy.deepcopy(cell).bfloat16()(x.bfloat16())
        found = cell(x)
        assert torch.equal(found, expected)
        found.float().sum().backward()
        assert cell.weight_ih.grad.abs().sum() > 0
        cell.zero_grad()
        return found

    with torch.autocast(device.type, torch.bfloat16):
        with first():
            cell(x)
        graph = check()
        with torch.no_grad():
            cell.weight_ih.mul_(2)
        check()
        with torch.autocast(device.type, torch.float16):
            assert cell(x).dtype == torch.float16
        cell.weight_ih = nn.Parameter(cell.weight_ih.detach() * 2)
        check()
    cell.weight_ih.data.mul_(2)  # which no version counts
    with torch.autocast(device.type, torch.bfloat16):
        check()
        torch.clear_autocast_cache()
        cell.weight_ih.data.mul_(2)
        check()
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        check()
        cell.weight_ih.data.mul_(2)
        check()
    assert graph.requires_grad


def test_frozen_parameters(device):
    cell, x = fusedrnn.GRUCell(3, 4, device=device), torch.randn(2, 3, device=device, requires_grad=True)
    cell.weight_ih.requires_grad_(False)
    with torch.autocast(device.type, torch.bfloat16):
        cell(x).float().sum().backward()
    assert cell.weight_ih.grad is None and cell.weight_hh.grad is not None and x.grad is not None


def test_second_order_and_checkpoints(device):
    cell, x = fusedrnn.GRUCell(3, 4, device=device), torch.randn(2, 3, device=device)

    def penalty(call):
        with torch.autocast(device.type, torch.bfloat16):
            loss = call().float().sum()
        gradients = torch.autograd.grad(loss, list(cell.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), cell.weight_ih)[0]

    two_steps = lambda x: cell(x, cell(x))  # noqa: E731
    expected = penalty(lambda: two_steps(x))
    assert expected.abs().sum() > 0
    assert torch.equal(penalty(lambda: checkpoint(two_steps, x, use_reentrant=False)), expected)


@pytest.mark.parametrize("name, options", MODULES)
def test_second_order_in_a_region(name, options, device):
    """Both backward passes inside of it: as outside."""
    module = make_modules(name, input_size=3, hidden_size=5, **options)[0].to(device)
    x, leaves = torch.randn(4, 2, 3, device=device), list(module.parameters())

    def penalty(inside):
        with torch.autocast(device.type, torch.bfloat16):
            loss = module(x)[0].float().sum()
        with torch.autocast(device.type, torch.bfloat16, enabled=inside):
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    for one, other in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


@pytest.mark.parametrize("name, options", MODULES)
def test_grad_scaler(name, options, device):
    """float16 with a scaled loss: it learns, the gradients are those of the loss, an overflow skips the step."""
    model = nn.Sequential(make_modules(name, input_size=3, hidden_size=16, **options)[0]).to(device)
    head = nn.Linear(options.get("proj_size", 16), 1, device=device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    x = torch.randn(6, 16, 3, device=device)
    target = x.sum((0, 2)).tanh()

    def loss():
        with torch.autocast(device.type, torch.float16):
            return (head(flat(model(x))[0][-1]).squeeze(-1).float() - target).square().mean()

    history = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        history.append(value.item())
    assert history[-1] < 0.5 * history[0]
    assert {p.grad.dtype for p in parameters} == {torch.float32}

    before, scale = [p.detach().clone() for p in parameters], scaler.get_scale()
    optimizer.zero_grad()
    scaler.scale(loss() * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < scale
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
