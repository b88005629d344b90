"""Runs one case: makes every contestant, checks it, times those that are right."""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import environment, gate, plans, timing
from .cases import Case
from .contestant import Apart, Contestant, Lost
from .implementations import OURS, Unavailable, contestants
from .limits import Limits
from .results import DISTURBED, Entry, Row
from .workload import Workload, arguments, class_name, make


@dataclass(frozen=True)
class Options:
    """What the command line fixes for all cases."""

    ours: str | None
    device: str
    budget_s: float
    rounds: tuple[int, int]
    tries: int  # at most, where other processes disturb
    first_uses: int  # first calls, their median; 0: neither these nor peak memory
    without: frozenset[str]


Enter = Callable[[str], Contestant | Apart]


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
    names = [name for name in contestants(work, options.ours) if name not in options.without]
    expected, limit = gate.reference(work), gate.tolerance(work)

    def enter(name: str) -> Contestant | Apart:
        if options.device == "cpu":
            return Apart(case, name, options.ours, threads)
        return Contestant(case, name, options.ours, threads, options.device, work)

    with contextlib.ExitStack() as stack:
        right: dict[str, Contestant | Apart] = {}
        for name in names:
            one = enter(name)
            stack.callback(one.close)
            row.entries[name] = _checked(one, expected, limit)
            if row.entries[name].status == "ok":
                right[name] = one
        del expected
        for name, found in _times(right, row, options).items():
            entry = row.entries[name]
            entry.median_us, entry.q1_us, entry.q3_us = found.median_us, found.q1_us, found.q3_us
            entry.rounds, entry.inner = found.rounds, found.inner
        if options.ours and OURS in right and options.device == "cuda":
            row.entries[OURS].plans = _plans(work, options.ours)
    for name in right:
        _first_use(row.entries[name], name, enter, 0 if case.mode == "scaling" else options.first_uses)
    return row


def _plans(work: Workload, package: str) -> str | None:
    """By which plans ours ran a case."""
    if work.case.mode == "cells":
        return None
    args, kwargs = arguments(work.case)
    module = getattr(importlib.import_module(package), class_name(work.case))(*args, **kwargs)
    shape = work.case.shape
    module = module.to(work.device, getattr(torch, work.case.dtype)).train(work.case.training)
    return " / ".join(map(plans.words, plans.passes(package, module, (shape.t, shape.n, shape.h))))


def _checked(one: Contestant | Apart, expected: dict[str, Tensor], limit: float) -> Entry:
    entry = Entry()
    try:
        entry.setup_ms, entry.first_ms = one.build()
        entry.error = one.error(expected)
    except Unavailable as reason:
        entry.status = str(reason)
    except Exception as problem:  # a contestant that breaks is a result, not the end
        first_line = (str(problem) or type(problem).__name__).splitlines()[0]
        entry.status = f"failed: {first_line[:120]}"
    if entry.error is not None and not entry.error <= limit:
        entry.status = "wrong"
    return entry


def _times(field: dict[str, Contestant | Apart], row: Row, options: Options) -> dict[str, timing.Timing]:
    """Measures again, if other processes got in the way; keeps the least disturbed try."""
    best: dict[str, timing.Timing] = {}
    row.others = math.inf if field else 0.0
    tries = options.tries
    while field and tries:
        watch = environment.Others([one.pid for one in field.values() if isinstance(one, Apart)])
        try:
            found = timing.measure(field, options.budget_s, options.rounds)
        except Lost as lost:
            row.entries[lost.name].status = f"failed: {lost}"
            field.pop(lost.name)
            best.pop(lost.name, None)
            continue
        tries -= 1
        others = watch.share()
        if others < row.others:
            best, row.others = found, others
        if others <= DISTURBED:
            break
    return best


def _first_use(entry: Entry, name: str, enter: Enter, tries: int) -> None:
    """The median of `tries` first calls, of which one was timed already, and peak memory."""
    if not tries:
        entry.setup_ms = entry.first_ms = None
        return
    found = [(entry.setup_ms, entry.first_ms)]
    try:
        for _ in range(tries - 1):
            with contextlib.closing(enter(name)) as one:
                found.append(one.build())
        entry.setup_ms, entry.first_ms = map(statistics.median, zip(*found, strict=True))
        with contextlib.closing(enter(name)) as one:
            entry.peak_mib = one.peak_mib()
    except Lost as lost:  # the times are good for all that
        sys.stderr.write(f"{name}: no first call or peak memory: {lost}\n")
