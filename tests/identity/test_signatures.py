"""A lineage is signed with a secret, and nothing but the same lineage has that signature."""

import shutil

import pytest

from opd_mcp.identity.lineage import LINEAGE_FILE, write_lineage
from opd_mcp.identity.signatures import SIGNATURE_FILE, LineageKey, below
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.identity import Lineage

MINE, OTHER = LineageKey(b"1" * 32), LineageKey(b"2" * 32)


@pytest.fixture
def made(tmp_path):
    """A directory with a signed lineage."""
    directory = tmp_path / "made"
    directory.mkdir()
    write_lineage(directory, Lineage(kind="report", stage="benchmark", recipe={}))
    MINE.sign(directory)
    return directory


def test_only_the_key_that_signed_says_so(made, tmp_path):
    assert MINE.signed(made)
    assert not OTHER.signed(made)
    assert MINE.signed(shutil.copytree(made, tmp_path / "elsewhere"))
    assert "1111" not in repr(MINE)


@pytest.mark.parametrize("signature", [b"", b"\xff\xfe", b"0" * 64, "é".encode() * 20])
def test_any_other_signature_is_none(made, signature):
    (made / SIGNATURE_FILE).write_bytes(signature)
    assert not MINE.signed(made)


def test_another_lineage_needs_another_signature(made):
    write_lineage(made, Lineage(kind="report", stage="benchmark", recipe={"a": 1}))
    assert not MINE.signed(made)
    (made / LINEAGE_FILE).unlink()
    assert not MINE.signed(made)
    MINE.sign(made)
    assert not (made / SIGNATURE_FILE).exists(), "there is nothing to sign"


def test_a_signature_without_end_is_not_read(made):
    (made / SIGNATURE_FILE).write_bytes(b"0" * 10_000)
    with pytest.raises(IntegrityError, match="more than"):
        MINE.signed(made)


def test_below_means_the_directory_itself_and_what_is_in_it(tmp_path):
    inside = tmp_path / "out" / "model"
    inside.mkdir(parents=True)
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    made_here = below(tmp_path / "out")
    assert made_here(tmp_path / "out")
    assert made_here(inside)
    assert not made_here(tmp_path)
    assert not made_here(tmp_path / "out" / "link")
    assert not made_here(tmp_path / "output")
