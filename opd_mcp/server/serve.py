"""Serving over stdio or HTTP."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcp.server import MCPServer

    from opd_mcp.server.http import HttpAccess
    from opd_mcp.service import JobService


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Inside, all output to fd 1 or sys.stdout goes to stderr; after it, fd 1 is the wire again.

    Over stdio one stray line breaks the protocol, and libraries do print while they are imported.
    """
    sys.stdout.flush()
    wire = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(wire, 1)
        os.close(wire)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, no cyclic garbage is looked for, and what was made there is never looked through again.

    A start makes hundreds of thousands of objects that stay: looking through them took a quarter of it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@dataclass(frozen=True)
class ServerSettings:
    """`gpu_hours`: plans that take the device for longer are asked about; `allow_delete`: offer delete_artifact.

    `read_only`: offer no tool that starts, stops, deletes or exports; `groups`: offer only these groups of tools, all
    of them if there is none. `secrets` are in no answer.
    """

    gpu_hours: float = 8.0
    allow_delete: bool = False
    read_only: bool = False
    groups: tuple[str, ...] = ()
    secrets: tuple[str, ...] = field(default=(), repr=False)


def serve_stdio(open_service: Callable[[], "JobService"], settings: ServerSettings) -> None:
    """Serves this process's stdin and stdout until the client closes them; runs go on without it.

    One SIGINT ends it at once, like SIGTERM: a thread that waits for stdin cannot be woken, and nothing here needs an
    end in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with stdout_to_stderr(), collector_paused():
        import anyio

        from opd_mcp.server.app import build_server

        server = build_server(open_service(), settings)
    anyio.run(_run, server)


async def _run(server: "MCPServer[Any]") -> None:
    from opd_mcp.server.stdio import stdio_streams

    lowlevel = server._lowlevel_server  # the SDK has no public way to serve streams of one's own
    async with stdio_streams() as (incoming, outgoing):
        await lowlevel.run(incoming, outgoing, lowlevel.create_initialization_options())


def serve_http(open_service: Callable[[], "JobService"], settings: ServerSettings, access: "HttpAccess") -> None:
    """Serves `http://HOST:PORT/mcp`, `/dashboard` and `/health` until the process is stopped.

    Raises ArgumentError `invalid_argument` for a host that others can reach without a token and allowed hosts.
    """
    access = access.checked()
    with collector_paused():
        from opd_mcp.server.app import build_server
        from opd_mcp.server.http import http_app
        from opd_mcp.server.http_limits import http_server

        service = open_service()
        app = http_app(build_server(service, settings), service, access, settings.secrets)
    http_server(app, access.host, access.port).run()
