"""What setup.py builds with: torch (found, never imported: an isolated build has none of its own), a compiler, nvcc.

Whatever is missing or too old ends the build with one line that says what to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

TORCH_MIN = (2, 10)
GCC_MIN, CLANG_MIN, CUDA_MIN = 11, 14, (12, 0)
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10's, which every later torch has too


def fail(message: str) -> NoReturn:
    raise SystemExit(f"fusedrnn: error: {message}")


def run(command: list[str]) -> str | None:
    """The command's output, or None where it could not run or failed."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- torch -----------------------------------------------------------------------------------------------------------


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: bool


def site_packages(prefix: str | Path) -> Iterator[Path]:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for lib in ("lib", "lib64"):
        yield Path(prefix, lib, python, "site-packages")


def inherited_site_packages() -> Iterator[Path]:
    """What the interpreter sees beside its own site-packages: the user's, and of a venv that wants it the base's."""
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists():
        if not re.search(r"^include-system-site-packages\s*=\s*true", config.read_text(), re.IGNORECASE | re.MULTILINE):
            return
        yield from site_packages(sys.base_prefix)
    yield Path(site.getusersitepackages())


def frontend_site_packages() -> Iterator[Path]:
    """What a front end other than pip may build for: those build in a fresh venv that doesn't tell its target."""
    names = ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT")
    prefixes = [os.environ.get(name) for name in names]
    with contextlib.suppress(OSError):  # the front end's own command line, environment and folder
        process = Path("/proc", str(os.getppid()))
        words, settings = ((process / name).read_text(errors="ignore").split("\0") for name in ("cmdline", "environ"))
        here = (process / "cwd").resolve()
        values = [Path(here, word.rpartition("=")[2]) for word in words if "/" in word]
        prefixes += [str(prefix) for value in values for prefix in (value, value.parent.parent)]  # --python .../python
        environ = dict(setting.partition("=")[::2] for setting in settings)
        prefixes += [environ.get(name) for name in names] + [str(f / ".venv") for f in (here, *here.parents)]
    prefixes += [str(Path(folder).parent) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for prefix in prefixes:
        if prefix and prefix != "/usr":
            yield from site_packages(prefix)


def torch_folders() -> Iterator[Path]:
    if override := os.environ.get("FUSEDRNN_TORCH"):
        yield from (Path(override), Path(override, "torch"))
        return
    if (spec := importlib.util.find_spec("torch")) and spec.submodule_search_locations:
        yield from map(Path, spec.submodule_search_locations)
    # pip's isolated builds run the target environment's interpreter, with its site-packages taken off sys.path.
    yield from (Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib"))
    yield from (folder / "torch" for folder in inherited_site_packages())
    if "PIP_BUILD_TRACKER" not in os.environ:
        yield from (folder / "torch" for folder in frontend_site_packages())


def find_torch() -> Torch:
    wanted = ".".join(map(str, TORCH_MIN))
    for folder in torch_folders():
        if not (folder / "version.py").is_file():
            continue
        text = (folder / "version.py").read_text()
        match = re.search(r"^__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text, re.MULTILINE)
        if not match:
            continue
        if (int(match[2]), int(match[3])) < TORCH_MIN:
            fail(f"torch {match[1]} in {folder} is too old, torch >= {wanted} is needed: pip install -U torch")
        if not (folder / "include/torch/csrc/stable/library.h").is_file():
            fail(f"torch {match[1]} in {folder} has no C++ headers: install a torch that has them (pip install torch)")
        return Torch(folder, match[1], re.search(r"^cuda\b.*= ['\"]", text, re.MULTILINE) is not None)
    if override := os.environ.get("FUSEDRNN_TORCH"):
        fail(f"FUSEDRNN_TORCH={override} is no torch package: set it to the folder that has torch's version.py")
    fail(
        f"no torch found for {sys.executable}: install torch >= {wanted} first (pip install torch), then fusedrnn "
        "(or set FUSEDRNN_TORCH to the torch package's folder)"
    )


# ---- compilers -------------------------------------------------------------------------------------------------------


class Compiler(NamedTuple):
    command: list[str]
    name: str
    x86_64: bool


def find_compiler() -> Compiler:
    if not sys.platform.startswith("linux"):
        fail(f"fusedrnn builds on Linux only; this is {sys.platform}")
    tried = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    command = next((shlex.split(name) for name in tried if shutil.which(shlex.split(name)[0])), None)
    if command is None:
        fail(f"no C++ compiler found (tried {', '.join(tried)}): install one (apt install g++) or set CXX")
    macros = run([*command, "-x", "c++", "-dM", "-E", "/dev/null"])
    if macros is None:
        fail(f"the C++ compiler '{shlex.join(command)}' does not run: install g++ or clang++, or set CXX")
    values = dict(re.findall(r"#define (\w+) (.*)", macros))
    kind, prefix, oldest = ("clang", "__clang_", CLANG_MIN) if "__clang__" in values else ("gcc", "__GNUC_", GCC_MIN)
    major = values.get("__clang_major__" if kind == "clang" else "__GNUC__", "0")
    minor = values.get(prefix + ("minor__" if kind == "clang" else "MINOR__"), "0")
    if int(major) < oldest:
        fail(
            f"{shlex.join(command)} is {kind} {major}.{minor}, too old for C++20: install gcc >= {GCC_MIN} or "
            f"clang >= {CLANG_MIN} and set CXX to it"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        fail(f"Python's headers are missing ({sysconfig.get_path('include')}/Python.h): apt install python3-dev")
    return Compiler(command, f"{kind} {major}.{minor}", "__x86_64__" in values)


def supports(compiler: Compiler, flags: list[str]) -> bool:
    return run([*compiler.command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]) is not None


def sanitizers(names: str) -> list[str]:
    """Flags to compile and link with, "address,undefined" or nothing: without the checks that take most of the
    compiler's time and find what the others find too."""
    return [f"-fsanitize={names}", "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all"] if names else []


class Nvcc(NamedTuple):
    command: list[str]
    version: str
    archs: list[str]


def cuda_arch_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_nvcc(compiler: Compiler) -> Nvcc | str:
    """nvcc and the architectures to build for, or why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    path = next((found for place in places if (found := shutil.which("nvcc", path=place))), None)
    if path is None:
        return f"no nvcc in CUDA_HOME={home}" if home else "no nvcc found (CUDA_HOME says where it is)"
    version = re.search(r"release (\d+)\.(\d+)", run([path, "--version"]) or "")
    if version is None:
        return f"{path} does not work"
    if (int(version[1]), int(version[2])) < CUDA_MIN:
        return f"{path} is CUDA {version[1]}.{version[2]}, too old (12.0 is the oldest)"
    archs = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
    if archs == [""]:
        known = re.findall(r"compute_(\d+)", run([path, "--list-gpu-arch"]) or "")
        archs = [arch for arch in CUDA_ARCHS if re.sub(r"\D", "", arch) in known]
        if CUDA_ARCHS[-1] not in archs:
            archs.append("9.0+PTX")
    if bad := [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]:
        fail(f"TORCH_CUDA_ARCH_LIST: {bad[0]!r} is no number such as 8.0, 9.0a or 12.0+PTX")
    if old := [arch for arch in archs if float(re.sub(r"[^\d.]", "", arch)) < 8]:  # lists of containers for anything
        print(f"fusedrnn: not building for {';'.join(old)}: its kernels need compute capability 8.0 or higher")
        archs = [arch for arch in archs if arch not in old]
        if not archs:
            fail(f"TORCH_CUDA_ARCH_LIST: none of {';'.join(old)} is 8.0 or higher")
    command = [path, "-ccbin", next((word for word in compiler.command if "++" in word), compiler.command[0])]
    probe = [*command, "-std=c++20", *cuda_arch_flags(archs), "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    if run(probe) is None:
        return f"{path} (CUDA {version[1]}.{version[2]}) with {compiler.name} can't compile for {';'.join(archs)}"
    return Nvcc(command, f"{version[1]}.{version[2]}", archs)


def find_ninja() -> str:
    if found := shutil.which("ninja"):
        return found
    with contextlib.suppress(ImportError):
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    fail("ninja not found: pip install ninja")


def pybind11_include(torch: Torch) -> Path:
    if (torch.folder / "include/pybind11/pybind11.h").exists():
        return torch.folder / "include"
    with contextlib.suppress(ImportError):
        import pybind11

        return Path(pybind11.get_include())
    fail("pybind11 not found: pip install pybind11")
