"""The layer ops against the float64 reference, no worse than twice torch.nn: every cell, dtype, shape and option.

Runs under every instruction set the processor has, with random upstream gradients for all outputs.
"""

import itertools

import pytest
import torch
from conftest import assert_close_to_reference, on_cuda_kernels
from helpers import (
    DTYPES,
    GATES,
    SAVED,
    VARIANTS,
    assert_same_bits,
    backward_ours,
    batch_sizes_of,
    fair_results,
    forward_ours,
    in_float64,
    layer_op,
    make_gradients,
    make_inputs,
    ours,
    ragged_lengths,
    variant,
    with_torch_nn,
)

# (T, N, I, H): around the widths of vectors, tiles and panels, and down to one of everything
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 5, 7),
    (17, 1, 64, 16),
    (2, 13, 5, 17),
    (17, 3, 1, 33),
    (17, 12, 64, 64),
    (2, 33, 64, 100),
    (17, 6, 5, 129),
    (64, 1, 5, 33),
    (64, 2, 64, 64),
    (1, 7, 64, 129),
    (1, 1, 5, 100),
    (17, 33, 1, 16),
    (64, 3, 5, 1),
]
# large enough to cross every way of splitting the work: over the batch, over hidden units, in chunks of time
LARGE = [
    (20, 64, 256, 256),
    (5, 1, 512, 512),
    (7, 130, 33, 48),
    (300, 8, 32, 40),
    (3, 5, 700, 300),
]


def check(case, device):
    assert_close_to_reference(*fair_results(case, device), what=str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_shapes(name, shape, dtype, device, capability):
    T, N, I, H = shape
    index = SHAPES.index(shape) + VARIANTS.index(name)
    options = {"directions": 1 + index % 2, "bias": index % 3 != 0, "states": index % 4 != 0}
    check(variant(name, T=T, N=N, I=I, H=H, dtype=dtype, **options), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_ragged_shapes(name, shape, dtype, device, capability):
    T, N, I, H = shape
    index = SHAPES.index(shape) + VARIANTS.index(name)
    options = {"directions": 2 - index % 2, "bias": index % 3 != 1, "states": index % 4 != 1}
    case = variant(name, T=T, I=I, H=H, dtype=dtype, lengths=ragged_lengths(N, T), **options)
    check(case, device)


LENGTHS = [None, (4, 3, 3, 1), (4, 4, 4), (5,), (3, 1, 1, 1, 1, 1, 1, 1), (9, 2)]
OPTIONS = list(itertools.product((1, 2), (True, False), (True, False), LENGTHS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_all_options(name, dtype, device, capability):
    for directions, bias, states, lengths in OPTIONS:
        options = {"directions": directions, "bias": bias, "states": states, "lengths": lengths}
        check(variant(name, T=4, N=3, I=3, H=6, dtype=dtype, **options), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_large(name, shape, dtype, device, capability):
    T, N, I, H = shape
    index = LARGE.index(shape) + VARIANTS.index(name)
    check(variant(name, T=T, N=N, I=I, H=H, dtype=dtype, directions=1 + index % 2), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_large_ragged(name, dtype, device, capability):
    """Sequence by sequence the batch shrinks from one that fills all tiles to a single row."""
    case = variant(name, I=40, H=96, lengths=ragged_lengths(70, 90), directions=2, dtype=dtype)
    check(case, device)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_of_equal_lengths_is_padded(name, device, capability):
    padded = variant(name, T=6, N=5, I=7, H=20, directions=2)
    packed = padded.but(lengths=(6,) * 5)
    inputs, gradients = make_inputs(padded, device), make_gradients(padded, device)
    as_rows = inputs.map(lambda t: t)
    as_rows.x = inputs.x.flatten(0, 1)
    as_rows.batch_sizes = batch_sizes_of(packed.lengths)
    one = ours(padded, inputs, gradients)
    other = ours(packed, as_rows, [gradients[0].flatten(0, 1), *gradients[1:]])
    assert_same_bits(one, {**other, "y": other["y"].view_as(one["y"]), "dx": other["dx"].view_as(one["dx"])})


@pytest.mark.parametrize("lengths", [None, (5, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_as_promised(name, dtype, lengths, device):
    """Shapes, dtypes and freshness of what an op gives, saved or not."""
    case = variant(name, T=5, N=3, dtype=dtype, directions=2, lengths=lengths)
    inputs = make_inputs(case, device)
    given = [t for t in (inputs.x, inputs.h0, inputs.c0, *inputs.weights) if t is not None]
    before = [t.clone() for t in given]
    D, N, H, P = 2, 3, case.H, case.output
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for save in (False, True):
        y, h_n, c_n, gates, cells = outputs = layer_op(case.cell)(*inputs.arguments(), save)
        assert y.shape == ((5, 3, D * P) if lengths is None else (11, D * P))
        assert h_n.shape == (D, N, P)
        assert c_n.shape == ((D, N, H) if case.cell == "lstm" else (0,))
        slots = SAVED[case.cell] + (case.P > 0)  # a projection also keeps what it projects, o tanh(c)
        assert gates.shape == ((case.rows, D, slots, H) if save else (0,))
        assert cells.shape == ((case.rows, D, H) if save and case.cell == "lstm" else (0,))
        assert y.dtype == h_n.dtype == c_n.dtype == gates.dtype == dtype
        if cells.numel():
            assert cells.dtype == state_dtype
        assert all(t.is_contiguous() and t.device == device for t in outputs)
        storages = {t.untyped_storage().data_ptr() for t in (*outputs, *given) if t.numel()}
        assert len(storages) == sum(t.numel() > 0 for t in (*outputs, *given)), "outputs share memory"
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input was changed"


@pytest.mark.parametrize("name", VARIANTS)
def test_saving_does_not_change_the_result(name, device, capability):
    for shape in ((1, 1, 8, 8), (9, 1, 33, 64), (6, 14, 16, 40)):
        T, N, I, H = shape
        case = variant(name, T=T, N=N, I=I, H=H, directions=2)
        inputs, gradients = make_inputs(case, device), make_gradients(case, device)
        expected = [way(case, inputs, gradients) for way in (with_torch_nn, in_float64)]
        names = list(forward_ours(case, inputs))
        expected = [{n: e[n] for n in names} for e in expected]
        assert_close_to_reference(forward_ours(case, inputs, save=False), *expected, what=str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["lstm", "lstm_proj", "gru"])
def test_saved_gates(name, dtype, device, capability, request):
    """What is saved for the backward: the activated gates (and the GRU's recurrent half of n)."""
    case = variant(name, T=1, N=3, I=4, H=21, dtype=dtype)
    inputs = make_inputs(case, device)
    _, _, c_n, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    double = inputs.map(torch.Tensor.double)
    w_ih, w_hh, b_ih, b_hh = double.weights[:4]
    wx = (double.x[0] @ w_ih.T + b_ih).chunk(GATES[case.cell], 1)
    rh = (double.h0[0] @ w_hh.T + b_hh).chunk(GATES[case.cell], 1)
    if case.cell == "lstm":
        i, f, g, o = (a + b for a, b in zip(wx, rh, strict=True))
        expected = [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]
        c = expected[1] * double.c0[0] + expected[0] * expected[2]
        if on_cuda_kernels(request.config):  # where wx is rounded to the dtype
            cells = cells.to(dtype)
        assert_close_to_reference({"cells": cells[:, 0], "c_n": c_n[0]}, None, {"cells": c, "c_n": c})
    else:
        r, z = (wx[0] + rh[0]).sigmoid(), (wx[1] + rh[1]).sigmoid()
        expected = [r, z, (wx[2] + r * rh[2]).tanh(), rh[2]]
    found = {f"slot {i}": gates[:, 0, i] for i in range(4)}
    assert_close_to_reference(found, None, {f"slot {i}": e for i, e in enumerate(expected)})


@pytest.mark.parametrize("name", VARIANTS)
def test_large_values_saturate(name, device, capability):
    """Gates far out on their plateaus: no overflow, no nan, forward or backward."""
    if name == "rnn_relu":
        pytest.skip("a ReLU has no plateau")
    for dtype in DTYPES:
        case = variant(name, T=4, N=9, I=5, H=33, dtype=dtype)
        inputs = make_inputs(case, device)
        inputs.x = inputs.x * 3000
        gradients = make_gradients(case, device)
        found = ours(case, inputs, gradients)
        assert all(t.isfinite().all() for t in found.values()), str(case)
        # Outputs only: the derivatives there, 1 - tanh^2 and such, are what the rounding left.
        results = (found, with_torch_nn(case, inputs, gradients), in_float64(case, inputs, gradients))
        picked = [{n: t for n, t in r.items() if n in ("y", "h_n", "c_n")} for r in results]
        assert_close_to_reference(*picked, what=str(case))


@pytest.mark.parametrize("name", VARIANTS)
def test_nan_stays_in_its_sequence(name, device, capability):
    case = variant(name, T=4, N=9, I=5, H=33)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    clean = forward_ours(case, inputs)["y"]
    inputs.x[2, 4] = float("nan")
    y = forward_ours(case, inputs)["y"]
    others = [n for n in range(9) if n != 4]
    assert torch.equal(y[:, others], clean[:, others])
    assert torch.equal(y[:2, 4], clean[:2, 4])
    assert y[2:, 4].isnan().all()
    assert backward_ours(case, inputs, gradients)["d0"].isnan().any()
