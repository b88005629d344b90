"""Builds fusedrnn: finds the installed torch and a compiler, writes a build.ninja and runs it.

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
  FUSEDRNN_SANITIZE       sanitizers to compile with: "address,undefined" (its own build folder)
"""

from __future__ import annotations

import contextlib
import fcntl
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

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
TORCH_MIN = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of TORCH_MIN; every later torch has it
GCC_MIN, CLANG_MIN, CUDA_MIN, SETUPTOOLS_MIN = 10, 12, (12, 0), 77
SANITIZE = os.environ.get("FUSEDRNN_SANITIZE", "")

# A source csrc/cpu/*_<isa>.cpp is compiled for that instruction set, every other one for the baseline. Lowest first:
# where two objects have the same inline function the linker keeps the first, so no old CPU ever meets a newer one's.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}

CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]


def fail(message: str) -> NoReturn:
    raise SystemExit(f"fusedrnn: error: {message}")


def say(message: str) -> None:
    print(f"fusedrnn: {message}", flush=True)


def run(command: list[str]) -> str | None:
    """The command's output, or None where it could not run or failed."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- torch: found, never imported (an isolated build has none of its own) --------------------------------------------


class Torch(NamedTuple):
    folder: Path
    version: str


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
    """Environments a front end other than pip may build for: those build in a fresh venv that doesn't name its target."""
    names = ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT")
    prefixes = [os.environ.get(name) for name in names]
    with contextlib.suppress(OSError):  # the front end's own environment and folder, which it may not hand on to us
        parent = Path("/proc", str(os.getppid()))
        environ = dict(x.partition("=")[::2] for x in (parent / "environ").read_text(errors="ignore").split("\0"))
        cwd = (parent / "cwd").resolve()
        prefixes += [environ.get(name) for name in names] + [str(f / ".venv") for f in (cwd, *cwd.parents)]
    prefixes += [str(Path(d).parent) for d in os.environ.get("PATH", "").split(os.pathsep) if d]
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
        match = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", (folder / "version.py").read_text())
        if not match:
            continue
        if (int(match[2]), int(match[3])) < TORCH_MIN:
            fail(f"torch {match[1]} in {folder} is too old, torch >= {wanted} is needed: pip install -U torch")
        if not (folder / "include/torch/csrc/stable/library.h").is_file():
            fail(f"torch {match[1]} in {folder} has no C++ headers: install a torch that has them (pip install torch)")
        return Torch(folder, match[1])
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
    if os.environ.get("FUSEDRNN_CUDA") == "0":
        return "FUSEDRNN_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    path = path or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        return "no nvcc found (CUDA_HOME sets where it is)"
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


# ---- the build -------------------------------------------------------------------------------------------------------


class Ninja:
    """Collects the lines of a build.ninja. Commands are lists of words; $in and $out stand for a step's files."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @staticmethod
    def command(words: list[str]) -> str:
        quoted = (word if word in ("$in", "$out", "$out.d") else shlex.quote(word).replace("$", "$$") for word in words)
        return " ".join(quoted)

    def rule(self, name: str, words: list[str], depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {self.command(words)}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []

    def build(self, out: Path, rule: str, inputs: list[Path], needs: list[Path] | None = None) -> Path:
        escaped = [re.sub(r"([$ :])", r"$\1", str(path)) for path in (out, *inputs)]
        implicit = " | " + " ".join(re.sub(r"([$ :])", r"$\1", str(path)) for path in needs) if needs else ""
        self.lines.append(f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}{implicit}")
        return out


def isa_of(source: Path) -> str | None:
    return next((isa for isa in sorted(ISAS, key=len, reverse=True) if source.stem.endswith("_" + isa)), None)


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_facts(path: Path, facts: dict[str, str]) -> None:
    lines = [f'#define FUSEDRNN_BUILD_{name} "{value}"' for name, value in facts.items()]
    write_if_changed(path, "\n".join(["// Written by setup.py for module.cpp.", "#pragma once", *lines, ""]))


def install(built: Path, target: Path) -> None:
    """Replaces target in one step: a process that has the old library loaded keeps it."""
    if target.exists() and target.stat().st_mtime_ns == built.stat().st_mtime_ns:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copy2(built, temporary)
    temporary.replace(target)


class BuildExt(build_ext):
    def build_folder(self) -> Path:
        tag = sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]
        return Path("build", tag + "".join("-" + word for word in SANITIZE.split(",") if word))

    def outputs(self) -> dict[Path, Path]:
        """Each library in the build folder, and where it goes."""
        base = ROOT if self.inplace else Path(self.build_lib)
        built = self.build_folder() / "fusedrnn"
        module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
        names = ("lib/libfusedrnn.so", "lib/libfusedrnn_cuda.so", module)
        return {built / name: base / "fusedrnn" / name for name in names}

    def get_outputs(self) -> list[str]:
        return [str(target) for target in self.outputs().values() if target.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {str(built): str(target) for built, target in self.outputs().items()} if self.inplace else {}

    def run(self) -> None:
        os.chdir(ROOT)  # sources and depfiles are named relative to it, and so are the places in error messages
        torch, compiler = find_torch(), find_compiler()
        folder = self.build_folder()
        (folder / "fusedrnn/lib").mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            targets = self.write_ninja(folder, torch, compiler)
            jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
            if subprocess.call([find_ninja(), "-f", str(folder / "build.ninja"), "-j", jobs, *map(str, targets)]):
                fail("the build failed; the compiler's first error above says why (FUSEDRNN_CUDA=0 leaves CUDA out)")
            for built, target in self.outputs().items():
                if built in targets:
                    install(built, target)
                else:
                    target.unlink(missing_ok=True)

    def write_ninja(self, folder: Path, torch: Torch, compiler: Compiler) -> list[Path]:
        """Writes build.ninja and the build facts; returns the libraries to build."""
        ninja = Ninja()
        ninja.lines.append(f"builddir = {folder}")
        isas = [isa for isa, flags in ISAS.items() if compiler.x86_64 and supports(compiler, flags)]
        warnings = ["-Wall", "-Wextra"]
        optimise = ["-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3", "-DNDEBUG"]
        sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
        common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
        common += [*warnings, *optimise, *sanitize]
        defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        defines += [f"-DFUSEDRNN_HAVE_{isa.upper()}" for isa in isas]
        torch_headers = ["-isystem", str(torch.folder / "include")]
        torch_libraries = ["-L" + str(torch.folder / "lib"), "-Wl,--as-needed", "-ltorch_cpu", "-ltorch", "-lc10"]
        user_cxx, user_link = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
        cxx = [*compiler.command, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out", *common]
        link = [*compiler.command, "-shared", *sanitize, "-o", "$out", "$in"]

        # The CPU library. -z defs: a symbol torch doesn't have is this build's error, not the user's import error.
        for isa in (None, *isas):
            flags = [*defines, "-Icsrc", *torch_headers, *(ISAS[isa] if isa else []), *user_cxx]
            ninja.rule(f"cxx_{isa}" if isa else "cxx", [*cxx, *flags], depfile=True)
        order = [None, *isas]
        sources = [source for source in sorted(Path("csrc").glob("*.cpp")) if source.name != "module.cpp"]
        sources += sorted(Path("csrc/cpu").glob("*.cpp"))
        sources = sorted((s for s in sources if isa_of(s) in order), key=lambda s: order.index(isa_of(s)))
        objects = []
        for source in sources:
            isa = isa_of(source)
            objects.append(ninja.build(folder / f"{source}.o", f"cxx_{isa}" if isa else "cxx", [source]))
        soname = ["-Wl,-soname,libfusedrnn.so", *([] if SANITIZE else ["-Wl,-z,defs"])]
        ninja.rule("link", [*link, *soname, *torch_libraries, "-pthread", *user_link])
        library = ninja.build(folder / "fusedrnn/lib/libfusedrnn.so", "link", objects)
        targets = [library]

        # The CUDA library. Its runtime is linked in, so the toolkit need not be the one torch was built with.
        nvcc = self.nvcc(compiler)
        if nvcc:
            flags = [*cuda_arch_flags(nvcc.archs), "-std=c++20", "-O3", "-DNDEBUG", "-Xfatbin", "-compress-all"]
            flags += ["--expt-relaxed-constexpr", "-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *warnings])]
            words = [*nvcc.command, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out", *flags]
            ninja.rule("nvcc", [*words, *defines, "-DUSE_CUDA", "-Icsrc", *torch_headers], depfile=True)
            objects = [
                ninja.build(folder / f"{source}.o", "nvcc", [source]) for source in sorted(Path("csrc/cuda").glob("*.cu"))
            ]
            words = [*nvcc.command, "-shared", "-cudart", "static", "-o", "$out", "$in"]
            for word in ["-soname,libfusedrnn_cuda.so", "-rpath,$ORIGIN", "--as-needed"]:
                words += ["-Xlinker", word.replace(",", "=", 1)]
            words += [f"-L{library.parent}", "-lfusedrnn", f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
            ninja.rule("link_cuda", words)
            targets.append(ninja.build(library.with_name("libfusedrnn_cuda.so"), "link_cuda", objects, [library]))

        # The Python module.
        facts = {
            "VERSION": self.distribution.get_version(),
            "COMPILER": compiler.name,
            "TORCH": torch.version,
            "ISAS": " ".join(isas),
            "NVCC": nvcc.version if nvcc else "",
            "CUDA_ARCHS": " ".join(nvcc.archs) if nvcc else "",
            "SANITIZE": SANITIZE,
        }
        write_facts(folder / "build_facts.h", facts)
        headers = [sysconfig.get_path("include"), str(pybind11_include(torch))]
        flags = ["-Icsrc", f"-I{folder}", *(word for header in headers for word in ("-isystem", header)), *user_cxx]
        ninja.rule("cxx_module", [*cxx, *flags], depfile=True)
        ninja.rule("link_module", [*link, f"-L{library.parent}", "-lfusedrnn", "-Wl,-rpath,$ORIGIN/lib", *user_link])
        module = ninja.build(folder / "csrc/module.cpp.o", "cxx_module", [Path("csrc/module.cpp")])
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        targets.append(ninja.build(folder / f"fusedrnn/_C{suffix}", "link_module", [module], [library]))
        write_if_changed(folder / "build.ninja", "\n".join([*ninja.lines, ""]))
        return targets

    def nvcc(self, compiler: Compiler) -> Nvcc | None:
        wish = os.environ.get("FUSEDRNN_CUDA", "")
        if wish not in ("", "0", "1"):
            fail(f"FUSEDRNN_CUDA={wish} is neither 0 nor 1")
        if SANITIZE or not any(Path("csrc/cuda").glob("*.cu")):
            return None
        found = find_nvcc(compiler)
        if isinstance(found, Nvcc):
            return found
        if wish == "1":
            fail(f"FUSEDRNN_CUDA=1, but {found}")
        say(f"building for the CPU only: {found}")
        return None


class DistInfo(dist_info):
    """pip asks for the metadata first, then downloads what it names: torch's absence is told before that."""

    def run(self) -> None:
        find_torch()
        find_compiler()
        super().run()


if int(setuptools.__version__.partition(".")[0]) < SETUPTOOLS_MIN:
    fail(f"setuptools {setuptools.__version__} is too old: pip install -U 'setuptools>={SETUPTOOLS_MIN}' ninja pybind11")

setuptools.setup(
    ext_modules=[setuptools.Extension("fusedrnn._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildExt, "dist_info": DistInfo},
)
