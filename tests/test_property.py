"""Any shape, dtype and option: hypothesis looks for a layer whose results are worse than torch.nn's."""

import pytest
import torch
from conftest import assert_close_to_reference
from helpers import (
    DTYPES,
    VARIANTS,
    fair_results,
    four_results,
    in_float64,
    layer_op,
    make_gradients,
    make_inputs,
    ours,
    variant,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn

# Reproducible, and bounded in number, not in time.
settings.register_profile(
    "fusedrnn",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fusedrnn")

# Small sizes, and those next to what kernels are built of
sizes = st.integers(1, 40) | st.sampled_from([47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160])
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=20).map(lambda ls: tuple(sorted(ls, reverse=True)))


@st.composite
def cases(draw, dtypes=DTYPES):
    options = {
        "T": draw(st.integers(1, 12)),
        "N": draw(st.integers(1, 20) | st.sampled_from([32, 33, 70])),
        "I": draw(sizes),
        "H": draw(sizes),
        "directions": draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
        "states": draw(st.booleans()),
        "lengths": draw(st.none() | lengths),
        "dtype": draw(st.sampled_from(dtypes)),
    }
    case = variant(draw(st.sampled_from(VARIANTS)), **options)
    return case.but(P=draw(st.integers(1, case.H - 1))) if case.P else case


@settings(max_examples=700)
@given(case=cases(), seed=st.integers(0, 1000), threads=st.integers(1, 4))
def test_any_layer(case, seed, threads, device):
    torch.set_num_threads(threads)
    assert_close_to_reference(*fair_results(case, device, seed), what=f"{case} seed {seed} threads {threads}")


@settings(max_examples=150)
@given(case=cases(dtypes=[torch.float64, torch.float32]), data=st.data())
def test_any_strides(case, data, device):
    """Every input a view of something larger, transposed or repeated at will."""

    def disguise(t):
        if t.dim() == 0 or not t.numel():
            return t
        kind = data.draw(st.sampled_from(["plain", "sliced", "transposed", "expanded", "flipped buffer"]))
        if kind == "sliced":
            padding = [data.draw(st.integers(0, 2)) for _ in range(2 * t.dim())]
            big = nn.functional.pad(t, padding, value=float("nan"))
            for d in range(t.dim()):
                big = big.narrow(-1 - d, padding[2 * d], t.shape[-1 - d])
            return big
        if kind == "transposed":
            order = data.draw(st.permutations(range(t.dim())))
            inverse = [order.index(d) for d in range(t.dim())]
            return t.permute(order).contiguous().permute(inverse)
        if kind == "expanded":
            d = data.draw(st.integers(0, t.dim() - 1))
            return t.narrow(d, 0, 1).expand(t.shape)
        if kind == "flipped buffer":
            return torch.stack([t, t.new_full(t.shape, float("nan"))], -1)[..., 0]
        return t

    inputs = make_inputs(case, device).map(disguise)
    gradients = [None if g is None else disguise(g) for g in make_gradients(case, device)]
    found = ours(case, inputs, gradients)
    expected = in_float64(case, inputs, gradients, found["y"])
    plain = inputs.map(torch.Tensor.clone)
    baseline = ours(case, plain, [None if g is None else g.clone() for g in gradients])
    assert_close_to_reference(found, baseline, expected, what=str(case))


@settings(max_examples=100)
@given(case=cases(dtypes=[torch.float32]).filter(lambda c: c.lengths is not None))
def test_packed_is_one_sequence_at_a_time(case, device):
    """The sequences of a ragged batch, each run alone, give the rows of the batch."""
    inputs = make_inputs(case, device)
    op = layer_op(case.cell)
    y, h_n, c_n, _, _ = op(*inputs.arguments(), False)
    found = {"y": y, "h_n": h_n, **({"c_n": c_n} if case.cell == "lstm" else {})}
    expected = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in found.items()}
    offsets = [0, *inputs.batch_sizes.cumsum(0).tolist()]
    for n, length in enumerate(case.lengths):
        rows = [offsets[t] + n for t in range(length)]
        pick = lambda s, n=n: None if s is None else s[:, n : n + 1]  # noqa: E731
        arguments = (inputs.x[rows][:, None], pick(inputs.h0), pick(inputs.c0), inputs.weights, None, case.directions)
        alone = op(*arguments, False)
        expected["y"][rows] = alone[0][:, 0].double()
        for name, final in zip(("h_n", "c_n"), alone[1:3], strict=True):
            if name in expected:
                expected[name][:, n] = final[:, 0].double()
    # Fewer rows are summed in another order, and a sum of one unit can be next to nothing.
    assert_close_to_reference(found, None, expected, what=str(case), slack=100)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=150)
@given(
    name=st.sampled_from(["LSTM", "GRU", "RNN"]),
    options=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "bias": st.booleans(),
            "batch_first": st.booleans(),
            "bidirectional": st.booleans(),
        }
    ),
    features=st.tuples(st.integers(1, 20), st.integers(2, 40)),
    ragged=st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=7),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_any_module(name, options, features, ragged, shape, seed):
    """Whole modules, packed in any order, against torch.nn's in float64."""
    torch.manual_seed(seed)
    theirs = getattr(nn, name)(*features, **options, dtype=torch.float64)
    module = getattr(fusedrnn, name)(*features, **options, dtype=torch.float64)
    module.load_state_dict(theirs.state_dict())
    if ragged is None:
        x = torch.randn(*shape, features[0], dtype=torch.float64)
    else:
        x = pack_sequence([torch.randn(n, features[0], dtype=torch.float64) for n in ragged], enforce_sorted=False)
    found, expected = {}, {}
    for m, results in ((module, found), (theirs, expected)):
        y, h = m(x)
        outputs = [y.data, *(h if isinstance(h, tuple) else (h,))]
        sum((i + 1) * t.square().sum() for i, t in enumerate(outputs)).backward()
        results |= {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        results |= {n: p.grad for n, p in m.named_parameters()}
    assert_close_to_reference(found, None, expected, what=f"{name} {options}")


def test_hypothesis_would_find_a_fault(device):
    """A result that is off by a part in ten thousand in one element is refused."""
    case = variant("gru", T=3, N=2, I=4, H=9)
    found, *expected = four_results(case, device)
    found["d1"].view(-1)[found["d1"].abs().argmax()] *= 1.0001
    with pytest.raises(AssertionError, match="d1"):
        assert_close_to_reference(found, *expected)
