"""Interleaved rounds: A B C, B C A, ... so that drift of the machine touches all alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_NS = 1_000_000  # a timing sample lasts at least this long; fast calls are looped in it
LEAD_IN_NS = 10_000_000  # calls faster than this get one untimed call first, to wake their threads
SETTLE_S = 0.05  # at most this long for the threads of the last library to stop spinning


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    q1_us: float
    q3_us: float
    rounds: int
    inner: int


class CpuClock:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def settle(self) -> None:
        """Waits for idle workers (OpenMP's, ONNX Runtime's), which spin for milliseconds."""
        deadline = time.perf_counter() + (SETTLE_S if self.threads > 1 else 0.0)
        while time.perf_counter() < deadline:
            before = time.process_time()
            time.sleep(0.002)
            if time.process_time() - before < 0.0005:
                return

    def sample(self, call: Callable[[], Any], inner: int, lead_in: bool = False) -> float:
        """Nanoseconds of one call, the mean of `inner`."""
        self.settle()
        if lead_in:
            call()
        loop = range(inner)
        start = time.perf_counter_ns()
        for _ in loop:
            call()
        return (time.perf_counter_ns() - start) / inner


class CudaClock:
    def sample(self, call: Callable[[], Any], inner: int, lead_in: bool = False) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if lead_in:
            call()
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e6 / inner


Clock = CpuClock | CudaClock


def measure(
    calls: dict[str, Callable[[], Any]], clock: Clock, budget_s: float, rounds: tuple[int, int]
) -> dict[str, Timing]:
    """Times every call in interleaved rounds: for the budget, within the limits of `rounds`."""
    inner: dict[str, int] = {}
    lead_in: dict[str, bool] = {}
    for name, call in calls.items():
        clock.sample(call, 1)  # warm-up
        estimate = clock.sample(call, 1)
        if estimate < SAMPLE_NS:
            estimate = min(clock.sample(call, math.ceil(SAMPLE_NS / 4 / estimate)), estimate)
        inner[name] = max(1, math.ceil(SAMPLE_NS / estimate))
        lead_in[name] = estimate < LEAD_IN_NS

    names = list(calls)
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
                samples[name].append(clock.sample(calls[name], inner[name], lead_in[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name], inner[name]) for name in names}


def _summary(ns: list[float], inner: int) -> Timing:
    q1, median, q3 = statistics.quantiles(ns, n=4, method="inclusive") if ns[1:] else ns * 3
    return Timing(median / 1e3, q1 / 1e3, q3 / 1e3, len(ns), inner)
