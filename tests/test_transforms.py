"""torch.func's transforms, forward mode and batched gradients, in float64."""

import pytest
import torch
from conftest import assert_close_to_reference
from helpers import VARIANTS, make_inputs, variant
from test_gradients import MODULES, as_function, flat, make_modules
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad, functional, grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.func import grad as func_grad
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import autograd, cells, reference

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"T": 3, "N": 2, "I": 2, "H": 3, "dtype": torch.float64}
KINDS = {
    "padded": {},
    "zerostate": {"states": False, "bias": False},
    "packed_bidirectional": {"lengths": (3, 1), "directions": 2},
}
ENTRIES = 4  # of a mapped dimension


def ours_and_reference(case, device):
    """Two functions of the same tensors, x first, that give the same outputs; the tensors; how many aren't weights."""
    inputs = make_inputs(case, device)
    ours, tensors = as_function(case, inputs)
    count = len(tensors) - len(inputs.weights)

    def expected(x, *rest):
        h0, c0 = (*rest[: count - 1], None, None)[:2]
        layer = getattr(reference, case.cell)
        outputs = layer(x, h0, c0, rest[count - 1 :], inputs.batch_sizes, inputs.directions)
        return outputs[: 3 if case.cell == "lstm" else 2]

    return ours, expected, [t.detach() for t in tensors], count


def assert_same(found, expected, what=""):
    found, expected = (dict(enumerate(tree_leaves(results))) for results in (found, expected))
    assert_close_to_reference(found, None, expected, what=what)


def scaled(t, dim=0):
    """One more dimension of several multiples of a tensor."""
    return torch.stack([t * (1 - 0.3 * k) for k in range(ENTRIES)], dim)


def loss_of(f):
    return lambda *tensors: sum(t.pow(3).sum() for t in f(*tensors))


def mapped(f, tensors, which, transform=lambda f: f):
    """vmap of the transformed function over some of its arguments."""
    in_dims = tuple(0 if k in which else None for k in range(len(tensors)))
    return vmap(transform(f), in_dims)(*[scaled(t) if k in which else t for k, t in enumerate(tensors)])


def every(f, tensors):
    return tuple(range(len(tensors)))


TRANSFORMS = {
    "vmap of the data": lambda f, ts, n: mapped(f, ts, range(n)),
    "vmap of x": lambda f, ts, n: mapped(f, ts, [0]),
    "vmap of the weights": lambda f, ts, n: mapped(f, ts, range(n, len(ts))),
    "vmap of one weight": lambda f, ts, n: mapped(f, ts, [0, n + 1]),
    "vmap of other dimensions": lambda f, ts, n: vmap(lambda x: f(x, *ts[1:]), -1, 1)(scaled(ts[0], -1)),
    "vmap of vmap": lambda f, ts, n: vmap(vmap(lambda x: f(x, *ts[1:])))(scaled(scaled(ts[0]))),
    "grad": lambda f, ts, n: func_grad(loss_of(f), every(f, ts))(*ts),
    "vmap of grad": lambda f, ts, n: mapped(f, ts, range(n), lambda f: func_grad(loss_of(f), every(f, ts))),
    "grad of vmap": lambda f, ts, n: func_grad(lambda *ts: mapped(loss_of(f), ts, [0]).sum(), every(f, ts))(*ts),
    "vjp": lambda f, ts, n: vjp(f, *ts)[1](tuple(map(torch.ones_like, f(*ts)))),
    "jvp": lambda f, ts, n: jvp(f, tuple(ts), tuple(t.sin() for t in ts)),
    "jvp of x": lambda f, ts, n: jvp(lambda x: f(x, *ts[1:]), (ts[0],), (ts[0],)),
    "jvp of vmap": lambda f, ts, n: jvp(lambda *ts: mapped(f, ts, range(n)), tuple(ts), tuple(ts)),
    "jacrev": lambda f, ts, n: jacrev(f, every(f, ts))(*ts),
    "jacfwd": lambda f, ts, n: jacfwd(f, every(f, ts))(*ts),
    "hessian": lambda f, ts, n: hessian(loss_of(f), (0, n))(*ts),
    "jacrev of jacrev": lambda f, ts, n: jacrev(jacrev(loss_of(f), (0, n)), (0, n + 1))(*ts),
    "jacrev of jacfwd": lambda f, ts, n: jacrev(jacfwd(loss_of(f)))(*ts),
    "jacfwd of jacfwd": lambda f, ts, n: jacfwd(jacfwd(loss_of(f)))(*ts),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_transforms(name, kind, transform, device):
    ours, expected, tensors, count = ours_and_reference(variant(name, **SHAPE, **KINDS[kind]), device)
    results = [TRANSFORMS[transform](f, tensors, count) for f in (ours, expected)]
    assert_same(*results)


@pytest.mark.parametrize("name", VARIANTS)
def test_transforms_without_gradients(name, device):
    """Under no_grad vmap calls the ops themselves, and forward mode goes on."""
    ours, expected, tensors, count = ours_and_reference(variant(name, **SHAPE), device)
    for transform in ("vmap of the data", "vmap of the weights", "vmap of vmap", "jvp", "jvp of x"):
        with torch.no_grad():
            results = [TRANSFORMS[transform](f, tensors, count) for f in (ours, expected)]
        assert_same(*results, what=transform)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lstm", "lstm_proj"])
def test_transforms_of_every_c(name, kind, device):
    case = variant(name, **SHAPE, **KINDS[kind])
    inputs = make_inputs(case, device)
    sizes, directions = inputs.batch_sizes, inputs.directions

    def ours(*tensors):
        y, _, _, _, cells = autograd.apply("lstm", directions, sizes, True, tensors[0], None, None, *tensors[1:])
        return y, cells

    def expected(*tensors):
        y, _, _, cells = reference.lstm(tensors[0], None, None, tensors[1:], sizes, directions)
        return y, cells

    for transform in ("vmap of x", "vmap of the weights", "grad of vmap", "jvp", "jacrev", "jacfwd", "hessian"):
        results = [TRANSFORMS[transform](f, [inputs.x, *inputs.weights], 1) for f in (ours, expected)]
        assert_same(*results, what=transform)


@pytest.mark.parametrize("name", VARIANTS)
def test_vmap_of_the_backward_op(name, device):
    case = variant(name, **SHAPE)
    inputs = make_inputs(case, device)
    op, backward = (getattr(torch.ops.fusedrnn, case.cell + end) for end in ("", "_backward"))
    y, _, _, gates, cells = op(*inputs.arguments(), True)
    for needs in (0b11, 0b11001):  # dx and dh0; dx, dw_ih and dw_hh

        def gradients(dy, needs=needs):
            dx, dh0, _, dweights = backward(dy, None, None, None, *inputs.arguments(), y, gates, cells, needs)
            return dx, dh0, dweights[:2]

        found = vmap(gradients)(scaled(y))
        for k in range(ENTRIES):
            assert_same([t[k] for t in tree_leaves(found)], gradients(scaled(y)[k]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck_forward_and_batched(name, kind, device):
    case = variant(name, **SHAPE, **KINDS[kind])
    run, tensors = as_function(case, make_inputs(case, device))
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(run, tensors, **modes, fast_mode=kind != "zerostate")
    modes = {"check_fwd_over_rev": True, "check_batched_grad": True}
    assert gradgradcheck(run, tensors, **modes, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_jvp_dtypes(name, dtype, device):
    """Tangents come in their tensors' dtype and are computed in float32."""
    case = variant(name, **{**SHAPE, "dtype": dtype})
    ours, expected, tensors, _ = ours_and_reference(case, device)
    _, found = jvp(ours, tuple(tensors), tuple(tensors))
    assert {t.dtype for t in found} == {dtype}
    wide = tuple(t.double() for t in tensors)
    assert_same(found, jvp(expected, wide, wide)[1])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_batched_gradients(name, kind, create_graph, device):
    """is_grads_batched, and through it once more."""
    ours, expected, tensors, count = ours_and_reference(variant(name, **SHAPE, **KINDS[kind]), device)
    for wanted in (slice(1), slice(count), slice(None)):
        results = []
        for f in (ours, expected):
            leaves = [t.clone().requires_grad_() for t in tensors]
            outputs = f(*leaves)
            upstream = [scaled(o.detach()) for o in outputs]
            options = {"is_grads_batched": True, "create_graph": create_graph}
            found = grad(outputs, leaves[wanted], upstream, **options)
            if create_graph:
                found = grad(sum(t.pow(2).sum() for t in found), leaves)
            results.append(found)
        assert_same(*results)


@pytest.mark.parametrize("name", VARIANTS)
def test_vectorized_jacobians(name, device):
    ours, expected, tensors, _ = ours_and_reference(variant(name, **SHAPE), device)
    for options in ({}, {"strategy": "forward-mode"}):
        results = [functional.jacobian(f, tuple(tensors), vectorize=True, **options) for f in (ours, expected)]
        assert_same(*results, what=str(options))
    for options in ({}, {"outer_jacobian_strategy": "forward-mode"}):
        results = [
            functional.hessian(lambda x, f=f: loss_of(f)(x, *tensors[1:]), tensors[0], vectorize=True, **options)
            for f in (ours, expected)
        ]
        assert_same(*results, what=str(options))


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", [*MODULES, ("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {})])
def test_per_sample_gradients(name, options, device):
    layers = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    module, _ = make_modules(name, input_size=3, hidden_size=4, dtype=torch.float64, device=device, **layers, **options)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    samples = torch.randn(ENTRIES, *([] if name.endswith("Cell") else [5]), 1, 3, dtype=torch.float64, device=device)

    def loss(parameters, sample):
        output = functional_call(module, parameters, sample)
        return sum(t.pow(3).sum() for t in tree_leaves(output))

    found = vmap(func_grad(loss), (None, 0))(parameters, samples)
    for k, sample in enumerate(samples):
        module.zero_grad()
        loss(dict(module.named_parameters()), sample).backward()
        assert_same([found[n][k] for n in parameters], [p.grad for p in module.parameters()])


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 2, 0), (2, 0, None), (None, 1, None)], ids=str)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_mapped_inference_of_cells(name, in_dims, device):
    """Without gradients a cell is one op, mapped over the input, the states and a weight."""
    cell = getattr(fusedrnn, name)(3, 4, device=device)
    x, h, c = (torch.randn(2, size, device=device) for size in (3, 4, 4))
    plain = x, h, cell.weight_hh
    mapped = [
        None if d is None else torch.randn(ENTRIES, *t.shape, device=device)
        for t, d in zip(plain, in_dims, strict=True)
    ]
    given = [t if m is None else m.movedim(0, d) for t, m, d in zip(plain, mapped, in_dims, strict=True)]

    def run(x, h, weight):
        states = (h, c) if name == "LSTMCell" else h
        return tuple(tree_leaves(functional_call(cell, {"weight_hh": weight}, (x, states))))

    with torch.no_grad():
        found = vmap(run, in_dims)(*given)
        for k in range(ENTRIES):
            entry = [t if m is None else m[k] for t, m in zip(plain, mapped, strict=True)]
            assert_same([t[k] for t in found], run(*entry))


@pytest.mark.parametrize("name, options", MODULES)
def test_ensemble(name, options, device):
    """torch.func.stack_module_state: one call for several models, and its gradients."""
    options = {"input_size": 3, "hidden_size": 4, "batch_first": True, "dtype": torch.float64, **options}
    models = [make_modules(name, seed=k, **options)[0].to(device) for k in range(3)]
    x = torch.randn(2, 5, 3, dtype=torch.float64, device=device)
    parameters, buffers = torch.func.stack_module_state(models)
    base = models[0]
    outputs = vmap(lambda p, b: flat(functional_call(base, (p, b), x)))(parameters, buffers)
    sum(t.pow(3).sum() for t in outputs).backward()
    for k, model in enumerate(models):
        expected = flat(model(x))
        assert_same([t[k] for t in outputs], expected)
        sum(t.pow(3).sum() for t in expected).backward()
        assert_same([p.grad[k] for p in parameters.values()], [p.grad for p in model.parameters()])


def test_vmap_of_single_sequences(device):
    """Of models written for one sequence; of nothing, an error."""
    module = fusedrnn.LSTM(3, 4, num_layers=2, device=device)
    x = torch.randn(ENTRIES, 5, 3, device=device)
    found, expected = vmap(module)(x), module(x.transpose(0, 1))
    assert torch.equal(found[0], expected[0].transpose(0, 1))
    assert torch.equal(found[1][1], expected[1][1].transpose(0, 1))
    with pytest.raises(ValueError, match="at least one entry"):
        vmap(module)(x[:0])


def test_vmap_of_lengths(device):
    """The entries would have different numbers of rows; lengths that are the same in all of them are no trouble."""
    module = fusedrnn.GRU(3, 4, batch_first=True, device=device)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x, lengths = torch.randn(ENTRIES, 2, 5, 3, device=device), torch.randint(1, 6, (ENTRIES, 2))

    def loss(parameters, x, options):
        return functional_call(module, parameters, x, options)[0].pow(2).sum()

    for options in ({"lengths": lengths}, {"reset": torch.zeros(ENTRIES, 2, 5, dtype=torch.bool, device=device)}):
        with pytest.raises(NotImplementedError, match="vmap over lengths= or reset= is not supported"):
            vmap(func_grad(loss), (None, 0, 0))(parameters, x, options)
    found = vmap(func_grad(loss), (None, 0, None))(parameters, x, {"lengths": lengths[0]})
    for k in range(ENTRIES):
        expected = func_grad(loss)(parameters, x[k], {"lengths": lengths[0]})
        torch.testing.assert_close({n: g[k] for n, g in found.items()}, expected)


def test_cells_keep_nothing_of_a_transform(device):
    """What a cell remembers of a batch size is no tensor of a transform's, which is dead when that has ended."""
    cell = fusedrnn.GRUCell(3, 4, device=device).requires_grad_(False)
    x, h = torch.randn(91, 3, device=device), torch.zeros(91, 4, device=device)
    cells._one_step.pop(91, None)
    func_grad(lambda x: cell(x, h).sum())(x)
    assert 91 not in cells._one_step
    cell(x, h)
    assert not is_functorch_wrapped_tensor(cells._one_step[91])


def test_tensors_that_have_left_their_transform(device):
    """They are plain tensors to layers: what made them is no part of the graph."""
    module, leaked = fusedrnn.GRU(3, 4, device=device), []

    def leaking(x):
        leaked.append(x * 2)
        return leaked[-1].sum()

    x = torch.randn(5, 2, 3, device=device)
    func_grad(leaking)(x)
    for _ in range(2):  # a graph could go through the leak once
        module(leaked[0])[0].sum().backward()
    found = [p.grad / 2 for p in module.parameters()]
    module.zero_grad()
    module(x * 2)[0].sum().backward()
    torch.testing.assert_close(found, [p.grad for p in module.parameters()])
    vmap(leaking)(x)
    for grad_mode in (torch.enable_grad(), torch.no_grad()):
        with grad_mode, pytest.raises(RuntimeError):
            module(leaked[1])


def test_dropout_of_mapped_entries(device):
    """The mapped entries get masks of their own, or the same, as vmap is told."""
    module = fusedrnn.GRU(3, 4, num_layers=2, dropout=0.5, device=device)
    x = torch.randn(5, 2, 3, device=device).expand(ENTRIES, 5, 2, 3)
    for randomness, distinct in (("different", ENTRIES), ("same", 1)):
        y, _ = vmap(module, randomness=randomness)(x)
        assert len({tuple(entry.flatten().tolist()) for entry in y}) == distinct


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name, options", [*MODULES, ("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {})])
def test_dual_tensors(name, options, gradients, device):
    """torch.autograd.forward_ad: the tangents are those of torch.func.jvp, whatever the grad mode."""
    module, _ = make_modules(name, input_size=3, hidden_size=4, dtype=torch.float64, device=device, **options)
    module.requires_grad_(False)
    shape, states = ((2, 3), (2, 4)) if name.endswith("Cell") else ((5, 2, 3), (1, 2, options.get("proj_size", 4)))
    x, h = (torch.randn(s, dtype=torch.float64, device=device) for s in (shape, states))
    c = torch.randn(*states[:-1], 4, dtype=torch.float64, device=device)

    def run(x):
        return tree_leaves(module(x, (h, c) if name.startswith("LSTM") else h))

    with gradients(), forward_ad.dual_level():
        found = [forward_ad.unpack_dual(t).tangent for t in run(forward_ad.make_dual(x, x.sin()))]
    assert_same(found, jvp(run, (x,), (x.sin(),))[1])
