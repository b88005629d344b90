from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch: str
    cpu_capabilities: tuple[str, ...]
    nvcc: str | None
    cuda_archs: tuple[str, ...]
    sanitize: str | None

class CpuPlan(TypedDict):
    capability: str
    threads: int
    max_threads: int
    multiply_adds: float
    multiply_adds_per_thread: float
    row_groups: int
    unit_groups: int
    packed: bool
    both_at_once: bool

class CudaPlan(TypedDict):
    name: str
    reason: str
    columns: int
    units: int
    blocks: tuple[int, int, int]
    shared_bytes: int
    together: int

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
def release_memory() -> int: ...
def cpu_plan(
    *, cell: str, dtype: str, T: int, N: int, I: int, H: int, P: int, directions: int, projected: bool
) -> CpuPlan: ...
def cuda_plan(
    *,
    N: int,
    H: int,
    P: int,
    directions: int,
    gates: int,
    backward: bool,
    element: int,
    tensor_cores: bool,
    projected: bool,
    processors: int,
    shared_bytes: int,
    cluster_blocks: int,
    layers: int = 1,
) -> CudaPlan: ...
def forced_cuda_plan() -> str: ...
def force_cuda_plan(name: str) -> None: ...
