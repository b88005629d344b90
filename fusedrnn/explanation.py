"""How a module would run, in words: kernels, threads and plans, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from . import _C, ops, stacked
from .modules import CELL, FusedBase


def explain(module: Any, shape: Sequence[int]) -> list[dict[str, Any]]:
    """Prints how a module would run on an input, layer by layer: kernel, instruction set, threads, plan, and why.

    Args:
        module: an ``LSTM``, ``GRU`` or ``RNN`` of fusedrnn, on the device in question.
        shape: of the input: ``[T, N, I]`` (``[N, T, I]`` if the module is ``batch_first``), or ``[T, I]``.

    Returns:
        The same facts, a dict for each layer.

    Raises:
        TypeError: ``module`` is of another class.
        ValueError: ``shape`` is not one of the module's inputs.
    """
    if not isinstance(module, FusedBase):
        raise TypeError(f"expected fusedrnn's LSTM, GRU or RNN, got {type(module).__name__}")
    if len(shape) not in (2, 3) or shape[-1] != module.input_size or min(shape) < 1:
        raise ValueError(f"expected the shape of an input with {module.input_size} features, got {list(shape)}")
    t, n = (shape[0], 1) if len(shape) == 2 else (shape[1], shape[0]) if module.batch_first else (shape[0], shape[1])
    weight = module._weights()[0]
    found = []
    for k in range(module.num_layers):
        directions, projected = 2 if module.bidirectional else 1, module.proj_size or module.hidden_size
        facts = {
            "cell": CELL[module.mode],
            "dtype": str(weight.dtype).removeprefix("torch."),
            "T": t,
            "N": n,
            "I": module.input_size if k == 0 else directions * projected,
            "H": module.hidden_size,
            "P": projected,
            "directions": directions,
            "projected": module.proj_size > 0,
        }
        plan = _plan(weight, facts, _layers_of_one_op(module, t))
        found.append({"layer": k, "device": str(weight.device), **facts, "recompute": module.recompute, **plan})
        print("\n".join(_words(found[-1])))
    return found


def _layers_of_one_op(module: FusedBase, steps: int) -> int:
    """Of those that a GPU may run at the same time."""
    layers, directions = module.num_layers, 2 if module.bidirectional else 1
    follow = stacked.follow_directly(layers, directions, module.training and module.dropout > 0)
    return layers if follow and not module.recompute and steps > stacked.CHUNK else 1


def _plan(weight: torch.Tensor, facts: dict[str, Any], layers: int) -> Mapping[str, object]:
    """What the library says of a layer; nothing on a device for which it has no kernels."""
    if weight.device.type == "cpu":
        return _C.cpu_plan(**facts)
    if weight.device.type != "cuda":
        return {}
    tf32, op = ops.tf32(weight), getattr(torch.ops.fusedrnn, f"{facts['cell']}_plan").default
    return _cuda_plan(weight.dtype, tf32, partial(_device_plan, op, weight, facts, tf32, layers))


def _device_plan(
    op: Callable[..., Any], like: torch.Tensor, facts: Mapping[str, Any], tf32: bool, layers: int, backward: bool
) -> _C.CudaPlan:
    """What the device takes, that is asked what it has room for."""
    shape = [facts[name] for name in ("N", "H", "P", "directions")]
    name, reason, numbers = op(like, *shape, backward, facts["projected"], layers, tf32)
    columns, units, x, y, shared_bytes, together = numbers
    return {
        "name": name,
        "reason": reason,
        "columns": columns,
        "units": units,
        "blocks": (x, y, facts["directions"]),
        "shared_bytes": shared_bytes,
        "together": together,
    }


def _cuda_plan(dtype: torch.dtype, tf32: bool, plan: Callable[[bool], _C.CudaPlan]) -> dict[str, Any]:
    """``plan(backward)`` of both passes, and how they multiply."""
    math = "tensor cores" + (" in TF32" if tf32 else "") if dtype.itemsize == 2 or tf32 else "multiply-adds"
    return {"math": math, "forward": plan(False), "backward": plan(True)}


def _words(facts: dict[str, Any]) -> list[str]:
    size = ", ".join(f"{name} {facts[name]}" for name in ("T", "N", "I", "H"))
    ways = ", both directions" if facts["directions"] == 2 else ""
    lines = [f"layer {facts['layer']}: {facts['cell']}, {facts['dtype']}, {size}{ways}, on {facts['device']}"]
    details = _cpu_words(facts) if "capability" in facts else _cuda_words(facts) if "math" in facts else []
    if facts["recompute"]:
        details.append(("training", "by chunks of about sqrt(T) steps, of one direction after the other"))
    return lines + [f"  {name + ':':<10}{text}" for name, text in details]


def _cuda_words(facts: dict[str, Any]) -> list[tuple[str, str]]:
    def words(plan: _C.CudaPlan) -> str:
        x, y, z = plan["blocks"]
        blocks = f"{x} x {y} x {z} blocks for {plan['units']} units, {plan['columns']} rows each"
        together = f"; {plan['together']} layers at the same time" if plan["together"] > 1 else ""
        return f"{plan['name']}, as {plan['reason']}; {blocks}{together}"

    return [("math", facts["math"]), ("forward", words(facts["forward"])), ("backward", words(facts["backward"]))]


def _cpu_words(facts: dict[str, Any]) -> list[tuple[str, str]]:
    computed = {"float16": "; computed in float32", "bfloat16": "; accumulated in float32"}.get(facts["dtype"], "")
    threads, rows, units = facts["threads"], facts["row_groups"], facts["unit_groups"]
    work, each = facts["multiply_adds"], facts["multiply_adds_per_thread"]
    parts = []
    if rows > 1:
        parts.append(f"{rows} parts of the batch, which share nothing")
    if units > 1:
        parts.append(f"{units} parts of the hidden units, which meet at a barrier every step")
    if facts["both_at_once"]:
        parts.append("both directions at once")
    weights = (
        "rewritten in panels at every call" if facts["packed"] else "read as they are: too few rows to pack them for"
    )
    return [
        ("kernel", f"{facts['capability']} instructions{computed}"),
        ("threads", f"{threads} of {facts['max_threads']}: {work:,.0f} multiply-adds, a thread for each {each:,.0f}"),
        ("division", "; ".join(parts) or "none"),
        ("weights", weights),
    ]
