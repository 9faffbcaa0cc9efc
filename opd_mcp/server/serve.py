"""Serving over stdio or local HTTP."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.server.stdout_guard import stdout_to_stderr

if TYPE_CHECKING:
    from opd_mcp.jobs.service import JobService

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def serve_stdio(open_service: Callable[[], "JobService"]) -> None:
    """Serves this process's stdin and stdout until the client closes them; runs go on without it."""
    with stdout_to_stderr():
        from opd_mcp.server.app import build_server

        server = build_server(open_service())
    server.run("stdio")


def serve_http(open_service: Callable[[], "JobService"], *, host: str, port: int) -> None:
    """Serves `http://HOST:PORT/mcp` until the process is stopped.

    Raises ArgumentError `invalid_argument` for a host that other machines can reach: there is no sign-in.
    """
    if host not in LOCAL_HOSTS:
        raise ArgumentError(
            "invalid_argument",
            "The HTTP transport has no sign-in and serves this machine only.",
            value=host,
            nearest=LOCAL_HOSTS,
            fix="Leave out --host, and reach the server from elsewhere through an SSH tunnel.",
        )
    from opd_mcp.server.app import build_server

    build_server(open_service()).run("streamable-http", host=host, port=port)
