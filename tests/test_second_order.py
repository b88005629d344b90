"""The linear ops against the derivatives of the float64 loops; second derivatives and forward mode by the kernels."""

import pytest
import torch
from conftest import assert_close_to_reference, relative_error
from helpers import DTYPES, GATES, VARIANTS, Inputs, layer_op, make_gradients, make_inputs, ragged_lengths, variant
from test_gradients import flat, make_modules
from torch import nn
from torch.autograd import forward_ad, grad
from torch.func import functional_call, jvp
from torch.func import grad as func_grad

import fusedrnn
from fusedrnn import ops, reference

# (T, N, I, H): around the widths of vectors, tiles and panels
SHAPES = [(1, 1, 2, 1), (5, 3, 4, 7), (4, 13, 5, 33), (17, 2, 3, 16), (6, 20, 8, 70)]


def perturbed(case, inputs, dwx, drh, dh, dc):
    """The reference with something added to wx, rh, and each step's h (before a projection) and c, all [rows, D, .].

    Its results, and every rh.
    """
    sizes = [case.N] * case.T if inputs.batch_sizes is None else inputs.batch_sizes.tolist()

    def in_turn(t):
        return iter([part for d in range(case.directions) for part in t[:, d].split(sizes)[:: -1 if d else 1]])

    rhs: list[torch.Tensor] = []
    parts, cell_step = [in_turn(t) for t in (dwx, drh, dh, dc)], getattr(reference, f"{case.cell}_step")

    def step(wx, rh, state):
        more = [next(part) for part in parts]
        rhs.append(rh + more[1])
        new = cell_step(wx + more[0], rhs[-1], state)
        return tuple(s + m for s, m in zip(new, more[2:], strict=False))

    lstm, reference.lstm_step = reference.lstm_step, step if case.cell == "lstm" else reference.lstm_step
    try:  # it tells an LSTM by its step
        results = reference._layer(step, GATES[case.cell], *inputs.arguments())
    finally:
        reference.lstm_step = lstm
    T = len(sizes)
    every_rh = torch.stack([torch.cat(rhs[d * T : (d + 1) * T][:: -1 if d else 1]) for d in range(case.directions)], 1)
    return *results, every_rh


def perturbations(case, device, seed=2):
    """``dwx, drh, dh, dc`` of some layer, at random."""
    generator = torch.Generator().manual_seed(seed)
    widths = [GATES[case.cell] * case.H] * 2 + [case.H] * 2
    shapes = [(case.rows, case.directions, width) for width in widths]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype).to(device) for s in shapes]


def linear_op(case, name):
    return layer_op(f"{case.cell}_{name}")


def on_cpu(results):
    """Where the reference is."""
    return {name: t.cpu() for name, t in results.items()}


def of_every_step(case, dh, inputs):
    """What is added to h before the projection, as it arrives in y."""
    if case.P:
        per_direction = len(inputs.weights) // case.directions
        w_hrs = [inputs.weights[(d + 1) * per_direction - 1] for d in range(case.directions)]
        dh = torch.stack([dh[:, d] @ w.T for d, w in enumerate(w_hrs)], 1)
    lead = (case.T, case.N) if case.lengths is None else (case.rows,)
    return dh.reshape(*lead, -1)


def cases_of(name, shape, dtype, ragged):
    T, N, I, H = shape
    index = SHAPES.index(shape) + VARIANTS.index(name) + ragged
    options = {"directions": 1 + index % 2, "bias": index % 3 != 0, "states": index % 4 != 0, "dtype": dtype}
    lengths = ragged_lengths(N, T) if ragged else None
    return variant(name, T=T, N=N, I=I, H=H, lengths=lengths, **options)


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_linear_ops(name, shape, dtype, ragged, device, capability):
    """The tangent op is the reference's derivative along a direction, the adjoint op its gradients in every state."""
    case = cases_of(name, shape, dtype, ragged)
    inputs, changes = make_inputs(case, device), perturbations(case, device)
    wide = inputs.map(lambda t: t.cpu().double())
    wide_changes = [t.cpu().double() for t in changes]
    dwx, drh, dh, _ = changes
    starts = [None if s is None else s.sin() for s in (inputs.h0, inputs.c0)]
    y, _, _, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    saved = (*inputs.arguments(), y, gates, cells)

    found = linear_op(case, "tangent")(dwx, drh, of_every_step(case, dh, inputs), *starts, *saved)
    zeros = [torch.zeros_like(t) for t in wide_changes]
    states = [s for s in (wide.h0, wide.c0) if s is not None]
    along = (*wide_changes[:3], *[s.sin() for s in states])

    def results(dwx, drh, dh, *states):
        h0, c0 = (*states, None, None)[:2]
        moved = Inputs(wide.x, h0, c0, wide.weights, wide.batch_sizes, wide.directions)
        return perturbed(case, moved, dwx, drh, dh, zeros[3])

    _, expected = jvp(results, (*zeros[:3], *states), along)
    assert_close_to_reference(
        on_cpu(dict(enumerate(found))), None, dict(enumerate(expected)), what=f"tangent {case}", slack=4
    )

    upstream = make_gradients(case, device)
    upstream[3] = changes[3] if case.cell == "lstm" else None
    by_wx, by_rh, every_h, every_c, dh0, dc0 = linear_op(case, "adjoint")(*upstream, *saved)
    leaves = [t.requires_grad_() for t in zeros]
    starts = [s.requires_grad_() for s in states]
    outputs = perturbed(case, wide, *leaves)
    given = [(o, g.cpu().double()) for o, g in zip(outputs, upstream, strict=False) if g is not None]
    roots, weights = zip(*given, strict=True)
    expected_wx, expected_rh, by_h, by_c, *by_starts = grad(roots, [*leaves, *starts], weights, allow_unused=True)
    if case.P:  # the loops' h is before the projection
        count = len(inputs.weights) // case.directions
        w_hrs = [w.cpu().double() for w in inputs.weights[count - 1 :: count]]
        every_h = every_h.cpu().double().reshape(case.rows, case.directions, case.P)
        every_h = torch.stack([every_h[:, d] @ w for d, w in enumerate(w_hrs)], 1).to(dtype)
    found = {"dwx": by_wx, "drh": by_rh, "dh": every_h.reshape(by_h.shape), "dc": every_c}
    expected = {"dwx": expected_wx, "drh": expected_rh if case.cell == "gru" else by_h.new_zeros(0), "dh": by_h}
    expected["dc"] = by_c if case.cell == "lstm" else by_h.new_zeros(0)
    if starts:
        found |= dict(zip(("dh0", "dc0"), (dh0, dc0)[: len(starts)], strict=False))
        expected |= dict(zip(("dh0", "dc0"), by_starts, strict=False))
    assert_close_to_reference(on_cpu(found), None, expected, what=f"adjoint {case}", slack=4)


@pytest.mark.parametrize("name", VARIANTS)
def test_linear_ops_of_nothing(name, device):
    """What is not given is zero; layers without rows or with other arguments."""
    case = variant(name, T=4, N=3, directions=2)
    inputs = make_inputs(case, device)
    y, _, _, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    saved = (*inputs.arguments(), y, gates, cells)
    for t in (*linear_op(case, "tangent")(*[None] * 5, *saved), *linear_op(case, "adjoint")(*[None] * 4, *saved)):
        assert t.abs().sum() == 0
    case = variant(name, T=0, N=3)
    inputs = make_inputs(case, device)
    y, _, _, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    saved = (*inputs.arguments(), y, gates, cells)
    dy, dh_n, *_ = linear_op(case, "tangent")(None, None, None, inputs.h0, None, *saved)
    assert dy.shape == y.shape
    assert torch.equal(dh_n, inputs.h0)
    assert linear_op(case, "adjoint")(*[None] * 4, *saved)[2].shape == y.shape


@pytest.mark.parametrize("changing", [True, False], ids=["along all", "along none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("H", [1, 16, 37])
@pytest.mark.parametrize("cell", ops.CELLS)
def test_curvature_op(cell, H, dtype, changing, device, capability):
    """How one step's gradients and its h change, by autograd through the reference's step."""
    generator = torch.Generator().manual_seed(H)
    widths = [GATES[cell] * H] * 2 + [H] * ops.STATES[cell]
    arguments, changes, upstream = (
        [torch.randn(23, width, generator=generator, dtype=torch.float64).to(dtype).double() for width in each]
        for each in (widths, widths, widths[2:])
    )
    along = changes[0][:, :H] if changing else torch.zeros(23, H, dtype=torch.float64)
    step = getattr(reference, f"{cell}_step")

    def gradients(a_h, wx, rh, *state):
        with torch.enable_grad():
            after, pull = torch.func.vjp(lambda wx, rh, *state: step(wx, rh, state), wx, rh, *state)
        return after[0], *pull((a_h, *upstream[1:]))

    directions = changes if changing else [torch.zeros_like(t) for t in changes]
    _, (dh_after, *second) = jvp(gradients, (upstream[0], *arguments), (along, *directions))
    given = [t.to(device, dtype) for t in (*arguments, *changes, *upstream, along)]
    k = len(arguments)
    pad = lambda ts, n: [*ts, *[None] * (n - len(ts))]  # noqa: E731
    moved = given[k : 2 * k] if changing else []
    found = layer_op(f"{cell}_curvature")(
        *pad(given[:k], 4), *pad(moved, 4), *pad(given[2 * k : -1], 2), given[-1] if changing else None
    )
    dby_wx, dby_rh, dby_h, dby_c, dh = found
    results, expected = {"dby_wx": dby_wx, "dh_after": dh}, {"dby_wx": second[0], "dh_after": dh_after}
    if cell == "gru":
        results |= {"dby_rh": dby_rh, "dby_h": dby_h}
        expected |= {"dby_rh": second[1], "dby_h": second[2]}
    if cell == "lstm":
        results["dby_c"], expected["dby_c"] = dby_c, second[3]
    for empty in (dby_rh, dby_h) if cell != "gru" else (dby_c,):
        assert empty.shape == (0,)
    assert_close_to_reference(on_cpu(results), None, expected, what=cell, slack=4)


def test_linear_ops_refuse(device):
    def given(**options):
        inputs = make_inputs(variant("gru", T=4, N=3, H=7, **options), device)
        y, _, _, gates, cells = layer_op("gru")(*inputs.arguments(), True)
        return (*inputs.arguments(), y, gates, cells)

    tangent, adjoint = layer_op("gru_tangent"), layer_op("gru_adjoint")
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(RuntimeError, match=r"x: expected dtype Float or Double, got "):
            tangent(*[None] * 5, *given(dtype=dtype))
        with pytest.raises(RuntimeError, match=r"x: expected dtype Float or Double, got "):
            adjoint(*[None] * 4, *given(dtype=dtype))
    saved = given()
    wrong = torch.zeros(12, 1, 20, device=device)
    for k, (what, shape) in enumerate(
        {"dwx": "12, 1, 21", "drh": "12, 1, 21", "dy": "4, 3, 7", "dh0": "1, 3, 7"}.items()
    ):
        arguments = [wrong if i == k else None for i in range(5)]
        with pytest.raises(RuntimeError, match=rf"fusedrnn: {what}: expected shape \[{shape}\], got \[12, 1, 20\]"):
            tangent(*arguments, *saved)
    curvature, lstm_curvature = layer_op("gru_curvature"), layer_op("lstm_curvature")
    gates, h = torch.zeros(5, 12, device=device), torch.zeros(5, 4, device=device)
    with pytest.raises(RuntimeError, match=r"rh: expected shape \[5, 12\], got \[5, 4\]"):
        curvature(gates, h, h, *[None] * 5, h, None, None)
    with pytest.raises(RuntimeError, match="upstream_c: expected None, this cell has no c"):
        curvature(gates, gates, h, *[None] * 5, h, h, None)
    with pytest.raises(RuntimeError, match=r"wx: expected dtype Float or Double, got Half"):
        curvature(gates.half(), gates, h, *[None] * 5, h, None, None)
    with pytest.raises(RuntimeError, match=r"wx: expected \[rows, 4 \* H\], got \[5, 3\]"):
        lstm_curvature(gates[:, :3], gates, h, *[None] * 5, h, None, None)
    with pytest.raises(RuntimeError, match="dc0: expected None, this cell has no c"):
        tangent(None, None, None, None, wrong, *saved)
    with pytest.raises(RuntimeError, match=r"dy: expected shape \[4, 3, 7\]"):
        adjoint(wrong, None, None, None, *saved)


# ---- through the modules -------------------------------------------------------------------------

MODULES = [
    ("LSTM", {}), ("LSTM", {"proj_size": 5}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"}),
]  # fmt: skip


@pytest.fixture
def no_loops(monkeypatch):
    """For derivatives that must not go through the eager loops."""

    def refuse(*_):
        raise AssertionError("the eager loops ran")

    for cell in ops.CELLS:
        monkeypatch.setattr(reference, cell, refuse)


def penalty(module, x, sizes):
    """Gradients of |d loss / d (x, weights)|^2 in the same and in the loss's weighting."""
    data = x if sizes is None else nn.utils.rnn.PackedSequence(x, sizes)
    y, *finals = flat(module(data))
    y = y if sizes is None else y.data
    scale = torch.ones((), device=x.device, dtype=x.dtype, requires_grad=True)
    loss = (scale * y).float().pow(3).sum() + sum((scale * s).float().sin().sum() for s in finals)
    leaves = [x, *module.parameters()]
    first = grad(loss, leaves, create_graph=True)
    return dict(enumerate(grad(sum(g.float().square().sum() for g in first), [*leaves, scale])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name, options", MODULES)
def test_gradients_of_gradients(name, options, packed, dtype, device):
    """Of both directions and two layers, no worse than twice torch.nn's own second derivatives."""
    if "nonlinearity" in options and dtype.itemsize == 2:
        pytest.skip("the rounding of 16 bits chooses the side of some ReLU, and each implementation another one")
    options = {"input_size": 9, "hidden_size": 21, "num_layers": 2, "bidirectional": True, **options}
    module, theirs = (m.to(device, dtype) for m in make_modules(name, **options))
    lengths = ragged_lengths(6, 8)
    sizes = torch.tensor([sum(n > t for n in lengths) for t in range(8)]) if packed else None
    x = torch.randn(*((sum(lengths),) if packed else (8, 6)), 9).to(device, dtype)
    wide = getattr(nn, name)(**options).double()
    wide.load_state_dict({k: v.cpu().double() for k, v in module.state_dict().items()})
    # cuDNN has no second derivatives, and on a CPU torch.nn has them in 16 bits with less than their accuracy.
    found = on_cpu(penalty(module, x.clone().requires_grad_(), sizes))
    nn_result = None if device.type == "cuda" else penalty(theirs, x.clone().requires_grad_(), sizes)
    expected = penalty(wide, x.cpu().double().requires_grad_(), sizes)
    slack = 1 if nn_result is not None else 4
    assert_close_to_reference(found, nn_result, expected, what=f"{name} {options}", slack=slack)


@pytest.mark.parametrize("name, options", MODULES)
def test_the_kernels_do_it(name, options, no_loops, device):
    """Double backward, Hessian-vector products both ways, and forward mode run no eager loop."""
    module, theirs = (
        m.to(device) for m in make_modules(name, input_size=4, hidden_size=7, dtype=torch.float64, **options)
    )
    x, v = torch.randn(2, 5, 3, 4, dtype=torch.float64, device=device)
    parameters = dict(module.named_parameters())

    def loss(x, parameters, module=module):
        return functional_call(module, parameters, (x,))[0].pow(3).sum()

    def product(module):
        leaf = x.clone().requires_grad_()
        (first,) = grad(module(leaf)[0].pow(3).sum(), leaf, create_graph=True)
        return grad((first * v).sum(), [leaf, *module.parameters()])

    found, expected = product(module), product(theirs.cpu()) if device.type == "cpu" else product(module)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-11
    detached = {k: p.detach() for k, p in parameters.items()}
    by_jvp = jvp(lambda x: func_grad(loss)(x, detached), (x,), (v,))[1]
    by_grads = func_grad(lambda x: (func_grad(loss)(x, detached) * v).sum())(x)
    assert relative_error(by_jvp, found[0]) < 1e-11
    assert relative_error(by_grads, found[0]) < 1e-11
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v))[0]).tangent
    step = 1e-6
    with torch.no_grad():
        difference = (module(x + step * v)[0] - module(x - step * v)[0]) / (2 * step)
    assert relative_error(tangent, difference) < 1e-7


@pytest.mark.parametrize("name, options", MODULES)
def test_without_rows(name, options, device):
    """A batch of no sequences has zero second derivatives in the weights."""
    module = getattr(fusedrnn, name)(3, 6, **options).to(device)
    x = torch.randn(4, 0, 3, device=device, requires_grad=True)
    (first,) = grad(module(x)[0].sum(), x, create_graph=True)
    second = grad(first.sum() + 0 * sum(p.sum() for p in module.parameters()), list(module.parameters()))
    assert all(g.abs().sum() == 0 for g in second)


def test_modified_after_forward(device):
    """A weight changed between the two backward passes is an error, as everywhere in autograd."""
    module = fusedrnn.LSTM(3, 4).to(device)
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    (first,) = grad(module(x)[0].sum(), x, create_graph=True)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
