"""The CUDA kernels built for the CPU (tests/cuda_host), as ops ``torch.ops.fusedrnn_cuda_host.*`` on CPU tensors.

A pytest plugin: ``pytest -p cuda_host --ops fusedrnn_cuda_host`` builds and loads them.
``--mutate '[FILE, OLD, NEW]'`` (JSON) builds them with a change to one file under csrc/cuda, as tools/mutants.py does.
``--ptx 9.0a`` runs the kernels as nvcc compiles them for that architecture, by interpreting their PTX.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toolchain import NVCC_FLAGS, STABLE_ABI, Nvcc, fail, find_compiler, find_nvcc, find_torch, sanitizers

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "fusedrnn_cuda_host"
LIBRARY = pytest.StashKey[ctypes.CDLL]()
# Symbols stay visible: by a kernel's name its PTX is found.
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-attributes"]
DEFINES = [STABLE_ABI, f"-DFUSEDRNN_NAMESPACE={NAMESPACE}", "-DFUSEDRNN_CUDA_KEY=CPU"]


def compile_all(units: list[Path], sources: Path, folder: Path, suffix: str, command: list[str]) -> list[Path]:
    """What ``command UNIT -o OUT`` makes of each unit, in ``folder``; only what has changed is compiled again."""
    folder.mkdir(parents=True, exist_ok=True)
    host = ROOT / "tests/cuda_host"
    headers = [*(sources / "csrc").rglob("*.h"), *(sources / "csrc").rglob("*.cuh"), *host.glob("*.h")]
    newest = max(header.stat().st_mtime for header in headers)

    def compile(unit: Path) -> Path:
        out = folder / f"{unit.name}{suffix}"
        if not out.exists() or out.stat().st_mtime < max(newest, unit.stat().st_mtime):
            subprocess.run([*command, str(unit), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile, units))


def mutated(mutation: tuple[str, str, str], folder: Path) -> Path:
    """A copy of the sources with a change to one file."""
    file, old, new = mutation
    sources = folder / "mutant"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    text = (sources / "csrc/cuda" / file).read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    (sources / "csrc/cuda" / file).write_text(text.replace(old, new))
    return sources


def build_ptx(sources: Path, folder: Path, arch: str) -> list[Path]:
    """The kernels' PTX."""
    nvcc = find_nvcc(find_compiler())
    if not isinstance(nvcc, Nvcc):
        fail(nvcc)
    flags = ["-ptx", f"-arch=compute_{arch.replace('.', '')}", *NVCC_FLAGS, *DEFINES]
    flags += ["-include", str(sources / "csrc/torch_errors.h")]
    command = [*nvcc.command, *flags, "-isystem", str(find_torch().folder / "include")]
    units = sorted((sources / "csrc/cuda").glob("*.cu"))
    return compile_all(units, sources, folder / f"ptx-{arch}", ".ptx", command)


def build(lib: Path, sanitize: str, sources: Path, folder: Path) -> Path:
    """The library, linked with the libfusedrnn.so in ``lib``."""
    torch, compiler = find_torch(), find_compiler()
    host = ROOT / "tests/cuda_host"
    flags = [*FLAGS, *DEFINES, "-Og" if sanitize else "-O2", *sanitizers(sanitize)]
    flags += ["-include", str(sources / "csrc/torch_errors.h")]
    command = [*compiler.command, *flags, "-isystem", str(torch.folder / "include"), "-iquote", str(host)]
    units = [sources / "csrc/ops.cpp", *sorted((sources / "csrc/cuda").glob("*.cu")), *sorted(host.glob("*.cpp"))]
    objects = [str(out) for out in compile_all(units, sources, folder, ".o", [*command, "-x", "c++", "-c"])]
    library = folder / f"lib{NAMESPACE}.so"
    link = [*compiler.command, "-shared", "-o", str(library), *objects]
    link += [f"-L{lib}", "-lfusedrnn", f"-Wl,-rpath,{lib}", f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-ltorch"]
    link += ["-lc10", *sanitizers(sanitize)]
    subprocess.run(link, check=True)
    return library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", help="JSON [FILE, OLD, NEW], a change to a file under csrc/cuda")
    parser.addoption("--ptx", metavar="ARCH", help="run the kernels' PTX for this architecture")


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    import fusedrnn
    from fusedrnn import _C

    sanitize = _C.build_info()["sanitize"] or ""
    name = "cuda_host" + "".join("-" + word for word in sanitize.split(",") if word)
    folder, sources = ROOT / "build" / name, ROOT
    if mutation := session.config.getoption("--mutate"):
        folder /= hashlib.sha1(mutation.encode()).hexdigest()[:12]
        sources = mutated(tuple(json.loads(mutation)), folder)
    library = build(Path(fusedrnn.__file__).parent / "lib", sanitize, sources, folder)
    torch.ops.load_library(library)
    loaded = session.config.stash[LIBRARY] = ctypes.CDLL(str(library))
    if arch := session.config.getoption("--ptx"):
        for ptx in build_ptx(sources, folder, arch):
            loaded.fusedrnn_cuda_host_load_ptx(os.fsencode(ptx))
