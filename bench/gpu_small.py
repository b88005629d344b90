"""Small layers of every cell, dtype and plan on a GPU, forward and backward: what compute-sanitizer watches."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn.utils.rnn import pack_sequence

import fusedrnn

LAYERS: tuple[tuple[type, dict[str, Any]], ...] = (
    (fusedrnn.LSTM, {}),
    (fusedrnn.LSTM, {"proj_size": 11}),
    (fusedrnn.GRU, {"bidirectional": True}),
    (fusedrnn.RNN, {"nonlinearity": "relu"}),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def main() -> None:
    for plan in ("cluster", "grid", "loop", "stepwise"):
        for (layer, options), dtype in itertools.product(LAYERS, DTYPES):
            with fusedrnn.use_plan(plan):
                module = layer(9, 37, **options, device="cuda", dtype=dtype)
                sequences = [torch.randn(t, 9, device="cuda", dtype=dtype, requires_grad=True) for t in (6, 4, 4, 1)]
                for x in (torch.stack([sequences[0]] * 21, 1), pack_sequence(sequences)):
                    y, _ = module(x)
                    (y if isinstance(y, torch.Tensor) else y.data).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
