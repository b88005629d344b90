"""The pytest plugin of `make asan`: checks that the sanitized library is the one loaded."""

from __future__ import annotations

import pytest


def pytest_sessionstart() -> None:
    from fusedrnn import _C

    if not _C.build_info()["sanitize"]:
        pytest.exit(f"{_C.__file__} was built without sanitizers", returncode=3)
