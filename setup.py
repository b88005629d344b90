"""Builds fusedrnn: writes a build.ninja and runs it.

  fusedrnn/lib/libfusedrnn.so       csrc/*.cpp csrc/cpu/*.cpp   LibTorch stable ABI, no Python symbols
  fusedrnn/lib/libfusedrnn_cuda.so  csrc/cuda/*.cu              the same, by nvcc where there is one
  fusedrnn/_C.*.so                  csrc/module.cpp             pybind11, no torch headers

`python setup.py build_ext --inplace` is the developer's incremental rebuild. Environment variables:

  CXX, CXXFLAGS, LDFLAGS  the C++ compiler and more flags for it
  MAX_JOBS                how many compilers run at a time (default: the cores this process may use)
  FUSEDRNN_TORCH          the torch package's folder, where it isn't found by itself
  FUSEDRNN_CUDA           1: build the CUDA library or fail; 0: don't; unset: where nvcc works
  CUDA_HOME               the CUDA toolkit (default: the nvcc on PATH)
  TORCH_CUDA_ARCH_LIST    the GPU architectures, as torch spells them: "8.0;9.0a;12.0+PTX"
  FUSEDRNN_SANITIZE       sanitizers to compile with: "address,undefined" (in a build folder of its own)
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from toolchain import (  # noqa: E402
    NVCC_FLAGS,
    STABLE_ABI,
    Compiler,
    Nvcc,
    Torch,
    cuda_arch_flags,
    fail,
    find_compiler,
    find_ninja,
    find_nvcc,
    find_torch,
    pybind11_include,
    sanitizers,
    supports,
)

SETUPTOOLS_MIN = 77
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
SANITIZE = os.environ.get("FUSEDRNN_SANITIZE", "")
WISH_CUDA = os.environ.get("FUSEDRNN_CUDA", "")

WARNINGS = ["-Wall", "-Wextra"]
CXX_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *WARNINGS]
FATBIN_FLAGS = ["-Xfatbin", "-compress-all", "-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS])]

# A source csrc/cpu/*_<isa>.cpp is compiled for that instruction set, every other one for the baseline. Lowest first:
# where two objects have the same inline function the linker keeps the first, so no old CPU ever meets a newer one's.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


def isa_of(source: Path) -> str:
    """The instruction set in a source's name, "" for the baseline."""
    return next((isa for isa in sorted(ISAS, key=len, reverse=True) if source.stem.endswith("_" + isa)), "")


def cpu_sources() -> list[Path]:
    found = [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp"), Path("csrc/cuda/plan.cpp")]
    return sorted(source for source in found if source.name != "module.cpp")


def user_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def install(built: Path, target: Path) -> None:
    """Replaces target in one step: a process that has the old library loaded keeps it."""
    if target.exists() and target.stat().st_mtime_ns == built.stat().st_mtime_ns:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copy2(built, temporary)
    temporary.replace(target)


class Ninja:
    """The lines of a build.ninja. Commands are lists of words, where $in and $out stand for a step's files."""

    def __init__(self, folder: Path) -> None:
        self.lines = [f"builddir = {folder}"]
        self.folder = folder

    def rule(self, name: str, words: list[str]) -> str:
        """A rule of this name and command; one that compiles (-MF $out.d) tells the headers it read."""
        files = ("$in", "$out", "$out.d")
        command = " ".join(word if word in files else shlex.quote(word).replace("$", "$$") for word in words)
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if "$out.d" in words else []
        return name

    def build(self, out: Path, rule: str, inputs: list[Path], needs: Path | None = None) -> Path:
        def escape(path: Path) -> str:
            return re.sub(r"([$ :])", r"$\1", str(path))

        implicit = f" | {escape(needs)}" if needs else ""
        self.lines.append(f"build {escape(out)}: {rule} {' '.join(map(escape, inputs))}{implicit}")
        return out

    def object(self, source: Path, rule: str) -> Path:
        return self.build(self.folder / f"{source}.o", rule, [source])


class Plan:
    """Which libraries to build from which sources, and how."""

    def __init__(self, folder: Path, version: str, torch: Torch, compiler: Compiler, nvcc: Nvcc | None) -> None:
        self.folder, self.version, self.torch, self.compiler, self.nvcc = folder, version, torch, compiler, nvcc
        found = {isa_of(source) for source in cpu_sources()}
        usable = [isa for isa, flags in ISAS.items() if isa in found and compiler.x86_64 and supports(compiler, flags)]
        self.isas = ["", *usable]
        self.defines = [
            STABLE_ABI,
            "-DFUSEDRNN_NAMESPACE=fusedrnn",
            *("-include", "csrc/torch_errors.h"),
            *(f"-DFUSEDRNN_HAVE_{isa.upper()}" for isa in usable),
        ]
        self.torch_headers = ["-isystem", str(torch.folder / "include")]
        # libstdc++ first: torch's libraries export copies of its templates, which another torch may not have.
        self.torch_libraries = [f"-L{torch.folder / 'lib'}", "-lstdc++", "-ltorch_cpu", "-ltorch", "-lc10"]
        if SANITIZE:
            # No sanitizer sees what tile instructions read and write: in their place, C++ that does the same.
            self.defines += ["-DFUSEDRNN_AMX_HOST", "-iquote", "tests/amx_host"]
        sanitize = sanitizers(SANITIZE)
        self.cxx = [*compiler.command, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out", *CXX_FLAGS, *sanitize]
        self.cxx += ["-Og", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3", "-DNDEBUG"]
        self.link = [*compiler.command, "-shared", *sanitize, "-o", "$out", "$in", "-Wl,--as-needed"]
        self.ninja = Ninja(folder)
        library = self.cpu_library()
        self.targets = [library, self.python_module(library)]
        if nvcc:
            self.targets.append(self.cuda_library(library, nvcc))
        write_if_changed(folder / "build.ninja", "\n".join([*self.ninja.lines, ""]))

    def cpu_library(self) -> Path:
        objects = []
        for isa in self.isas:
            flags = [*self.defines, *self.torch_headers, *ISAS.get(isa, []), *user_flags("CXXFLAGS")]
            rule = self.ninja.rule(f"cxx_{isa}" if isa else "cxx", [*self.cxx, *flags])
            objects += [self.ninja.object(source, rule) for source in cpu_sources() if isa_of(source) == isa]
        flags = ["-Wl,-soname,libfusedrnn.so", *self.torch_libraries, "-pthread", *user_flags("LDFLAGS")]
        # A symbol that torch doesn't have is this build's error, not the user's import error.
        flags += [] if SANITIZE else ["-Wl,-z,defs"]
        rule = self.ninja.rule("link", [*self.link, *flags])
        return self.ninja.build(self.folder / "fusedrnn/lib/libfusedrnn.so", rule, objects)

    def cuda_library(self, library: Path, nvcc: Nvcc) -> Path:
        words = [*nvcc.command, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out", *NVCC_FLAGS, *FATBIN_FLAGS]
        words += [
            *cuda_arch_flags(nvcc.archs),
            *self.defines,
            "-DFUSEDRNN_CUDA_KEY=CUDA",
            *self.torch_headers,
        ]
        rule = self.ninja.rule("nvcc", words)
        # The cells first: they take longest, and the last one to begin should not.
        sources = sorted(Path("csrc/cuda").glob("*.cu"), key=lambda source: (source.stem == "layer_cuda", source))
        objects = [self.ninja.object(source, rule) for source in sources]
        # The CUDA runtime is linked in, so that the toolkit need not be the one torch was built with.
        words = [*nvcc.command, "-shared", "-cudart", "static", "-o", "$out", "$in"]
        for word in ("--as-needed", "-soname=libfusedrnn_cuda.so", "-rpath=$ORIGIN"):
            words += ["-Xlinker", word]
        words += [f"-L{library.parent}", "-lfusedrnn", *self.torch_libraries]
        # libtorch.so leads to libtorch_cuda.so, which a CPU build of torch lacks.
        rule = self.ninja.rule("link_cuda", [*words, "-Xlinker", "--no-as-needed", "-ltorch"])
        return self.ninja.build(library.with_name("libfusedrnn_cuda.so"), rule, objects, library)

    def python_module(self, library: Path) -> Path:
        facts = {
            "VERSION": self.version,
            "COMPILER": self.compiler.name,
            "TORCH": self.torch.version,
            "ISAS": " ".join(self.isas).strip(),
            "NVCC": self.nvcc.version if self.nvcc else "",
            "CUDA_ARCHS": " ".join(self.nvcc.archs) if self.nvcc else "",
            "SANITIZE": SANITIZE,
        }
        lines = [f'#define FUSEDRNN_BUILD_{name} "{value}"' for name, value in facts.items()]
        write_if_changed(self.folder / "build_facts.h", "\n".join(["#pragma once", *lines, ""]))
        headers = [f"-I{self.folder}", "-isystem", sysconfig.get_path("include")]
        headers += ["-isystem", str(pybind11_include(self.torch))]
        source = self.ninja.object(
            Path("csrc/module.cpp"),
            self.ninja.rule("cxx_module", [*self.cxx, *headers, *user_flags("CXXFLAGS")]),
        )
        flags = [f"-L{library.parent}", "-lfusedrnn", "-Wl,-rpath,$ORIGIN/lib", *user_flags("LDFLAGS")]
        rule = self.ninja.rule("link_module", [*self.link, *flags])
        return self.ninja.build(self.folder / f"fusedrnn/_C{EXT_SUFFIX}", rule, [source], library)


def optional_nvcc(compiler: Compiler) -> Nvcc | None:
    if WISH_CUDA not in ("", "0", "1"):
        fail(f"FUSEDRNN_CUDA={WISH_CUDA} is neither 0 nor 1")
    if SANITIZE or not any(Path("csrc/cuda").glob("*.cu")):
        return None
    found = find_nvcc(compiler) if WISH_CUDA != "0" else "FUSEDRNN_CUDA=0"
    if isinstance(found, Nvcc):
        return found
    if WISH_CUDA == "1":
        fail(f"FUSEDRNN_CUDA=1, but {found}")
    print(f"fusedrnn: building for the CPU only: {found}", flush=True)
    return None


def build(folder: Path, version: str) -> list[Path]:
    """The libraries built."""
    torch, compiler, ninja = find_torch(), find_compiler(), find_ninja()
    nvcc = optional_nvcc(compiler)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    for attempt in (nvcc, None) if nvcc else (None,):
        targets = Plan(folder, version, torch, compiler, attempt).targets
        if subprocess.call([ninja, "-f", str(folder / "build.ninja"), "-j", jobs, *map(str, targets)]) == 0:
            return targets
        if attempt is None or torch.cuda or WISH_CUDA == "1":
            break
        print("fusedrnn: building for the CPU only: nvcc failed, and this torch has no CUDA", flush=True)
    hint = " (FUSEDRNN_CUDA=0 leaves the CUDA library out)" if nvcc else ""
    fail(f"the build failed; the compiler's first error above says why{hint}")


class BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # an earlier build's files, perhaps of modules that are no more
            shutil.rmtree(Path(self.build_lib, "fusedrnn"), ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    def outputs(self) -> dict[Path, Path]:
        """Each library in the build folder, and where it goes."""
        tag = EXT_SUFFIX.split(".")[1] + "".join("-" + word for word in SANITIZE.split(",") if word)
        built, target = Path("build", tag, "fusedrnn"), ROOT if self.inplace else Path(self.build_lib)
        names = ("lib/libfusedrnn.so", "lib/libfusedrnn_cuda.so", f"_C{EXT_SUFFIX}")
        return {built / name: target / "fusedrnn" / name for name in names}

    def get_outputs(self) -> list[str]:
        return [str(target) for target in self.outputs().values() if target.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {str(built): str(target) for built, target in self.outputs().items()} if self.inplace else {}

    def run(self) -> None:
        os.chdir(ROOT)  # sources are named relative to it, in depfiles and in error messages
        outputs = self.outputs()
        folder = next(iter(outputs)).parents[2]
        (folder / "fusedrnn/lib").mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = build(folder, self.distribution.get_version())
            for built, target in outputs.items():
                if built in done:
                    install(built, target)
                else:
                    target.unlink(missing_ok=True)


class DistInfo(dist_info):
    """pip asks for the metadata first, then downloads what it names: what is missing here is told before that."""

    def run(self) -> None:
        find_torch()
        find_compiler()
        super().run()


if int(setuptools.__version__.partition(".")[0]) < SETUPTOOLS_MIN:
    fail(f"setuptools {setuptools.__version__} is too old: pip install -U 'setuptools>={SETUPTOOLS_MIN}' ninja")

setuptools.setup(
    ext_modules=[setuptools.Extension("fusedrnn._C", ["csrc/module.cpp"])],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "dist_info": DistInfo},
)
