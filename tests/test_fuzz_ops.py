"""Any call of an op, right, nearly right or absurd, gives a right result or an exception: never a crash.

`make fuzz` makes as many as are asked for, under sanitizers; a normal run some hundreds. fuzzing.py has the mistakes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzzing import Mistakes, attempt, calls, close, harmless, layers, mistakes, ordinary, spoil
from helpers import (
    CELLS,
    GATES,
    Case,
    Inputs,
    in_float64,
    layer_op,
    make_gradients,
    make_inputs,
    needs_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from fusedrnn import reference

LINEAR = ("_tangent", "_adjoint", "_curvature")  # of float32 and float64, and of hidden units
OPS = ("", "_inference", "_step", "_advance", "_backward", "_stack", "_stack_backward", "_layer", *LINEAR)


@dataclass(frozen=True)
class OpCall:
    """torch.ops.fusedrnn.<cell><op>, its arguments by the names of its schema."""

    op: str
    case: Case
    layers: int  # of a stack
    save: bool
    seed: int
    threads: int
    mistakes: Mistakes

    @property
    def what(self) -> str:
        return self.op or "forward"

    def run(self) -> Callable[[], None]:
        torch.set_num_threads(self.threads)
        op = getattr(torch.ops.fusedrnn, self.op if self.op == "segments" else self.case.cell + self.op).default
        names = [a.name for a in op._schema.arguments]
        stacked = self.op in ("_stack", "_stack_backward", "_advance")
        values = self.segments() if self.op == "segments" else self.stack() if stacked else self.layer()
        given = spoil({name: values[name] for name in names}, self.mistakes)
        written = [given.get(name) for name in ("h", "c", "y")] if self.op == "_advance" else []
        written = [t for t in written if t is not None]
        written = written if all(map(ordinary, written)) else []
        before = [t.clone() for t in written]
        try:
            results = op(**given)
        except Exception:
            for t, b in zip(written, before, strict=True):
                assert torch.equal(t.nan_to_num(), b.nan_to_num()), "an error that changes tensors"
            raise
        return lambda: self.check(given, results, before)

    def layer(self) -> dict[str, Any]:
        case, seed = self.case, self.seed
        if self.op == "_step":
            case = case.but(T=1, lengths=None, directions=1)
        if self.op in LINEAR:
            case = case.but(
                H=case.H or 1, P=case.P and 1, dtype=case.dtype if case.dtype.itemsize > 2 else torch.float32
            )
        inputs, (dy, dh_n, dc_n, _) = make_inputs(case, seed=seed), make_gradients(case, seed=seed + 1)
        y, h_n, c_n, gates, cells = layer_op(case.cell)(*inputs.arguments(), True)
        x, h0, c0, weights, batch_sizes, directions = inputs.arguments()
        if self.op == "_step":
            h0 = torch.zeros_like(h_n) if h0 is None else h0
            c0 = torch.zeros_like(c_n) if c0 is None and case.cell == "lstm" else c0
            return {"x": x[0], "h": h0[0], "c": None if c0 is None else c0[0], "weights": weights}
        if self.op in LINEAR:
            h = y.new_full((case.rows, case.H), 0.5)
            wx, c = h.repeat(1, GATES[case.cell]), h if case.cell == "lstm" else None
            dwx = wx.unsqueeze(1).repeat(1, directions, 1)
        if self.op == "_curvature":
            values = {"wx": wx, "rh": -wx, "h": h, "c": c, "dwx": None, "drh": wx, "dh": h, "dc": c}
            return {**values, "upstream_h": h, "upstream_c": c, "dupstream_h": None}
        values = {"x": x, "h0": h0, "c0": c0, "weights": weights, "batch_sizes": batch_sizes}
        if self.op in LINEAR:
            values |= {"dwx": dwx, "drh": -dwx, "dh0": dh_n, "dc0": dc_n}
        values |= {"directions": directions, "save": self.save, "every_c": self.save, "recompute": True, "tf32": False}
        values |= {"dy": dy, "dh_n": dh_n, "dc_n": dc_n, "dcells": None if dc_n is None else torch.ones_like(cells)}
        return {**values, "y": y, "gates": gates, "cells": cells, "needs": needs_of(inputs)}

    def stack(self) -> dict[str, Any]:
        first = self.case.but(directions=1)
        if self.op != "_advance":
            first = first.but(lengths=None)
        every = [first] + [first.but(I=first.output)] * (self.layers - 1)
        inputs = [make_inputs(c, seed=self.seed + k) for k, c in enumerate(every)]
        together = lambda states: None if states[0] is None else torch.cat(states)  # noqa: E731
        values = {"x": inputs[0].x, "h0": together([i.h0 for i in inputs]), "c0": together([i.c0 for i in inputs])}
        values |= {"weights": [w for i in inputs for w in i.weights], "layers": self.layers}
        if self.op == "_advance":
            y, h_n, c_n, _, _ = layer_op(first.cell)(*inputs[0].arguments(), False)  # of these shapes
            state = lambda given, n: n.repeat(self.layers, 1, 1) if given is None else given  # noqa: E731
            values |= {"h": state(values["h0"], h_n), "c": state(values["c0"], c_n) if c_n.dim() == 3 else None}
            return {**values, "batch_sizes": inputs[0].batch_sizes, "y": torch.zeros_like(y)}
        values |= {"chunk": 64, "save": True}
        y, h_n, c_n, saved = getattr(torch.ops.fusedrnn, first.cell + "_stack")(**values)
        values |= {"y": y, "saved": saved, "needs": [needs_of(i) for i in inputs], "tf32": False}
        values |= {"save": self.save, "dy": torch.ones_like(y), "dh_n": h_n}
        return {**values, "dc_n": c_n if first.cell == "lstm" else None}

    def segments(self) -> dict[str, Any]:
        rng, N, T = random.Random(self.seed), self.case.N, self.case.T
        reset = torch.tensor([[rng.random() < 0.3 for _ in range(T)] for _ in range(N)], dtype=torch.bool).view(N, T)
        values = {"lengths": torch.tensor([rng.randint(0, T) for _ in range(N)], dtype=torch.int64)}
        values |= {"reset": reset if self.save else None, "first_row": torch.arange(N) * T, "step_row": torch.arange(T)}
        return {**values, "directions": self.case.directions}

    def check(self, given: dict[str, Any], results: Any, before: list[Tensor]) -> None:
        """Against the reference, on whatever was accepted."""
        if self.op == "segments":
            if harmless(self.mistakes):
                rows = [
                    n * self.case.T + t for n, length in enumerate(given["lengths"].tolist()) for t in range(length)
                ]
                assert sorted(results[1].tolist()) == rows
            return
        if self.op in LINEAR:
            if harmless(self.mistakes):
                plain = tree_map(lambda t: t.resolve_neg().clone() if isinstance(t, Tensor) else t, given)
                expected = getattr(torch.ops.fusedrnn, self.case.cell + self.op)(**plain)
                close(list(results), list(expected), self)
            return
        states = [given.get(name) for name in ("h0", "c0", "h", "c")]
        tensors = [t for t in (given["x"], *given["weights"], *states, *before) if t is not None]
        if max(n for t in tensors for n in t.shape) > 10_000 or not all(t.isfinite().all() for t in tensors):
            return
        x, weights = given["x"].double(), [w.double() for w in given["weights"]]
        if self.op == "_advance":
            found = [t for t in (given["y"], given["h"], given["c"]) if t is not None]
            states = (*[t.double() for t in before[:-1]], None)[:2]
            expected = self.advanced(x, states, weights, given["batch_sizes"], given["layers"])
        elif self.op == "_step":
            x, states = x[None], [None if given[name] is None else given[name].double()[None] for name in ("h", "c")]
            found = [results[0][None], *[t[None] for t in results]]  # y is h
        elif self.op in ("", "_inference", "_layer"):
            found = list(results[: 3 if self.case.cell == "lstm" else 2])
            states = [None if given[name] is None else given[name].double() for name in ("h0", "c0")]
        elif self.op == "_backward" and harmless(self.mistakes):
            self.check_gradients(given, results)
            return
        else:
            return
        if self.op != "_advance":
            sizes, directions = given.get("batch_sizes"), given.get("directions", 1)
            expected = getattr(reference, self.case.cell)(x, *states, weights, sizes, directions)
        if all(e.abs().max() < torch.finfo(t.dtype).max for t, e in zip(found, expected, strict=False) if t.numel()):
            close(found, list(expected[: len(found)]), self)

    def advanced(self, x: Tensor, states: Any, weights: list[Tensor], batch_sizes: Tensor | None, layers: int) -> Any:
        """A stack's outputs, and states, by the reference."""
        each, finals = len(weights) // layers, []
        for k in range(layers):
            own = [None if s is None else s[k : k + 1] for s in states]
            of_layer = weights[k * each : (k + 1) * each]
            x, *new = getattr(reference, self.case.cell)(x, *own, of_layer, batch_sizes, 1)
            finals.append(new)
        return x, torch.cat([f[0] for f in finals]), torch.cat([f[1] for f in finals])

    def check_gradients(self, given: dict[str, Any], results: Any) -> None:
        if self.case.dtype not in (torch.float32, torch.float64):
            return
        inputs = Inputs(*[given[name] for name in ("x", "h0", "c0", "weights", "batch_sizes", "directions")])
        upstream = [given[name] for name in ("dy", "dh_n", "dc_n", "dcells")]
        expected = in_float64(self.case, inputs, upstream, given["y"] if given["y"].numel() else None)
        dx, dh0, dc0, dweights = results
        found = {"dx": dx, "dh0": dh0, "dc0": dc0, **{f"d{i}": d for i, d in enumerate(dweights)}}
        names = list(inputs.named())
        # Where all units are saturated, the last digit of y is not the last one of 1 - y^2.
        close([found[n] for n in names], [expected[n] for n in names], self, slack=100)


op_calls = st.builds(
    OpCall,
    op=st.sampled_from([*OPS, "", "_backward", "_advance", "segments"]),
    case=layers(),
    layers=st.integers(1, 3),
    save=st.booleans(),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
    mistakes=mistakes,
)


@calls(0.7, usually=400)
@given(op_calls)
def test_any_op(call):
    attempt(call)


def test_every_op_is_called():
    found = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedrnn::")}
    assert {name.split(".")[0] for name in found} == {
        "segments",
        *[cell + op for cell in CELLS for op in (*OPS, "_plan")],
    }  # a GPU's
