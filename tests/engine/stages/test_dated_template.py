"""A chat template with the date: one moment for all of a build, whatever the clock says when it is resumed."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_record, read_rollouts
from opd_mcp.engine.context import Context, DistillInputs, ResponsesInputs, SftInputs
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.schemas.errors import RunError

DATED = (
    "{{ strftime_now('%d%m') }}{{ messages[0]['content'] }}"
    "{% for m in messages[1:] %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
FIRST, LATER = datetime(2026, 3, 7, 23, 59, tzinfo=UTC), datetime(2026, 3, 8, 0, 1, tzinfo=UTC)


@pytest.fixture
def dated(example: Path, tmp_path: Path) -> Path:
    """The example's teacher with a template that writes day and month before the question."""
    teacher = Path(shutil.copytree(example / "teacher", tmp_path / "dated"))
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (teacher / "tokenizer_config.json").write_text(json.dumps(config))
    (teacher / "chat_template.jinja").write_text(DATED)
    return teacher


def at(build, moment: datetime, **changes: object) -> Context:
    return replace(build.context(**changes), rendered_at=moment)


def days(rows: Sequences, tokenizer) -> set[str]:
    return {tokenizer.decode(rows.prompt(row).tolist())[:4] for row in range(len(rows))}


@pytest.fixture
def tokenizer(example: Path):
    from opd_mcp.engine.models.loading import load_tokenizer

    return load_tokenizer(example / "teacher")


def test_a_resumed_build_goes_on_with_the_date_that_it_was_begun_with(build, dated, tokenizer, stopping) -> None:
    with pytest.raises(RunError, match="run_cancelled"):
        build.rollouts("rollouts", tokenizer=dated, context=at(build, FIRST, reporter=stopping(after=2)))
    begun = list((build.root / "rollouts").glob("*.parquet"))
    assert 0 < len(begun) < 5
    build.rollouts("rollouts", tokenizer=dated, context=at(build, LATER))
    rollouts = build.root / "rollouts"
    assert days(read_rollouts(rollouts), tokenizer) == {"0703"}
    assert read_record(rollouts).rendered_at == FIRST.isoformat()
    cache = build.cache(rollouts, "cache", teacher=dated, context=at(build, LATER), allow_teacher_mismatch=True)
    assert read_manifest(cache).rendered_at == FIRST.isoformat()
    assert read_lineage(cache).rendered_at == FIRST.isoformat()


def test_a_build_of_another_day_has_its_own_date(build, dated, tokenizer) -> None:
    build.rollouts("rollouts", tokenizer=dated, context=at(build, LATER))
    assert days(read_rollouts(build.root / "rollouts"), tokenizer) == {"0803"}


def test_a_template_without_a_clock_records_no_moment(build, drawn, finished) -> None:
    assert read_record(drawn).rendered_at is None
    assert read_manifest(finished).rendered_at is None
    assert read_lineage(finished).rendered_at is None


def test_every_stage_that_renders_records_the_moment(build, dated, tmp_path, tokenizer) -> None:
    context, recipe = at(build, FIRST), build.recipe
    prompts = build.prompts
    stages.generate_responses(
        recipe.responses, ResponsesInputs(teacher=dated, prompts=prompts), tmp_path / "responses", context
    )
    responses = read_lineage(tmp_path / "responses")
    assert responses.rendered_at == FIRST.isoformat()
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "1+1=?", "response": "#2"}\n' * 8)
    short = recipe.sft.model_copy(update={"steps": 2, "on_truncated": "keep"})
    for name, source, moment in (
        ("ids", tmp_path / "responses", None),  # nothing was rendered: the ids are the responses' own
        ("texts", texts, FIRST.isoformat()),
    ):
        inputs = SftInputs(student=build.student, responses=source, tokenizer=dated)
        stages.sft(short, inputs, tmp_path / name, context)
        assert read_lineage(tmp_path / name).rendered_at == moment
    live = DistillInputs(
        student=build.student, teacher=dated, prompts=prompts, rollout=recipe.rollout, allow_teacher_mismatch=True
    )
    stages.distill(recipe.distill.model_copy(update={"method": "live", "steps": 1}), live, tmp_path / "live", context)
    assert read_lineage(tmp_path / "live").rendered_at == FIRST.isoformat()
