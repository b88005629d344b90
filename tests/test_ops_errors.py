"""The raw ops given nonsense: a RuntimeError that names the argument, never a crash, never a wrong answer.

torch.nn's own messages are test_errors.py's concern; here nothing stands between the caller and the kernels.
"""

import random
from contextlib import suppress

import pytest
import torch
from helpers import CELLS, Inputs, layer_backward_op, layer_op, make_gradients, make_inputs, needs_of, variant

PADDED = {"T": 5, "N": 3, "I": 4, "H": 6}
LENGTHS = (4, 3, 1)  # batch sizes 3, 2, 2, 1


def forward_arguments(cell, device, packed=False, **options) -> dict:
    case = variant(cell, lengths=LENGTHS if packed else None, **{**PADDED, **options})
    names = ("x", "h0", "c0", "weights", "batch_sizes", "directions")
    return dict(zip(names, make_inputs(case, device).arguments(), strict=True))


def call_forward(cell, arguments, save=True):
    return layer_op(cell.removesuffix("_proj"))(*arguments.values(), save)


def replaced(arguments, name, value):
    """A weight is named w0, w1, ..."""
    if name[0] == "w" and name[1:].isdigit():
        weights = list(arguments["weights"])
        weights[int(name[1:])] = value
        return {**arguments, "weights": weights}
    return {**arguments, name: value}


def wrong_shapes(t):
    """One more or one fewer in every dimension, a dimension more or fewer, nothing at all."""
    for d in range(t.dim()):
        yield t.narrow(d, 0, t.shape[d] - 1)
        yield torch.cat([t, t.narrow(d, 0, 1)], d)
    yield t[0]
    yield t[None]
    yield t.flatten() if t.dim() > 1 else t[:, None]
    yield t.new_empty(0)
    yield t.new_empty([0] * t.dim())


# What the message calls each argument
CALLED = {"w0": "w_ih", "w1": "w_hh", "w2": "b_ih", "w3": "b_hh", "w4": "w_hr"}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", [*CELLS, "lstm_proj"])
def test_shapes_that_do_not_fit(cell, packed, device):
    arguments = forward_arguments(cell, device, packed)
    tensors = {n: t for n, t in arguments.items() if n in ("h0", "c0") and t is not None}
    tensors |= {f"w{i}": w for i, w in enumerate(arguments["weights"])}
    for name, t in tensors.items():
        for wrong in wrong_shapes(t):
            with pytest.raises(RuntimeError, match="expected") as error:
                call_forward(cell, replaced(arguments, name, wrong))
            if name != "w0":  # a w_ih of another size may be blamed on what then doesn't fit it
                assert CALLED.get(name, name) in str(error.value) or name in ("w1", "w4")
    for wrong in wrong_shapes(arguments["x"]):
        if wrong.dim() == arguments["x"].dim() and wrong.shape[1:] == arguments["x"].shape[1:] and not packed:
            continue  # another number of steps is no mistake
        with pytest.raises(RuntimeError, match="expected"):
            call_forward(cell, {**arguments, "x": wrong})


@pytest.mark.parametrize("cell", [*CELLS, "lstm_proj"])
def test_shapes_that_do_not_fit_a_step(cell, device):
    arguments = forward_arguments(cell, device, T=1)
    op = getattr(torch.ops.fusedrnn, f"{cell.removesuffix('_proj')}_step")
    c = None if arguments["c0"] is None else arguments["c0"][0]
    tensors = {"x": arguments["x"][0], "h": arguments["h0"][0], "c": c, "weights": arguments["weights"]}
    op(*tensors.values())
    for name in ("x", "h", "c"):
        for wrong in wrong_shapes(tensors["x"] if tensors[name] is None else tensors[name]):
            with pytest.raises(RuntimeError, match="expected"):
                op(*{**tensors, name: wrong}.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "lstm_proj"])
def test_mixed_dtypes(cell, dtype, device):
    arguments = forward_arguments(cell, device)
    names = ["x", "h0", *(["c0"] if arguments["c0"] is not None else [])]
    names += [f"w{i}" for i in range(len(arguments["weights"]))]
    for name in names:
        t = arguments[name] if name in arguments else arguments["weights"][int(name[1:])]
        with pytest.raises(RuntimeError, match="dtype"):
            call_forward(cell, replaced(arguments, name, t.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64, torch.bool], ids=str)
def test_dtypes_that_are_not_real(dtype, device):
    case = variant("gru", **PADDED)
    inputs = make_inputs(case, device).map(lambda t: t.to(dtype))
    with pytest.raises(RuntimeError, match="dtype"):
        layer_op("gru")(*inputs.arguments(), True)


@pytest.mark.parametrize("directions", [0, -1, 3, 2, 2**40, -(2**62)])
@pytest.mark.parametrize("cell", CELLS)
def test_number_of_directions(cell, directions, device):
    with pytest.raises(RuntimeError, match="expected"):
        call_forward(cell, {**forward_arguments(cell, device), "directions": directions})


@pytest.mark.parametrize("cell", CELLS)
def test_number_of_weights(cell, device):
    arguments = forward_arguments(cell, device, directions=2)
    weights = arguments["weights"]
    for wrong in ([], weights[:1], weights[:3], weights[:5], weights[:7], weights + weights[:1], weights * 2):
        with pytest.raises(RuntimeError, match="expected"):
            call_forward(cell, {**arguments, "weights": wrong})


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
def test_only_the_lstm_has_c_and_projection(cell, device):
    arguments = forward_arguments(cell, device)
    with pytest.raises(RuntimeError, match="c0"):
        call_forward(cell, {**arguments, "c0": arguments["h0"]})
    with pytest.raises(RuntimeError, match="weights"):
        call_forward(cell, {**arguments, "weights": [*arguments["weights"], torch.zeros(3, 6, device=device)]})


def test_a_projection_to_nothing(device):
    arguments = forward_arguments("lstm", device)
    weights = [w[:, :0] if k == 1 else w for k, w in enumerate(arguments["weights"])]
    weights.append(weights[0].new_zeros(0, PADDED["H"]))
    with pytest.raises(RuntimeError, match="P > 0"):
        call_forward("lstm", {**arguments, "h0": arguments["h0"][..., :0], "weights": weights})


LYING = {
    "increasing": [2, 3, 2, 1],
    "negative": [4, 3, 2, -1],
    "zero": [3, 3, 2, 0],
    "all zero": [0, 0, 0, 0],
    "too few rows": [3, 2, 1, 1],
    "too many rows": [3, 3, 2, 1],
    "huge": [2**62, 2**62, 1, 1],
    "overflowing": [2**62, 2**62, 2**62, 2**62 + 8],
    "nothing": [],
    "one step": [3],
    "rows times more": [8, 8, 8, 8],
}


@pytest.mark.parametrize("sizes", LYING.values(), ids=LYING)
@pytest.mark.parametrize("states", [True, False], ids=["states", "zerostate"])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_sizes_that_lie(cell, states, sizes, device):
    arguments = forward_arguments(cell, device, packed=True, states=states)
    arguments["batch_sizes"] = torch.tensor(sizes, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        call_forward(cell, arguments)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_sizes_of_a_wrong_kind(cell, device):
    arguments = forward_arguments(cell, device, packed=True)
    sizes = arguments["batch_sizes"]
    wrong = [sizes.int(), sizes.double(), sizes.bool(), sizes[:, None], sizes[0], sizes.new_empty(0, 4)]
    wrong += [sizes.to(device)] if device.type != "cpu" else []
    for one in wrong:
        with pytest.raises(RuntimeError, match="batch_sizes"):
            call_forward(cell, {**arguments, "batch_sizes": one})


def test_batch_sizes_may_be_strided(device):
    arguments = forward_arguments("lstm", device, packed=True)
    expected = call_forward("lstm", arguments)
    doubled = torch.stack([arguments["batch_sizes"], torch.full((4,), -7)], 1).flatten()[::2]
    for found, value in zip(call_forward("lstm", {**arguments, "batch_sizes": doubled}), expected, strict=True):
        assert torch.equal(found, value)


def backward_arguments(cell, device, packed=False) -> dict:
    case = variant(cell, lengths=LENGTHS if packed else None, directions=2, **PADDED)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    y, _, _, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    dcells = torch.ones_like(cells) if case.cell == "lstm" else None
    names = ("dy", "dh_n", "dc_n", "dcells", "x", "h0", "c0", "weights", "batch_sizes", "directions")
    arguments = dict(zip(names, (*gradients[:3], dcells, *inputs.arguments()), strict=True))
    return {**arguments, "y": y, "gates": gates, "cells": cells, "needs": needs_of(inputs)}


def call_backward(cell, arguments):
    return layer_backward_op(cell.removesuffix("_proj"))(*arguments.values())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", [*CELLS, "lstm_proj"])
def test_backward_of_what_does_not_fit(cell, packed, device):
    arguments = backward_arguments(cell, device, packed)
    call_backward(cell, arguments)
    has_c = cell.startswith("lstm")
    for name in ["dy", "dh_n", "y", "gates", "x", "h0", *(["dc_n", "dcells", "cells", "c0"] if has_c else [])]:
        if name == "gates" and cell.startswith("rnn"):
            continue  # nothing is read from it
        for wrong in wrong_shapes(arguments[name]):
            with pytest.raises(RuntimeError, match="expected"):
                call_backward(cell, {**arguments, name: wrong})
        for dtype in (torch.float64, torch.float16, torch.int32):
            with pytest.raises(RuntimeError, match="dtype"):
                call_backward(cell, {**arguments, name: arguments[name].to(dtype)})
    for i, w in enumerate(arguments["weights"]):
        for wrong in wrong_shapes(w):
            with pytest.raises(RuntimeError, match="expected"):
                call_backward(cell, replaced(arguments, f"w{i}", wrong))
    if not has_c:
        with pytest.raises(RuntimeError, match="dc_n"):
            call_backward(cell, {**arguments, "dc_n": arguments["dh_n"]})
        with pytest.raises(RuntimeError, match="dcells"):
            call_backward(cell, {**arguments, "dcells": arguments["dh_n"]})


@pytest.mark.parametrize("cell", CELLS)
def test_backward_without_what_the_forward_saved(cell, device):
    """The outputs of a forward that saved nothing are refused."""
    arguments = backward_arguments(cell, device)
    nothing = arguments["y"].new_empty(0)
    if not cell.startswith("rnn"):
        with pytest.raises(RuntimeError, match="gates"):
            call_backward(cell, {**arguments, "gates": nothing})
    if cell == "lstm":
        with pytest.raises(RuntimeError, match="cells"):
            call_backward(cell, {**arguments, "cells": nothing})


@pytest.mark.parametrize("cell", CELLS)
def test_needs_beyond_the_weights(cell, device):
    """Bits that stand for nothing are no reason to fail, or are refused; they write nowhere."""
    arguments = backward_arguments(cell, device)
    for needs in (-1, 2**62, 1 << 40, 1 << (3 + len(arguments["weights"]))):
        try:
            results = call_backward(cell, {**arguments, "needs": needs})
        except RuntimeError:
            continue
        assert len(results[3]) == len(arguments["weights"])


@pytest.mark.parametrize("cell", CELLS)
def test_many_steps_of_an_empty_batch(cell, device):
    """They are no rows and need no memory."""
    arguments = forward_arguments(cell, device, states=False)
    y = call_forward(cell, {**arguments, "x": torch.empty(2**40, 0, 4, device=device)})[0]
    assert y.shape == (2**40, 0, 6)


SEGMENTS = {
    "lengths": torch.tensor([4, 0, 2]),
    "reset": torch.tensor([[False, True, False, True], [True] * 4, [False] * 4]),
    "first_row": torch.tensor([0, 4, 8]),
    "step_row": torch.arange(4),
    "directions": 2,
}


@pytest.mark.parametrize(
    "name, wrong",
    [
        *[("lengths", torch.tensor(lengths)) for lengths in ([5, 0, 2], [-1, 0, 2], [2**62] * 3, [1, 2], [[1, 2, 3]])],
        ("lengths", torch.tensor([4.0, 0.0, 2.0])),
        ("reset", torch.zeros(4, 3, dtype=torch.bool)),
        ("reset", torch.zeros(3, 4)),
        ("first_row", torch.arange(4)),
        ("step_row", torch.arange(3)),
        ("step_row", torch.arange(4).int()),
        ("step_row", torch.tensor(4)),
        ("directions", 0),
        ("directions", 3),
    ],
)
def test_segments_that_do_not_fit(name, wrong):
    with pytest.raises(RuntimeError, match=r"expected|Expected|does not fit"):
        torch.ops.fusedrnn.segments(*{**SEGMENTS, name: wrong}.values())


def test_segments_of_rows_beyond_the_input():
    """The op computes with any numbers; index_select refuses them."""
    rows = torch.tensor([2**63 - 1, 4, 8])
    _, source, _, _ = torch.ops.fusedrnn.segments(*{**SEGMENTS, "first_row": rows}.values())
    with pytest.raises((IndexError, RuntimeError)):
        torch.zeros(12, 2).index_select(0, source)


def freed(t):
    """As another thread, or FSDP, leaves a tensor."""
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", [*CELLS, "lstm_proj"])
def test_storage_that_is_gone(cell, packed, device):
    arguments = backward_arguments(cell, device, packed)
    forward = {n: arguments[n] for n in ("x", "h0", "c0", "weights", "batch_sizes", "directions")}
    for call, given in ((call_forward, forward), (call_backward, arguments)):
        names = [n for n, t in given.items() if isinstance(t, torch.Tensor) and t.numel()]
        for name in [*names, *[f"w{i}" for i in range(len(arguments["weights"]))]]:
            t = given["weights"][int(name[1:])] if name[0] == "w" else given[name]
            with pytest.raises(RuntimeError, match="storage has been freed or made smaller"):
                call(cell, replaced(given, name, freed(t)))


def test_storage_of_a_part_and_of_segments():
    """Where a tensor lies in its storage counts, not how large that is."""
    arguments = forward_arguments("gru", "cpu")
    twice = torch.cat([arguments["x"], arguments["x"]])
    twice.untyped_storage().resize_(arguments["x"].untyped_storage().nbytes())
    call_forward("gru", {**arguments, "x": twice[:5]})
    with pytest.raises(RuntimeError, match="storage"):
        call_forward("gru", {**arguments, "x": twice[5:]})
    for name in ("lengths", "reset", "first_row", "step_row"):
        with pytest.raises(RuntimeError, match="storage"):
            torch.ops.fusedrnn.segments(*{**SEGMENTS, name: freed(SEGMENTS[name])}.values())


@pytest.mark.parametrize("cell", CELLS)
def test_a_meta_tensor_among_others(cell):
    """It leads to the fake kernels, whose results are of no values: they refuse it."""
    arguments = forward_arguments(cell, "cpu", packed=True)
    for name in ("h0", "batch_sizes", "w0"):
        t = arguments["weights"][0] if name == "w0" else arguments[name]
        with pytest.raises(RuntimeError, match="fusedrnn"):
            call_forward(cell, replaced(arguments, name, t.to("meta")))
    arguments = backward_arguments(cell, "cpu", packed=True)
    for name in ("dy", "dh_n", "h0", "batch_sizes", "y", "gates", "cells", "w1"):
        t = arguments["weights"][1] if name == "w1" else arguments[name]
        with pytest.raises(RuntimeError, match="fusedrnn"):
            call_backward(cell, replaced(arguments, name, t.to("meta")))
    x, h, c, w, sizes, d = forward_arguments(cell, "cpu").values()
    y = x.new_empty(*x.shape[:2], h.shape[2], device="meta")
    with pytest.raises(RuntimeError, match="fusedrnn: y"):
        getattr(torch.ops.fusedrnn, f"{cell}_advance")(x, h, c, w, sizes, d, y)


def disturbed(value, rng: random.Random):
    """Something a careless caller might pass instead of `value`."""
    if isinstance(value, list):
        choice = rng.randrange(4)
        if choice == 0:
            return value[: rng.randrange(len(value) + 1)]
        if choice == 1:
            return value + value[: rng.randrange(1, len(value) + 1)]
        if choice == 2:
            return rng.sample(value, len(value))
        i = rng.randrange(len(value))
        return [*value[:i], disturbed(value[i], rng), *value[i + 1 :]]
    if isinstance(value, int):
        return rng.choice([0, 1, 2, 3, -1, 255, 2**31, -(2**63), 2**63 - 1])
    if value is None:
        return rng.choice([torch.zeros(0), torch.zeros(2, 3, 6), torch.tensor([3, 2, 2, 1]), torch.zeros(())])
    choice = rng.randrange(9)
    d = rng.randrange(value.dim()) if value.dim() else 0
    if choice == 0:
        return value.to(rng.choice([torch.float64, torch.float16, torch.int64, torch.int32, torch.bool]))
    if choice == 1:
        return value[None] if rng.random() < 0.5 else value.flatten()
    if choice == 2 and value.dim():
        return value.narrow(d, 0, rng.randrange(value.shape[d] + 1))
    if choice == 3 and value.dim():
        return torch.cat([value] * rng.randrange(1, 4), d)
    if choice == 4 and value.dim() > 1:
        return value.transpose(0, 1)
    if choice == 5:
        return value.new_zeros(()).expand(value.shape)
    if choice == 6 and value.dtype == torch.int64:
        return value + torch.tensor([rng.choice([-(2**40), -1, 1, 2**40]) for _ in range(value.numel())])
    if choice == 7:
        return value.new_empty(rng.choice([(0,), (0, 0), (0, 3, 4), (5, 0, 4), (5, 3, 0), (2**20, 0)]))
    return value * float("nan") if value.is_floating_point() else value * -1


@pytest.mark.parametrize("cell", [*CELLS, "lstm_proj"])
def test_careless_callers(cell, device):
    """A few hundred calls with one to three arguments disturbed: each gives a result or a RuntimeError."""
    if device.type != "cpu":
        pytest.skip("made of CPU tensors")
    rng = random.Random(f"careless {cell}")
    for _ in range(400):
        backward = rng.random() < 0.5
        packed = rng.random() < 0.5
        arguments = backward_arguments(cell, device, packed) if backward else forward_arguments(cell, device, packed)
        for name in rng.sample(sorted(arguments), rng.randrange(1, 4)):
            arguments[name] = disturbed(arguments[name], rng)
        with suppress(RuntimeError):
            call_backward(cell, arguments) if backward else call_forward(cell, arguments, rng.random() < 0.5)


def test_the_inputs_are_what_the_ops_take():
    """Guards this file: the order of Inputs.arguments() is the order of the names used here."""
    assert list(Inputs.__dataclass_fields__) == ["x", "h0", "c0", "weights", "batch_sizes", "directions"]
