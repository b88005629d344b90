"""The weights, inputs and upstream gradients of a case, the same for every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Case


@dataclass
class Workload:
    case: Case
    device: str
    weights: dict[str, Tensor]
    x: Tensor | PackedSequence  # [T, N, I], packed rows, or [N, I] for the cells
    padded: Tensor  # [T, N, I]: the same input before packing
    hx: tuple[Tensor, ...]  # (h0,) or (h0, c0); empty if the call gets none
    upstream: tuple[Tensor, ...]  # gradients of y, h_n(, c_n); empty in inference

    @property
    def state(self) -> Tensor | tuple[Tensor, ...] | None:
        """hx as the modules take it."""
        return None if not self.hx else self.hx if self.case.cell == "LSTM" else self.hx[0]

    def cast(self, dtype: torch.dtype) -> Workload:
        """The same numbers in another dtype (for the reference of a narrow one)."""

        def to(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        x = self.x
        return Workload(
            self.case,
            self.device,
            {name: to(w) for name, w in self.weights.items()},
            x._replace(data=to(x.data)) if isinstance(x, PackedSequence) else to(x),
            to(self.padded),
            tuple(map(to, self.hx)),
            tuple(map(to, self.upstream)),
        )


def arguments(case: Case) -> tuple[tuple[int, ...], dict[str, bool]]:
    """Constructor arguments of the module or cell."""
    s = case.shape
    if case.mode == "cells":
        return (s.h, s.h), {}
    return (s.h, s.h, s.layers), {"bidirectional": s.bidirectional}


def class_name(case: Case) -> str:
    return case.cell + ("Cell" if case.mode == "cells" else "")


def make(case: Case, device: str) -> Workload:
    s, dtype = case.shape, getattr(torch, case.dtype)
    directions = 2 if s.bidirectional else 1
    torch.manual_seed(1)
    args, kwargs = arguments(case)
    module = getattr(nn, class_name(case))(*args, **kwargs)
    weights = {name: w.to(device, dtype) for name, w in module.state_dict().items()}

    def normal(*size: int) -> Tensor:
        return torch.randn(*size).to(device, dtype)

    states = 2 if case.cell == "LSTM" else 1
    rows_of_state = (s.n, s.h) if case.mode == "cells" else (s.layers * directions, s.n, s.h)
    padded = normal(s.t, s.n, s.h)
    x: Tensor | PackedSequence = padded
    if case.mode == "cells":
        x = padded[0]
    elif case.packed:
        x = pack_padded_sequence(padded, torch.tensor(case.lengths), enforce_sorted=False)
    hx = tuple(0.5 * normal(*rows_of_state) for _ in range(states if case.has_state else 0))
    upstream: tuple[Tensor, ...] = ()
    if case.training:
        data = x.data if isinstance(x, PackedSequence) else x
        upstream = (normal(*data.shape[:-1], directions * s.h),)
        upstream += tuple(normal(*rows_of_state) for _ in range(states))
        for leaf in (data, padded, *hx):
            leaf.requires_grad_()
    return Workload(case, device, weights, x, padded, hx, upstream)
