"""Records: sealed by their own hash, brought forward from earlier versions, refused from later ones."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from opd_mcp.schemas.base import Record, first_problem


class First(Record):
    """A record as an earlier program knew it."""

    name: str
    size: float = 1.0


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {("title" if key == "name" else key): value for key, value in values.items()}


class Second(Record):
    """The same record later."""

    upgrades = (renamed,)
    title: str
    size: float = 1.0


def test_a_sealed_record_is_read_as_it_was_written():
    record = First(name="käse", size=0.1).sealed()
    assert First.from_json(record.to_json(indent=2)) == record


def test_another_value_breaks_the_seal():
    values = First(name="a").sealed().to_dict()
    with pytest.raises(ValidationError) as caught:
        First.from_json(json.dumps({**values, "size": 2.0}))
    assert first_problem(caught.value) == "its content is not what was written"


def test_a_sealed_record_of_an_earlier_version_is_brought_forward():
    written = First(name="a").sealed()
    record = Second.from_json(written.to_json())
    assert (record.schema_version, record.title) == (2, "a")


def test_a_broken_seal_of_an_earlier_version_is_seen_too():
    values = First(name="a").sealed().to_dict()
    with pytest.raises(ValidationError, match="not what was written"):
        Second.from_json(json.dumps({**values, "name": "b"}))


@pytest.mark.parametrize("version", [3, 0, -1, "2", None, 1.0])
def test_a_version_that_is_not_known_is_refused(version):
    with pytest.raises(ValidationError, match="is not known"):
        Second.from_json(json.dumps({"schema_version": version, "title": "a"}))
