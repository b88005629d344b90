"""The build: what setup.py finds and refuses, and what the libraries it made need from torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusedrnn
from fusedrnn import _C

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted((Path(fusedrnn.__file__).parent / "lib").glob("*.so"))


@pytest.fixture(scope="module")
def toolchain():
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "tools" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toolchain"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch_folder(tmp_path, monkeypatch):
    """Makes a torch package of a version, with headers, for the build to find."""

    def make(version: str, cuda: str | None = None) -> Path:
        folder = tmp_path / "torch"
        (folder / "include/torch/csrc/stable").mkdir(parents=True, exist_ok=True)
        (folder / "include/torch/csrc/stable/library.h").touch()
        (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")
        monkeypatch.setenv("FUSEDRNN_TORCH", str(folder))
        return folder

    return make


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a C++ compiler of which only the predefined macros matter."""

    def make(macros: str) -> None:
        program = tmp_path / "c++"
        program.write_text(f"#!/bin/sh\ncat <<END\n{macros}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))

    return make


def refusal(function, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    message = str(error.value)
    assert message.startswith("fusedrnn: error: ") and "\n" not in message
    return message


def test_one_version():
    assert importlib.metadata.version("fusedrnn") == fusedrnn.__version__ == _C.build_info()["version"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_the_stable_abi_is_needed(library):
    """No C++ symbol of torch's, which differ between versions; nothing of Python's."""
    output = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    symbols = [line.split()[-1] for line in output.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    unstable = [s for s in symbols if re.match(r"_ZNK?(2at|3c10|5torch)|_?Py", s)]
    # libstdc++'s have a version there; one without would be a copy that this torch happens to export
    unstable += [s for s in symbols if re.match(r"_ZNK?(St|Ss|So)", s) and "@" not in s]
    assert not unstable


@pytest.mark.parametrize("name", ["STABLE_TORCH_ERROR_CODE_CHECK", "STABLE_TORCH_LIBRARY("])
def test_headers_of_the_oldest_torch_are_enough(name):
    """Not every name of newer headers depends on the version that is built for; nor what a macro of theirs expands."""
    sources = [path for kind in ("*.h", "*.cpp", "*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(kind)]
    assert sources and not [str(path) for path in sources if name in path.read_text()]


def test_every_mutant_can_be_made():
    """What tools/mutants.py takes away stands in its file, once."""
    mutants = runpy.run_path(str(ROOT / "tools" / "mutants.py"))["MUTANTS"]
    found = {what: (ROOT / "csrc/cuda" / file).read_text().count(old) for what, file, old, _ in mutants}
    assert len(mutants) > 30 and set(found.values()) == {1}, found


def test_cpu_capability():
    built = _C.build_info()["cpu_capabilities"]
    before = _C.cpu_capability()
    assert before in built
    try:
        for name in built[: built.index(before) + 1]:
            _C.set_cpu_capability(name)
            assert _C.cpu_capability() == name
    finally:
        _C.set_cpu_capability(before)
    with pytest.raises(ValueError, match="'sse9' is unknown"):
        _C.set_cpu_capability("sse9")
    assert _C.cpu_capability() == before


def test_cpu_capability_of_the_environment():
    """It is the highest one to use; a name that is none is said to be."""

    def run(name):
        program = [sys.executable, "-c", "import fusedrnn; print(fusedrnn._C.cpu_capability())"]
        environment = {**os.environ, "FUSEDRNN_CPU_CAPABILITY": name}
        done = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip(), done.stderr

    assert run("default") == ("default", "")
    best, said = run(_C.build_info()["cpu_capabilities"][-1])
    assert (best in _C.build_info()["cpu_capabilities"], said) == (True, "")
    found, said = run("sse9")
    assert found == best and "FUSEDRNN_CPU_CAPABILITY: 'sse9' is none" in said


@pytest.mark.parametrize(
    ("version", "cuda", "has_cuda"),
    [("2.10.0", None, False), ("2.13.0+cpu", None, False), ("3.0.1+cu130", "13.0", True)],
)
def test_torch_is_found(toolchain, torch_folder, version, cuda, has_cuda):
    folder = torch_folder(version, cuda)
    assert toolchain.find_torch() == toolchain.Torch(folder, version, has_cuda)


def test_torch_is_refused(toolchain, torch_folder, monkeypatch):
    folder = torch_folder("2.9.1+cu128")
    assert "torch 2.9.1+cu128" in refusal(toolchain.find_torch)
    shutil.rmtree(folder / "include")
    (folder / "version.py").write_text("__version__ = '2.10.0'\n")
    assert "no C++ headers" in refusal(toolchain.find_torch)
    (folder / "version.py").unlink()
    assert "is no torch package" in refusal(toolchain.find_torch)
    monkeypatch.delenv("FUSEDRNN_TORCH")
    monkeypatch.setattr(toolchain, "torch_folders", lambda: iter([folder]))
    assert "pip install torch" in refusal(toolchain.find_torch)


def test_torch_of_the_environment(toolchain, tmp_path, monkeypatch):
    """Front ends that build in a venv of their own: the target is the active environment, or one beside the project."""
    monkeypatch.delenv("FUSEDRNN_TORCH", raising=False)
    monkeypatch.delenv("PIP_BUILD_TRACKER", raising=False)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = tmp_path / "lib" / python / "site-packages" / "torch"
    assert folder in list(toolchain.torch_folders())
    monkeypatch.setenv("PIP_BUILD_TRACKER", "here")  # pip runs the target's own interpreter
    assert folder not in list(toolchain.torch_folders())


@pytest.mark.parametrize(
    ("macros", "name"),
    [
        ("#define __GNUC__ 11\n#define __GNUC_MINOR__ 4", "gcc 11.4"),
        (
            "#define __GNUC__ 4\n#define __clang__ 1\n#define __clang_major__ 14\n#define __clang_minor__ 0",
            "clang 14.0",
        ),
    ],
)
def test_compiler_is_found(toolchain, compiler, macros, name):
    compiler(macros)
    assert toolchain.find_compiler().name == name


def test_compiler_is_refused(toolchain, compiler, monkeypatch):
    compiler("#define __GNUC__ 10\n#define __GNUC_MINOR__ 2")
    assert "is gcc 10.2, too old" in refusal(toolchain.find_compiler)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "no C++ compiler found (tried /nowhere/c++)" in refusal(toolchain.find_compiler)
    monkeypatch.setenv("CXX", "false")
    assert "does not run" in refusal(toolchain.find_compiler)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler found (tried c++, g++, clang++)" in refusal(toolchain.find_compiler)


def test_no_nvcc(toolchain, tmp_path, monkeypatch):
    """Whatever is wrong with nvcc is one reason not to use it, never an error."""
    compiler = toolchain.Compiler(["c++"], "gcc 12.2", True)
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for script, reason in [("exit 1", "does not work"), ("echo release 11.8", "is CUDA 11.8, too old")]:
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
        assert reason in toolchain.find_nvcc(compiler)
    nvcc.write_text("#!/bin/sh\n[ $1 = --version ] && echo release 12.4\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    assert "can't compile for 8.0;9.0a" in toolchain.find_nvcc(compiler)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert "'Hopper' is no number" in refusal(toolchain.find_nvcc, compiler)


def test_architectures_that_are_too_old(toolchain, monkeypatch, capsys):
    """A container's list may have some: they are left out, unless there is no other."""
    monkeypatch.setattr(toolchain, "run", lambda command: "release 12.4")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path: "/usr/bin/nvcc")
    compiler = toolchain.Compiler(["c++"], "gcc 12.2", True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 7.5 8.0 9.0a+PTX 12.0+PTX")
    assert toolchain.find_nvcc(compiler).archs == ["8.0", "9.0a+PTX", "12.0+PTX"]
    assert "not building for 5.2;7.5:" in capsys.readouterr().out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    assert "none of 7.0;7.5+PTX is 8.0 or higher" in refusal(toolchain.find_nvcc, compiler)


def test_cuda_arch_flags(toolchain):
    assert toolchain.cuda_arch_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
