"""What runs commands in this process."""

import pytest
from typer.testing import CliRunner

from opd_mcp.cli import app, following, starting, upkeep


@pytest.fixture
def opd_mcp(service, monkeypatch):
    """Runs a command over the service; answers what it printed, and raises what it raised."""
    for module in (starting, following, upkeep):
        monkeypatch.setattr(module, "open_service", lambda *roots, **more: service)

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run
