"""Every c_t of an LSTM as a result, with gradients."""

import pytest
import torch
from conftest import assert_close_to_reference
from helpers import (
    DTYPES,
    backward_ours,
    differentiate,
    in_float64,
    make_gradients,
    make_inputs,
    ragged_lengths,
    variant,
)

from fusedrnn import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"directions": 2}, {"lengths": ragged_lengths(7, 9), "directions": 2}, {}], ids=str
)
@pytest.mark.parametrize("name", ["lstm", "lstm_proj"])
def test_backward_op(name, options, dtype, device, capability):
    """The gradients of all results and every c at once; torch's part is played by the eager loops at the same dtype."""
    case = variant(name, T=7, N=3, I=5, H=19, dtype=dtype, **options)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    gradients[3] = torch.randn(case.rows, case.directions, case.H, dtype=state, device=device)
    for upstream in (gradients, [None, None, None, gradients[3]]):
        found = backward_ours(case, inputs, upstream)
        eager = differentiate(lambda same: reference.lstm(*same.arguments()), inputs, upstream)
        expected = in_float64(case, inputs, upstream)
        assert_close_to_reference(found, *({name: results[name] for name in found} for results in (eager, expected)))
