"""What the dashboard's page reads: which run it opens on, a run in full, small curves, filters and documents."""

import json

import pytest

from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.errors import PathError, UnknownIdError
from opd_mcp.schemas.requests import BenchmarkStudent, ExportStudent, ReadDashboard
from opd_mcp.service import JobService
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.runs import CHECKPOINTS, JOURNAL_FILE, LOG_FILE, RunLock
from opd_mcp.store.workspace import Workspace


@pytest.fixture
def distilled(world, service, finished):
    """The id of a finished distillation of 40 steps with a report."""
    arguments = world.start_arguments(
        name="forty steps", tags=["forty"], eval_prompts=world.prompts("eval"), overrides={"distill.steps": 40}
    )
    status = finished(service, service.start_distillation(arguments).run_id)
    assert status.state == "succeeded", status
    return status.run_id


@pytest.fixture
def active(world):
    """A run that goes on, and its journal; a newer run is lost."""
    given = world.settings
    settings = JobSettings(given.lease_folder, 2, given.examples, ("/bin/true",))
    service = JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)
    run_id, _ = (
        service.start_distillation(world.start_arguments(overrides={"distill.steps": n})).run_id for n in (7, 8)
    )
    directory = service.workspace.run(run_id)
    with RunLock.acquire(directory), JournalWriter(directory / JOURNAL_FILE, 1) as journal:
        journal.append("state", {"state": "running"})
        yield run_id, journal


def test_a_finished_run_in_full(service, distilled):
    feed = service.dashboard_page(ReadDashboard())
    [run] = feed.runs
    assert (run.run_id, run.name, feed.total, feed.next_cursor) == (distilled, "forty steps", 1, None)
    detail = run.detail
    assert detail.settings["distill.steps"] == 40
    assert {"distill.steps", "sft.steps"} <= set(detail.changed)
    assert detail.inputs["teacher"].endswith("/teacher")
    assert detail.planned_seconds["distill"] > 0
    assert detail.documents[0].resource == f"opd://runs/{distilled}/report"
    assert max(len(curve.steps) for curve in run.curves) == 40
    assert 1 < len(feed.sparks[distilled]) <= 24
    assert service.dashboard().runs[0].detail is None  # agents are told the same by other tools


def test_a_small_curve_is_drawn_again_only_once_its_run_has_gone_on(service, active):
    run_id, journal = active
    drawn = []

    def draw(view):
        drawn.append(view.records)
        return [1.0, 2.0]

    views = service.store.views
    assert views.sparkline(run_id, draw) == views.sparkline(run_id, draw) == [1.0, 2.0]
    journal.append("metric", {"step": 1, "values": {"loss": 1.0}})
    views.sparkline(run_id, draw)
    assert len(drawn) == 2
    assert drawn[1] == drawn[0] + 1


def test_a_reused_training_is_shown_with_the_curves_of_the_run_that_made_it(world, service, distilled, finished):
    arguments = world.start_arguments(eval_prompts=world.prompts("other", start=3), overrides={"distill.steps": 40})
    again = finished(service, service.start_distillation(arguments).run_id)
    first, second = service.dashboard_page(ReadDashboard(run_ids=[distilled, again.run_id])).runs
    assert service.dashboard([again.run_id]).runs[0].curves == []
    assert second.detail.curves_of == {"distill": distilled, "sft": distilled}
    assert [curve.key for curve in second.curves] == [curve.key for curve in first.curves]
    assert first.detail.curves_of == {}


def test_alerts_and_checkpoints_are_marked_where_they_were_and_an_active_run_is_shown_first(service, distilled, active):
    run_id, journal = active
    directory = service.workspace.run(run_id)
    journal.append("alert", {"code": "before", "message": "No step was recorded by then."})
    journal.append("phase", {"phase": "distill", "event": "started"})
    for step in (1, 2, 3):
        journal.append("metric", {"step": step, "values": {"loss": 1 / step}})
        if step == 2:
            journal.append("alert", {"code": "kl_rising", "message": "It rises."})
    (directory / CHECKPOINTS / "distill" / "step-00000002").mkdir(parents=True)
    (directory / CHECKPOINTS / "distill" / ".building-step-3").mkdir()
    (directory / LOG_FILE).write_text("".join(f"line {number}\n" for number in range(30)))
    feed = service.dashboard_page(ReadDashboard())
    [run] = feed.runs
    assert (run.run_id, run.state) == (run_id, "running")
    assert feed.listed[0].run_id != run_id  # a newer one is over
    marks = [(mark.phase, mark.step, mark.kind, mark.text) for mark in run.detail.marks]
    assert marks == [("distill", 2, "alert", "kl_rising"), ("distill", 2, "checkpoint", "checkpoint")]
    assert run.detail.log == [f"line {number}" for number in range(18, 30)]
    assert run.detail.documents == []
    assert feed.sparks[run_id] == [1.0, 0.5, 0.33333]
    listed = service.dashboard_page(ReadDashboard(run_ids=[distilled], state="succeeded", tag="forty"))
    assert [row.run_id for row in listed.listed] == [run.run_id for run in listed.runs] == [distilled]
    assert service.dashboard_page(ReadDashboard(name="nothing is called so")).listed == []


def test_a_benchmark_shows_the_curves_samples_and_page_of_its_report(world, service, distilled, finished):
    given = {"model": distilled, "prompts": world.prompts("eval"), "preset": "demo"}
    measured = finished(service, service.benchmark_student(BenchmarkStudent(**given)).run_id)
    folder = service.store.artifacts.get(measured.result["artifacts"]["report"]).path
    tokens = {"student": {"ends": [1, 1], "log_ratios": [-0.5, 0.25]}}
    added = {
        "curves": [{"key": "distill.loss", "steps": [1, 2], "values": [0.5, 0.25]}],
        "samples": [{"prompt": "1+1=?", "responses": {"student": "2"}, "tokens": tokens}],
    }
    (folder / "report.json").write_text(json.dumps(json.loads((folder / "report.json").read_text()) | added))
    [run] = service.dashboard_page(ReadDashboard(run_ids=[measured.run_id])).runs
    assert [curve.key for curve in run.curves] == ["distill.loss"]
    assert run.detail.samples[0].tokens["student"].log_ratios == [-0.5, 0.25]
    with pytest.raises(UnknownIdError, match="earlier version"):
        service.run_document(measured.run_id, "report")
    (folder / "report.html").write_text("<!doctype html>")
    assert service.run_document(measured.run_id, "report") == "<!doctype html>"
    with pytest.raises(UnknownIdError, match="exported nothing"):
        service.run_document(measured.run_id, "card")


def test_the_card_of_an_export_is_read_from_below_an_allowed_root_only(world, distilled, finished, tmp_path):
    (tmp_path / "out").mkdir()
    given = world.settings
    settings = JobSettings(
        given.lease_folder, 2, given.examples, given.worker_command, export_roots=(tmp_path / "out",)
    )
    exporter = JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)
    export = ExportStudent(model=distilled, destination=str(tmp_path / "out" / "mine"))
    status = finished(exporter, exporter.export_student(export).run_id)
    [run] = exporter.dashboard_page(ReadDashboard(run_ids=[status.run_id])).runs
    assert run.detail.export == str(tmp_path / "out" / "mine")
    assert [document.kind for document in run.detail.documents] == ["card"]
    assert exporter.run_document(status.run_id, "card") == (tmp_path / "out" / "mine" / "README.md").read_text()
    with pytest.raises(UnknownIdError, match="no report"):
        exporter.run_document(status.run_id, "report")
    with pytest.raises(PathError, match="outside"):
        world.service().run_document(status.run_id, "card")
