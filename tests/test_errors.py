"""Bad arguments: ours raises what torch.nn raises, the same type and the same words; and takes what torch.nn takes.

No message is written here: torch.nn is called, its exception caught, and ours compared with it. With a PackedSequence
torch.nn leaves much unchecked, and what it raises then is an accident of its kernels, if it doesn't crash: there any
error will do, but those that its Python code raises on purpose are compared too.
"""

from types import SimpleNamespace

import pytest
import torch
from outcomes import ERRORS, same_outcome, tensors_in
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]
CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]
I, H, T, N = 4, 6, 5, 3


# ---- calls ---------------------------------------------------------------------------------------


def good(lstm, proj=0, batched=True, rows=1, batch=N):
    """A state of the right shape."""
    shape = (rows, batch) if batched else (rows,)
    return (torch.zeros(*shape, proj or H), torch.zeros(*shape, H)) if lstm else torch.zeros(*shape, H)


def bad_inputs():
    """name -> input, no state given"""
    x = torch.randn(T, N, I)
    data, sizes = torch.randn(9, I), torch.tensor([3, 3, 2, 1])
    return {
        **{f"{d} dimensions": torch.randn([3] * d + [I]) for d in (0, 3, 4)},
        "no dimension": torch.tensor(1.0),
        "features": torch.randn(T, N, I + 1),
        "one feature": torch.randn(T, N, 1),
        "no features": torch.randn(T, N, 0),
        "unbatched features": torch.randn(T, I + 1),
        "no steps": torch.randn(0, N, I),
        "no steps unbatched": torch.randn(0, I),
        "no steps, no batch": torch.randn(0, 0, I),
        **{str(d): x.to(d) for d in (torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool)},
        "list": x.tolist(),
        "none": None,
        "number": 1.0,
        "numpy": x.numpy(),
        "string": "sequence",
        "tuple": (x, x),
        "sparse": x.to_sparse(),
        "meta": x.to("meta"),
        "packed features": PackedSequence(torch.randn(9, I + 2), sizes),
        "packed dtype": PackedSequence(data.double(), sizes),
        "packed int": PackedSequence(data.long(), sizes),
        "packed dimensions": PackedSequence(torch.randn(9, 1, I), sizes),
        "packed one dimension": PackedSequence(torch.randn(9), sizes),
    }


@pytest.mark.parametrize("case", bad_inputs())
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("name, kind", LAYERS)
def test_input(name, kind, options, case):
    def call(library):
        torch.manual_seed(0)
        return getattr(library, name)(I, H, **options, **kind)(bad_inputs()[case])

    torch.manual_seed(0)
    same_outcome(call, packed=case.startswith("packed"))


MIXED = ("float64", "int64", "half")


def bad_states(lstm, proj):
    """name -> (input, hx)"""
    x, single = torch.randn(T, N, I), torch.randn(T, I)
    packed = pack_padded_sequence(torch.randn(T, N, I), torch.tensor([5, 4, 2]))
    unsorted = pack_sequence([torch.randn(n, I) for n in (2, 5, 4)], enforce_sorted=False)
    h = good(lstm, proj)
    cases = {}
    parts = (0, 1) if lstm else (None,)
    for part in parts:
        right = h if part is None else h[part]
        variants = {
            "layers": torch.cat([right, right]),
            "batch": right[:, :2],
            "batch of one": right[:, :1],
            "no batch": right[:, :0],
            "hidden": torch.zeros(1, N, H + 1),
            "one hidden": torch.zeros(1, N, 1),
            "no hidden": torch.zeros(1, N, 0),
            "two dimensions": right[0],
            "four dimensions": right[None],
            "no dimension": torch.tensor(0.0),
            "float64": right.double(),
            "int64": right.long(),
            "half": right.half(),
            "meta": right.to("meta"),
            "none": None,
            "number": 0.0,
            "list": right.tolist(),
        }
        for name, value in variants.items():
            hx = value if part is None else tuple(value if i == part else h[i] for i in (0, 1))
            label = name if part is None else f"{'hc'[part]} {name}"
            cases[f"padded {label}"] = (x, hx)
            cases[f"packed {label}"] = (packed, hx)
            cases[f"unsorted {label}"] = (unsorted, hx)
            cases[f"unbatched {label}"] = (single, hx)
    one = good(lstm, proj, batched=False)
    cases["unbatched right"] = (single, one)
    cases["batched with unbatched state"] = (x, one)
    if lstm:
        cases |= {
            "a tensor": (x, h[0]),
            "a tensor of two": (x, torch.zeros(2, 1, N, H)),
            "one of two": (x, (h[0],)),
            "three": (x, (*h, h[0])),
            "nothing": (x, ()),
            "a list": (x, list(h)),
            "packed list": (packed, list(h)),
            "unsorted list": (unsorted, list(h)),
            "swapped": (x, h[::-1]),
            "a dict": (x, {0: h[0], 1: h[1]}),
            "a string": (x, "hc"),
        }
    else:
        cases |= {"a tuple": (x, (h,)), "a list": (x, [h]), "a string": (x, "h")}
    return cases


STATES = [(n, k, c) for n, k in LAYERS for c in bad_states(n == "LSTM", k.get("proj_size", 0))]


@pytest.mark.parametrize("name, kind, case", STATES)
def test_states(name, kind, case):
    """torch.nn.LSTM doesn't check the states that come with a PackedSequence, and crashes: it isn't called then."""
    lstm = name == "LSTM"
    packed = next((word for word in ("packed", "unsorted") if case.startswith(word)), False)
    promoted = (
        case.split(" c ")[-1] in MIXED
    )  # c is only multiplied and added: where oneDNN isn't used it may be anything
    unchecked = lstm and packed and "list" not in case.split()[1:2]
    for options in ({}, {"num_layers": 2}, {"batch_first": True}, {"bidirectional": True}):

        def call(library, options=options):
            torch.manual_seed(0)
            module = getattr(library, name)(I, H, **options, **kind)
            return module(*bad_states(lstm, kind.get("proj_size", 0))[case])

        for context in (torch.enable_grad, torch.no_grad):
            with context():
                if not unchecked:
                    same_outcome(call, promoted=promoted, packed=packed)
                else:
                    with pytest.raises(ERRORS):
                        call(fusedrnn)


def test_batch_sizes_that_lie():
    """torch.nn checks less here and may read stray rows; ours refuses, whatever the state."""
    data = torch.randn(9, I)
    for sizes in ([2, 3, 3, 1], [3, 3, 3, 1], [3, 3, 2], [4, 4, 2, -1], [3, 3, 3, 0], []):
        packed = PackedSequence(data, torch.tensor(sizes, dtype=torch.int64))
        for name, kind in LAYERS:
            with pytest.raises(ERRORS):
                getattr(fusedrnn, name)(I, H, **kind)(packed)


@pytest.mark.parametrize("name, kind", LAYERS)
def test_calls_with_wrong_arguments(name, kind):
    x = torch.randn(T, N, I)
    for call in (
        lambda module: module(),
        lambda module: module(x, None, None),
        lambda module: module(x, state=None),
        lambda module: module(input=x),
        lambda module: module(input=x, hx=None),
    ):

        def on(library, call=call):
            torch.manual_seed(0)
            try:
                return call(getattr(library, name)(I, H, **kind))
            except TypeError as error:  # Python's own names the function by its place
                raise TypeError(str(error).split("forward()")[-1]) from None

        same_outcome(on)


WEIGHTS = {
    "w_ih rows": ("weight_ih", lambda w: w[:-1]),
    "w_ih columns": ("weight_ih", lambda w: w[:, :-1]),
    "w_hh rows": ("weight_hh", lambda w: w[:-1]),
    "w_hh columns": ("weight_hh", lambda w: w[:, :-1]),
    "b_ih": ("bias_ih", lambda b: b[:-1]),
    "b_hh": ("bias_hh", lambda b: b[:-1]),
    "w_hh float64": ("weight_hh", lambda w: w.double()),
    "b_hh float64": ("bias_hh", lambda b: b.double()),
    "w_ih one dimension": ("weight_ih", lambda w: w[0]),
    "everything": ("weight_ih", lambda w: w.new_zeros(0)),
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_weights_that_do_not_fit(name, kind, case):
    """An error wherever torch.nn gives one; its words aren't ours to repeat, but no crash and no garbage."""
    which, change = WEIGHTS[case]
    suffix = "" if name.endswith("Cell") else "_l0"
    module = getattr(fusedrnn, name)(I, H, **kind)
    setattr(module, which + suffix, nn.Parameter(change(getattr(module, which + suffix).detach())))
    with pytest.raises(ERRORS):
        module(torch.randn(N, I) if suffix == "" else torch.randn(T, N, I))


@pytest.mark.parametrize("name, kind", LAYERS)
def test_a_weight_that_is_none(name, kind):
    def call(library):
        module = getattr(library, name)(I, H, **kind)
        module.bias_hh_l0 = None
        return module(torch.randn(T, N, I))

    same_outcome(call, must_raise=True)


# ---- cells ---------------------------------------------------------------------------------------


def bad_cell_calls(lstm):
    x, h = torch.randn(N, I), torch.zeros(N, H)
    pair = (lambda s: (s, s)) if lstm else (lambda s: s)
    cases = {
        **{f"{d} dimensions": (torch.randn([2] * (d - 1) + [I]), None) for d in (1, 3, 4)},
        "no dimension": (torch.tensor(1.0), None),
        "features": (torch.randn(N, I + 1), None),
        "unbatched features": (torch.randn(I + 1), None),
        "features and state": (torch.randn(N, I + 1), pair(h)),
        "float64": (x.double(), None),
        "int64": (x.long(), None),
        "half": (x.half(), None),
        "none": (None, None),
        "a list": (x.tolist(), None),
        "numpy": (x.numpy(), None),
        "packed": (pack_sequence([x]), None),
        "unbatched, batched state": (x[0], pair(h)),
        "batched, unbatched state": (x, pair(h[0])),
        "state as a list": (x, [h, h] if lstm else [h]),
        "state as a tuple of one": (x, (h,)),
        "state as a tuple of three": (x, (h, h, h)),
        "state as a tensor": (x, h),
        "state as a stack": (x, torch.stack([h, h])),
    }
    states = {
        "batch": h[:2],
        "batch of one": h[:1],
        "no batch": h[:0],
        "hidden": torch.zeros(N, H + 1),
        "one hidden": torch.zeros(N, 1),
        "three dimensions": h[None],
        "no dimension": torch.tensor(0.0),
        "float64": h.double(),
        "int64": h.long(),
        "number": 0.0,
    }
    cases |= {f"state {name}": (x, pair(value)) for name, value in states.items()}
    if lstm:
        cases |= {f"c {name}": (x, (h, value)) for name, value in states.items()}
        cases |= {f"h {name}": (x, (value, h)) for name, value in states.items()}
        cases |= {"c none": (x, (h, None)), "h none": (x, (None, h)), "empty": (x, ())}
    return cases


@pytest.mark.parametrize("name, kind, case", [(n, k, c) for n, k in CELLS for c in bad_cell_calls(n == "LSTMCell")])
def test_cell_calls(name, kind, case):
    def call(library):
        torch.manual_seed(0)
        cell = getattr(library, name)(I, H, **kind)
        return cell(*bad_cell_calls(name == "LSTMCell")[case])

    for context in (torch.enable_grad, torch.no_grad):
        with context():
            same_outcome(call, promoted=case.removeprefix("c ") in MIXED)


@pytest.mark.parametrize("arguments, options", [((), {}), ((1, 2, 3), {}), ((1,), {"state": 2}), ((1,), {"input": 2})])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_number_of_arguments(name, arguments, options):
    same_outcome(lambda library: getattr(library, name)(I, H)(*arguments, **options), must_raise=True)


def test_unknown_nonlinearity_of_a_cell():
    same_outcome(lambda library: library.RNNCell(I, H, nonlinearity="cube")(torch.randn(N, I)), must_raise=True)


# ---- what torch itself would crash on ------------------------------------------------------------


@pytest.mark.parametrize("what", ["input", "data", "sorted_indices", "unsorted_indices", "nested", "hx", "weight"])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("name, kind", LAYERS)
def test_storage_that_is_gone(name, kind, options, what):
    module = getattr(fusedrnn, name)(I, H, **options, **kind)
    x, hx = torch.randn(T, N, I), good(name == "LSTM", kind.get("proj_size", 0), rows=options.get("num_layers", 1))
    lost = {"hx": hx[0] if name == "LSTM" else hx, "weight": module.weight_hh_l0}.get(what, x)
    if what in PackedSequence._fields:
        x = pack_sequence([torch.randn(n, I) for n in (2, 5, 4)], enforce_sorted=False)
        lost = getattr(x, what)
    elif what == "nested":
        x = torch.nested.nested_tensor([torch.randn(n, I) for n in (2, 5, 4)], layout=torch.jagged)
        lost = x.values()
    lost.untyped_storage().resize_(0)
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast), pytest.raises(RuntimeError, match="freed or made smaller"):
            module(x, hx)


@pytest.mark.parametrize("name, kind", LAYERS)
def test_packed_data_that_is_not_dense(name, kind):
    data, sizes = torch.randn(9, I), torch.tensor([3, 3, 2, 1])
    module = getattr(fusedrnn, name)(I, H, **kind)
    for other in (data.to_sparse(), data.to_mkldnn()):
        with pytest.raises(RuntimeError):
            module(PackedSequence(other, sizes))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("name, kind", LAYERS)
def test_packed_order_of_another_batch(name, kind, options):
    module = getattr(fusedrnn, name)(I, H, **options, **kind)
    for entries in (2, 4):
        order = torch.arange(entries)
        packed = PackedSequence(torch.randn(9, I), torch.tensor([3, 3, 2, 1]), order, order)
        with pytest.raises(RuntimeError, match=rf"\b{entries}\b"):
            module(packed)


def test_a_function_of_no_layers():
    for layers in (0, -1):
        with pytest.raises(ValueError, match=f"got 4 weights for {layers} layers"):
            fusedrnn.functional.gru(torch.randn(T, N, I), list(fusedrnn.GRU(I, H).parameters()), num_layers=layers)


def test_the_state_of_a_function():
    weights = list(fusedrnn.LSTM(I, H).parameters())
    for wrong in (torch.zeros(1, N, H), torch.zeros(2, 1, N, H)):
        with pytest.raises(TypeError, match=r"expected hx to be a pair of tensors \(h_0, c_0\), got Tensor"):
            fusedrnn.functional.lstm(torch.randn(T, N, I), weights, wrong)


def test_weights_that_are_no_matrices():
    w_ih, w_hh, *biases = fusedrnn.GRU(I, H).parameters()
    for wrong in ((w_ih[:, 0], w_hh), (w_ih, w_hh[0])):
        with pytest.raises(RuntimeError, match="expected w_ih and w_hh to have 2 dimensions"):
            fusedrnn.functional.gru(torch.randn(T, N, I), [*wrong, *biases])


@pytest.mark.parametrize("dropout", [-0.5, 1.5, float("nan")])
def test_dropout_that_is_no_probability(dropout):
    weights = list(fusedrnn.GRU(I, H, num_layers=2).parameters())
    with pytest.raises(ValueError, match="expected a dropout of 0 to 1"):
        fusedrnn.functional.gru(torch.randn(T, N, I), weights, num_layers=2, dropout=dropout, training=True)


def test_weights_of_an_iterator():
    module, x = fusedrnn.GRU(I, H), torch.randn(T, N, I)
    assert torch.equal(fusedrnn.functional.gru(x, module.parameters())[0], module(x)[0])


# ---- and afterwards ------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", LAYERS)
def test_module_works_after_an_error(name, kind):
    module = getattr(fusedrnn, name)(I, H, **kind)
    x = torch.randn(T, N, I)
    before = module(x)[0]
    for wrong in (torch.randn(T, N, I + 1), x.double(), torch.tensor(0.0)):
        with pytest.raises((RuntimeError, ValueError)):
            module(wrong)
    assert torch.equal(module(x)[0], before)


def test_refused_lengths_draw_no_random_numbers():
    module = fusedrnn.GRU(I, H, num_layers=2, dropout=0.5)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="length"):
        module(torch.randn(T, N, I, generator=torch.Generator()), lengths=[T + 1] * N)
    assert torch.equal(torch.get_rng_state(), before)


def test_this_file_can_fail():
    """same_outcome sees another text, another type, and an error on one side only."""

    def raising(error):
        raise error

    for mine in (lambda: raising(ValueError("b")), lambda: raising(TypeError("a")), lambda: None):
        call = lambda library, mine=mine: mine() if library is fusedrnn else raising(ValueError("a"))  # noqa: E731
        with pytest.raises(AssertionError):
            same_outcome(call)
    assert tensors_in((torch.ones(1), (torch.ones(1), None))) and not tensors_in(SimpleNamespace())
