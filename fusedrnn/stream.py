"""Serving: a module run on input that arrives a step or a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import check_sizes, check_stored
from .modules import CELL, GRU, LSTM, RNN, FusedBase
from .network import stack

_is_compiling = torch.compiler.is_compiling
_increment_version = torch._C._increment_version


class Stream:
    """Runs a module on a stream of input: the state is carried from call to call, without gradients. ::

        stream = fusedrnn.Stream(lstm)  # of one sequence
        for x in source:                # [1, I], or chunks [T, 1, I]
            y = stream(x)
        stream.reset()                  # before the next sequence

    The state is updated in place, and the results lie in the same memory, where the next call overwrites
    them (``clone()`` what is to be kept): on a CPU, after the first call with a shape, no tensor is
    allocated any more (but in float16). To autograd that is a change in place: what has saved a result for
    backward raises there if there was another call. A result may be the next input, ``y = stream(y)``; it is
    copied then. A stream is for one thread, and for the device and dtype that the module has when it is made;
    autocast doesn't change it.
    Under torch.compile a call gives new tensors. Pickled or copied, it takes the module along, and its
    state at that time.

    Args:
        module: an ``LSTM``, ``GRU`` or ``RNN`` of fusedrnn in one direction; dropout is not applied. Its
            parameters are read at every call (parametrizations too); its ``forward`` isn't called, so that
            hooks added later don't run; a copy of the stream is refused then.
        batch_size: N, how many sequences run side by side.

    Raises:
        TypeError: ``module`` is of another class, or has a ``forward`` of its own.
        ValueError: it is bidirectional, so that it needs the end of a sequence for its first output; it has
            forward hooks, as pruned weights and the older ``weight_norm`` have; ``batch_size`` is below 1.
    """

    def __init__(self, module: FusedBase, batch_size: int = 1) -> None:
        _check_module(module)
        if batch_size < 1:
            raise ValueError(f"expected batch_size to be 1 or more, got {batch_size}")
        self.module, self.batch_size = module, batch_size
        self._advance = ops.advance[CELL[module.mode]]
        widths = [module.proj_size or module.hidden_size, module.hidden_size][: ops.STATES[CELL[module.mode]]]
        check_stored(module._weights())
        like = module._weights()[0].detach()
        sizes = [module.num_layers * batch_size * width for width in widths]
        with torch.inference_mode(False):  # written to in any mode
            self._sizes_of_a_step = torch.tensor([batch_size], device="cpu")
            self._memory = like.new_zeros(sum(sizes))  # of all states
            parts = zip(self._memory.split(sizes), widths, strict=True)
            self._states = tuple([part.view(module.num_layers, batch_size, width) for part, width in parts])
        self._shape: torch.Size | None = None  # of the input for which there are results

    def __call__(self, input: Tensor) -> Tensor:
        """The outputs of the next step or steps.

        Args:
            input: a step ``[N, I]`` or a chunk ``[T, N, I]`` (``[N, T, I]`` if the module is
                ``batch_first``).

        Returns:
            Every h of the last layer, shaped as ``input``; overwritten by the next call.

        Raises:
            ValueError, RuntimeError: the input's dtype, shape or device is wrong, or there is no memory; the
                state is what it was.
        """
        if _is_compiling():
            return self._traced(input)
        if input.shape != self._shape:
            self._prepare(input)
        x = input.transpose(0, 1) if self._transposed else input
        module = self.module
        try:
            self._advance(x, self._h, self._c, module._weights(), self._sizes, module.num_layers, self._y)
        except RuntimeError:
            self._check_kind()
            raise
        _increment_version(self._written)  # the op is out of autograd's sight
        return self._result

    def _check_kind(self) -> None:
        """That the module is still of the dtype and on the device that the states have."""
        state, w = self._memory, self.module._weights()[0]
        if w.dtype != state.dtype or w.device != state.device:
            raise RuntimeError(
                f"the stream was made for a module of {state.dtype} on {state.device}, which has become"
                f" {w.dtype} on {w.device}: make another Stream"
            )

    def _traced(self, input: Tensor) -> Tensor:
        """A call to tracers, which don't follow tensors that are written to in part: new results, and all states."""
        is_step = input.dim() == 2
        x = input.transpose(0, 1) if self.module.batch_first and not is_step else input
        cell, weights, layers = CELL[self.module.mode], self.module._weights_by_name(), self.module.num_layers
        widths = [s.shape[-1] for s in self._states]
        parts = self._memory.split([layers * self.batch_size * width for width in widths])
        states = tuple([p.view(layers, self.batch_size, width) for p, width in zip(parts, widths, strict=True)])
        check_sizes(cell, x, states, weights, layers, x.shape[-2], x.dim())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            sizes = self._sizes_of_a_step if is_step else None
            (y,), states = stack(cell, x, states, weights, sizes, layers, 1, 0.0)
            self._memory.copy_(torch.cat([s.flatten() for s in states]))
        return y.transpose(0, 1) if self.module.batch_first and not is_step else y

    def _prepare(self, input: Tensor) -> None:
        """Checks the shape of the input, and makes what a call with it needs."""
        if input.dim() not in (2, 3):
            raise ValueError(f"Stream: Expected input to be 2D or 3D, got {input.dim()}D instead")
        is_step = input.dim() == 2
        self._transposed = self.module.batch_first and not is_step
        self._sizes = self._sizes_of_a_step if is_step else None
        x = input.transpose(0, 1) if self._transposed else input
        weights, layers = self.module._weights(), self.module.num_layers
        check_sizes(CELL[self.module.mode], x, self._states, weights, layers, x.shape[-2], x.dim())
        self._h, self._c = (*self._states, None)[:2]
        with torch.inference_mode(False):
            self._y = self._h.new_empty(*x.shape[:-1], self._h.shape[-1])
            self._result = self._y.transpose(0, 1) if self._transposed else self._y
        self._written = (self._y,)
        self._shape = input.shape

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.batch_size), self.state

    def __setstate__(self, hx: Any) -> None:
        self.state = hx

    def reset(self, sequences: Tensor | None = None) -> None:
        """Zero states for all sequences, or for some of them: indices, or a bool mask ``[N]``."""
        for state in self._states:
            if sequences is None:
                state.zero_()
            else:
                state[:, sequences] = 0

    @property
    def state(self) -> Any:
        """The state, as ``hx`` of the module: ``h [L, N, P]``, or ``(h, c)``. A copy; it can be assigned."""
        states = tuple([s.clone() for s in self._states])
        return states if len(states) == 2 else states[0]

    @state.setter
    def state(self, hx: Any) -> None:
        given = tuple(hx) if len(self._states) == 2 else (hx,)
        for k, (state, value) in enumerate(zip(self._states, given, strict=True)):
            if value.shape != state.shape:
                raise RuntimeError(f"Expected hidden[{k}] size {tuple(state.shape)}, got {list(value.shape)}")
        with torch.no_grad():
            for state, value in zip(self._states, given, strict=True):
                state.copy_(value)


def _check_module(module: FusedBase) -> None:
    """That a module's parameters, read at every call, and its options say all that a call of it computes."""
    if not isinstance(module, FusedBase):
        raise TypeError(f"expected fusedrnn's LSTM, GRU or RNN, got {type(module).__name__}")
    if getattr(module.forward, "__func__", None) not in (LSTM.forward, GRU.forward, RNN.forward):
        raise TypeError(f"a stream doesn't call forward, and that of {type(module).__name__} is not fusedrnn's own")
    if module._forward_pre_hooks or module._forward_hooks:
        raise ValueError(
            "a stream doesn't run the module's forward hooks: remove them. If they compute a weight (prune,"
            " weight_norm, spectral_norm), make that permanent (prune.remove, remove_weight_norm,"
            " remove_spectral_norm), or use torch.nn.utils.parametrizations, which are evaluated at every call"
        )
    if module.bidirectional:
        raise ValueError("a bidirectional module needs the end of a sequence for its first output")
