"""What the compiler makes of the kernels for a GPU, where there is an nvcc."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CELLS, NUMBERS = ("LSTM", "GRU", "RNNTanh"), ("bf16", "float")


def test_the_kernels_of_a_cluster_have_enough_registers(tmp_path, monkeypatch):
    """What a step loads for the next one would be waited for at once, if it had to be put away into memory."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from toolchain import NVCC_FLAGS, STABLE_ABI, Nvcc, find_compiler, find_nvcc, find_torch

    nvcc = find_nvcc(find_compiler())
    if not isinstance(nvcc, Nvcc) or not nvcc.version.startswith("13."):
        pytest.skip("needs CUDA 13's nvcc: others divide registers in their own way")
    declared = [
        f"template __global__ void {kernel}(const {way}<TensorCores<{number}>::Storage>);"
        for cell in CELLS
        for number in NUMBERS
        for way, kernel in (
            ("Forward", f"forward_cluster<{cell}, TensorCores<{number}>>"),
            ("Backward", f"backward_cluster<{cell}, TensorCores<{number}>, few_tiles>"),
            ("Backward", f"backward_cluster<{cell}, TensorCores<{number}>, many_tiles>"),
        )
    ]
    source = tmp_path / "kernels.cu"
    headers = [f'#include "{name}"' for name in ("cells/lstm.h", "cells/gru.h", "cells/rnn.h", "cuda/cluster.cuh")]
    source.write_text("\n".join([*headers, "namespace fusedrnn::cuda {", *declared, "}", ""]))
    command = [*nvcc.command, *NVCC_FLAGS, STABLE_ABI, "-arch=sm_90a", "-Xptxas", "-v", "-cubin", "-I", ROOT / "csrc"]
    command += ["-isystem", find_torch().folder / "include", "-o", tmp_path / "kernels.cubin", source]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    spills = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores", result.stderr, re.DOTALL)
    assert len(spills) == len(declared), result.stderr
    assert {name: bytes for name, bytes in spills if bytes != "0"} == {}
