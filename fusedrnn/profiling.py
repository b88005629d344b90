"""Ranges for profilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import record_function

_ranges = False


def profile_ranges(enabled: bool = True) -> None:
    """Whether each layer's forward is a range of its own, ``fusedrnn lstm layer 0``, in torch.profiler.

    Off in the beginning. The ops have names of their own in any case (``fusedrnn::lstm``,
    ``fusedrnn::lstm_backward``); under ``torch.autograd.profiler.emit_nvtx`` all are NVTX ranges. On a GPU, layers
    that would run at the same time run one after another.
    """
    global _ranges
    _ranges = enabled


def ranges_enabled() -> bool:
    return _ranges and not torch.compiler.is_compiling()


def in_range(cell: str, index: int, layer: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with record_function(f"fusedrnn {cell} layer {index}"):
        return layer(*arguments)
