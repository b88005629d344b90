"""What this machine can do, measured, and the floor that follows for a case."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from . import environment
from .cases import GATES, Case

SIZES = tuple(2**k for k in range(14, 27))  # bytes read by each thread: 16 KiB to 64 MiB
READ_S = 0.02
PEAK_S = 0.05


@dataclass
class Limits:
    threads: int
    gflops: dict[str, float] = field(default_factory=dict)  # by dtype, all threads together
    source: dict[str, str] = field(default_factory=dict)  # what reached that figure
    read_gbs: dict[int, float] = field(default_factory=dict)  # by bytes a thread, all threads

    def bandwidth(self, bytes_per_thread: float) -> float:
        """GB/s of all threads, interpolated between the measured sizes."""
        sizes = sorted(self.read_gbs)
        at = min(max(bytes_per_thread, sizes[0]), sizes[-1])
        i = max(k for k in range(len(sizes)) if sizes[k] <= at)
        if i + 1 == len(sizes):
            return self.read_gbs[sizes[-1]]
        share = math.log2(at / sizes[i])
        return self.read_gbs[sizes[i]] * (1 - share) + self.read_gbs[sizes[i + 1]] * share

    def floor_us(self, case: Case) -> tuple[float, str]:
        """The least time the case could take, and which limit that is.

        flops: every multiply-add at the peak. Training does each matmul three times (forward, the
        input's gradient, the weight's), a gradient penalty five times at least (forward, back to x,
        along that gradient, and two for the weights). bytes: W_ih read once and W_hh once a step, spread over
        the threads, from the cache level that holds a thread's share. No pointwise work.
        """
        s = case.shape
        directions = 2 if s.bidirectional else 1
        size = torch.finfo(getattr(torch, case.dtype)).bits // 8
        flops = bytes_us = 0.0
        for k in range(s.layers):
            inputs = s.h if k == 0 else directions * s.h
            units = GATES[case.cell] * s.h * directions
            flops += 2.0 * case.rows * units * (inputs + s.h)
            shared = units * s.h * size if s.t > 1 else units * (inputs + s.h) * size
            read = units * size * (inputs + s.t * s.h)
            if self.read_gbs:
                bytes_us += read / self.bandwidth(shared / self.threads) / 1e3
        passes = 5 if case.mode == "penalty" else 3 if case.training else 1
        flops_us = passes * flops / self.gflops[case.dtype] / 1e3
        bytes_us *= 2 if case.training else 1
        return max((flops_us, "flops"), (bytes_us, "bytes"))


def measure(dtypes: list[str], threads: int, device: str, tries: int) -> Limits:
    """The best of some tries; one is enough if nothing else uses the processors."""
    best = Limits(threads)
    for _ in range(tries):
        watch = environment.Others()
        found = _measure_once(dtypes, threads, device)
        for dtype, gflops in found.gflops.items():
            if gflops > best.gflops.get(dtype, 0.0):
                best.gflops[dtype], best.source[dtype] = gflops, found.source[dtype]
        for size, gbs in found.read_gbs.items():
            best.read_gbs[size] = max(gbs, best.read_gbs.get(size, 0.0))
        if watch.share() < 0.05:
            break
    return best


def _measure_once(dtypes: list[str], threads: int, device: str) -> Limits:
    found = Limits(threads)
    for dtype in dtypes:
        found.gflops[dtype], found.source[dtype] = _mm_gflops(dtype, device), "torch.mm"
    if device != "cpu":
        return found
    probe = _compile_probe()
    if probe is None:
        found.read_gbs = {size: _torch_read_gbs(size * threads) for size in SIZES}
        return found
    for dtype, name in (("float32", "fma_gflops"), ("bfloat16", "bf16_gflops")):
        if dtype in dtypes:
            loop = getattr(probe, name)
            peak = _together([partial(loop, PEAK_S)] * threads)
            if peak > found.gflops[dtype]:
                found.gflops[dtype], found.source[dtype] = peak, "register loop"
    for size in SIZES:
        buffers = [torch.ones(size + 64, dtype=torch.uint8) for _ in range(threads)]
        starts = [(b.data_ptr() + 63) // 64 * 64 for b in buffers]
        reads = [partial(probe.read_gbs, start, size, READ_S) for start in starts]
        found.read_gbs[size] = _together(reads)
    return found


def _compile_probe() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        source = Path(__file__).with_name("probe.c")
        if subprocess.run([*command, "-o", library, source], capture_output=True).returncode:
            return None
        probe = ctypes.CDLL(str(library))
    for name in ("fma_gflops", "bf16_gflops", "read_gbs"):
        getattr(probe, name).restype = ctypes.c_double
    probe.fma_gflops.argtypes = probe.bf16_gflops.argtypes = [ctypes.c_double]
    probe.read_gbs.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_double]
    return probe


def _together(measurements: Sequence[Callable[[], float]]) -> float:
    """The sum of measurements that start together, each in a thread; the better of two tries."""
    barrier = threading.Barrier(len(measurements))

    def work(measurement: Callable[[], float]) -> float:
        barrier.wait()
        return measurement()

    with ThreadPoolExecutor(len(measurements)) as pool:
        return max(sum(pool.map(work, measurements)) for _ in range(2))


def _mm_gflops(dtype: str, device: str) -> float:
    """The best of two layouts; on a GPU float32 is TF32, as cuDNN's recurrent layers have it."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    best = 0.0
    size = 1024 if device == "cpu" else 8192
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size).to(device, kind) for _ in range(2))
    for right in (b, b.t()):
        torch.mm(a, right)
        started = time.perf_counter()
        while time.perf_counter() - started < 2 * PEAK_S:
            begin = time.perf_counter_ns()
            for _ in range(1 if device == "cpu" else 20):
                torch.mm(a, right)
            if device == "cuda":
                torch.cuda.synchronize()
            spent = (time.perf_counter_ns() - begin) / (1 if device == "cpu" else 20)
            best = max(best, 2.0 * size**3 / spent)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    return best


def _torch_read_gbs(size: int) -> float:
    """Without a compiler: the best of summing a buffer."""
    data = torch.ones(size // 4)
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < READ_S:
        begin = time.perf_counter_ns()
        data.sum()
        best = max(best, size / (time.perf_counter_ns() - begin))
    return best
