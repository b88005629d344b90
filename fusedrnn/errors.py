"""What wrong arguments raise: torch.nn's errors, in its words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops

_Result = TypeVar("_Result")

# Other exceptions pass (checkpointing stops a forward with one). functorch asserts that its tensors are not used later.
ARGUMENT_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# What says that the arguments were right: of an allocation on a GPU, on the CPU, in C++.
_NO_MEMORY = ("out of memory", "can't allocate", "bad_alloc")


def in_torch_words(forward: Any, module: Any, input: Any, hx: Any, error: Exception) -> Exception:
    """What torch.nn's ``forward`` (None: it has no such call) raises for the arguments that gave ``error``, or that."""
    if torch.compiler.is_compiling():  # a tracer reports it, or leaves the call to eager code
        return error
    transformed = torch._C._are_functorch_transforms_active()  # torch.nn knows fewer of them
    nested = isinstance(input, Tensor) and input.is_nested  # and none of these
    if transformed or nested:
        return error
    if any(words in str(error) for words in _NO_MEMORY):
        return out_of_memory(error)
    if forward is None:
        return error
    if not all(map(_is_stored, (*_tensors((input, hx)), *module.parameters()))):  # torch.nn would read what is gone
        return error
    try:
        with torch.no_grad():
            if isinstance(module, torch.nn.RNNBase) and isinstance(input, PackedSequence):
                # torch.nn's forward reads out of bounds for some of these.
                if hx is None:
                    module.check_input(input.data, input.batch_sizes)
                else:
                    module.check_forward_args(input.data, hx, input.batch_sizes)
            elif _has_its_shapes(module):  # nor does it look at the weights' shapes
                forward(module, input, hx)
    except Exception as theirs:
        return theirs
    return error


def out_of_memory(error: Exception) -> Exception:
    """``error`` as a torch.OutOfMemoryError, if it is an op's that had no memory on a GPU: an op can't raise one."""
    return torch.OutOfMemoryError(str(error)) if "CUDA out of memory" in str(error) else error


def raises_out_of_memory(backward: Callable[..., _Result]) -> Callable[..., _Result]:
    """The ``backward`` of an autograd.Function, with such an error in the place of the op's."""

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> _Result:
        try:
            return backward(ctx, *gradients)
        except RuntimeError as error:
            raise out_of_memory(error) from None

    return wrapped


def _has_its_shapes(module: Any) -> bool:
    """Whether the weights of a multi-layer module have the shapes that its attributes say."""
    if not isinstance(module, torch.nn.RNNBase):
        return True
    hidden, directions = module.hidden_size, 2 if module.bidirectional else 1
    rows, projected = ops.GATES.get(module.mode.lower(), 1) * hidden, module.proj_size or hidden
    for name in module._flat_weights_names:
        width = module.input_size if "_l0" in name else directions * projected
        shapes = {
            "weight_ih": (rows, width),
            "weight_hh": (rows, projected),
            "weight_hr": (projected, hidden),
        }
        weight = getattr(module, name)  # if it is no tensor, torch.nn says so
        if isinstance(weight, Tensor) and weight.shape != shapes.get(name[:9], (rows,)):
            return False
    return True


def check_stored(*values: Any) -> None:
    """That tensors are dense and have their memory, before torch's own operations, which crash for some others. The
    ops check it themselves."""
    if torch.compiler.is_compiling():
        return
    for t in _tensors(values):
        if t.layout is not torch.strided:
            raise RuntimeError(f"fusedrnn: expected dense tensors, got one of layout {t.layout}")
        if not _is_stored(t):
            raise RuntimeError("fusedrnn: expected tensors whose storage has not been freed or made smaller")


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [] if values.is_nested else [values]  # of tensors, that are checked where they are taken out
    return [t for value in values for t in _tensors(value)] if isinstance(values, list | tuple) else []


def _is_stored(t: Tensor) -> bool:
    """Whether all of a tensor lies in its storage."""
    if t.layout is not torch.strided or t.is_meta or is_functorch_wrapped_tensor(t):
        return True
    if t._has_symbolic_sizes_strides or 0 in t.shape:  # a tracer's sizes compare to no memory
        return True
    last = sum([(n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)])
    return (t.storage_offset() + last + 1) * t.itemsize <= t.untyped_storage().nbytes()


def pair(hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """``(h_0, c_0)`` of an LSTM's ``hx``: two tensors, or none at all."""
    if hx is None:
        return None, None
    h, c = (None, None) if isinstance(hx, Tensor) else hx
    if h is None or c is None:
        raise TypeError(f"expected hx to be a pair of tensors (h_0, c_0), got {type(hx).__name__}")
    return h, c


def check_dimensions(cell: str, x: Tensor, states: Sequence[Tensor] | None) -> None:
    """torch.nn's errors about the number of dimensions of the input and the states."""
    dim = x.dim()
    if dim not in (2, 3):
        name, tail = ("RNN", "D tensor") if cell.startswith("rnn") else (cell.upper(), "D")
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}{tail} instead")
    if states is not None and any(s.dim() != dim for s in states):
        which = "batched 3-D" if dim == 3 else "unbatched 2-D"
        if ops.STATES[cell] == 2:
            raise RuntimeError(
                f"For {which} input, hx and cx should also be {dim}-D "
                f"but got ({states[0].dim()}-D, {states[1].dim()}-D) tensors"
            )
        raise RuntimeError(f"For {which} input, hx should also be {dim}-D but got {states[0].dim()}-D tensor")


def check_sizes(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    rows: int,
    batch: int,
    dim: int,
) -> list[tuple[int, int, int]]:
    """torch.nn's errors about the input's dtype and all sizes. Returns the shapes of the states."""
    w_ih, w_hh = weights[0], weights[1]
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(f"expected w_ih and w_hh to have 2 dimensions, got {w_ih.dim()} and {w_hh.dim()}")
    if x.dtype != w_ih.dtype and not ops.autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.dim() != dim:
        raise RuntimeError(f"input must have {dim} dimensions, got {x.dim()}")
    if x.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {x.shape[-1]}")
    expected = [(rows, batch, w_hh.shape[1])]
    if ops.STATES[cell] == 2:
        expected.append((rows, batch, w_ih.shape[0] // ops.GATES[cell]))
    if states is not None and len(states) != len(expected):
        raise RuntimeError("lstm expects two hidden states")
    for k, (s, e) in enumerate(zip(states or (), expected, strict=False)):
        if s.shape != e:
            name = f"hidden[{k}]" if len(expected) == 2 else "hidden"
            raise RuntimeError(f"Expected {name} size {e}, got {list(s.shape)}")
    return expected
