"""The pytest plugin of `make asan`: checks that the sanitized library is the one loaded, and runs every n-th test.

The stride is best a prime: the sample then meets every cell, dtype, shape and instruction set of a parametrised test.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run every n-th test only")


def pytest_sessionstart() -> None:
    from fusedrnn import _C

    if not _C.build_info()["sanitize"]:
        pytest.exit(f"{_C.__file__} was built without sanitizers", returncode=3)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for i, item in enumerate(items) if i % config.getoption("--every")]
    items[:] = items[:: config.getoption("--every")]
    config.hook.pytest_deselected(items=left_out)
