"""What all tests share: Triton's kernels run in its interpreter, and tests of an extra are skipped where it is not."""

import os
from importlib.util import find_spec

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `@pytest.mark.needs("package")` where the package is missing; `make test-extras` brings it."""
    for item in items:
        for marker in item.iter_markers("needs"):
            if find_spec(marker.args[0]) is None:
                item.add_marker(pytest.mark.skip(reason=f"make test-extras: {marker.args[0]} is not installed"))
