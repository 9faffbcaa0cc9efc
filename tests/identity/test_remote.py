"""Which teachers' servers may be asked."""

import pytest

from opd_mcp.identity.remote import require_allowed_host
from opd_mcp.schemas.errors import ArgumentError


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "127.8.8.8"])
def test_this_machine_is_allowed(host):
    require_allowed_host(f"http://{host}:8001", ())  # it raises for any other
    with pytest.raises(ArgumentError):
        require_allowed_host(f"http://{host}.example.org:8001", ())


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "10.0.0.1",
        "example.org",
        "localhost.example.org",
        "0.0.0.0",
        "[::ffff:10.0.0.1]",
        "2130706433",
    ],
)
def test_others_are_refused_with_the_way_out(host):
    with pytest.raises(ArgumentError, match="--allow-teacher-host") as caught:
        require_allowed_host(f"http://{host}:8001/v1", ("teacher.lan",))
    assert caught.value.code == "teacher_host_not_allowed"


def test_a_host_that_the_owner_named_is_allowed_and_none_below_it():
    require_allowed_host("https://Teacher.lan./v1", ("teacher.lan",))
    with pytest.raises(ArgumentError):
        require_allowed_host("https://x.teacher.lan", ("teacher.lan",))
