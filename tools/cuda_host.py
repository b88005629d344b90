"""The CUDA kernels built for the CPU (tests/cuda_host), as ops ``torch.ops.fusedrnn_cuda_host.*`` on CPU tensors.

A pytest plugin: ``pytest -p cuda_host --ops fusedrnn_cuda_host`` builds and loads them.
``--mutate '[FILE, OLD, NEW]'`` (JSON) builds them with a change to one file under csrc/cuda, as tools/mutants.py does.
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
from toolchain import find_compiler, find_torch, sanitizers

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "fusedrnn_cuda_host"
LIBRARY = pytest.StashKey[ctypes.CDLL]()
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += [f"-DFUSEDRNN_NAMESPACE={NAMESPACE}", "-DFUSEDRNN_CUDA_KEY=CPU"]


def build(lib: Path, sanitize: str = "", mutation: tuple[str, str, str] | None = None) -> Path:
    """The library, linked with the libfusedrnn.so in ``lib``; only what has changed is compiled again."""
    torch, compiler = find_torch(), find_compiler()
    name = "cuda_host" + "".join("-" + word for word in sanitize.split(",") if word)
    folder = ROOT / "build" / name
    sources = ROOT
    if mutation:
        file, old, new = mutation
        folder = folder / hashlib.sha1("\0".join(mutation).encode()).hexdigest()[:12]
        sources = folder / "mutant"
        shutil.rmtree(sources, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", sources / "csrc")
        text = (sources / "csrc/cuda" / file).read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
        (sources / "csrc/cuda" / file).write_text(text.replace(old, new))
    folder.mkdir(parents=True, exist_ok=True)
    host = ROOT / "tests/cuda_host"
    flags = [*FLAGS, "-O1" if sanitize else "-O2", *sanitizers(sanitize)]
    flags += ["-include", str(sources / "csrc/torch_errors.h")]
    command = [*compiler.command, *flags, "-isystem", str(torch.folder / "include"), "-iquote", str(host)]
    units = [sources / "csrc/ops.cpp", *sorted((sources / "csrc/cuda").glob("*.cu")), host / "fibers.cpp"]
    headers = [*(sources / "csrc").rglob("*.h"), *(sources / "csrc").rglob("*.cuh"), *host.glob("*.h")]
    newest = max(header.stat().st_mtime for header in headers)

    def compile(unit: Path) -> Path:
        out = folder / f"{unit.name}.o"
        if not out.exists() or out.stat().st_mtime < max(newest, unit.stat().st_mtime):
            subprocess.run([*command, "-x", "c++", "-c", str(unit), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = [str(out) for out in pool.map(compile, units)]
    library = folder / f"lib{NAMESPACE}.so"
    link = [*compiler.command, "-shared", "-o", str(library), *objects]
    link += [f"-L{lib}", "-lfusedrnn", f"-Wl,-rpath,{lib}", f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-ltorch"]
    link += ["-lc10", *sanitizers(sanitize)]
    subprocess.run(link, check=True)
    return library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", help="JSON [FILE, OLD, NEW], a change to a file under csrc/cuda")


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    import fusedrnn
    from fusedrnn import _C

    mutation = session.config.getoption("--mutate")
    lib = Path(fusedrnn.__file__).parent / "lib"
    library = build(lib, _C.build_info()["sanitize"] or "", tuple(json.loads(mutation)) if mutation else None)
    torch.ops.load_library(library)
    session.config.stash[LIBRARY] = ctypes.CDLL(str(library))
