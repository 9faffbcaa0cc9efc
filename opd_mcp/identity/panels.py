"""Several teachers as one: each answers and scores the prompts of its domain, and together they have one identity."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from opd_mcp.identity.models import full_weights_hash, inspect_model
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, DataError
from opd_mcp.schemas.identity import ModelIdentity

DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
TOKENS = ("tokenizer", "encoding", "chat_template", "special_tokens")


def panel_identity(members: Mapping[str, ModelIdentity]) -> ModelIdentity:
    """The identity of several teachers by domain: hashes over theirs, and the tokenizer and template that they share.

    Raises ConsistencyError `tokenizer_mismatch` for teachers that encode or render prompts differently, and
    ArgumentError `invalid_argument` for a domain that cannot be part of a name.
    """
    assert members, "at least one teacher"
    ordered = dict(sorted(members.items()))
    for domain in ordered:
        if DOMAIN.fullmatch(domain) is None:
            raise ArgumentError(
                "invalid_argument",
                "A domain's name is up to 40 letters, digits, '.', '_' and '-'.",
                value=domain,
                fix="Give e.g. teacher={'math': …, 'code': …}, and the same names in the prompts.",
            )
    first_domain, first = next(iter(ordered.items()))
    for domain, member in ordered.items():
        if differing := member.differences(first) & set(TOKENS):
            raise ConsistencyError(
                "tokenizer_mismatch",
                f"The teachers of {first_domain} and {domain} have other {', '.join(sorted(differing))}: one student "
                "cannot be given prompts in both forms.",
                value=member.label(),
                fix="Give teachers of one family, with the same tokenizer and chat template.",
            )
    whole = {name: {domain: getattr(member, name) for domain, member in ordered.items()} for name in HASHES}
    return first.model_copy(
        update={
            "name": ", ".join(f"{domain}: {member.name}" for domain, member in ordered.items()),
            "quantization": None,
            "members": ordered,
            **{name: None if None in part.values() else content_hash(part) for name, part in whole.items()},
        }
    )


HASHES = ("weights", "configuration", "weights_full")


def full_panel(teachers: Mapping[str, Path]) -> ModelIdentity:
    """The identity of the teachers in these directories, with hashes over every byte of their weights."""
    members = {}
    for domain, path in teachers.items():
        identity = inspect_model(path).identity
        members[domain] = identity.model_copy(update={"weights_full": full_weights_hash(path)})
    return panel_identity(members)


def domains_of(panel: ModelIdentity, member: ModelIdentity | None) -> list[str]:
    """The domains of one of several teachers; raises ConsistencyError `teacher_mismatch` for a model that is none."""
    members = panel.members or {}
    found = [domain for domain, teacher in members.items() if member is not None and teacher.same_model(member)]
    if not found:
        given = member.label() if member else "a server"
        raise ConsistencyError(
            "teacher_mismatch",
            f"The teachers are {panel.label()}; what was given is {given}.",
            value=given,
            fix="Give the directory of one of the teachers.",
        )
    return found


def require_domains(found: Mapping[str | None, int], known: Collection[str], what: str) -> None:
    """Raise DataError `unknown_domain` for prompts whose domain none of the teachers has."""
    unknown = {name: count for name, count in found.items() if name not in known}
    if not unknown:
        return
    name, count = next(iter(unknown.items()))
    said = "have no `teacher_domain`" if name is None else f"are of the domain {str(name)[:60]!r}"
    raise DataError(
        "unknown_domain",
        f"{count} of the {what} {said}, and the teachers are of {', '.join(sorted(known))}.",
        value=name,
        nearest=sorted(known)[:3],
        fix="Give each prompt the name of its teacher in the field `teacher_domain`, or name the field that has it: "
        "columns={'prompt': …, 'teacher_domain': …}.",
    )
