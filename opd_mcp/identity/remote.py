"""Teachers behind a URL: what an address may be, and who a server is that has only a name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from opd_mcp.schemas.errors import ArgumentError

HOST = re.compile(r"(\[[^\[\]]+\]|[^@:\[\]]+)(:\d*)?")


@dataclass(frozen=True)
class Address:
    """The parts of a server's URL; `path` is what stands before /v1."""

    scheme: str
    hostname: str
    port: int | None
    path: str


def checked_url(url: str) -> Address:
    """The parts of an http(s) URL; raises ArgumentError `invalid_argument`, for a key in the URL too."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    # not every Python minds what stands behind an address in brackets
    spare = not HOST.fullmatch(parts.netloc) or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or spare:
        raise ArgumentError(
            "invalid_argument",
            "teacher_url is http(s)://host[:port][/path], without a user, key or query.",
            value=url.rsplit("@", 1)[-1].split("?", 1)[0],
            fix="Give the server's address; put its key into the environment variable OPD_TEACHER_KEY.",
        )
    return Address(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))


def require_allowed_host(url: str, allowed: Iterable[str]) -> None:
    """Raise ArgumentError `teacher_host_not_allowed` unless the URL's host is this machine or one of `allowed`.

    The address decides where token ids and the teacher's key go, so the caller alone does not choose it.
    """
    host = checked_url(url).hostname.casefold().rstrip(".")
    if is_loopback(host) or host in {name.casefold().rstrip(".") for name in allowed}:
        return
    raise ArgumentError(
        "teacher_host_not_allowed",
        "teacher_url names a host that this server was not told to talk to.",
        value=host,
        fix=f"Use a teacher on this machine, or have the server's owner start it with --allow-teacher-host {host}.",
    )


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own by its spelling, without asking a name server."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
