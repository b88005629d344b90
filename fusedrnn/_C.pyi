from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch: str
    cpu_capabilities: tuple[str, ...]
    nvcc: str | None
    cuda_archs: tuple[str, ...]
    sanitize: str | None

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
