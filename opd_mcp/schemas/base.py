"""The base of every model that crosses a border: strict, immutable, serialised without nulls."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opd_mcp.schemas.texts import escaped


class AddedLater:
    """Marks a setting that older versions lack, and whose default is what they did (`Annotated[…, AddedLater()]`).

    At its default it stays out of the keys of results, so that those of older workspaces are still found.
    """


class Schema(BaseModel):
    """A strict, immutable record: unknown fields are errors, and absent values are absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null", protected_namespaces=())

    def to_json(self, *, indent: int | None = None) -> str:
        """The record as JSON text without null fields."""
        return self.model_dump_json(exclude_none=True, indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values without null fields."""
        return self.model_dump(mode="json", exclude_none=True)

    def key_settings(self) -> dict[str, Any]:
        """`to_dict` without the settings that are `AddedLater` and at their default."""
        values = self.to_dict()
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value == field.default and any(isinstance(mark, AddedLater) for mark in field.metadata):
                values.pop(name, None)
            elif isinstance(value, Schema):
                values[name] = value.key_settings()
        return values

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The record that `to_json` wrote; raises pydantic's ValidationError for anything else."""
        return cls.model_validate_json(text)

    def escaped(self, keep: str = "") -> Self:
        """The record with `schemas.texts.escaped` applied to every text in it, names of entries included."""
        return self.model_copy(update={name: _escaped(value, keep) for name, value in self})

    def content_hash(self) -> str:
        """sha256 (hex) of the record's canonical JSON: equal content, equal hash."""
        return content_hash(self.to_dict())


class Record(Schema):
    """The content of one of our files: it names its schema version and is sealed with its own hash.

    Earlier versions are upgraded when they are read: `upgrades[n]` turns the values of version n + 1 into those of
    version n + 2. A version later than this program's, and a seal that does not match, are ValidationErrors.
    """

    upgrades: ClassVar[tuple[Callable[[dict[str, Any]], dict[str, Any]], ...]] = ()

    schema_version: int = 0
    self_sha256: str = Field("", description="over all other fields; absent in files that nothing sealed")

    def sealed(self) -> Self:
        """The record as it is written."""
        seal = content_hash({**self.to_dict(), "self_sha256": ""})
        return self.model_copy(update={"self_sha256": seal})

    @classmethod
    def current_version(cls) -> int:
        """The schema version that this program writes."""
        return len(cls.upgrades) + 1

    @model_validator(mode="before")
    @classmethod
    def _brought_forward(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # The seal is checked first, over the values as written: an upgrade changes them.
        seal = values.get("self_sha256")
        if seal and seal != content_hash({**values, "self_sha256": ""}):
            raise ValueError("its content is not what was written")
        current = cls.current_version()
        version = values.get("schema_version", current)
        if type(version) is not int or not 1 <= version <= current:
            raise ValueError(f"schema version {version!r} is not known to this program, which reads up to {current}")
        for upgrade in cls.upgrades[version - 1 :]:
            values = upgrade(values)
        return {**values, "schema_version": current}


def _escaped(value: Any, keep: str) -> Any:
    if isinstance(value, str):
        return escaped(value, keep)
    if isinstance(value, Schema):
        return value.escaped(keep)
    if isinstance(value, dict):
        return {_escaped(key, keep): _escaped(part, keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_escaped(part, keep) for part in value)
    return value


def unchanged(values: dict[str, Any]) -> dict[str, Any]:
    """The upgrade to a version that only adds optional fields."""
    return values


def first_problem(error: ValidationError) -> str:
    """What is wrong with a record, in a few words."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"]).removeprefix("Value error, ")


def content_hash(value: Any) -> str:
    """sha256 (hex) of a JSON-ready value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
