"""The correctness gate: nothing is timed that doesn't compute what torch.nn computes.

The reference is torch.nn in full float32, from the same (rounded) weights and inputs, so that
the errors of narrow dtypes are seen for every implementation, torch.nn's own included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .implementations import Runner, torch_like
from .workload import Workload

# dtype: largest error of outputs (absolute: they are of order 1), and of gradients (relative to
# the largest element of the gradient). About four times what torch.nn itself shows.
TOLERANCE = {
    "float32": (2e-5, 2e-4),
    "float64": (1e-6, 1e-5),  # the reference is float32 here
    "bfloat16": (5e-2, 2e-1),
    "float16": (1e-2, 5e-2),
}
TOLERANCE_TF32 = (1e-2, 5e-2)


def reference(work: Workload) -> dict[str, Tensor]:
    runner = torch_like("torch.nn")(work.cast(torch.float32), 1)
    if work.device == "cuda":  # not TF32
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return _run(runner, work)
    return _run(runner, work)


def error(work: Workload, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error over all results; for gradients relative to the largest element."""
    worst = 0.0
    for name, value in found.items():
        want = expected[name]
        if value.shape != want.shape or not bool(torch.isfinite(value).all()):
            return float("inf")
        if value.numel():
            scale = float(want.abs().max()) if work.case.training else 1.0
            worst = max(worst, float((value - want).abs().max()) / (scale or 1.0))
    return worst


def tolerance(work: Workload) -> float:
    if work.device == "cuda" and work.case.dtype == "float32":
        return TOLERANCE_TF32[work.case.training]
    return TOLERANCE[work.case.dtype][work.case.training]


def _run(runner: Runner, work: Workload) -> dict[str, Tensor]:
    with torch.set_grad_enabled(work.case.training):
        return {k: v.detach() for k, v in runner.outputs(runner.call()).items()}
