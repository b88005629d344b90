"""Constructor arguments, good and bad: the same module, or the same type of error, words and warnings as torch.nn."""

import math

import pytest
import torch
from outcomes import same_outcome

I, H = 4, 6

CONSTRUCTOR = [
    *({"dropout": d} for d in (-0.1, 1.1, True, "a", None, math.nan, math.inf, 1j, 2, [0.5])),
    *({"dropout": d, "num_layers": 2} for d in (-0.1, 1.1, True, "a", math.nan, 0, 1, 0.5)),
    {"dropout": 0.5},  # a warning: one layer
    *({"bias": b} for b in (1, 0, None, "yes", torch.tensor(True))),
    *({"batch_first": b} for b in (1, 0, None, "yes")),
    *({"input_size": s} for s in (0, -1, 2.0, "2", None, True, torch.tensor(3))),
    *({"hidden_size": s} for s in (0, -1, 2.0, "2", None, True)),
    *({"num_layers": n} for n in (0, -1, 1.5, "1", None)),
    *({"bidirectional": b} for b in (1, 0, None, "yes")),
    *({"proj_size": p} for p in (-1, 0, 1, 6, 7, 1.5, "1", None)),
    *({"device": d} for d in ("nowhere", 1.5)),
    *({"dtype": d} for d in (torch.int64, torch.complex64, "float32", torch.bool)),
    *({"nonlinearity": f} for f in ("sigmoid", "", None, "RELU")),
    {"hiden_size": 3},
    {"mode": "LSTM"},
]


@pytest.mark.parametrize("options", CONSTRUCTOR, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_constructor(name, options):
    same_outcome(lambda library: repr(getattr(library, name)(**{"input_size": I, "hidden_size": H, **options})))


@pytest.mark.parametrize("arguments", [(), (4,), (4, 6, 2, "relu", True, False, 0.0, True), (4, 6, 1, 2, 3), (4,) * 12])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_positional_arguments(name, arguments):
    def call(library):
        try:
            return repr(getattr(library, name)(*arguments))
        except TypeError as error:  # Python's own names the function by its place
            raise TypeError(str(error).split("__init__()")[-1]) from None

    same_outcome(call)


CELL_CONSTRUCTOR = [
    *({"input_size": s} for s in (0, -1, 2.0, "2", None)),
    *({"hidden_size": s} for s in (0, -1, 2.0, None)),
    *({"bias": b} for b in (1, 0, None, "yes", False)),
    *({"dtype": d} for d in (torch.int64, torch.complex64, "float32")),
    *({"device": d} for d in ("nowhere", 1.5)),
    *({"nonlinearity": f} for f in ("sigmoid", "", None, "relu")),
]


@pytest.mark.parametrize("options", CELL_CONSTRUCTOR, ids=str)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cell_constructor(name, options):
    if "nonlinearity" in options and name != "RNNCell":
        pytest.skip("Python's own message, which names the class")
    same_outcome(lambda library: repr(getattr(library, name)(**{"input_size": I, "hidden_size": H, **options})))
