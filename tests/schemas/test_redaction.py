"""Secrets leave no text: known values in any spelling, and what has a secret's shape."""

import io
import json

import pytest

from opd_mcp.schemas.redaction import REDACTED, RedactedStream, Redactor

SECRET = 'planted "token"/with%odd+signs-0123456789'


@pytest.fixture
def redactor():
    return Redactor((SECRET, "short"))


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"x{SECRET}y",
        json.dumps({"a": SECRET}),
        repr([SECRET]),
        "https://host/?q=planted%20%22token%22%2Fwith%25odd%2Bsigns-0123456789",
        f"cut off: {SECRET[:20]}",
    ],
)
def test_a_known_secret_is_taken_out_in_every_spelling(redactor, text):
    assert "planted" not in redactor.text(text)
    assert REDACTED in redactor.text(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [redacted]"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer [redacted]"),
        ("b'bearer  abc.def-ghi_jkl~='", "b'bearer [redacted]'"),
        ("https://user:pass@host/path", "https://[redacted]@host/path"),
        ("git+ssh://token@host", "git+ssh://[redacted]@host"),
        ("http://h/?token=abc&x=1", "http://h/?token=[redacted]&x=1"),
        ("key hf_" + "a" * 34 + ".", "key [redacted]."),
        ("sk-proj-" + "B4" * 12, "[redacted]"),
    ],
)
def test_what_is_shaped_like_a_secret_is_taken_out(text, left):
    assert Redactor().text(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "a bearer of good news",
        "basic arithmetic",
        "https://host/a@b",
        "mail me@host",
        "sk-learn",
        "hf_hub",
        "risk-" + "a" * 20,
        "tokens=120, key=distill.steps",
        "sha256 " + "0f" * 32,
        "short",
    ],
)
def test_other_texts_stay_as_they_are(redactor, text):
    assert redactor.text(text) == text


def test_secrets_are_found_in_names_and_values_of_any_depth(redactor):
    value = {"a": [1, None, {SECRET: (SECRET, 2.5)}]}
    assert redactor.value(value) == {"a": [1, None, {REDACTED: [REDACTED, 2.5]}]}
    assert redactor.holds_secret(value)
    assert not redactor.holds_secret({"a": [1, None, {"b": ["c"]}]})


def test_the_environment_s_secrets_are_known_by_their_names():
    names = ["HF_TOKEN", "OPD_TEACHER_KEY", "OPD_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD", "MY_SECRET"]
    found = Redactor.of_environment(
        {**{name: f"value-of-{name}" for name in names}, "HOME": "/home/someone", "SSH_KEY": "/home/someone/.ssh/id"},
        "another-secret",
        None,
    )
    assert set(found.secrets) == {*(f"value-of-{name}" for name in names), "another-secret"}
    assert "value-of" not in repr(found)


def test_a_stream_finds_a_secret_that_is_written_in_pieces(redactor):
    below = io.StringIO()
    stream = RedactedStream(below, redactor)
    for piece in ("before ", SECRET[:5], SECRET[5:], " after\nlast ", SECRET):
        stream.write(piece)
    assert below.getvalue() == f"before {REDACTED} after\n"
    stream.flush()
    assert below.getvalue() == f"before {REDACTED} after\nlast {REDACTED}"


@pytest.mark.parametrize("piece", ["a", "a://", "Bearer ", "?token=", "sk-", "://@", "authorization ", SECRET[:12]])
def test_a_long_hostile_text_is_done_in_one_pass(redactor, piece):
    assert "planted" not in redactor.text(piece * 30_000)  # quadratic time would not end within the suite's
