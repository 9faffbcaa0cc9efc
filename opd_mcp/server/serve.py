"""Serving over stdio or HTTP."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from opd_mcp.server.settings import ServerSettings
from opd_mcp.server.stdout_guard import stdout_to_stderr

if TYPE_CHECKING:
    from opd_mcp.jobs.service import JobService
    from opd_mcp.server.http import HttpAccess


def serve_stdio(open_service: Callable[[], "JobService"], settings: ServerSettings) -> None:
    """Serves this process's stdin and stdout until the client closes them; runs go on without it."""
    with stdout_to_stderr():
        from opd_mcp.server.app import build_server

        server = build_server(open_service(), settings)
    server.run("stdio")


def serve_http(open_service: Callable[[], "JobService"], settings: ServerSettings, access: "HttpAccess") -> None:
    """Serves `http://HOST:PORT/mcp`, `/dashboard` and `/health` until the process is stopped.

    Raises ArgumentError `invalid_argument` for a host that others can reach without a token and allowed hosts.
    """
    access = access.checked()
    import uvicorn

    from opd_mcp.server.app import build_server
    from opd_mcp.server.http import http_app

    service = open_service()
    app = http_app(build_server(service, settings), service, access, settings.secrets)
    print(f"opd-mcp serves http://{access.host}:{access.port}/mcp and /dashboard", file=sys.stderr, flush=True)
    uvicorn.run(app, host=access.host, port=access.port, log_level="warning", timeout_graceful_shutdown=2)
