"""Any call of the public modules and functions gives a right result or an exception: test_fuzz_ops.py for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fuzzing import Mistakes, attempt, calls, close, harmless, layers, mistakes, spoil
from helpers import Case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

import fusedrnn

WAYS = ("module", "functional", "cell", "stream", "explain")
FORMS = ("padded", "unbatched", "packed", "sorted", "nested", "lengths")


@dataclass(frozen=True)
class ApiCall:
    """A network on sequences, by a module, a function, a cell or a stream."""

    way: str
    form: str  # of the input, to a module or a function
    case: Case  # of its lengths, some forms are all of one
    layers: int
    batch_first: bool
    recompute: bool
    reset: bool
    grad: bool
    seed: int
    threads: int
    mistakes: Mistakes

    @property
    def takes(self) -> str:
        return {"cell": "a step", "stream": "padded", "explain": "a shape"}.get(self.way, self.form)

    @property
    def what(self) -> str:
        return f"{self.way}, {self.takes}"

    def run(self) -> Callable[[], None]:
        torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        options, sequences = self.options(), self.sequences()
        name = self.case.cell.split("_")[0].upper() + ("Cell" if self.way == "cell" else "")
        theirs = getattr(nn, name)(**options).double()
        hx = self.states(len(sequences)) if self.case.states and self.way != "stream" else None
        arguments = {**self.formed(sequences), "hx": of_sequence(hx, 0) if self.takes == "unbatched" else hx}
        arguments["weights"] = [p.detach().to(self.case.dtype).requires_grad_() for p in theirs.parameters()]
        given = spoil({**options, **arguments}, self.mistakes, options=len(options))
        made, called = ({key: given[key] for key in keys} for keys in (options, arguments))
        with torch.set_grad_enabled(self.grad):
            results, parameters = self.call(name, made, **called)
            outputs = results if isinstance(results, tuple) and not isinstance(results, PackedSequence) else (results,)
            gradients = (
                self.gradients(outputs, parameters) if self.grad and self.way not in ("stream", "explain") else []
            )
        return lambda: self.check(theirs, sequences, hx, outputs, gradients)

    def options(self) -> dict[str, Any]:
        """Of the module."""
        case = self.case
        options: dict[str, Any] = {"input_size": case.I, "hidden_size": case.H, "bias": case.bias, "dtype": case.dtype}
        if case.cell.startswith("rnn"):
            options["nonlinearity"] = case.cell[4:]
        if self.way == "cell":
            return options
        options |= {"num_layers": self.layers, "bidirectional": self.directions == 2, "batch_first": self.batch_first}
        return {**options, "proj_size": case.P} if case.P else options

    @property
    def directions(self) -> int:
        return 1 if self.way in ("cell", "stream") else self.case.directions

    def sequences(self) -> list[Tensor]:
        case = self.case
        if case.lengths is not None and self.takes in ("packed", "sorted", "nested", "lengths"):
            lengths = list(case.lengths)
            if self.takes != "sorted":
                random.Random(self.seed).shuffle(lengths)
        else:
            batch = 1 if self.takes == "unbatched" else max(case.N, self.way in ("stream", "explain"))
            lengths = [1 if self.way == "cell" else max(case.T, 1)] * batch
        return [torch.randn(length, case.I, dtype=case.dtype) for length in lengths]

    def states(self, batch: int) -> Any:
        case = self.case
        lead = (batch,) if self.way == "cell" else (self.layers * self.directions, batch)
        h = torch.randn(*lead, case.H if self.way == "cell" else case.output, dtype=case.dtype)
        return (h, torch.randn(*lead, case.H, dtype=case.dtype)) if case.cell == "lstm" else h

    def formed(self, sequences: list[Tensor]) -> dict[str, Any]:
        """The sequences as `input`, and what goes with it."""
        if self.takes == "unbatched":
            return {"input": sequences[0]}
        if self.takes in ("packed", "sorted") and sequences:
            return {"input": pack_sequence(sequences, enforce_sorted=self.takes == "sorted")}
        if self.takes == "nested" and sequences:
            return {"input": torch.nested.nested_tensor(sequences, layout=torch.jagged)}
        none = torch.zeros(max(self.case.T, 1), 0, self.case.I, dtype=self.case.dtype)
        padded = pad_sequence(sequences) if sequences else none
        if self.takes == "a step":
            return {"input": padded[0]}
        formed: dict[str, Any] = {"input": padded.transpose(0, 1) if self.batch_first else padded}
        if self.takes == "a shape":
            return {"input": list(formed["input"].shape)}
        if self.takes == "lengths":
            formed["lengths"] = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
            if self.reset:
                formed["reset"] = torch.rand(formed["input"].shape[:2]) < 0.3
        return formed

    def call(self, name: str, made: dict[str, Any], weights: Any, **called: Any) -> tuple[tuple[Any, ...], list[Any]]:
        """The results, and the parameters that they have gradients for."""
        if self.way == "functional":
            named = ("num_layers", "bidirectional", "batch_first", "nonlinearity")
            options = {key: made[key] for key in named if key in made}
            function = getattr(fusedrnn.functional, name.lower())
            return function(weights=weights, recompute=self.recompute, **called, **options), weights
        module = getattr(fusedrnn, name)(**made)
        module.recompute = self.recompute
        for key, weight in zip(module.state_dict(), weights, strict=True):
            setattr(module, key, nn.Parameter(weight, requires_grad=weight.is_floating_point()))
        if self.way == "stream":
            return (fusedrnn.Stream(module, max(self.case.N, 1))(called["input"]),), []
        if self.way == "explain":
            return (fusedrnn.explain(module, called["input"]),), []
        results = module(**called)
        return results if isinstance(results, tuple) else (results,), list(module.parameters())

    @staticmethod
    def gradients(outputs: Any, parameters: list[Tensor]) -> list[Tensor]:
        tensors = [t for o in outputs for t in (o if isinstance(o, tuple) else (o,)) if t is not None]
        total = sum([(t.values() if t.is_nested else t).sum() for t in tensors if t.is_nested or t.is_floating_point()])
        return list(torch.autograd.grad(total, parameters))

    def check(
        self, theirs: nn.Module, sequences: list[Tensor], hx: Any, outputs: tuple[Any, ...], gradients: list[Tensor]
    ) -> None:
        """Against torch.nn in float64, a sequence at a time."""
        exact = self.case.dtype == torch.float64 and harmless(self.mistakes) and sequences
        if not exact or self.way == "explain" or (self.takes == "lengths" and self.reset):
            return
        if self.way == "cell":
            results = theirs(torch.cat(sequences), hx)
            expected, finals = list(results) if isinstance(results, tuple) else [results], []
            found = list(outputs)
        else:
            alone = [theirs(s, of_sequence(hx, n)) for n, s in enumerate(sequences)]
            expected, finals = [y for y, _ in alone], [h for _, h in alone]
            found = self.separated(outputs[0], [len(s) for s in sequences])
        close([t.detach() for t in found], [t.detach() for t in expected], self)
        if gradients:
            close(gradients, self.gradients([*expected, *finals], list(theirs.parameters())), self)

    def separated(self, y: Any, lengths: list[int]) -> list[Tensor]:
        """An output as those of the sequences."""
        if self.takes == "unbatched":
            return [y]
        if isinstance(y, PackedSequence):
            y, _ = pad_packed_sequence(y, batch_first=True)
        elif y.is_nested:
            return list(y.unbind())
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return [y[n, :length] for n, length in enumerate(lengths)]


def of_sequence(hx: Any, n: int) -> Any:
    return tuple([t[:, n] for t in hx]) if isinstance(hx, tuple) else None if hx is None else hx[:, n]


api_calls = st.builds(
    ApiCall,
    way=st.sampled_from(["module", "module", *WAYS]),
    form=st.sampled_from(FORMS),
    case=layers().filter(lambda case: case.I and case.H),  # as torch.nn's
    layers=st.integers(1, 3),
    batch_first=st.booleans(),
    recompute=st.booleans(),
    reset=st.booleans(),
    grad=st.booleans(),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
    mistakes=mistakes,
)


@pytest.mark.filterwarnings("ignore")
@calls(0.3, usually=200)
@given(api_calls)
def test_any_module(call):
    attempt(call)
