"""By which plans a layer runs on a GPU."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Any

import torch


def passes(package: str, module: torch.nn.Module, shape: Sequence[int]) -> list[dict[str, Any]]:
    """What ``package.explain`` says of the forward and the backward pass of the module's last layer."""
    with contextlib.redirect_stdout(io.StringIO()):
        facts = importlib.import_module(package).explain(module, shape)[-1]
    return [facts["forward"], facts["backward"]]


def words(plan: dict[str, Any]) -> str:
    """A plan and its division: "cluster 16x8x1 of 2 rows"."""
    together = f", {plan['together']} layers at the same time" if plan["together"] > 1 else ""
    return f"{plan['name']} {'x'.join(map(str, plan['blocks']))} of {plan['columns']} rows{together}"
