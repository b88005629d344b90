"""The float64 reference itself, against torch.nn in float64: what all other tests lean on."""

import pytest
import torch
from helpers import VARIANTS, in_float64, make_gradients, make_inputs, ragged_lengths, variant, with_torch_nn


@pytest.mark.parametrize("lengths", [None, ragged_lengths(6, 7), (4, 4, 4), (1,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_reference_is_torch_nn(name, directions, bias, lengths):
    options = {"directions": directions, "bias": bias, "lengths": lengths}
    case = variant(name, T=6, N=4, I=5, H=9, dtype=torch.float64, **options)
    inputs, gradients = make_inputs(case), make_gradients(case)
    found, expected = in_float64(case, inputs, gradients), with_torch_nn(case, inputs, gradients)
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", VARIANTS)
def test_no_state_is_the_zero_state(name):
    case = variant(name, dtype=torch.float64, directions=2)
    inputs, gradients = make_inputs(case), make_gradients(case)
    zeros = inputs.map(lambda t: t)
    zeros.h0 = torch.zeros_like(inputs.h0)
    zeros.c0 = None if inputs.c0 is None else torch.zeros_like(inputs.c0)
    inputs.h0 = inputs.c0 = None
    found, expected = in_float64(case, inputs, gradients), in_float64(case, zeros, gradients)
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
