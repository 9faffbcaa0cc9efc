"""Files that are complete or absent."""

import json
import multiprocessing
import stat

import pytest

from opd_mcp.identity.files import publish_file, read_json_object, write_atomic
from opd_mcp.schemas.errors import IntegrityError


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path):
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_finished_file_takes_the_place_of_an_earlier_one(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / ".a.partial").write_text("new")
    publish_file(tmp_path / ".a.partial", tmp_path / "a")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def write_many(path, letter):
    for _ in range(20):
        write_atomic(path, letter * 10_000)


def test_writers_of_several_processes_never_mix(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_many, args=(tmp_path / "a", letter)) for letter in "xy"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "a").exists():
            seen.add((tmp_path / "a").read_text())
    seen.add((tmp_path / "a").read_text())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {"x" * 10_000, "y" * 10_000}


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "a", 3)  # type: ignore[arg-type]
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_only_json_objects_are_read(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"a\.json"):
        read_json_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"b": 1}))
    assert read_json_object(tmp_path / "a.json") == {"b": 1}
