"""torch.library.opcheck on every op: schema, no aliasing, fake kernels with the real shapes and strides, tracing."""

import pytest
import torch
from helpers import DTYPES, GATES, VARIANTS, layer_backward_op, layer_op, make_gradients, make_inputs, needs_of, variant

OPTIONS = [
    {"directions": 1},
    {"directions": 2, "bias": False},
    {"directions": 2, "lengths": (5, 3, 3, 1)},
    {"directions": 1, "states": False},
    {"directions": 1, "N": 0},
    {"directions": 2, "T": 0},
]


def identifier(options):
    return "-".join(f"{k}{v}" for k, v in options.items())


def check(op, arguments):
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def forward_and_backward(case, device):
    """The arguments of both ops."""
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    y, _, _, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    return inputs.arguments(), (*gradients, *inputs.arguments(), y, gates, cells, needs_of(inputs))


@pytest.mark.parametrize("options", OPTIONS, ids=identifier)
@pytest.mark.parametrize("name", VARIANTS)
def test_forward(name, options, device):
    arguments, _ = forward_and_backward(variant(name, **options), device)
    cell = name.removesuffix("_proj")
    for save in (False, True):
        check(layer_op(cell).default, (*arguments, save))
    if device.type == "cpu":
        inference = getattr(torch.ops.fusedrnn, f"{cell}_inference").default
        check(inference, arguments)
        found, expected = inference(*arguments), layer_op(cell)(*arguments, False)
        assert len(found) == (3 if cell == "lstm" else 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


@pytest.mark.parametrize("N", [3, 0])
@pytest.mark.parametrize("name", VARIANTS)
def test_step(name, N, device):
    """A cell's step is the first of a sequence, without the dimensions that have one entry."""
    x, h0, c0, weights, _, _ = make_inputs(variant(name, T=1, N=N), device).arguments()
    cell = name.removesuffix("_proj")
    op = getattr(torch.ops.fusedrnn, f"{cell}_step").default
    arguments = x[0], h0[0], None if c0 is None else c0[0], weights
    check(op, arguments)
    expected = layer_op(cell)(x, h0, c0, weights, None, 1, False)[1 : 3 if cell == "lstm" else 2]
    found = op(*arguments)
    assert len(found) == len(expected) and all(torch.equal(a, b[0]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=identifier)
@pytest.mark.parametrize("name", VARIANTS)
def test_backward(name, options, device):
    _, arguments = forward_and_backward(variant(name, **options), device)
    op = layer_backward_op(name.removesuffix("_proj")).default
    check(op, arguments)
    check(op, (None, *arguments[1:-1], arguments[-1] & ~1))
    if name.startswith("lstm"):
        cells = arguments[-2]
        check(op, (*arguments[:3], torch.ones_like(cells), *arguments[4:]))


@pytest.mark.parametrize("options", OPTIONS, ids=identifier)
@pytest.mark.parametrize("name", VARIANTS)
def test_linear(name, options, device):
    _, arguments = forward_and_backward(variant(name, **options), device)
    (dy, dh_n, dc_n, dcells), layer, cell = arguments[:4], arguments[4:-1], name.removesuffix("_proj")
    check(getattr(torch.ops.fusedrnn, f"{cell}_adjoint").default, (dy, dh_n, dc_n, dcells, *layer))
    rows, H = dy.shape[:-1].numel(), layer[3][1].shape[0] // GATES[cell]
    gates = torch.ones(rows, layer[5], GATES[cell] * H, device=device)
    op = getattr(torch.ops.fusedrnn, f"{cell}_tangent").default
    check(op, (gates, None, dy, dh_n, None, *layer))
    check(op, (None, gates, None, None, dc_n, *layer))
    gates, h = gates[:, 0], torch.ones(rows, H, device=device)
    c = h if cell == "lstm" else None
    check(getattr(torch.ops.fusedrnn, f"{cell}_curvature").default, (gates, gates, h, c, *[None] * 4, h, c, h))


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_segments(directions, reset):
    mask = torch.tensor([[False, True, False, True], [True] * 4, [False] * 4])
    arguments = (torch.tensor([4, 0, 2]), mask if reset else None, torch.arange(3) * 4, torch.arange(4), directions)
    check(torch.ops.fusedrnn.segments.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_dtypes(name, dtype, device):
    forward, backward = forward_and_backward(variant(name, dtype=dtype), device)
    cell = name.removesuffix("_proj")
    check(layer_op(cell).default, (*forward, True))
    check(layer_backward_op(cell).default, backward)


@pytest.mark.parametrize("name", VARIANTS)
def test_strided_inputs(name, device):
    """Fresh outputs are contiguous whatever the inputs' strides, in the fake kernels too."""
    case = variant(name, directions=2)
    inputs = make_inputs(case, device).map(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1))
    gradients = [None if g is None else g[:1].expand(g.shape) for g in make_gradients(case, device)]
    y, _, _, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    check(layer_op(case.cell).default, (*inputs.arguments(), True))
    backward = (*gradients, *inputs.arguments(), y, gates, cells, needs_of(inputs))
    check(layer_backward_op(case.cell).default, backward)


@pytest.mark.parametrize("name", VARIANTS)
def test_meta_device(name):
    """On the meta device the ops give shapes, without a kernel."""
    forward, backward = forward_and_backward(variant(name, directions=2), "meta")
    cell = name.removesuffix("_proj")
    assert all(t.device.type == "meta" for t in layer_op(cell)(*forward, True))
    assert layer_backward_op(cell)(*backward)[0].shape == forward[0].shape
