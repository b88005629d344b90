"""What one layer call is, and the three ways to run it: our ops, torch.nn's kernels, the float64 reference.

Each way gives the same dict of named tensors: y, h_n, c_n and, for a backward, dx, dh0, dc0 and d0, d1, ... (weights).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedrnn import reference

NAMESPACE = "fusedrnn"  # set from --ops

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
VARIANTS = ("lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu")  # a cell, or a cell with projection
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
SAVED = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}


def layer_op(cell: str):
    return getattr(getattr(torch.ops, NAMESPACE), cell)


def layer_backward_op(cell: str):
    return getattr(getattr(torch.ops, NAMESPACE), f"{cell}_backward")


@dataclass(frozen=True)
class Case:
    """Shape and options of one layer call. Lengths (longest first) make it packed; they replace T and N."""

    cell: str = "lstm"
    T: int = 5
    N: int = 3
    I: int = 5
    H: int = 7
    P: int = 0  # projected output size, or 0
    directions: int = 1
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    states: bool = True  # h0 (and c0) given
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.cell, f"T{self.T}-N{self.N}-I{self.I}-H{self.H}", str(self.dtype).split(".")[1]]
        words += [f"P{self.P}"] if self.P else []
        words += ["bidirectional"] if self.directions == 2 else []
        words += [] if self.bias else ["nobias"]
        words += [f"packed{len(self.lengths)}x{max(self.lengths)}"] if self.lengths else []
        words += [] if self.states else ["zerostate"]
        return "-".join(words)

    @property
    def batch(self) -> int:
        return self.N if self.lengths is None else len(self.lengths)

    @property
    def rows(self) -> int:
        return self.T * self.N if self.lengths is None else sum(self.lengths)

    @property
    def output(self) -> int:
        return self.P or self.H

    def but(self, **changes) -> Case:
        return replace(self, **changes)


def variant(name: str, **options) -> Case:
    """A case of one of VARIANTS; the projection is about half of H and never its multiple of anything."""
    case = Case(cell=name.removesuffix("_proj"), **options)
    return case.but(P=max(1, case.H // 2)) if name.endswith("_proj") and case.H > 1 else case


def ragged_lengths(N: int, T: int) -> tuple[int, ...]:
    """Lengths from T down to 1, unevenly, with repeats."""
    return tuple(max(1, T - (n * n * T) // max(1, N * N)) for n in range(N))


def batch_sizes_of(lengths) -> Tensor:
    return torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))], dtype=torch.int64)


@dataclass
class Inputs:
    """The tensors of a layer call, in the order of the op's arguments."""

    x: Tensor  # [T, N, I] or [rows, I]
    h0: Tensor | None  # [D, N, P]
    c0: Tensor | None  # [D, N, H]
    weights: list[Tensor]
    batch_sizes: Tensor | None  # [T], always on the CPU
    directions: int

    def named(self) -> dict[str, Tensor]:
        """Every tensor that can have a gradient, in the order of the bits of `needs`."""
        states = {"dx": self.x, "dh0": self.h0, "dc0": self.c0}
        weights = {f"d{i}": w for i, w in enumerate(self.weights)}
        return {name: t for name, t in {**states, **weights}.items() if t is not None}

    def map(self, function) -> Inputs:
        maybe = lambda t: None if t is None else function(t)  # noqa: E731
        return Inputs(
            function(self.x), maybe(self.h0), maybe(self.c0), [function(w) for w in self.weights],
            self.batch_sizes, self.directions,
        )  # fmt: skip

    def arguments(self) -> tuple:
        return self.x, self.h0, self.c0, self.weights, self.batch_sizes, self.directions


def weight_shapes(case: Case) -> list[tuple[int, ...]]:
    G = GATES[case.cell]
    one = [(G * case.H, case.I), (G * case.H, case.output)]
    one += [(G * case.H,), (G * case.H,)] if case.bias else []
    one += [(case.P, case.H)] if case.P else []
    return one * case.directions


def make_inputs(case: Case, device="cpu", seed: int = 0) -> Inputs:
    """Made on the CPU in float64, then rounded: the same numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype).to(device)

    def uniform(*shape):
        bound = 1 / math.sqrt(max(1, case.H))
        values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 * bound - bound
        return values.to(case.dtype).to(device)

    D, N = case.directions, case.batch
    x = normal(case.T, N, case.I) if case.lengths is None else normal(case.rows, case.I)
    h0 = normal(D, N, case.output) if case.states else None
    c0 = normal(D, N, case.H) if case.states and case.cell == "lstm" else None
    weights = [uniform(*shape) for shape in weight_shapes(case)]
    sizes = None if case.lengths is None else batch_sizes_of(case.lengths)
    return Inputs(x, h0, c0, weights, sizes, D)


def make_gradients(case: Case, device="cpu", seed: int = 1) -> list[Tensor | None]:
    """Random upstream gradients of y, h_n and (lstm) c_n; none of every c."""
    generator = torch.Generator().manual_seed(seed)
    D, N, width = case.directions, case.batch, case.directions * case.output
    shapes = [(case.T, N, width) if case.lengths is None else (case.rows, width), (D, N, case.output)]
    shapes += [(D, N, case.H)] if case.cell == "lstm" else []
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype).to(device) for s in shapes]
    return made + [None] * (4 - len(made))


# ---- the three ways ------------------------------------------------------------------------------


def forward_ours(case: Case, inputs: Inputs, save: bool = False) -> dict[str, Tensor]:
    y, h_n, c_n, _, _ = layer_op(case.cell)(*inputs.arguments(), save)
    return {"y": y, "h_n": h_n, "c_n": c_n} if case.cell == "lstm" else {"y": y, "h_n": h_n}


def needs_of(inputs: Inputs) -> int:
    """The mask that asks for every gradient there can be."""
    bits = 1 | (2 if inputs.h0 is not None else 0) | (4 if inputs.c0 is not None else 0)
    return bits | sum(8 << i for i in range(len(inputs.weights)))


def backward_ours(case: Case, inputs: Inputs, gradients, needs: int | None = None) -> dict[str, Tensor]:
    """Gradients by name; those that weren't asked for are left as the op gives them (empty)."""
    y, _, _, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
    needs = needs_of(inputs) if needs is None else needs
    dx, dh0, dc0, dweights = layer_backward_op(case.cell)(*gradients, *inputs.arguments(), y, gates, cells, needs)
    found = {"dx": dx, "dh0": dh0, "dc0": dc0, **{f"d{i}": d for i, d in enumerate(dweights)}}
    return {name: found[name] for name in inputs.named()}


def ours(case: Case, inputs: Inputs, gradients) -> dict[str, Tensor]:
    return {**forward_ours(case, inputs, save=True), **backward_ours(case, inputs, gradients)}


@contextmanager
def one_thread():
    """For what isn't ours: OpenMP's own barriers take seconds where something else uses the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@one_thread()
def differentiate(layer, inputs: Inputs, gradients) -> dict[str, Tensor]:
    inputs = inputs.map(lambda t: t.detach().requires_grad_())
    outputs = [t for t in layer(inputs) if t is not None]
    given = [(o, g) for o, g in zip(outputs, gradients, strict=False) if g is not None and o.requires_grad]
    named = inputs.named()
    if given:
        roots, upstream = zip(*given, strict=True)
        found = torch.autograd.grad(roots, list(named.values()), upstream, allow_unused=True)
    else:
        found = [None] * len(named)
    filled = [torch.zeros_like(t) if d is None else d for d, t in zip(found, named.values(), strict=True)]
    results = dict(zip(("y", "h_n", "c_n"), (o.detach() for o in outputs), strict=False))
    return {**results, **dict(zip(named, filled, strict=True))}


def _relu_step(case: Case, inputs: Inputs, y: Tensor):
    """A step of the reference whose ReLUs are on or off as they were in `y`, taken in the order of the loops."""
    sizes = [case.N] * case.T if inputs.batch_sizes is None else inputs.batch_sizes.tolist()
    on = (y > 0).double().reshape(-1, case.directions, case.H)
    sides = [list(on[:, d].split(sizes)) for d in range(case.directions)]
    remaining = iter(sides[0] + (sides[1][::-1] if case.directions == 2 else []))
    return lambda wx, rh, state: ((wx + rh) * next(remaining),)


def in_float64(case: Case, inputs: Inputs, gradients, y: Tensor | None = None) -> dict[str, Tensor]:
    """The reference, on the rounded numbers that the others see.

    The derivative of a ReLU jumps at zero, where a rounding error chooses the side. With `y`, somebody's result, the
    reference is that of the smooth function around it: each unit is on where it is in `y`.
    """

    def layer(double: Inputs):
        if case.cell == "rnn_relu" and y is not None:
            outputs = reference._layer(_relu_step(case, double, y), 1, *double.arguments())
        else:
            outputs = getattr(reference, case.cell)(*double.arguments())
        return outputs if case.cell == "lstm" else outputs[:2]

    wide = [None if g is None else g.double() for g in gradients]
    return differentiate(layer, inputs.map(Tensor.double), wide)


def with_torch_nn(case: Case, inputs: Inputs, gradients) -> dict[str, Tensor]:
    """torch.nn's own kernels, at the dtype of the case."""

    def layer(same: Inputs):
        D, N = case.directions, case.batch
        h0 = same.x.new_zeros(D, N, case.output) if same.h0 is None else same.h0
        state = h0
        if case.cell == "lstm":
            state = (h0, same.x.new_zeros(D, N, case.H) if same.c0 is None else same.c0)
        options = (case.bias, 1, 0.0, True, D == 2)
        function = getattr(torch._VF, case.cell)
        if same.batch_sizes is None:
            return function(same.x, state, same.weights, *options, False)
        return function(same.x, same.batch_sizes, state, same.weights, *options)

    return differentiate(layer, inputs, gradients)


def four_results(case: Case, device="cpu", seed: int = 0):
    """Ours, torch.nn's, our reference and torch.nn's reference, on the same inputs and upstream gradients."""
    inputs = make_inputs(case, device, seed)
    gradients = make_gradients(case, device, seed + 1)
    found, nn_result = ours(case, inputs, gradients), with_torch_nn(case, inputs, gradients)
    expected = nn_expected = in_float64(case, inputs, gradients, found["y"])
    if case.cell == "rnn_relu":
        nn_expected = in_float64(case, inputs, gradients, nn_result["y"])
    return found, nn_result, expected, nn_expected


def fair_results(case: Case, device="cpu", seed: int = 0, runs: int = 10):
    """four_results; of several seeds, each tensor concatenated, where a tensor can be a number or two.

    The relative error of those is luck (a sum that nearly cancels).
    """
    if min(case.rows * case.I, case.batch * case.output, case.H * case.I, case.H) >= 8:
        return four_results(case, device, seed)
    found = [four_results(case, device, seed + 2 * i) for i in range(runs)]
    return [{name: torch.cat([r[name] for r in way]) for name in way[0]} for way in zip(*found, strict=True)]


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor], what: str = "") -> None:
    assert set(one) == set(other)
    for name in one:
        same = torch.equal(one[name], other[name])
        assert same, f"{what} {name} differs by {(one[name] - other[name]).abs().max().item():.3g}"
