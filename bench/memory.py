"""Peak memory of making a contestant and of one call, its weights included."""

from __future__ import annotations

import resource
from dataclasses import replace

import torch

from .cases import Case, Shape
from .implementations import contestants
from .workload import make


def resident_peak(case: Case, name: str, ours: str | None, threads: int) -> int:
    """Growth of this process's resident set, whatever allocator is used; in a fresh process.

    A tiny case first, so that the libraries' own pages and threads are there already.
    """
    s = case.shape
    tiny = replace(case, shape=Shape(min(s.n, 2), min(s.t, 2), 8, s.layers, s.bidirectional))
    peak = 0
    for warm in (tiny, case):
        work = make(warm, "cpu")
        before = _resident()
        _reset_peak()
        contestants(work, ours)[name](work, threads).call()
        peak = _peak_resident() - before
    return peak


def cuda_peak(case: Case, name: str, ours: str | None, threads: int) -> int:
    """What torch's allocator gave for it, in a process that has run the case before."""
    work = make(case, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestants(work, ours)[name](work, threads).call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # then the peak is the largest since the fork; the inputs are made before, so close


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return _peak_resident()


def _peak_resident() -> int:
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
