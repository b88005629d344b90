"""The layer ops at their edges: nothing to do, part of the gradients, odd memory layouts, threads, repetition."""

import pytest
import torch
from conftest import assert_close_to_reference, on_cuda_kernels
from helpers import (
    DTYPES,
    VARIANTS,
    Case,
    assert_same_bits,
    backward_ours,
    fair_results,
    forward_ours,
    four_results,
    in_float64,
    layer_backward_op,
    layer_op,
    make_gradients,
    make_inputs,
    needs_of,
    ours,
    ragged_lengths,
    variant,
    weight_shapes,
    with_torch_nn,
)

from fusedrnn import ops

# ---- nothing to do -------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [True, False], ids=["states", "zerostate"])
@pytest.mark.parametrize("T, N", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_empty(name, dtype, T, N, states, device, capability):
    """No step: the states pass through. No batch: everything is empty and weight gradients are zero."""
    case = variant(name, T=T, N=N, directions=2, states=states, dtype=dtype)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    assert_close_to_reference(ours(case, inputs, gradients), None, in_float64(case, inputs, gradients))
    for save in (False, True):
        gates, cells = layer_op(case.cell)(*inputs.arguments(), save)[3:]
        assert gates.numel() == 0 and cells.numel() == 0


@pytest.mark.parametrize("cell, P", [("lstm", 0), ("lstm", 2), ("gru", 0), ("rnn_tanh", 0)])
def test_no_units(cell, P, device, capability):
    case = Case(cell, T=3, N=2, H=0, P=P, directions=2)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    assert_close_to_reference(ours(case, inputs, gradients), None, in_float64(case, inputs, gradients))


@pytest.mark.parametrize("N", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_no_features(name, dtype, N, device, capability):
    """Nothing but the state and the biases go into a step."""
    case = variant(name, T=3, N=N, I=0, H=33, directions=2, dtype=dtype)
    assert_close_to_reference(*four_results(case, device), what=str(case))


@pytest.mark.parametrize("name", VARIANTS)
def test_one_of_everything(name, device, capability):
    for dtype in DTYPES:
        case = variant(name, T=1, N=1, I=1, H=1, dtype=dtype)
        assert_close_to_reference(*fair_results(case, device), what=str(case))


# ---- part of the gradients -----------------------------------------------------------------------

LENGTHS = [None, (5, 4, 4, 1)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_single_need(name, lengths, device, capability):
    """Each gradient alone, each left out, and none: what is asked for is right, what isn't is empty."""
    case = variant(name, T=5, N=4, I=6, H=20, directions=2, lengths=lengths)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    expected = in_float64(case, inputs, gradients)
    whole = backward_ours(case, inputs, gradients)
    bits = {"dx": 1, "dh0": 2, "dc0": 4, **{f"d{i}": 8 << i for i in range(len(inputs.weights))}}
    everything = needs_of(inputs)
    for needs in [0] + [bits[n] for n in whole] + [everything & ~bits[n] for n in whole]:
        found = backward_ours(case, inputs, gradients, needs)
        asked = [n for n in whole if needs & bits[n]]
        assert all(found[n].numel() == 0 for n in whole if n not in asked), f"needs {needs:b}"
        picked = [{n: source[n] for n in asked} for source in (found, whole, expected)]
        assert_close_to_reference(*picked, what=f"needs {needs:b}")


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_missing_upstream_gradients(name, lengths, device, capability):
    """None stands for zeros, for each of dy, dh_n, dc_n alone and together."""
    case = variant(name, T=5, N=4, I=6, H=20, directions=2, lengths=lengths)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    for mask in range(8):
        some = [g if mask >> i & 1 else None for i, g in enumerate(gradients)]
        expected, nn_result = in_float64(case, inputs, some), with_torch_nn(case, inputs, some)
        found = backward_ours(case, inputs, some)
        picked = [{n: source[n] for n in found} for source in (found, nn_result, expected)]
        assert_close_to_reference(*picked, what=f"given {mask:b}")


@pytest.mark.parametrize("name", VARIANTS)
def test_state_gradients_without_states(name, device, capability):
    """dh0 and dc0 are there for the asking even where the states were left out."""
    case = variant(name, T=4, N=3, H=19, directions=2)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    zeros = inputs.map(lambda t: t)
    zeros.h0 = torch.zeros_like(inputs.h0)
    zeros.c0 = None if inputs.c0 is None else torch.zeros_like(inputs.c0)
    without = inputs.map(lambda t: t)
    without.h0 = without.c0 = None
    expected = in_float64(case, zeros, gradients)
    y, _, _, gates, cells = layer_op(case.cell)(*without.arguments(), True)
    needs = 6 if case.cell == "lstm" else 2
    arguments = (*gradients, *without.arguments(), y, gates, cells, needs)
    dx, dh0, dc0, _ = layer_backward_op(case.cell)(*arguments)
    assert [r.shape for r in ops._fake_backward(case.cell, *arguments)[:3]] == [r.shape for r in (dx, dh0, dc0)]
    found = {"dh0": dh0, "dc0": dc0} if case.cell == "lstm" else {"dh0": dh0}
    assert_close_to_reference(found, None, {n: expected[n] for n in found})


@pytest.mark.parametrize("name", VARIANTS)
def test_an_op_called_with_parameters(name, device, capability):
    """Without the autograd.Function, and with gradients on: what requires gradients is only numbers to an op."""
    case = variant(name, T=4, N=3, H=19, directions=2)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    parameters = inputs.map(lambda t: t.clone().requires_grad_())
    assert_same_bits(ours(case, parameters, gradients), ours(case, inputs, gradients))


# ---- memory layouts ------------------------------------------------------------------------------


def odd_address(t):
    """The same values one element into a larger buffer: no alignment."""
    buffer = t.new_empty(t.numel() + 1)
    return buffer[1:].view(t.shape).copy_(t)


def column_major(t):
    return t if t.dim() < 2 else t.transpose(0, -1).contiguous().transpose(0, -1)


def strided(t):
    """Every second element of the last dimension."""
    return torch.stack([t, t + 1], -1).flatten(-2)[..., ::2]


def batch_first(t):
    return t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)


def expanded_first(t):
    """Stride 0: the first slice repeated along the first dimension."""
    return t[:1].expand(t.shape)


def expanded_second(t):
    return t if t.dim() < 2 else t[:, :1].expand(t.shape)


LAYOUTS = [odd_address, column_major, strided, batch_first, expanded_first, expanded_second]


@pytest.mark.parametrize("what", ["x", "states", "weights", "gradients"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_memory_layouts(name, layout, what, device, capability):
    for lengths in (None, (6, 5, 5, 2, 1)):
        for T, N in ((1, 1), (6, 5)) if lengths is None else ((6, 5),):
            case = variant(name, T=T, N=N, I=12, H=18, directions=2, lengths=lengths)
            inputs, gradients = make_inputs(case, device), make_gradients(case, device)
            if what == "x":
                inputs.x = layout(inputs.x)
            elif what == "states":
                inputs.h0 = layout(inputs.h0)
                inputs.c0 = None if inputs.c0 is None else layout(inputs.c0)
            elif what == "weights":
                inputs.weights = [layout(w) for w in inputs.weights]
            else:
                gradients = [None if g is None else layout(g) for g in gradients]
            plain = inputs.map(lambda t: t.contiguous().clone())
            plain_gradients = [None if g is None else g.contiguous().clone() for g in gradients]
            found, baseline = ours(case, inputs, gradients), ours(case, plain, plain_gradients)
            expected = in_float64(case, plain, plain_gradients)
            assert_close_to_reference(found, baseline, expected, what=str(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_memory_layouts_of_all_inputs(name, layout, dtype, device, capability):
    case = variant(name, T=6, N=5, I=12, H=18, directions=2, dtype=dtype)
    inputs = make_inputs(case, device).map(layout)
    gradients = [None if g is None else layout(g) for g in make_gradients(case, device)]
    plain = inputs.map(lambda t: t.contiguous().clone())
    plain_gradients = [None if g is None else g.contiguous().clone() for g in gradients]
    baseline = ours(case, plain, plain_gradients)
    expected = in_float64(case, plain, plain_gradients)
    assert_close_to_reference(ours(case, inputs, gradients), baseline, expected, what=str(case))


def test_one_tensor_in_many_places(device, capability):
    """Tied weights: the same tensor for both directions, and for the input and recurrent matrix."""
    case = variant("gru", T=5, N=3, I=8, H=8, directions=2)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    w, b = inputs.weights[0], inputs.weights[2]
    inputs.weights = [w, w, b, b] * 2
    expected, nn_result = in_float64(case, inputs, gradients), with_torch_nn(case, inputs, gradients)
    assert_close_to_reference(ours(case, inputs, gradients), nn_result, expected)


# ---- repetition and threads ----------------------------------------------------------------------

SPLITS = [
    variant("lstm", T=1, N=1, I=16, H=16),
    variant("lstm", T=9, N=1, I=64, H=129),
    variant("gru", T=7, N=2, I=20, H=64, directions=2),
    variant("lstm", T=12, N=37, I=33, H=48),
    variant("rnn_tanh", T=40, N=16, I=40, H=40, directions=2),
    variant("lstm_proj", T=7, N=9, I=33, H=70),
    variant("gru", I=32, H=65, lengths=ragged_lengths(33, 30)),
    variant("rnn_relu", I=8, H=33, lengths=ragged_lengths(5, 60), directions=2),
    variant("lstm", I=30, H=96, lengths=ragged_lengths(19, 40), directions=2),
    variant("gru", T=5, N=130, I=48, H=48),
]
# more rows than the backward pass takes at a time
LONG = [
    variant("lstm_proj", T=70, N=37, I=9, H=70, directions=2),
    variant("gru", I=8, H=33, lengths=ragged_lengths(70, 90), directions=2),
    variant("rnn_tanh", T=3, N=2100, I=5, H=20),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_same_bits_every_time(case, dtype, device, capability):
    case = case.but(dtype=dtype)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    first = ours(case, inputs, gradients)
    for _ in range(3):
        assert_same_bits(ours(case, inputs, gradients), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPLITS + LONG, ids=str)
def test_same_bits_with_any_number_of_threads(case, dtype, device, capability, request):
    if on_cuda_kernels(request.config):
        pytest.skip("threads are the CPU's")
    case = case.but(dtype=dtype)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    torch.set_num_threads(1)
    alone = ours(case, inputs, gradients)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(ours(case, inputs, gradients), alone, what=f"{threads} threads:")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sequence_in_pieces_is_the_sequence(name, device, capability, request):
    """70,000 steps in one call, and in two with the states carried over."""
    emulated = on_cuda_kernels(request.config) and device.type == "cpu"  # a thread at a time
    T = 2_000 if emulated else 70_000
    case = variant(name, T=T, N=2, I=2, H=3)
    inputs = make_inputs(case, device)
    whole = forward_ours(case, inputs, save=True)
    state, pieces = (inputs.h0, inputs.c0), []
    for part in inputs.x.split([T // 3 + 1, T - T // 3 - 1]):
        arguments = (part, *state, inputs.weights, None, 1)
        y, h_n, c_n, _, _ = layer_op(case.cell)(*arguments, False)
        state = (h_n, c_n if case.cell == "lstm" else None)
        pieces.append(y)
    found = {"y": torch.cat(pieces), "h_n": state[0]}
    assert_close_to_reference(found, None, {n: whole[n].double() for n in found})
    gradients = make_gradients(case, device)
    assert all(d.isfinite().all() for d in backward_ours(case, inputs, gradients).values())


def test_weight_shapes_are_the_interface(device):
    """Guards this suite: what it feeds the op is what the op's own checks demand."""
    case = variant("lstm_proj", directions=2)
    assert len(weight_shapes(case)) == 10
    layer_op("lstm")(*make_inputs(case, device).arguments(), False)
