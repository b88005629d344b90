"""First-call time and peak memory, each in a process of its own.

A fork server that has imported the libraries but run nothing forks one child a measurement: the
first call is a process's first, and the growth of the peak resident set is this implementation's
alone, whatever allocator it uses: its module or session with the weights, and one call.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from .cases import Case, Shape
from .implementations import contestants
from .workload import make

PRELOAD = [
    "torch",
    "torch.fx.experimental.symbolic_shapes",
    "onnx",
    "onnxruntime",
    "openvino",
    "bench.implementations",
]
TIMEOUT_S = 120


@dataclass(frozen=True)
class FirstUse:
    first_ms: float | None  # the first call in a fresh process
    setup_ms: float | None  # making the module, session or compiled model before it
    peak_mib: float | None  # of making it and one call, its weights included


def start_server(ours: str | None) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD + ([ours] if ours else []))


def first_use(case: Case, name: str, ours: str | None, threads: int, tries: int) -> FirstUse:
    """The median of `tries` processes; one is enough for memory."""
    cold = [_in_child(_cold, case, name, ours, threads) for _ in range(tries)]
    times = [pair for pair in cold if pair is not None]
    first, setup = map(statistics.median, zip(*times, strict=True)) if times else (None, None)
    return FirstUse(first, setup, _in_child(_peak, case, name, ours, threads))


def cuda_first_use(case: Case, name: str, ours: str | None) -> FirstUse:
    """In this process: the first call for this shape, and the allocator's peak."""
    work = make(case, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.set_grad_enabled(case.training):
        start = time.perf_counter_ns()
        runner = contestants(work, ours)[name](work, 1)
        built = time.perf_counter_ns()
        result = runner.call()
        torch.cuda.synchronize()
        end = time.perf_counter_ns()
    del result
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return FirstUse((end - built) / 1e6, (built - start) / 1e6, peak)


def _in_child(target: Any, *args: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, target, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(TIMEOUT_S) else None
    except EOFError:  # it died
        return None
    finally:
        if process.is_alive():
            process.join(1)
            process.kill()
        process.join()
        ours.close()


def _report(pipe: Connection, target: Any, *args: Any) -> None:
    pipe.send(target(*args))
    pipe.close()


def _cold(case: Case, name: str, ours: str | None, threads: int) -> tuple[float, float]:
    """Milliseconds of the first call and of the set-up before it."""
    torch.set_num_threads(threads)
    work = make(case, "cpu")
    with torch.set_grad_enabled(case.training):
        start = time.perf_counter_ns()
        runner = contestants(work, ours)[name](work, threads)
        built = time.perf_counter_ns()
        runner.call()
        end = time.perf_counter_ns()
    return (end - built) / 1e6, (built - start) / 1e6


def _peak(case: Case, name: str, ours: str | None, threads: int) -> float:
    """A tiny case first, so that the libraries' own pages and threads are there already."""
    torch.set_num_threads(threads)
    s = case.shape
    tiny = replace(case, shape=Shape(min(s.n, 2), min(s.t, 2), 8, s.layers, s.bidirectional))
    for warm in (tiny, case):
        work = make(warm, "cpu")
        before = _resident()
        _reset_peak()
        with torch.set_grad_enabled(case.training):
            runner = contestants(work, ours)[name](work, threads)
            runner.call()
        peak = _peak_resident() - before
    return peak / 2**20


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
