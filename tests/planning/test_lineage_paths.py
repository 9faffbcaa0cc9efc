"""What a lineage, a manifest or an earlier plan names is below the allowed roots, or it is not looked at."""

import json
import shutil
from pathlib import Path

import pytest

from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.lineage import LINEAGE_FILE, data_hashes, read_lineage, write_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import OpdError, PathError
from opd_mcp.schemas.identity import Lineage
from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace


@pytest.fixture
def references(service):
    return service._references


@pytest.fixture
def opened(monkeypatch):
    """Every path that was opened or listed from now on."""
    seen: list[str] = []

    def note(method):
        def noted(path, *args, **kwargs):
            seen.append(str(path))
            return method(path, *args, **kwargs)

        return noted

    for name in ("open", "read_bytes", "read_text", "iterdir", "glob"):
        monkeypatch.setattr(Path, name, note(getattr(Path, name)))
    return seen


def claiming(world, name: str, teacher_path: Path) -> str:
    """A student with a lineage that names its SFT teacher by a path."""
    student = world.copy_of(world.student, name)
    teacher = inspect_model(Path(world.teacher)).identity.model_copy(update={"name": str(teacher_path)})
    lineage = Lineage(
        kind="model",
        stage="sft",
        recipe={},
        model=inspect_model(student).identity,
        sft_teacher=asserted_claim(teacher).model_copy(update={"basis": "proven"}),
    )
    write_lineage(student, lineage)
    return str(student)


def test_a_teacher_that_a_lineage_names_outside_the_roots_is_not_looked_at(world, service, opened):
    secret = world.root / "outside" / "teacher"
    shutil.copytree(world.teacher, secret)
    there = claiming(world, "there", secret)
    gone = claiming(world, "gone", world.root / "outside" / "nothing")
    opened.clear()
    plans = [service.plan(world.plan_arguments(student=path, teacher=world.other_teacher)) for path in (there, gone)]
    assert [path for path in opened if "outside" in path] == []
    assert [plan.inputs.sft_teacher_path for plan in plans] == [None, None]
    codes = [{finding.code for finding in (*plan.blocking, *plan.warnings)} for plan in plans]
    assert codes[0] == codes[1], "the plan tells what is there from what is not"


def test_a_teacher_that_a_lineage_names_below_a_root_is_found(world, service):
    inside = world.copy_of(world.teacher, "inside")
    plan = service.plan(world.plan_arguments(student=claiming(world, "student", inside), teacher=world.other_teacher))
    assert plan.inputs.sft_teacher_path == str(inside)


def test_a_link_below_a_root_does_not_lead_a_lineage_out(world, service, opened):
    secret = world.root / "outside" / "teacher"
    shutil.copytree(world.teacher, secret)
    (world.root / "data" / "link").symlink_to(secret)
    student = claiming(world, "student", world.root / "data" / "link")
    opened.clear()
    plan = service.plan(world.plan_arguments(student=student, teacher=world.other_teacher))
    assert plan.inputs.sft_teacher_path is None
    assert [path for path in opened if "outside" in path] == []


def test_something_that_is_no_model_where_a_lineage_points_stops_no_plan(world, service):
    (world.root / "data" / "empty").mkdir()
    student = claiming(world, "student", world.root / "data" / "empty")
    assert service.plan(world.plan_arguments(student=student)).inputs.sft_teacher_path == world.teacher


def test_a_lineage_beside_responses_that_is_a_link_out_is_refused(world, service):
    responses = world.file("responses.jsonl", '{"prompt": "1+1=?", "response": "#2"}\n')
    outside = world.root / "outside"
    outside.mkdir()
    write_lineage(outside, Lineage(kind="responses", stage="r", recipe={}, files={"responses.jsonl": "0" * 64}))
    (world.root / "data" / LINEAGE_FILE).symlink_to(outside / LINEAGE_FILE)
    with pytest.raises(PathError) as caught:
        service._references.responses(responses, None)
    assert caught.value.code == "outside_roots"


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/b/c/secret.txt"])
def test_files_that_a_lineage_names_elsewhere_are_not_opened(world, service, opened, name):
    student = world.copy_of(world.student, "student")
    (world.root / "outside").mkdir()
    (world.root / "outside" / "secret.txt").write_text("secret")
    (student / "a" / "b" / "c").mkdir(parents=True)
    (student / "a" / "b" / "c" / "secret.txt").symlink_to(world.root / "outside" / "secret.txt")
    write_lineage(student, Lineage(kind="model", stage="sft", recipe={}, files={name: "0" * 64}))
    opened.clear()
    with pytest.raises(OpdError) as caught:
        service.plan(world.plan_arguments(student=str(student)))
    assert caught.value.code in ("lineage_mismatch", "outside_roots")
    assert [path for path in opened if path.endswith(("secret.txt", "hostname"))] == []


def narrower(world) -> JobService:
    """A service over the same workspace that may read another folder only."""
    (world.root / "narrow").mkdir()
    settings = JobSettings(world.settings.lease_folder, 2, world.settings.examples, world.settings.worker_command)
    return JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "narrow"]), settings)


def test_a_saved_plan_is_held_against_the_roots_of_now(world, service):
    teacher = str(world.copy_of(world.teacher, "teacher"))
    plan = service.plan(world.plan_arguments(teacher=teacher))
    with pytest.raises(PathError) as caught:
        narrower(world).start_distillation(StartDistillation(plan_id=plan.plan_id))
    assert caught.value.code == "outside_roots"


def test_what_an_earlier_run_was_given_is_held_against_the_roots_of_now(world, service, finished, opened):
    teacher = str(world.copy_of(world.teacher, "moved-teacher"))
    status = finished(service, service.start_distillation(world.start_arguments(teacher=teacher)).run_id)
    cache, student = status.result["artifacts"]["cache"], status.result["artifacts"]["sft"]
    other, opened_before = narrower(world), len(opened)
    request = other._builder.from_cache(StartDistillation(student=student, cache_id=cache, preset="demo"))
    assert (request.inputs.teacher, request.inputs.prompts) == (None, None)
    assert [path for path in opened[opened_before:] if "/data/" in path] == []
    assert (
        service._builder.from_cache(
            StartDistillation(student=student, cache_id=cache, preset="demo")
        ).inputs.teacher.path
        == teacher
    )


def test_a_lineage_that_somebody_else_wrote_is_asserted_in_the_plan(world, service, sft_student):
    made = Path(sft_student(world.teacher))
    stolen = world.copy_of(world.student, "claims")
    lineage = read_lineage(made).model_copy(update={"model": inspect_model(stolen).identity, "files": {}})
    write_lineage(stolen, lineage)
    shutil.copy(made / "lineage.sig", stolen)
    plan = service.plan(world.plan_arguments(student=str(stolen)))
    assert (plan.consistency.status, plan.consistency.basis) == ("consistent", "asserted")
    assert "lineage_asserted" in {finding.code for finding in plan.warnings}
    copied = service.plan(world.plan_arguments(student=str(world.copy_of(made, "copied"))))
    assert copied.consistency.basis == "proven"


def test_responses_that_somebody_else_wrote_are_asserted(world, service, references):
    folder = world.root / "data" / "responses"
    folder.mkdir()
    (folder / "responses.jsonl").write_text('{"prompt": "1+1=?", "response": "#2"}\n')
    claim = asserted_claim(inspect_model(Path(world.teacher)).identity).model_copy(update={"basis": "proven"})
    files = data_hashes(folder, ["responses.jsonl"])
    write_lineage(folder, Lineage(kind="responses", stage="r", recipe={}, sft_teacher=claim, files=files))
    for reference in (folder, folder / "responses.jsonl"):
        assert references.responses(str(reference), None).input.sft_teacher.basis == "asserted"
    service.store.artifacts.key.key.sign(folder)
    for reference in (folder, folder / "responses.jsonl"):
        assert references.responses(str(reference), None).input.sft_teacher.basis == "proven"


def test_a_copied_in_caches_claim_is_asserted(world, service, finished, references):
    status = finished(service, service.start_distillation(world.start_arguments()).run_id)
    cache = Path(status.result["paths"]["cache"])
    assert references.cache(str(cache)).input.sft_teacher.basis == "proven"
    copy = world.copy_of(cache, "cache")
    assert references.cache(str(copy)).input.sft_teacher.basis == "proven", "the signature travels with it"
    content = json.loads((copy / "lineage.json").read_text())
    write_lineage(copy, Lineage.model_validate({**content, "self_sha256": "", "stage": "another"}))
    assert references.cache(str(copy)).input.sft_teacher.basis == "asserted"
