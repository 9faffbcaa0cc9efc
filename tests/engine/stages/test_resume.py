"""A build that is interrupted goes on where it was, ends with the same content, and refuses other inputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.cache.building import BUILD_FILE, BuildRecord, ShardNote
from opd_mcp.engine.cache.verify import verified
from opd_mcp.engine.context import ResponsesInputs, RolloutInputs, ScoreInputs
from opd_mcp.engine.stages import responses
from opd_mcp.identity.lineage import read_manifest
from opd_mcp.schemas.errors import ConsistencyError, IntegrityError, RunError
from opd_mcp.schemas.reports import StageCost

REPOSITORY = Path(__file__).resolve().parents[3]
KILLS, EXAMPLE = REPOSITORY / "tools" / "chaos" / "cache_builds.py", REPOSITORY / "examples" / "arithmetic"


def test_sigkill_anywhere_loses_one_shard_at_most_and_changes_nothing():
    # 3 moments here; `python tools/chaos/cache_builds.py --points 20` takes a minute or two more
    command = [sys.executable, str(KILLS), "--points", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["killed"] == 3
    assert answer["killed_in"] == ["rollout", "score"]
    assert len(set(answer["contents"])) == 1
    assert answer["shards_made_twice"] == 0


def test_stopped_rollouts_go_on_and_keep_their_shards(build, stopping, drawn):
    with pytest.raises(RunError, match="run_cancelled"):
        build.rollouts("rollouts", context=build.context(reporter=stopping(after=4)))
    kept = {path: path.stat().st_mtime_ns for path in (build.root / "rollouts").glob("*.parquet")}
    assert 0 < len(kept) < 5
    rollouts = build.rollouts("rollouts")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for shard in drawn.glob("*.parquet"):
        assert (rollouts / shard.name).read_bytes() == shard.read_bytes()


def test_a_stopped_cache_goes_on_and_has_the_same_content(build, stopping, drawn, finished, content):
    with pytest.raises(RunError, match="run_cancelled"):
        build.cache(drawn, "cache", context=build.context(reporter=stopping(after=2)))
    assert not (build.root / "cache" / "manifest.json").exists()
    cache = build.cache(drawn, "cache")
    assert content(cache) == content(finished)
    assert not list(cache.glob("*.done.json"))
    assert not (cache / BUILD_FILE).exists()
    assert verified(cache).problems == []


def answered(build, name: str, context, **changes: object) -> StageCost:
    """The teacher's answers to twelve prompts."""
    section = build.recipe.responses.model_copy(update={"limit": 12, **changes})
    inputs = ResponsesInputs(teacher=build.teacher, prompts=EXAMPLE / "sft.jsonl")
    return stages.generate_responses(section, inputs, build.root / name, context)


def test_stopped_responses_go_on_and_keep_their_shards(build, stopping, monkeypatch):
    monkeypatch.setattr(responses, "SHARD_ROWS", 4)
    answered(build, "whole", build.context())
    kept = build.root / "checkpoints"
    with pytest.raises(RunError, match="run_cancelled"):
        answered(build, "answers", build.context(checkpoints=kept, reporter=stopping(after=3)))
    assert 0 < len(list(kept.glob("*.parquet"))) < 3
    known, times = slowed(kept, 1000.0), {path: path.stat().st_mtime_ns for path in kept.glob("*.parquet")}
    with pytest.raises(IntegrityError, match="another responses"):
        answered(build, "answers", build.context(checkpoints=kept), limit=11)
    cost = answered(build, "answers", build.context(checkpoints=kept))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert known * 1000 < cost.seconds < known * 1000 + 900
    answers, whole = (build.root / name / "responses.parquet" for name in ("answers", "whole"))
    assert answers.read_bytes() == whole.read_bytes()


def slowed(directory: Path, seconds: float) -> int:
    """Let the notes of finished shards tell of so many seconds each; how many there are."""
    notes = list(directory.glob("*.done.json"))
    for path in notes:
        note = ShardNote.from_json(path.read_bytes())
        path.write_bytes(note.model_copy(update={"seconds": seconds, "self_sha256": ""}).sealed().to_json().encode())
    return len(notes)


def test_the_cost_of_a_resumed_stage_is_that_of_all_its_attempts(build, stopping, drawn):
    with pytest.raises(RunError, match="run_cancelled"):
        build.rollouts("rollouts", context=build.context(reporter=stopping(after=4)))
    kept = slowed(build.root / "rollouts", 1000.0)
    inputs = RolloutInputs(student=build.student, prompts=build.prompts)
    cost = stages.rollout(build.recipe.rollout, inputs, build.root / "rollouts", build.context())
    assert kept * 1000 < cost.seconds < kept * 1000 + 900
    with pytest.raises(RunError, match="run_cancelled"):
        build.cache(drawn, "cache", context=build.context(reporter=stopping(after=2)))
    kept = slowed(build.root / "cache", 1000.0)
    scored = ScoreInputs(teacher=build.teacher, student=build.student, rollouts=drawn)
    cost = stages.score(build.recipe.score, scored, build.root / "cache", build.context())
    assert kept * 1000 < cost.seconds < kept * 1000 + 900
    assert cost.tokens_per_second == pytest.approx(cost.tokens / cost.seconds)


def test_a_damaged_shard_of_a_build_is_made_again(build, stopping, drawn, finished, content):
    with pytest.raises(RunError):
        build.cache(drawn, "cache", context=build.context(reporter=stopping(after=3)))
    shard = build.root / "cache" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert content(build.cache(drawn, "cache")) == content(finished)


def test_another_teacher_may_not_go_on_with_a_build(build, stopping, drawn, tmp_path):
    with pytest.raises(RunError):
        build.cache(drawn, "cache", context=build.context(reporter=stopping(after=2)))
    swapped = Path(shutil.copytree(build.teacher, tmp_path / "swapped"))
    weights = bytearray((swapped / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (swapped / "model.safetensors").write_bytes(weights)
    with pytest.raises(IntegrityError, match=r"input_changed.*another teacher"):
        build.cache(drawn, "cache", teacher=swapped, allow_teacher_mismatch=True)
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        build.cache(drawn, "cache", teacher=swapped)


def test_a_build_of_an_earlier_version_goes_on(build, stopping, drawn, finished, content):
    with pytest.raises(RunError):
        build.cache(drawn, "cache", context=build.context(reporter=stopping(after=2)))
    file = build.root / "cache" / BUILD_FILE
    record = BuildRecord.from_json(file.read_bytes()).record
    assert record["teacher"].pop("configuration")
    assert record["teacher"].pop("encoding")
    file.write_text(BuildRecord(record=record).sealed().to_json())
    assert content(build.cache(drawn, "cache")) == content(finished)


def test_another_seed_may_not_go_on_with_rollouts(build, stopping):
    with pytest.raises(RunError):
        build.rollouts("rollouts", context=build.context(reporter=stopping(after=4)))
    other = build.recipe.rollout.model_copy(update={"batch_size": 3})
    with pytest.raises(IntegrityError, match=r"input_changed.*another layout"):
        build.rollouts("rollouts", recipe=other)


def test_the_manifest_fixes_seed_and_layout(finished):
    layout = read_manifest(finished).layout
    assert (layout.rows, layout.shard_rows, layout.seed) == (40, 8, 0)
