"""One implementation of one case: made, called, checked and timed, here or in a process of its own.

Thread pools go on spinning for a while when a call has returned (OpenMP's, ONNX Runtime's, OpenVINO's), and so take
processors from whoever is timed next. On a CPU every contestant is therefore a process, which is stopped (SIGSTOP)
whenever it isn't its turn. A fork server that has imported the libraries but run nothing makes these processes, so that
a first call is a process's first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gate, memory, timing
from .cases import Case
from .implementations import OWN, PADDED, Unavailable, contestants
from .workload import Workload, make

PRELOAD = [
    "torch",
    "torch.fx.experimental.symbolic_shapes",
    "onnx",
    "onnxruntime",
    "openvino",
    "bench.contestant",
]
TIMEOUT_S = 120
LARGEST_MMAP_THRESHOLD = 2**25  # glibc's, on 64 bits


class Contestant:
    """In this process. A `work` that is given is used, and not made again."""

    def __init__(
        self, case: Case, name: str, ours: str | None, threads: int, device: str, work: Workload | None = None
    ) -> None:
        self._case, self._name, self._ours = case, name, ours
        self._threads, self._device, self._work = threads, device, work
        self._call: Callable[[], Any] | None = None

    def build(self) -> tuple[float, float]:
        """Milliseconds of making the module, session or compiled model, and of its first call."""
        work = self._work = self._work or make(self._case, self._device)
        with self._grad():
            start = time.perf_counter_ns()
            runner = contestants(work, self._ours)[self._name](work, self._threads)
            built = time.perf_counter_ns()
            result = runner.call()
            timing.wait(self._device)
            end = time.perf_counter_ns()
            found = runner.outputs(result)
        self._call = runner.call
        self._found = {name: value.detach() for name, value in found.items()}
        return (built - start) / 1e6, (end - built) / 1e6

    def error(self, expected: dict[str, Tensor]) -> float | None:
        """Of the first call's results; None where they are not to be compared."""
        found, self._found = self._found, {}
        assert self._work is not None
        return None if self._name == PADDED else gate.error(self._work, found, expected)

    def sample(self, inner: int, lead_in: int) -> float:
        """Nanoseconds of one call, the mean of `inner`, after `lead_in` untimed ones."""
        assert self._call is not None
        with self._grad():
            return timing.sample(self._call, inner, lead_in, self._device)

    def peak_mib(self) -> float:
        """What making it and one call take at most, its weights included."""
        measure = memory.cuda_peak if self._device == "cuda" else memory.resident_peak
        with self._grad():
            return measure(self._case, self._name, self._ours, self._threads) / 2**20

    def _grad(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self._case.training)

    def close(self) -> None:
        self._call = self._work = None


class Lost(RuntimeError):
    """The process ended, or doesn't answer."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


class Apart:
    """A `Contestant` in a process of its own, on the CPU."""

    def __init__(self, case: Case, name: str, ours: str | None, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, case, name, ours, threads), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def build(self) -> tuple[float, float]:
        return self._ask("build")

    def error(self, expected: dict[str, Tensor]) -> float | None:
        return self._ask("error", {name: value.numpy() for name, value in expected.items()})

    def sample(self, inner: int, lead_in: int) -> float:
        return self._ask("sample", inner, lead_in)

    def peak_mib(self) -> float:
        return self._ask("peak_mib")

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            os.kill(self.pid, signal.SIGCONT)
            self._pipe.send((method, *arguments))
            if not self._pipe.poll(TIMEOUT_S):
                raise Lost(self.name, f"no answer in {TIMEOUT_S} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as problem:
            self._process.join(1)
            raise Lost(self.name, f"its process ended: {self._process.exitcode}") from problem
        finally:
            with contextlib.suppress(OSError):  # it ended
                _stop(self.pid)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def start_server() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


def _stop(pid: int) -> None:
    """Returns when none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.perf_counter() + 1
    while time.perf_counter() < deadline:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        if not set(states) - set("TtZX"):
            return
        time.sleep(1e-4)


def _serve(pipe: Connection, case: Case, name: str, ours: str | None, threads: int) -> None:
    """Answers what `Apart` asks, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent = 1  # PR_SET_PDEATHSIG: a stopped process wouldn't see that the benchmark was killed
    ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
    torch.set_num_threads(threads)
    if ours and name in OWN:  # not in the fork server: in a process forked after it was loaded it has one thread
        importlib.import_module(ours)
    gc.disable()
    # As in a process that has lived for a while: after a free of this size glibc keeps memory for the next call.
    torch.empty(LARGEST_MMAP_THRESHOLD - 2**16, dtype=torch.uint8)
    contestant = Contestant(case, name, ours, threads, "cpu")
    while True:
        method, *arguments = pipe.recv()
        if method == "error":
            arguments = [{name: torch.from_numpy(value) for name, value in arguments[0].items()}]
        try:
            answer = getattr(contestant, method)(*arguments)
        except Unavailable as reason:
            answer = reason
        except Exception as problem:  # its type may not survive the way
            answer = RuntimeError(str(problem) or type(problem).__name__)
        pipe.send(answer)
