"""Small layers of every cell, dtype and plan on a GPU, forward and backward, compared with the CPU's in float64.

    python -m bench.gpu_small [--large] [PLAN...]

One line a layer and dtype, with the plans of its two passes, as not every layer can be run by each; with --large also
of layers that need much of the device. It is also what compute-sanitizer watches. Exit status 3 if an error is too
large, or if no layer could be run by a plan.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn
from fusedrnn import stacked

from . import plans

PLANS = ("stepwise", "loop", "grid", "cluster", "split")
LAYERS: tuple[tuple[type, dict[str, Any]], ...] = (
    (fusedrnn.LSTM, {}),
    (fusedrnn.LSTM, {"hidden_size": 16}),  # a cluster of one block
    (fusedrnn.LSTM, {"proj_size": 11}),
    (fusedrnn.LSTM, {"num_layers": 3}),
    (fusedrnn.GRU, {"bidirectional": True}),
    (fusedrnn.RNN, {}),  # relu's derivative jumps
)
LARGE: tuple[tuple[type, dict[str, Any]], ...] = (
    (fusedrnn.LSTM, {"hidden_size": 768}),  # clusters of more than 8 blocks, and weights in shared memory
    (fusedrnn.GRU, {"hidden_size": 520}),
)
# Dtypes, and the error of y and of gradients that is allowed, relative to the largest number. float32 is TF32.
TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float32: 1e-2, torch.float64: 1e-10}


def results(module: torch.nn.Module, x: Tensor | PackedSequence) -> list[Tensor]:
    """y, and its sum's gradients."""
    y = module(x)[0]
    y = y.data if isinstance(y, PackedSequence) else y
    leaves = [x.data if isinstance(x, PackedSequence) else x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


def error(found: Tensor, expected: Tensor) -> float:
    difference = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
    return difference if difference == difference else float("inf")


def plans_of(module: torch.nn.Module, device: str) -> tuple[str, str]:
    """By which plans the module's last layer runs on a batch, forward and backward, and how or why."""
    if torch.device(device).type != "cuda":
        return "", ""
    found = plans.passes("fusedrnn", module, (6, 21, 9))
    return "/".join([plan["name"] for plan in found]), "; ".join(
        dict.fromkeys(f"{plans.words(plan)}: {plan['reason']}" for plan in found)
    )


def main(arguments: list[str], device: str = "cuda") -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_small")
    parser.add_argument("plans", nargs="*", default=PLANS)
    parser.add_argument("--large", action="store_true")
    wanted = parser.parse_args(arguments)
    layers = LAYERS + LARGE * wanted.large
    failed = False
    for plan in wanted.plans:
        taken = False
        for (layer, options), (dtype, tolerance) in itertools.product(layers, TOLERANCE.items()):
            torch.manual_seed(0)
            module = layer(9, **{"hidden_size": 37, **options}, dtype=dtype)
            longest = stacked.CHUNK + 6 if "num_layers" in options else 6
            sequences = [torch.randn(t, 9, dtype=dtype) for t in (longest, 4, 4, 1)]
            worst = []
            for data in (torch.stack([sequences[0]] * 21, 1), pack_sequence(sequences)):
                leaf = data.data if isinstance(data, PackedSequence) else data
                leaf.requires_grad_()
                expected = results(copy.deepcopy(module).double(), data.to(torch.float64))
                with fusedrnn.use_plan(plan):
                    on_device = copy.deepcopy(module).to(device)
                    names, reason = plans_of(on_device, device)
                    found = results(on_device, data.to(device))  # type: ignore[arg-type]
                worst.append(max(map(error, found, expected)))
            verdict = "ok" if max(worst) <= tolerance else "WRONG"
            failed |= verdict != "ok"
            taken |= names in ("", f"{plan}/{plan}", "grid/split")
            why = f"  ({reason})" if reason else ""
            words = [layer.__name__, *map(str, options.values()), str(dtype).removeprefix("torch.")]
            errors = f"padded {worst[0]:.1e}  packed {worst[1]:.1e}"
            print(f"{plan:<9}{' '.join(words):<24}{names:<19}{errors}  {verdict}{why}", flush=True)
        if not taken:
            print(f"{plan}: no layer was run by it")
            failed = True
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
