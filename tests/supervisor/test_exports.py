"""Exports as runs: where they may write, that they appear whole or not at all, and that they are known again."""

from pathlib import Path

import pytest

from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.errors import ConsistencyError, PathError
from opd_mcp.schemas.requests import BenchmarkStudent, ExportStudent
from opd_mcp.server.render.workspace import setup_text
from opd_mcp.service import JobService
from opd_mcp.store.artifacts import read_artifact
from opd_mcp.store.roots import AllowedRoots, ExportRoots
from opd_mcp.store.workspace import Workspace


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def exporter(world, out) -> JobService:
    """A service that may export below `out`."""
    given = world.settings
    settings = JobSettings(given.lease_folder, 2, given.examples, given.worker_command, export_roots=(out,))
    return JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)


@pytest.fixture
def distilled(world, exporter, finished):
    """The status of a finished distillation with a report."""
    arguments = world.start_arguments(sft_prompts=world.prompts("sft"), eval_prompts=world.prompts("eval", start=50))
    return finished(exporter, exporter.start_distillation(arguments).run_id)


def test_a_distilled_student_is_exported_proven_and_used_from_there(world, exporter, distilled, out, finished):
    started = exporter.export_student(ExportStudent(model=distilled.run_id, destination=str(out / "mine")))
    status = finished(exporter, started.run_id)
    assert (status.kind, status.state, status.phases_done) == ("export", "succeeded", ["export"]), status
    assert status.result["paths"] == {"export": str(out / "mine")}
    assert status.result["export"]["bytes"] > 0
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert "['teacher', 'student']" in (out / "mine" / "README.md").read_text()
    target = exporter.store.record(started.run_id).request.inputs.export
    assert target.report == distilled.result["paths"]["report"]
    assert {origin.role for origin in target.data} == {"prompts", "sft_prompts"}
    assert exporter.store.artifacts.made_here(out / "mine")

    call = status.next_action
    assert (call.tool, call.arguments["model"]) == ("sample_model", str(out / "mine"))
    measured = exporter.benchmark_student(
        BenchmarkStudent(model=str(out / "mine"), prompts=world.prompts(), preset="demo")
    )
    assert finished(exporter, measured.run_id).state == "succeeded"
    assert exporter.store.record(measured.run_id).request.inputs.model.sft_teacher.basis == "proven"
    assert read_artifact(Path(distilled.result["paths"]["model"])).kind == "model"


def test_an_export_that_died_is_resumed_and_proves_nothing_of_a_foreign_model(world, exporter, out, finished, until):
    (out / "die-once").touch()
    started = exporter.export_student(ExportStudent(model=world.student, destination=str(out / "mine")))
    assert until(exporter, started.run_id, lambda status: status.state == "lost").state == "lost"
    assert not (out / "mine").exists()
    exporter.resume(started.run_id)
    assert finished(exporter, started.run_id).state == "succeeded"
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert not exporter.store.artifacts.made_here(out / "mine")


def test_an_export_that_was_named_before_its_worker_died_is_taken_as_done(world, exporter, out, finished, monkeypatch):
    started = exporter.export_student(ExportStudent(model=world.student, destination=str(out / "mine")))
    assert finished(exporter, started.run_id).state == "succeeded"
    journal = world.root / "home" / "runs" / started.run_id / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    kept = next(number for number, line in enumerate(lines) if '"finished"' in line)
    journal.write_text("".join(lines[:kept]))
    for file in journal.parent.glob("series.bin"):
        file.unlink()
    again = world_again(exporter, world)
    assert again.status(started.run_id).state == "lost"
    again.resume(started.run_id)
    status = finished(again, started.run_id)
    assert (status.state, status.phases_done) == ("succeeded", ["export"])


def world_again(exporter: JobService, world) -> JobService:
    return JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), exporter.settings)


def test_nothing_is_replaced(world, exporter, out, finished):
    (out / "there").mkdir()
    with pytest.raises(PathError, match="destination_exists"):
        exporter.export_student(ExportStudent(model=world.student, destination=str(out / "there")))


def test_a_destination_taken_meanwhile_fails_the_run_and_stays_as_it_is(world, exporter, out, finished, busy_machine):
    started = exporter.export_student(ExportStudent(model=world.student, destination=str(out / "mine")))
    (out / "mine").write_text("somebody's")
    busy_machine.release()
    status = finished(exporter, started.run_id)
    assert (status.state, status.error.code) == ("failed", "destination_exists")
    assert (out / "mine").read_text() == "somebody's"
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_without_an_adapter_none_is_exported(world, exporter, out):
    with pytest.raises(ConsistencyError, match="no_adapter"):
        exporter.export_student(ExportStudent(model=world.student, destination=str(out / "a"), format="adapter"))


def test_without_an_export_root_the_error_says_how_to_get_one(world, service, out):
    with pytest.raises(PathError, match=r"outside_roots.*--export-root"):
        service.export_student(ExportStudent(model=world.student, destination=str(out / "mine")))


def test_the_workspaces_settings_name_export_roots(world, out):
    workspace = Workspace(world.root / "home")
    (workspace.root / "settings.toml").write_text(f'[export]\nroots = ["{out}", "relative"]\n')
    service = JobService(workspace, AllowedRoots([]), world.settings)
    assert service.exports.roots == (out.resolve(),)
    assert service.setup().export_roots == [str(out.resolve())]
    assert f"export roots: {out.resolve()}" in setup_text(service.setup())


@pytest.mark.parametrize(
    ("destination", "code"),
    [
        ("hub:owner/name", "relative_path"),
        ("relative", "relative_path"),
        ("{out}/../elsewhere", "outside_roots"),
        ("/tmp", "outside_roots"),
        ("{out}/a b", "unusable_name"),
        ("{out}/.hidden", "unusable_name"),
        ("{out}/..", "unusable_name"),
        ("{out}/missing/model", "not_found"),
        ("{out}/link/model", "outside_roots"),
        ("{out}/dangling", "destination_exists"),
        ("{out}/home/model", "outside_roots"),
        ("{out}/a\x00/b", "not_found"),
    ],
)
def test_where_nothing_is_written(out, destination, code):
    (out / "link").symlink_to(out.parent)
    (out / "dangling").symlink_to(out / "nothing")
    (out / "home").mkdir()
    roots = ExportRoots([out], out / "home")
    with pytest.raises(PathError) as refused:
        roots.new_directory(destination.format(out=out))
    assert refused.value.code == code
    assert roots.new_directory(str(out / "model")) == out.resolve() / "model"
