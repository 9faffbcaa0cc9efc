"""Ids: readable, unique, and safe as names of files."""

import re
import secrets

ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}", re.ASCII)


def new_id(label: str) -> str:
    """A readable id: the label in lower case with six random hex digits, e.g. `lightning-qwen3-0.6b-7f3a12`."""
    words = re.sub(r"[^a-z0-9.]+", "-", label.casefold()).strip("-.")[:60].rstrip("-.")
    return f"{words or 'run'}-{secrets.token_hex(3)}"


def is_id(text: str) -> bool:
    """Whether a text can be an id, so that it may become part of a path."""
    return ID_PATTERN.fullmatch(text) is not None
