"""What gc removes, and what it keeps."""

import os
import shutil
import time

import pytest

from opd_mcp.identity.lineage import read_lineage
from opd_mcp.maintenance.gc import DAY, collected
from opd_mcp.store.runs import CHECKPOINTS, RECORD_FILE


@pytest.fixture
def made(world, service, finished):
    """The status of a finished distillation."""
    status = finished(service, service.start_distillation(world.start_arguments()).run_id)
    assert status.state == "succeeded", status
    return status


def aged(path, days):
    then = time.time() - days * DAY
    for entry in (*path.rglob("*"), path):
        os.utime(entry, (then, then))
    return path


def build(store, name, days):
    directory = store.workspace.artifacts_of("cache") / f".building-{name}"
    directory.mkdir()
    (directory / "part").write_bytes(b"x" * 100)
    return aged(directory, days)


def parents_here(store):
    here = {artifact.artifact_id: read_lineage(artifact.path) for artifact in store.artifacts.list()}
    return {
        (child, parent.artifact_id)
        for child, lineage in here.items()
        if lineage is not None
        for parent in lineage.parents
        if parent.artifact_id in here
    }


def test_leftovers_go_and_a_dry_run_only_names_them(service, made):
    store = service.store
    run = store.workspace.run(made.run_id)
    checkpoint = run / CHECKPOINTS / "distill"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "weights").write_bytes(b"w" * 50)
    gone = [
        checkpoint,
        build(store, "deleted-abc", 0),
        build(store, "0123456789ab", 1),
        build(store, f"rollout-{'a' * 32}", 20),
    ]
    temporary = store.workspace.plans / ".p.json.0123456789ab.tmp"
    temporary.write_text("half")
    gone.append(aged(temporary, 1))
    young = build(store, f"score-{'b' * 32}", 1)
    listed = collected(store, remove=False, older_than_days=14)
    assert all(path.exists() for path in gone)
    assert {str(path) for path in gone} <= {item.path for item in listed.items}
    done = collected(store, remove=True, older_than_days=14)
    assert [item.path for item in done.items] == [item.path for item in listed.items]
    assert done.bytes == listed.bytes
    assert not any(path.exists() for path in gone)
    assert young.exists()
    assert collected(store, remove=True, older_than_days=14).items == []


def test_what_somebody_builds_or_a_lost_run_would_go_on_with_is_kept(world, service, made, finished):
    failing = world.start_arguments(method="lightning", overrides={"sft.optimizer.learning_rate": 666})
    failed = finished(service, service.start_distillation(failing).run_id)
    assert failed.state == "failed"
    store = service.store
    key = next(phase.key for phase in store.record(failed.run_id).request.phases if phase.name == "rollout")
    resumable = build(store, f"rollout-{key[:32]}", 100)
    held = f"rollout-{'c' * 32}"
    with store.artifacts.resumable_directory("cache", held, lambda: False) as directory:
        (directory / "part").write_bytes(b"x")
        aged(directory, 100)
        collected(store, remove=True, older_than_days=14)
        assert directory.exists()
    assert resumable.exists()


def builds(store, *, remove=False, days=14.0):
    found = collected(store, remove=remove, older_than_days=days)
    return [item.path for item in found.items if item.kind == "build"]


def test_a_lock_without_its_build_goes_unless_somebody_holds_it(service, made):
    store = service.store
    folder = store.workspace.artifacts_of("cache")
    stray = folder / f".building-score-{'a' * 32}.lock"
    stray.touch()
    with store.artifacts.resumable_directory("cache", f"score-{'b' * 32}", lambda: False) as directory:
        directory.rmdir()  # as it is between the lock and the directory, and after the publication
        assert builds(store) == [str(stray)]
        assert stray.exists(), "a dry run only names it"
        assert builds(store, remove=True) == [str(stray)]
        assert directory.with_name(f"{directory.name}.lock").exists()
    assert not list(folder.glob(".building-*"))


def test_a_build_of_a_succeeded_run_goes_with_its_lock_and_one_that_an_open_run_needs_stays(
    world, service, made, finished
):
    store = service.store
    failing = world.start_arguments(overrides={"sft.optimizer.learning_rate": 666})
    failed = finished(service, service.start_distillation(failing).run_id).run_id
    keys = {
        run: next(phase.key[:32] for phase in store.record(run).request.phases if phase.name == "score")
        for run in (made.run_id, failed)
    }
    nobody_s, needed = build(store, f"score-{keys[made.run_id]}", 1), build(store, f"score-{keys[failed]}", 100)
    locks = [path.with_name(f"{path.name}.lock") for path in (nobody_s, needed)]
    for lock in locks:
        lock.touch()
    assert builds(store) == [str(nobody_s)]
    assert builds(store, remove=True) == [str(nobody_s)]
    assert [path.exists() for path in (nobody_s, locks[0], needed, locks[1])] == [False, False, True, True]
    shutil.rmtree(store.workspace.run(failed))
    assert builds(store, days=101) == []
    assert builds(store, remove=True) == [str(needed)], "its run is gone, and nobody took it up for so long"
    assert not locks[1].exists()


def test_a_build_that_was_touched_within_the_hour_stays_also_after_its_run_succeeded(service, made):
    store = service.store
    key = next(phase.key[:32] for phase in store.record(made.run_id).request.phases if phase.name == "rollout")
    build(store, f"rollout-{key}", 0)
    assert builds(store) == []


def test_artifacts_go_only_when_asked_and_never_a_parent(service, made):
    store = service.store
    before = parents_here(store)
    assert not [item for item in collected(store, remove=True, older_than_days=0).items if item.kind == "artifact"]
    orphan = store.artifacts.new_building_directory("prompts")
    store.artifacts.publish("prompts", orphan, artifact_id="prompts-orphan", key="o")
    done = collected(store, remove=True, older_than_days=0, artifacts=True)
    assert [item.path.rsplit("/", 1)[1] for item in done.items] == ["prompts-orphan"]
    assert parents_here(store) == before
    assert {artifact.artifact_id for artifact in store.artifacts.list()} == set(made.result["artifacts"].values())


def test_with_a_damaged_run_no_build_and_no_artifact_is_offered(service, made):
    store = service.store
    old = build(store, f"rollout-{'a' * 32}", 100)
    (store.workspace.run(made.run_id) / RECORD_FILE).write_bytes(b"{")
    found = collected(store, remove=True, older_than_days=0, artifacts=True)
    assert {item.kind for item in found.items} <= {"deleted", "temporary", "checkpoints", "index"}
    assert "run.json" in found.kept[0]
    assert old.exists()
