"""Rounds: a later one draws from the student as it is then, and goes on where the one before ended."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_mcp.engine import stages
from opd_mcp.engine.context import DistillInputs, RoundInputs
from opd_mcp.engine.stages.distill import MOMENTS_FILE
from opd_mcp.identity.lineage import read_lineage, verified_lineage
from opd_mcp.schemas.errors import ConsistencyError, IntegrityError
from opd_mcp.schemas.reports import TrainingSummary
from opd_mcp.schemas.resolve import resolve_recipe
from tests.engine.conftest import SHORT, Builder

STEPS = 4


@pytest.fixture
def build(student: Path, tmp_path: Path) -> Builder:
    return Builder(tmp_path, student, resolve_recipe("demo", SHORT | {"distill.steps": STEPS, "distill.rounds": 2}))


def round_of(build: Builder, number: int, **changes: object) -> RoundInputs:
    first, last = ((0, 2), (2, STEPS))[number - 1]
    return RoundInputs(number=number, first=first, last=last, final=number == 2, origin=build.student, **changes)


def distilled(build: Builder, of: RoundInputs, student: Path, cache: Path, **changes: object) -> Path:
    section = build.recipe.distill.model_copy(update=changes)
    output = build.root / f"student-{of.number}"
    stages.distill(section, DistillInputs(student=student, cache=cache, round=of), output, build.context())
    return output


def test_a_second_round_is_drawn_from_and_goes_on_with_the_first_ones_student(build: Builder) -> None:
    rollouts = build.rollouts("rollouts-1", most=16, tokenizer=build.teacher)
    first = distilled(build, round_of(build, 1), build.student, build.cache(rollouts, "cache-1"))
    assert (first / MOMENTS_FILE).is_file()
    again = replace(build, student=first)
    with pytest.raises(ConsistencyError, match="behaviour_mismatch"):
        distilled(build, round_of(build, 2, before=first), first, build.root / "cache-1")
    cache = again.cache(again.rollouts("rollouts-2", most=16, skipped=16, tokenizer=build.teacher), "cache-2")
    second = distilled(build, round_of(build, 2, before=first), first, cache)
    summaries = [TrainingSummary.from_json((path / "training.json").read_bytes()) for path in (first, second)]
    rounds = [summary.round for summary in summaries]
    assert [(of.number, of.first_step, of.last_step, of.ended_by) for of in rounds if of] == [
        (1, 0, 2, "steps"),
        (2, 2, 4, "steps"),
    ]
    assert [summary.steps for summary in summaries] == [2, 2]
    assert not (second / MOMENTS_FILE).exists()
    lineage = read_lineage(second)
    assert lineage is not None
    assert lineage.sft_teacher is not None
    assert lineage.sft_teacher.basis == "proven"
    (first / MOMENTS_FILE).write_bytes(b"other moments")
    with pytest.raises(IntegrityError):
        verified_lineage(first, full=True)


def test_between_rounds_the_weights_stay_in_float32_and_the_last_has_the_first_students_dtype(build: Builder) -> None:
    cache = build.cache(build.rollouts("rollouts", most=16), "cache")
    first = distilled(build, round_of(build, 1), build.student, cache, save_dtype="bfloat16")
    assert {weight.dtype for weight in load_file(first / "model.safetensors").values()} == {torch.float32}
    again = replace(build, student=first)
    cache = again.cache(again.rollouts("rollouts-2", most=16), "cache-2")
    last = distilled(build, round_of(build, 2, before=first), first, cache, save_dtype="bfloat16")
    assert {weight.dtype for weight in load_file(last / "model.safetensors").values()} == {torch.bfloat16}


def test_an_adapter_goes_on_from_round_to_round(build: Builder) -> None:
    adapter = {
        "adapter": build.recipe.distill.adapter or resolve_recipe("demo", {"distill.adapter": {}}).distill.adapter
    }
    cache = build.cache(build.rollouts("rollouts", most=16), "cache")
    first = distilled(build, round_of(build, 1), build.student, cache, **adapter)
    assert (first / "adapter_config.json").is_file()
    again = replace(build, student=first)
    cache = again.cache(again.rollouts("rollouts-2", most=16), "cache-2")
    last = distilled(build, round_of(build, 2, before=first), first, cache, **adapter)
    assert (last / "model.safetensors").is_file(), "merged, as the recipe says of the student that it ends with"
    lineage = read_lineage(last)
    assert lineage is not None
    assert lineage.adapter is not None
    assert lineage.adapter.start == "continued"


def test_a_later_round_has_prompts_of_its_own(build: Builder) -> None:
    whole = build.cache(build.rollouts("whole"), "whole-cache")
    parts = [build.rollouts(f"part-{skipped}", most=8, skipped=skipped) for skipped in (0, 8)]
    assert sorted(path.name for path in parts[0].glob("*.parquet")) == ["rollouts-00000.parquet"]
    from opd_mcp.engine.cache.shards import read_shard

    ids = [read_shard(part / "rollouts-00000.parquet").prompt_row_ids for part in parts]
    assert not set(ids[0]) & set(ids[1])
    assert whole.is_dir()
