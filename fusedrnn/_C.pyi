from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch: str
    cpu_capabilities: tuple[str, ...]
    nvcc: str | None
    cuda_archs: tuple[str, ...]
    sanitize: str | None

class CudaPlan(TypedDict):
    name: str
    reason: str
    columns: int
    blocks: tuple[int, int, int]
    shared_bytes: int

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
def cuda_plan(
    *,
    T: int,
    N: int,
    H: int,
    P: int,
    directions: int,
    gates: int,
    K: int,
    element: int,
    tensor_cores: bool,
    projected: bool,
    processors: int,
    shared_bytes: int,
) -> CudaPlan: ...
def forced_cuda_plan() -> str: ...
def force_cuda_plan(name: str) -> None: ...
