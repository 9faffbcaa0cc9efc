"""Planted secrets do not come out again."""

import io

import pytest

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.redaction import RedactingStream, environment_secrets, redacted, redacted_values

SHAPED = [
    "hf_" + "a1B2" * 8,
    "sk-" + "proj-A1b2" * 4,
    "Authorization: Bearer " + "Zm9v" * 5,
    "https://somebody:letmein@example.org/x",
]


@pytest.mark.parametrize("text", SHAPED)
def test_what_looks_like_a_secret_is_taken_out(text):
    found = redacted(f"before {text} after")
    assert "[redacted]" in found
    assert found.startswith("before ")
    assert found.endswith(" after")
    assert not any(part in found for part in ("a1B2", "A1b2", "Zm9v", "letmein"))


def test_ordinary_words_stay():
    text = "hf_model at http://host:8000/v1, task-12 of sk-learn, /data/x@y, bearer of news"
    assert redacted(text) == text


def test_the_environments_secrets_are_known_by_their_names():
    secrets = environment_secrets({"OPD_TEACHER_KEY": "plain words", "HOME": "/home/somebody", "A_TOKEN": "1"})
    assert secrets == ("plain words",)
    assert redacted_values({"a": ["x plain words y"], "b": 1}, secrets) == {"a": ["x [redacted] y"], "b": 1}


def test_an_error_never_shows_one():
    error = ArgumentError("invalid_argument", f"No: {SHAPED[0]}.", value=SHAPED[3], fix="Try again.")
    assert "a1B2" not in str(error)
    assert "letmein" not in str(error)


def test_a_secret_in_two_writes_is_still_found():
    inner = io.StringIO()
    stream = RedactingStream(inner, ["plain words"])
    stream.write("it is plain")
    stream.write(" words\nand")
    stream.flush()
    assert inner.getvalue() == "it is [redacted]\nand"
