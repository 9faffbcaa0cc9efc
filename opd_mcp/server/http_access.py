"""Who is let in over HTTP: names and origins, the bearer token, and the dashboard's sessions.

Sources: RFC 9110, section 7.2, and RFC 3986, section 3.2 (authorities); RFC 6454 (origins).
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.store.keys import WatchedFile, workspace_token
from opd_mcp.store.workspace import HTTP_TOKEN, Workspace

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MIN_TOKEN_CHARACTERS = 16
SESSION_SECONDS = 12 * 3600.0
MAX_SESSIONS = 64
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
Text = Callable[[], str]
"""A text that may change while the server runs, such as a file's."""


@dataclass(frozen=True)
class Authority:
    """A host, in lower case and without brackets, and its port where one is given."""

    host: str
    port: int | None = None

    def admits(self, other: "Authority") -> bool:
        """Whether the other one is this host, on this port or on any where this one has none."""
        return self.host == other.host and self.port in (None, other.port)


def authority(text: str) -> Authority | None:
    """The `host`, `host:port`, `[IPv6]` or `[IPv6]:port` that a text is, to its last character; None for any other.

    User names, zones, empty or impossible ports, spaces and escapes are no part of a host here.
    """
    host, colon, port = text.lower(), "", ""
    if text.startswith("["):
        host, bracket, rest = host[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        if not bracket or colon not in ("", ":") or not _is_ipv6(host):
            return None
    else:
        host, colon, port = host.partition(":")
        if len(host) > 253 or _NAME.fullmatch(host) is None:
            return None
    if not colon:
        return Authority(host)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        return None
    return Authority(host, int(port))


def origin_authority(text: str) -> Authority | None:
    """The authority of an http or https origin; None for any other text, `null` among them."""
    scheme, _, rest = text.partition("://")
    return authority(rest) if scheme in ("http", "https") else None


@dataclass(frozen=True)
class HttpAccess:
    """Where the server listens and whom it answers.

    `token`: the bearer token as it is now; without it every program of this machine is let in. `sessions`: a text that
    ends all sessions of the dashboard when it changes.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: Text | None = None
    allowed_hosts: tuple[str, ...] = ()
    sessions: Text = str

    def checked(self) -> "HttpAccess":
        """Itself; raises ArgumentError `invalid_argument` for a host that others can reach without token and names."""
        if self.token is not None and len(self.token()) < MIN_TOKEN_CHARACTERS:
            raise ArgumentError(
                "invalid_argument",
                f"The token has fewer than {MIN_TOKEN_CHARACTERS} characters.",
                fix='Make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"',
            )
        for name in self.allowed_hosts:
            if authority(name) is None:
                raise ArgumentError(
                    "invalid_argument",
                    "An allowed host is a host name or address, with a port or without.",
                    value=name,
                    fix="Give it as it stands in the URL, without http:// and path.",
                )
        if self.host not in LOCAL_HOSTS and (self.token is None or not self.allowed_hosts):
            raise ArgumentError(
                "invalid_argument",
                "A host that other machines can reach needs a bearer token and the names it is reached by.",
                value=self.host,
                fix="Give --allowed-host and leave out --no-token; or leave out --host and use an SSH tunnel.",
            )
        return self

    def is_token(self, given: str) -> bool:
        """Whether this is the bearer token as it is now; a token that has become too short lets nobody in."""
        known = self.token() if self.token is not None else ""
        return len(known) >= MIN_TOKEN_CHARACTERS and hmac.compare_digest(_bytes(given), _bytes(known))

    def admits_host(self, text: str) -> bool:
        """Whether a Host header names this server: this machine's own names always, on any port (SSH tunnels)."""
        found = authority(text)
        return found is not None and any(name.admits(found) for name in self._names())

    def admits_origin(self, text: str) -> bool:
        """Whether a page of this origin may call."""
        found = origin_authority(text)
        return found is not None and any(name.admits(found) for name in self._names())

    def _names(self) -> list[Authority]:
        known = (authority(name) for name in self.allowed_hosts)
        return [*map(Authority, LOCAL_HOSTS), *(name for name in known if name is not None)]


def known_token(workspace: Workspace, file: Path | None, given: str | None) -> Text:
    """The bearer token: a file's, one that was given, or the workspace's own, which is made at its first use."""
    if file is not None:
        return WatchedFile(file)
    if given:
        return given.strip
    return workspace_token(workspace)


def announcement(access: HttpAccess, *, on_terminal: bool) -> str:
    """What the server prints at its start: where it is, how to connect, and what a start without a token means.

    The token itself is printed when it is made and on a terminal; logs elsewhere only say how to print it.
    """
    host = f"[{access.host}]" if ":" in access.host else access.host
    base = f"http://{host}:{access.port}"
    lines = [f"opd-mcp serves {base}/mcp and /dashboard"]
    if access.token is None:
        lines.append("Without a token (--no-token), every user and program of this machine can read and start runs.")
        return "\n".join(lines)
    file = access.token if isinstance(access.token, WatchedFile) else None
    word = "$OPD_TOKEN"
    if file is not None:
        home = shlex.quote(str(file.path.parent))
        word = (
            f"$(OPD_HOME={home} opd-mcp token)"
            if file.path.name == HTTP_TOKEN
            else f"$(cat {shlex.quote(str(file.path))})"
        )
        lines.append(f"The bearer token is in {file.path}.")
    if file is not None and (file.made or on_terminal):
        word = access.token()
    lines.append(f'Connect: claude mcp add --transport http opd {base}/mcp --header "Authorization: Bearer {word}"')
    lines.append(f"Dashboard: {base}/dashboard?token={word}")
    return "\n".join(lines)


class DashboardSessions:
    """The dashboard's sessions: ids that this process keeps, each for a time, and cookies that prove one.

    A cookie is a session's id with an HMAC over it, the token and the sessions' text: it tells nothing of the token,
    and is worth nothing once the token or that text has changed, the session is over or the server has ended.
    """

    def __init__(self, access: HttpAccess, now: Callable[[], float] = time.monotonic) -> None:
        self._access = access
        self._now = now
        self._key = secrets.token_bytes(32)
        self._ends: OrderedDict[str, float] = OrderedDict()

    def cookie(self) -> str:
        """The cookie of a new session; the oldest session ends where there are too many."""
        session = secrets.token_urlsafe(18)
        self._ends[session] = self._now() + SESSION_SECONDS
        while len(self._ends) > MAX_SESSIONS:
            self._ends.popitem(last=False)
        return f"{session}.{self._mac(session)}"

    def holds(self, cookie: str) -> bool:
        """Whether the cookie proves a session that goes on."""
        session, _, mac = cookie.partition(".")
        if not hmac.compare_digest(_bytes(mac), _bytes(self._mac(session))):
            return False
        return self._ends.get(session, 0.0) > self._now()

    def _mac(self, session: str) -> str:
        token = self._access.token() if self._access.token is not None else ""
        parts = (part.encode("utf-8", "surrogatepass") for part in (session, token, self._access.sessions()))
        return hmac.new(self._key, b"".join(len(part).to_bytes(8) + part for part in parts), hashlib.sha256).hexdigest()


def _is_ipv6(text: str) -> bool:
    try:
        return "%" not in text and ipaddress.IPv6Address(text) is not None
    except ValueError:
        return False


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
