"""How the time loop runs on a GPU.

``cluster``: one launch for all steps, the blocks of a cluster have all recurrent weights of a direction and send each
other h; ``grid``: one launch, the weights stay on the whole chip; ``split``: that, and backward the blocks of a cluster
divide the sums over the gates; ``loop``: one launch, the weights come from the L2 cache at each step; ``stepwise``: a
launch a step, for what is too large for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _C


@contextmanager
def use_plan(name: str) -> Iterator[None]:
    """Makes every layer on a GPU run by this plan, or by the next slower one that its shape allows, in this process.

    Results are the same to the last bit, with ``cluster`` and ``split`` to rounding. ``""`` is the automatic choice.
    Raises ValueError for a name that is none of these and of ``cluster``, ``split``, ``grid``, ``loop``, ``stepwise``.
    """
    before = _C.forced_cuda_plan()
    _C.force_cuda_plan(name)
    try:
        yield
    finally:
        _C.force_cuda_plan(before)
