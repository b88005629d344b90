"""torch.utils.flop_counter counts what torch.nn does by matrix products, one by one."""

import pytest
import torch
from helpers import make_inputs, variant
from test_gradients import MODULES, flat, make_modules
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import ops, stacked

T, N, I, H = 5, 2, 3, 4
STACKED = {"num_layers": 2, "bidirectional": True}


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def pair_of(name, device, **options):
    """Ours and torch.nn's; in float64, as torch.nn's LSTM in float32 is an op that isn't counted."""
    return [m.to(device).double() for m in make_modules(name, input_size=I, hidden_size=H, **options)]


def states(module, device):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    hx = [torch.zeros(rows, N, w, device=device).double() for w in (module.proj_size or H, H)]
    hx = [t.requires_grad_() for t in hx]
    return tuple(hx) if module.mode == "LSTM" else hx[0]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, STACKED], ids=str)
@pytest.mark.parametrize("name, cell_options", MODULES)
def test_as_torch_nn(name, cell_options, options, packed, device):
    x = torch.randn(T, N, I, dtype=torch.float64, device=device, requires_grad=True)

    def run(module, hx):
        y, *finals = flat(module(pack_sequence([x[:, 0], x[:2, 1]]) if packed else x, hx))
        return sum(t.sum() for t in (y.data if packed else y, *finals))

    found = []
    for module in pair_of(name, device, **options, **cell_options):
        hx = states(module, device)
        training = flops(lambda m=module, hx=hx: run(m, hx).backward())
        with torch.no_grad():
            found.append((flops(lambda m=module, hx=hx: run(m, hx)), training))
    assert found[0] == found[1] and found[0][0] > 0


def test_what_is_not_needed_is_not_counted(device):
    """By hand: of a layer, rows x w_ih and rows x w_hh forward; backward those that lead somewhere."""
    module = fusedrnn.GRU(I, H, device=device)
    x = torch.randn(T, N, I, device=device)
    w_ih, w_hh = 2 * T * N * 3 * H * I, 2 * T * N * 3 * H * H
    y, _ = module(x)
    assert flops(lambda: y.sum().backward()) == w_ih + 2 * w_hh
    module.weight_ih_l0.requires_grad_(False)
    y, _ = module(x.requires_grad_())
    assert flops(lambda: y.sum().backward()) == w_ih + 2 * w_hh
    module.requires_grad_(False)
    y, _ = module(x)
    assert flops(lambda: y.sum().backward()) == w_ih + w_hh


def test_linear_ops(device):
    """Along a direction and back, as many as the recurrence forward."""
    inputs = make_inputs(variant("lstm_proj", T=T, N=N, I=I, H=H, directions=2), device)
    y, _, _, gates, cells = ops.forward["lstm"](*inputs.arguments(), True)
    saved = (*inputs.arguments(), y, gates, cells)
    expected = 2 * 2 * T * N * (4 * H * y.shape[-1] // 2 + H * y.shape[-1] // 2)
    assert flops(lambda: ops.tangent["lstm"](None, None, y, None, None, *saved)) == expected
    assert flops(lambda: ops.adjoint["lstm"](y, None, None, None, *saved)) == expected


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_stack(name, device):
    """As its layers one by one."""
    gates, layers = ops.GATES[name], 3
    weights = []
    for k in range(layers):
        weights += [torch.randn(gates * H, I if k == 0 else H, device=device), torch.randn(gates * H, H, device=device)]
    h0 = torch.zeros(layers, N, H, device=device)
    arguments = (torch.randn(T, N, I, device=device), h0, h0 if name == "lstm" else None, weights, layers, 2)
    expected = flops(lambda: stacked._forward(name, *arguments, True))
    assert flops(lambda: stacked.forward[name](*arguments, True)) == expected > 0
    y, _, _, saved = stacked.forward[name](*arguments, True)
    for needs in ([31, 24, 24], [8, 0, 0], [0, 16, 0], [0, 0, 8], [0, 0, 0], [2, 0, 0]):
        given = (torch.ones_like(y), None, None, *arguments, y, saved, needs)
        found = flops(lambda given=given: stacked.backward[name](*given))
        assert found == flops(lambda given=given: stacked._backward(name, *given)), needs


@torch.no_grad()
def test_cell(device):
    cell = fusedrnn.GRUCell(I, H, device=device)
    x, h = torch.randn(N, I, device=device), torch.zeros(N, H, device=device)
    assert flops(lambda: cell(x, h)) == 2 * N * 3 * H * (I + H)


def test_stream(device):
    stream = fusedrnn.Stream(fusedrnn.LSTM(I, H, 2, device=device), N)
    assert flops(lambda: stream(torch.randn(N, I, device=device))) == 2 * N * 4 * H * (I + 3 * H)


def test_compiled(device):
    torch._dynamo.reset()
    module = fusedrnn.LSTM(I, H, device=device)
    x = torch.randn(T, N, I, device=device)
    run = lambda x: module(x)[0].sum()  # noqa: E731
    compiled = torch.compile(run, backend="aot_eager")
    found = [flops(lambda f=f: f(x).backward()) for f in (run, compiled)]
    torch._dynamo.reset()
    assert found[0] == found[1] > 0
