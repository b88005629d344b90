"""What a call does: returns or raises, and with what words. For comparing ours with torch.nn."""

import traceback
import warnings

import torch
from torch import nn

import fusedrnn


def outcome(function):
    """("raised", type, text, whether on purpose), or ("returned", value); and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = ("returned", function())
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            on_purpose = last.filename == nn.modules.rnn.__file__ and last.line.startswith("raise")
            result = ("raised", type(error), str(error), on_purpose)
    return result, [(w.category, str(w.message)) for w in caught if "oneDNN" not in str(w.message)]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value if v is not None for t in tensors_in(v)] if isinstance(value, tuple) else []


# What an error of any kind may be
ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def same_outcome(call, must_raise=False, promoted=False, packed=False):
    """Compares call(fusedrnn) with call(torch.nn).

    promoted: torch.nn may take mixed dtypes, ours refuses them. packed: torch.nn's accidents aren't compared; if it is
    "unsorted", neither are words.
    """
    (theirs, their_warnings), (ours, our_warnings) = outcome(lambda: call(nn)), outcome(lambda: call(fusedrnn))
    if promoted and theirs[0] == "returned":
        assert ours[:2] == ("raised", RuntimeError) and "dtype" in ours[2]
        return
    assert ours[0] == theirs[0], f"ours {ours}\ntorch.nn {theirs}"
    if theirs[0] == "raised":
        if packed and not theirs[3]:
            assert issubclass(ours[1], ERRORS)
            return
        if packed == "unsorted":  # torch.nn tells the shape of the state after sorting it
            assert ours[1] == theirs[1]
            return
        assert ours[1:3] == theirs[1:3]
        assert our_warnings == their_warnings
        return
    assert not must_raise, "torch.nn takes this"
    assert our_warnings == their_warnings
    for a, b in zip(tensors_in(ours[1]), tensors_in(theirs[1]), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
