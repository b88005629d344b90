"""Where a result was measured."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "onnxruntime", "openvino", "onnx", "numpy", "fusedrnn")
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "bf16", "i8mm"),
)


def collect(ours: str | None, device: str, threads: list[int]) -> dict[str, Any]:
    model, flags = _cpu()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": model,
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cpus": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "threads": threads,
        "device": device,
        "process_each": device == "cpu",  # for every implementation
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "ours": ours or "none (peers only)",
        "variables": {k: v for k, v in os.environ.items() if re.match("OMP_|MKL_|FUSEDRNN_", k)},
    }
    if ours:
        introspection = getattr(importlib.import_module(ours), "_C", None)
        capability = getattr(introspection, "cpu_capability", None)
        found["our_cpu_capability"] = capability() if capability else None
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


class Others:
    """How much of this process's processors others use (or the hypervisor takes), but for those of `children`."""

    def __init__(self, children: Sequence[int] = ()) -> None:
        self._children = children
        self._started = self._now()

    def share(self) -> float:
        busy, own, wall = (b - a for a, b in zip(self._started, self._now(), strict=True))
        cpus = len(os.sched_getaffinity(0))
        return max(0.0, (busy - own) / (wall * cpus))

    def _now(self) -> tuple[float, float, float]:
        """Seconds: processors busy, our processes' share of that, wall clock."""
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return 0.0, 0.0, time.monotonic()
        ticks = 0
        for line in lines:
            name, *counts = line.split()
            if name[:3] == "cpu" and name[3:] and int(name[3:]) in os.sched_getaffinity(0):
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
                ticks += user + nice + system + irq + softirq + steal
        own = 0
        for child in self._children:
            with contextlib.suppress(OSError):  # it ended
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])  # utime and stime
        second = os.sysconf("SC_CLK_TCK")
        return ticks / second, time.process_time() + own / second, time.monotonic()


def machine_name(environment: dict[str, Any]) -> str:
    """A folder's name for this kind of machine: its processor and how many of them."""
    name = environment.get("gpu") or f"{environment['cpu']} {environment['cpus']}c"
    name = re.sub(r"\((R|TM|C)\)|processor|CPU|@.*?GHz", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(environment: dict[str, Any]) -> str:
    e = environment
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items() if v)
    hardware = f"{e['cpu']}, {e['cpus']} CPUs ({' '.join(e['instruction_sets'])}; {e['caches']})"
    if "gpu" in e:
        hardware = f"{e['gpu']}, CUDA {e['cuda']}, cuDNN {e['cudnn']}; {hardware}"
    return (
        f"{hardware}\n{versions}, Python {e['python']}\n"
        f"{e['date']}, commit {e['commit']}, load average {e['load_average'][0]} at the start"
    )


def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(re.findall(r"^([^\t\n]+?)\s*:\s*(.*)$", text, flags=re.MULTILINE))
    model = fields.get("model name", platform.machine())
    if "cpu family" in fields and not re.search(r"\d{3}", model):  # a bare "AMD EPYC" says little
        model += f" family {fields['cpu family']} model {fields['model']}"
    return model, set((fields.get("flags") or fields.get("Features") or "").split())


def _caches() -> str:
    sizes = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes.append(f"L{level} {size}")
    return ", ".join(sizes)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        with contextlib.suppress(ImportError):  # built in place, not installed
            return getattr(importlib.import_module(name), "__version__", None)
        return None


def _commit() -> str:
    def git(*args: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
