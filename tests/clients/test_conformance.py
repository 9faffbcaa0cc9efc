"""The conformance suite: what each revision requires, on our server; every `tasks-*` scenario on the fixture server."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TASKS = (
    "lifecycle", "capability-negotiation", "wire-fields", "request-state-removal", "mrtr-input", "request-headers",
    "dispatch-and-envelope", "status-notifications", "required-task-error", "mrtr-composition",
)  # fmt: skip


@pytest.fixture(scope="module")
def fixture_url(serving):
    return serving(sys.executable, str(HERE / "tasks_fixture.py"), "PORT")


@pytest.mark.parametrize("revision", ["2026-07-28", "2025-11-25"])
def test_everything_that_applies_passes(node, url, revision):
    baseline = str(HERE / f"conformance-{revision}.yml")
    done = node.run(
        "conformance", "server", "--url", f"{url}/mcp", "--requirements", revision, "--expected-failures", baseline,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"Total: \d+ passed", done.stdout)


@pytest.mark.parametrize("scenario", TASKS)
def test_the_tasks_extension_passes(node, fixture_url, scenario):
    done = node.run("conformance", "server", "--url", f"{fixture_url}/mcp", "--scenario", f"tasks-{scenario}")
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.search(r"Passed: (\d+)/(\d+), 0 failed", done.stdout)
    assert found, done.stdout[-2000:]
    # Status notifications are optional, and a server that sends none has nothing to check there.
    assert int(found[1]) == int(found[2])
    assert int(found[1]) > 0 or scenario == "status-notifications"
