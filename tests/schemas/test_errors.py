"""The tree of errors: one message with the way out, and a docstring that lists every code there is."""

import pickle
import re
from pathlib import Path

import opd_mcp
from opd_mcp.schemas import errors
from opd_mcp.schemas.errors import DataError, InputError, OpdError, nearest

PACKAGE = Path(opd_mcp.__file__).parent


def test_the_message_holds_code_value_nearest_and_fix() -> None:
    error = DataError("malformed_line", "Line 3 is not JSON.", value="a:3", nearest=["b"], fix="Write JSON.")
    assert str(error) == "[malformed_line] Line 3 is not JSON. Got: 'a:3'. Nearest: b. Fix: Write JSON."
    assert isinstance(error, InputError)
    assert isinstance(error, ValueError)


def test_an_error_survives_the_way_between_processes() -> None:
    error = DataError("malformed_line", "Line 3 is not JSON.", value="a:3", nearest=["b"], fix="Write JSON.")
    copied = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copied), str(copied)) == (DataError, str(error))


def test_a_long_value_is_cut() -> None:
    assert len(OpdError("code", "What.", value="x" * 10_000, fix="Do.").value) == 500


def test_nearest_names_what_looks_alike() -> None:
    assert nearest("studnet", ["student", "teacher"]) == ["student"]


def test_the_tree_lists_every_code_that_is_raised() -> None:
    listed = set(re.findall(r"[a-z]+(?:_[a-z]+)+", errors.__doc__ or ""))
    pattern = re.compile(r"(?:Error|_error|_mismatch|Finding)\(\s*(?:code=)?\"([a-z]+(?:_[a-z]+)+)\"")
    raised = {code for file in PACKAGE.rglob("*.py") for code in pattern.findall(file.read_text(encoding="utf-8"))}
    assert raised - listed == set(), "add these to the tree in schemas/errors.py"
