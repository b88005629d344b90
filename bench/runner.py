"""Runs one case: builds every contestant, checks it, times those that are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import environment, gate, memory, timing
from .cases import Case
from .implementations import PADDED, Runner, Unavailable, contestants
from .limits import Limits
from .results import DISTURBED, Entry, Row
from .workload import Workload, make


@dataclass(frozen=True)
class Options:
    """What the command line fixes for all cases."""

    ours: str | None
    device: str
    budget_s: float
    rounds: tuple[int, int]
    tries: int  # at most, where other processes disturb
    first_uses: int  # fresh processes for first call and peak memory; their median
    without: frozenset[str]


def run(case: Case, threads: int, limits: Limits | None, options: Options) -> Row:
    torch.set_num_threads(threads)
    work = make(case, options.device)
    shape = case.shape
    padded_rows = shape.n * shape.t
    row = Row(
        *(case.key, case.group, case.cell, case.dtype, str(shape)),
        *(threads, case.rows, padded_rows),
    )
    if limits is not None:
        row.floor_us, row.floor_kind = limits.floor_us(case)
    runners = _checked(work, threads, row, options)
    clock: timing.Clock = timing.CpuClock(threads)
    if options.device == "cuda":
        clock = timing.CudaClock()
    with torch.set_grad_enabled(case.training):
        calls = {name: runner.call for name, runner in runners.items()}
        times = _undisturbed(calls, clock, row, options) if calls else {}
    for name, found in times.items():
        entry = row.entries[name]
        entry.median_us, entry.q1_us, entry.q3_us = found.median_us, found.q1_us, found.q3_us
        entry.rounds, entry.inner = found.rounds, found.inner
    if options.first_uses and case.mode != "scaling":
        names = list(runners)
        del runners, calls, work
        for name in names:
            if options.device == "cuda":
                used = memory.cuda_first_use(case, name, options.ours)
            else:
                used = memory.first_use(case, name, options.ours, threads, options.first_uses)
            entry = row.entries[name]
            entry.first_ms, entry.setup_ms = used.first_ms, used.setup_ms
            entry.peak_mib = used.peak_mib
    return row


def _undisturbed(
    calls: dict[str, Callable[[], Any]], clock: timing.Clock, row: Row, options: Options
) -> dict[str, timing.Timing]:
    """Measures again, if other processes got in the way; keeps the least disturbed try."""
    best: dict[str, timing.Timing] = {}
    row.others = math.inf
    for _ in range(options.tries):
        watch = environment.Others()
        found = timing.measure(calls, clock, options.budget_s, options.rounds)
        others = watch.share()
        if others < row.others:
            best, row.others = found, others
        if others <= DISTURBED:
            break
    return best


def _checked(work: Workload, threads: int, row: Row, options: Options) -> dict[str, Runner]:
    """The contestants that give the right result; `row` gets an entry for every one."""
    expected = gate.reference(work)
    limit = gate.tolerance(work)
    runners: dict[str, Runner] = {}
    for name, build in contestants(work, options.ours).items():
        if name in options.without:
            continue
        entry = row.entries[name] = Entry()
        try:
            runner = build(work, threads)
            if name != PADDED:  # it computes something else; the unpacked modes check it
                entry.error = gate.error(work, runner, expected)
        except Unavailable as reason:
            entry.status = str(reason)
            continue
        except Exception as problem:  # a contestant that breaks is a result, not the end
            first_line = (str(problem) or type(problem).__name__).splitlines()[0]
            entry.status = f"failed: {first_line[:120]}"
            continue
        if entry.error is None or entry.error <= limit:
            runners[name] = runner
        else:
            entry.status = "wrong"
    return runners
