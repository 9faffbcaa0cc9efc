"""The HTTP application: who may speak to it, and the routes next to `/mcp`: `/health`, `/dashboard`.

Every request but `/health` must name an allowed host (421) and, from a browser, an allowed origin (403), and must carry
the bearer token where there is one (401). A browser gets to the dashboard with `/dashboard?token=…` once; after that a
cookie that is good for the dashboard only, and only for reading.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any

from anyio import to_thread
from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import opd_mcp
from opd_mcp.schemas.errors import ArgumentError, OpdError
from opd_mcp.server.app import dashboard_html
from opd_mcp.server.protocol.outgoing import Outgoing
from opd_mcp.service import JobService

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
COOKIE = "opd_dashboard"
MIN_TOKEN_CHARACTERS = 16
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class HttpAccess:
    """Where the server listens and whom it answers."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()

    def checked(self) -> "HttpAccess":
        """Itself; raises ArgumentError `invalid_argument` for a host that others can reach without token and names."""
        if self.token is not None and len(self.token) < MIN_TOKEN_CHARACTERS:
            raise ArgumentError(
                "invalid_argument",
                f"The token has fewer than {MIN_TOKEN_CHARACTERS} characters.",
                fix='Make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"',
            )
        if self.host not in LOCAL_HOSTS and (self.token is None or not self.allowed_hosts):
            raise ArgumentError(
                "invalid_argument",
                "A host that other machines can reach needs a bearer token and the names it is reached by.",
                value=self.host,
                fix="Give --token-file (or OPD_TOKEN) and --allowed-host; or leave out --host and use an SSH tunnel.",
            )
        return self

    def security(self) -> TransportSecuritySettings:
        """The names under which the server answers; this machine's own ones always."""
        hosts = ["127.0.0.1", "localhost", "[::1]", *self.allowed_hosts]
        names = [f"{host}{port}" for host in hosts for port in ("", ":*")]
        return TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=names,
            allowed_origins=[f"{scheme}://{name}" for name in names for scheme in ("http", "https")],
        )


class Gate:
    """ASGI middleware that lets a request through to the application, or answers it."""

    def __init__(self, app: ASGIApp, access: HttpAccess) -> None:
        self._app = app
        self._token = access.token.encode() if access.token else None
        self._security = TransportSecurityMiddleware(access.security())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] != "http" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        refusal = await self._security.validate_request(request, is_post=False) or self._refusal(request)
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if self._token is None or self._is_token(bearer(request)):
            return None
        if request.url.path.startswith("/dashboard") and request.method == "GET":
            given = request.query_params.get("token")
            if given is not None and self._is_token(given):
                # The address bar and the history keep no token: it moves into a cookie that scripts cannot read.
                answer = RedirectResponse("/dashboard", status_code=303, headers={"Referrer-Policy": "no-referrer"})
                answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/dashboard")
                return answer
            if self._is_token(cookie(request)):
                return None
        return PlainTextResponse(
            "401: a bearer token is needed.\n", status_code=401, headers={"WWW-Authenticate": 'Bearer realm="opd-mcp"'}
        )

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode(), self._token)


def bearer(request: Request) -> str:
    """The token of the Authorization header; empty without one."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else ""


def cookie(request: Request) -> str:
    """The token of the dashboard's cookie; empty without one."""
    jar: SimpleCookie = SimpleCookie(request.headers.get("cookie", ""))
    return jar[COOKIE].value if COOKIE in jar else ""


def http_app(server: MCPServer[Any], service: JobService, access: HttpAccess, secrets: Sequence[str] = ()) -> ASGIApp:
    """The application with all routes, behind the gate; no answer holds one of the secrets."""
    outgoing = Outgoing(tuple(secrets))

    @server.custom_route("/health", methods=["GET"])
    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": opd_mcp.__version__})

    @server.custom_route("/dashboard", methods=["GET"])
    async def dashboard(request: Request) -> Response:
        return HTMLResponse(dashboard_html(), headers=PAGE_HEADERS)

    @server.custom_route("/dashboard/feed", methods=["GET"])
    async def feed(request: Request) -> Response:
        chosen = [run_id for run_id in request.query_params.get("run_ids", "").split(",") if run_id]
        try:
            found = await to_thread.run_sync(service.dashboard, chosen)
        except OpdError as error:
            return JSONResponse({"error": outgoing.error(error)}, status_code=404)
        return JSONResponse(outgoing.values(found), headers={"Cache-Control": "no-store"})

    app = server.streamable_http_app(host=access.host, transport_security=access.security())
    return Gate(app, access)
