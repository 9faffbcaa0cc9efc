"""Graders that close their child when the test ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from opd_mcp.grading.graders import Grader, grader_for


@pytest.fixture
def grader() -> Iterator[Callable[..., Grader]]:
    """`grader(name, …)`: like `grader_for`, closed at the end."""
    with ExitStack() as stack:
        yield lambda name, **settings: stack.enter_context(grader_for(name, **settings))
