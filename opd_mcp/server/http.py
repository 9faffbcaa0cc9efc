"""The HTTP application: the gate, and the routes next to `/mcp`: `/health`, `/dashboard`, and `/`, which leads there.

Every request but `/health` must name an allowed host (421) and, from a browser, an allowed origin (403), and must carry
the bearer token where there is one (401). A browser gets to the dashboard with `/dashboard?token=…` once; after that it
has a session of its own, whose cookie is good for the dashboard only, and only for reading.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from anyio import to_thread
from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import opd_mcp
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.requests import ReadDashboard
from opd_mcp.server.http_access import SESSION_SECONDS, DashboardSessions, HttpAccess, origin_authority
from opd_mcp.server.page.assembly import dashboard_html
from opd_mcp.server.protocol.outgoing import Outgoing
from opd_mcp.service import JobService

COOKIE = "opd_dashboard"
PAGES = ("/dashboard", "/dashboard/feed", "/dashboard/document")
MAX_HEADERS = 64
MAX_HEADER_BYTES = 32 << 10
MAX_TARGET_BYTES = 8 << 10
MAX_MCP_SESSIONS = 1_000
# The gate checks names and origins; the SDK's own check takes `localhost:anything` for this machine.
CHECKED_BY_THE_GATE = TransportSecuritySettings(enable_dns_rebinding_protection=False)
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# A report is text of models and data: it runs nothing, loads nothing, and is of no origin.
DOCUMENT_HEADERS = PAGE_HEADERS | {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
}


class Gate:
    """ASGI middleware that lets a request through to the application, or answers it."""

    def __init__(self, app: ASGIApp, access: HttpAccess) -> None:
        self._app = app
        self._access = access
        self._sessions = DashboardSessions(access)
        # Cookies ignore ports: the name keeps those of several servers on this machine apart.
        self._cookie = f"{COOKIE}_{access.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            request = Request(scope, receive)
            await (self._refusal(request) or self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if refusal := too_large(request):
            return refusal
        if request.url.path == "/health":
            return None
        return self._misdirected(request) or self._front_door(request) or self._unauthorized(request)

    def _front_door(self, request: Request) -> Response | None:
        """The way from `/` to the dashboard, which asks for the token itself."""
        if request.url.path != "/" or request.method not in ("GET", "HEAD"):
            return None
        return RedirectResponse("/dashboard", status_code=307, headers={"Cache-Control": "no-store"})

    def _misdirected(self, request: Request) -> Response | None:
        [host, *others] = request.headers.getlist("host") or [""]
        if others or not self._access.admits_host(host):
            return PlainTextResponse("421: this server has no such name.\n", status_code=421)
        origins = request.headers.getlist("origin")
        if len(origins) > 1 or not all(map(self._access.admits_origin, origins)):
            return PlainTextResponse("403: pages of this origin may not call.\n", status_code=403)
        return None

    def _unauthorized(self, request: Request) -> Response | None:
        if self._access.token is None or self._access.is_token(bearer(request)):
            return None
        if request.url.path in PAGES and request.method == "GET":
            if self._access.is_token(request.query_params.get("token", "")):
                return self._signed_in()
            if from_itself(request) and any(map(self._sessions.holds, cookies(request, self._cookie))):
                return None
        return PlainTextResponse(
            "401: a bearer token is needed; `opd-mcp token` prints the workspace's.\n",
            status_code=401,
            headers={"WWW-Authenticate": 'Bearer realm="opd-mcp"'},
        )

    def _signed_in(self) -> Response:
        """The page without the token in its address, so that the address bar and the history keep none."""
        answer = RedirectResponse(
            "/dashboard", status_code=303, headers={"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        )
        answer.set_cookie(
            self._cookie,
            self._sessions.cookie(),
            max_age=int(SESSION_SECONDS),
            httponly=True,
            samesite="strict",
            path="/dashboard",
        )
        return answer


def too_large(request: Request) -> Response | None:
    """The answer to a target or headers beyond all use."""
    target = len(request.scope["raw_path"] or b"") + len(request.scope["query_string"])
    if target > MAX_TARGET_BYTES:
        return PlainTextResponse("414: the address is too long.\n", status_code=414)
    headers = request.headers.raw
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        return PlainTextResponse("431: the headers are too large.\n", status_code=431)
    return None


def bearer(request: Request) -> str:
    """The token of the one Authorization header; empty without one."""
    [value, *others] = request.headers.getlist("authorization") or [""]
    scheme, _, token = value.partition(" ")
    return token.strip() if scheme.lower() == "bearer" and not others else ""


def cookies(request: Request, name: str) -> Iterator[str]:
    """All values that the cookie headers have for a name; whatever else they hold is not looked at."""
    for header in request.headers.getlist("cookie"):
        for pair in header.split(";"):
            found, equals, value = pair.strip().partition("=")
            if equals and found == name:
                yield value.strip('"')


def from_itself(request: Request) -> bool:
    """Whether our own page asks: a browser sends the cookie for pages of other ports of this machine as well."""
    origin = request.headers.get("origin")
    host = origin_authority(f"http://{request.headers['host']}")
    site = request.headers.get("sec-fetch-site", "none")
    return site in ("none", "same-origin") and (origin is None or origin_authority(origin) == host)


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
        given: dict[str, Any] = {name: value for name, value in request.query_params.items() if value}
        given["run_ids"] = [run_id for run_id in given.get("run_ids", "").split(",") if run_id]
        try:
            found = await to_thread.run_sync(service.dashboard_page, ReadDashboard.model_validate(given))
        except ValidationError as error:
            return JSONResponse({"error": outgoing.line(f"Not a view of the dashboard: {error}")}, status_code=400)
        except OpdError as error:
            return JSONResponse({"error": outgoing.error(error)}, status_code=404)
        return JSONResponse(outgoing.values(found), headers={"Cache-Control": "no-store"})

    @server.custom_route("/dashboard/document", methods=["GET"])
    async def document(request: Request) -> Response:
        kind = "card" if request.query_params.get("kind") == "card" else "report"
        try:
            text = await to_thread.run_sync(service.run_document, request.query_params.get("run_id", ""), kind)
        except OpdError as error:
            return PlainTextResponse(outgoing.error(error), status_code=404, headers=DOCUMENT_HEADERS)
        shown = HTMLResponse if kind == "report" else PlainTextResponse
        return shown(outgoing.document(text), headers=DOCUMENT_HEADERS)

    app = server.streamable_http_app(
        host=access.host, transport_security=CHECKED_BY_THE_GATE, max_sessions=MAX_MCP_SESSIONS
    )
    return Gate(app, access)
