"""AMX: which processors use its tiles, and what the emulation of a sanitized build (tests/amx_host) computes."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import _C

BUILT = _C.build_info()["cpu_capabilities"]
EMULATED = bool(_C.build_info()["sanitize"])
# What each capability needs of the flags in /proc/cpuinfo.
NEEDED = {
    "default": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": set() if EMULATED else {"amx_tile", "amx_bf16"},
}

pytestmark = pytest.mark.skipif(sys.platform != "linux" or "amx" not in BUILT, reason="needs a build with AMX")


@pytest.fixture
def restored_capability():
    before = _C.cpu_capability()
    yield
    _C.set_cpu_capability(before)


def may_use_tiles() -> bool:
    """Asks Linux for the tiles' state, as a process must."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return EMULATED or ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def test_capabilities_are_the_processors(restored_capability):
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    there = True
    for name, needed in NEEDED.items():
        there = there and needed <= flags and (name != "amx" or may_use_tiles())
        if there:
            _C.set_cpu_capability(name)
            assert _C.cpu_capability() == name
        else:
            with pytest.raises(ValueError, match=f"'{name}' is unknown, or not one this build and CPU have"):
                _C.set_cpu_capability(name)


def dot(a: list[float], b: list[float]) -> float:
    """As a large enough layer multiplies: relu(W x), where a is every row of W and b every x."""
    T, N, H = 4, 4, 5
    x = torch.tensor(b, dtype=torch.bfloat16).expand(T, N, -1)
    w_ih = torch.tensor(a, dtype=torch.bfloat16).repeat(H, 1)
    w_hh = torch.zeros(H, H, dtype=torch.bfloat16)
    y, *_ = torch.ops.fusedrnn.rnn_relu(x, None, None, [w_ih, w_hh], None, 1, False)
    assert (y == y[0, 0, 0]).all()
    return y[0, 0, 0].item()


@pytest.mark.skipif(not EMULATED, reason="of the emulation")
def test_products_are_as_documented(restored_capability):
    """Even and odd k are summed apart, in steps of 32; subnormal numbers are zeros."""
    large, zeros = 2.0**12, [0.0] * 30
    cancelling = [large, 1.0, large], [large, 1.0, -large]
    in_two_steps = [large, 1.0, *zeros, large], [large, 1.0, *zeros, -large]
    expected = {"avx512_bf16": (0, 0), "amx": (1, 0)}  # one sum in order; one of even and one of odd k
    for name in ("avx512_bf16", "amx"):
        _C.set_cpu_capability(name)
        assert (dot(*cancelling), dot(*in_two_steps)) == expected[name]
    assert dot([2.0**-60], [2.0**-60]) == 2.0**-120
    assert dot([2.0**-70], [2.0**-70]) == 0
    assert dot([2.0**-130], [2.0**100]) == 0


@pytest.mark.skipif(EMULATED or shutil.which("objdump") is None, reason="needs objdump, and AMX itself")
def test_tiles_are_released():
    """Only AMX's own kernels have tile instructions; each configures tiles, and whatever calls them releases them."""
    library = Path(fusedrnn.__file__).parent / "lib/libfusedrnn.so"
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"^[0-9a-f]+ <(\S+)>:\n((?:.+\n)*)", code, re.MULTILINE))

    def with_instruction(name: str) -> set[str]:
        return {function for function, body in functions.items() if f"\t{name}" in body}

    multiply, release = with_instruction("tdpbf16ps"), with_instruction("tilerelease")
    assert multiply and multiply == with_instruction("ldtilecfg") == with_instruction("tileloadd")
    assert all("3amx" in function for function in multiply | release)
    work_of_a_team = "FvN8fusedrnn6MemberEE"  # void(Member)
    teams = {function for function in functions if "3amx" in function and work_of_a_team in function}
    teams = {function for function in teams if "_M_invoke" in function}
    assert teams and teams <= release
