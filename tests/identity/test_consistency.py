"""Teacher consistency: enforced, proven where it can be, asserted where it must be."""

import json
import shutil
from pathlib import Path

import pytest

from opd_mcp.identity.consistency import (
    asserted_claim,
    consistency,
    proven_claim,
    require_behaviour,
    require_consistent,
    sft_teacher,
)
from opd_mcp.identity.lineage import data_hashes, write_lineage
from opd_mcp.identity.models import full_weights_hash, inspect_model
from opd_mcp.identity.signatures import everywhere
from opd_mcp.schemas.errors import ConsistencyError, IntegrityError
from opd_mcp.schemas.identity import Lineage, ModelIdentity


@pytest.fixture
def teacher(make_model) -> ModelIdentity:
    return inspect_model(make_model("teacher", seed=1)).identity


@pytest.fixture
def other(make_model) -> ModelIdentity:
    return inspect_model(make_model("teacher_other_style", seed=2)).identity


@pytest.fixture
def sft_student(make_model, teacher) -> Path:
    """A student directory with the lineage that the SFT stage writes."""
    student = make_model("student", seed=3)
    identity = inspect_model(student).identity.model_copy(update={"weights_full": full_weights_hash(student)})
    claim = proven_claim(teacher)
    write_lineage(student, Lineage(kind="model", stage="sft", recipe={}, model=identity, sft_teacher=claim))
    return student


def test_the_sft_teacher_is_consistent_and_proven(teacher, sft_student):
    verdict = require_consistent(teacher, sft_teacher(sft_student, made_here=everywhere))
    assert (verdict.status, verdict.basis) == ("consistent", "proven")


def test_a_renamed_copy_of_the_teacher_is_the_teacher(teacher, sft_student, make_model):
    renamed = inspect_model(make_model("another_name", seed=1)).identity
    assert require_consistent(renamed, sft_teacher(sft_student, made_here=everywhere)).status == "consistent"


def test_another_teacher_is_refused_with_both_identities_and_the_ways_out(teacher, other, sft_student):
    with pytest.raises(ConsistencyError) as caught:
        require_consistent(other, sft_teacher(sft_student, made_here=everywhere))
    text = str(caught.value)
    assert caught.value.code == "teacher_mismatch"
    assert teacher.label() in text
    assert other.label() in text
    assert "sft_prompts" in text
    assert "allow_teacher_mismatch=True" in text


def test_an_allowed_mismatch_is_recorded(other, sft_student):
    verdict = require_consistent(other, sft_teacher(sft_student, made_here=everywhere), allowed=True)
    assert (verdict.status, verdict.mismatch_allowed) == ("mismatch", True)


def test_a_copied_directory_still_proves_its_lineage(teacher, sft_student, tmp_path):
    copy = shutil.copytree(sft_student, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(sft_student)
    claim = sft_teacher(copy, made_here=everywhere)
    assert claim is not None
    assert (claim.basis, claim.identity) == ("proven", teacher)


def test_a_lineage_beside_other_weights_is_refused(sft_student, make_model):
    shutil.copy(make_model("impostor", seed=4) / "model.safetensors", sft_student / "model.safetensors")
    with pytest.raises(IntegrityError, match="weights") as caught:
        sft_teacher(sft_student, made_here=everywhere)
    assert caught.value.code == "lineage_mismatch"


def test_a_student_without_lineage_is_refused_unless_its_teacher_is_declared(teacher, make_model):
    base = make_model("base", seed=5)
    with pytest.raises(ConsistencyError, match="declared_teacher") as caught:
        require_consistent(teacher, sft_teacher(base, made_here=everywhere))
    assert caught.value.code == "lineage_missing"
    assert "sft_prompts" in str(caught.value)
    verdict = require_consistent(teacher, sft_teacher(base, declared=teacher, made_here=everywhere))
    assert (verdict.status, verdict.basis) == ("consistent", "asserted")


def test_a_declared_teacher_that_is_another_is_a_mismatch(teacher, other, make_model):
    base = make_model("base", seed=5)
    with pytest.raises(ConsistencyError, match="asserted") as caught:
        require_consistent(teacher, sft_teacher(base, declared=other, made_here=everywhere))
    assert caught.value.code == "teacher_mismatch"


def test_a_declaration_never_overrules_a_proof(teacher, other, sft_student):
    claim = sft_teacher(sft_student, declared=other, made_here=everywhere)
    assert claim is not None
    assert (claim.basis, claim.identity) == ("proven", teacher)


@pytest.mark.parametrize(
    ("declared", "status"),
    [("Teacher", "consistent"), ("org/teacher", "consistent"), ("org/teacher-2", "mismatch")],
)
def test_a_name_alone_is_compared_by_its_last_part(teacher, declared, status):
    verdict = consistency(teacher, asserted_claim(declared), allowed=False)
    assert (verdict.status, verdict.basis) == (status, "asserted")


def test_rollouts_must_be_the_students_own(teacher, other):
    require_behaviour(teacher, teacher.model_copy(update={"name": "renamed"}))
    with pytest.raises(ConsistencyError) as caught:
        require_behaviour(teacher, other)
    assert caught.value.code == "behaviour_mismatch"
    assert teacher.label() in str(caught.value)
    assert other.label() in str(caught.value)


def test_responses_prove_their_teacher_by_directory_or_by_file(teacher, tmp_path):
    (tmp_path / "responses.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    files = data_hashes(tmp_path, ["responses.jsonl"])
    claim = proven_claim(teacher)
    write_lineage(tmp_path, Lineage(kind="responses", stage="responses", recipe={}, sft_teacher=claim, files=files))
    assert sft_teacher(tmp_path, made_here=everywhere) == claim
    assert sft_teacher(tmp_path / "responses.jsonl", made_here=everywhere) == claim
    (tmp_path / "mine.jsonl").write_text("{}")
    assert sft_teacher(tmp_path / "mine.jsonl", made_here=everywhere) is None


def test_a_lineage_that_was_not_made_here_is_asserted(teacher, other, sft_student):
    claim = sft_teacher(sft_student, made_here=lambda directory: False)
    assert (claim.basis, claim.identity) == ("asserted", teacher)
    verdict = require_consistent(teacher, claim)
    assert (verdict.status, verdict.basis) == ("consistent", "asserted")
    with pytest.raises(ConsistencyError) as caught:
        require_consistent(other, claim)
    assert caught.value.code == "teacher_mismatch"


def test_a_data_file_is_held_against_its_own_entry_alone(teacher, tmp_path):
    for name in ("responses.jsonl", "secret.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": "a", "response": "b"}))
    files = {**data_hashes(tmp_path, ["responses.jsonl"]), "secret.jsonl": "0" * 64, "missing.jsonl": "0" * 64}
    lineage = Lineage(kind="responses", stage="r", recipe={}, sft_teacher=proven_claim(teacher), files=files)
    write_lineage(tmp_path, lineage)
    assert sft_teacher(tmp_path / "responses.jsonl", made_here=everywhere).identity == teacher
    with pytest.raises(IntegrityError, match=r"secret\.jsonl is not the file|missing\.jsonl is missing"):
        sft_teacher(tmp_path, made_here=everywhere)
