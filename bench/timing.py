"""Interleaved rounds: A B C, B C A, ... so that drift of the machine touches all alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SAMPLE_NS = 1_000_000  # a timing sample lasts at least this long; fast calls are looped in it
LEAD_IN_NS = 3_000_000  # and untimed calls for this long come first: a training loop has warm caches and memory


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    q1_us: float
    q3_us: float
    rounds: int
    inner: int


class Sampled(Protocol):
    def sample(self, inner: int, lead_in: int) -> float:
        """Nanoseconds of one call, the mean of `inner`, after `lead_in` untimed ones."""
        ...


def sample(call: Callable[[], Any], inner: int, lead_in: int, device: str) -> float:
    loop = range(inner)
    for _ in range(lead_in):
        call()
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in loop:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e6 / inner
    start = time.perf_counter_ns()
    for _ in loop:
        call()
    return (time.perf_counter_ns() - start) / inner


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(contestants: Mapping[str, Sampled], budget_s: float, rounds: tuple[int, int]) -> dict[str, Timing]:
    """Times every contestant in interleaved rounds: for the budget, within the limits of `rounds`."""
    inner: dict[str, int] = {}
    lead_in: dict[str, int] = {}
    for name, one in contestants.items():
        one.sample(1, 0)  # warm-up
        estimate = one.sample(1, 0)
        if estimate < SAMPLE_NS:
            estimate = min(one.sample(math.ceil(SAMPLE_NS / 4 / estimate), 0), estimate)
        inner[name] = max(1, math.ceil(SAMPLE_NS / estimate))
        lead_in[name] = math.ceil(LEAD_IN_NS / estimate)

    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    deadline = time.perf_counter() + budget_s
    try:
        for r in range(rounds[1]):
            if r >= rounds[0] and time.perf_counter() > deadline:
                break
            first = r % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(contestants[name].sample(inner[name], lead_in[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name], inner[name]) for name in names}


def _summary(ns: list[float], inner: int) -> Timing:
    q1, median, q3 = statistics.quantiles(ns, n=4, method="inclusive") if ns[1:] else ns * 3
    return Timing(median / 1e3, q1 / 1e3, q3 / 1e3, len(ns), inner)
