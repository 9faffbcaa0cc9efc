"""Teachers behind a URL: what an address may be, and who a server is that has only a name."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from opd_mcp.schemas.errors import ArgumentError


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
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise ArgumentError(
            "invalid_argument",
            "teacher_url is http(s)://host[:port][/path], without a user, key or query.",
            value=url.rsplit("@", 1)[-1].split("?", 1)[0],
            fix="Give the server's address; put its key into the environment variable OPD_TEACHER_KEY.",
        )
    return Address(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))
