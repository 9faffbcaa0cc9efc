"""A teacher that sees more than its student: its prompts, the scores of the student's own tokens, and its identity."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_cache, read_rollouts
from opd_mcp.engine.cache.merge import merged
from opd_mcp.engine.cache.shards import read_shard
from opd_mcp.engine.cache.verify import verified
from opd_mcp.engine.context import Context, DistillInputs, ResponsesInputs, RolloutInputs, ScoreInputs, SftInputs
from opd_mcp.engine.data.encoding import context_of
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.scoring.local import base_as_teacher, rescorer
from opd_mcp.identity.consistency import self_claim
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import ConsistencyError, DataError, IntegrityError, RunError
from opd_mcp.schemas.identity import RemoteTeacher
from opd_mcp.schemas.recipes import AdapterRecipe

SYSTEM = "1;2"
HINT = "3;"


@pytest.fixture
def build(build):
    return build.shorter()


@pytest.fixture
def prompts(example, tmp_path):
    """`prompts(seen)`: a file of the example's first prompts; `seen(text, number)` is what the teacher sees."""

    def written(seen=lambda text, number: None, name="prompts", count=24) -> Path:
        rows = [json.loads(line) for line in (example / "opd.jsonl").read_text().splitlines()[:count]]
        for number, row in enumerate(rows):
            text = seen(row["prompt"], number)
            if text is not None:
                row["teacher_messages"] = [{"role": "user", "content": text}]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return written


@pytest.fixture
def with_system(build):
    """The context of a recipe with a system prompt for the teacher alone."""
    return Context(build.recipe.runtime, build.recipe.prompting.model_copy(update={"teacher_system": SYSTEM}))


def scored(build, prompts, context, name="cache", **changes):
    """A cache with a teacher whose student is asserted to be its own, context included."""
    rollouts = build.rollouts(f"{name}-rollouts", prompts=prompts, context=context, tokenizer=build.teacher)
    return build.cache(rollouts, name, context=context, allow_teacher_mismatch=True, **changes)


def forward(model, prompt, response):
    """log π [T] of a response, by a plain forward pass."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *response]])
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0].double()
    rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return rows[torch.arange(len(response)), torch.tensor(response)].numpy()


def test_a_teacher_that_is_shown_the_students_prompt_gives_the_same_cache_to_the_byte(build, prompts):
    plain, same = prompts(name="plain"), prompts(lambda text, number: text, name="same")
    caches = [scored(build, file, build.context(), file.stem) for file in (plain, same)]
    shards = [[path.read_bytes() for path in sorted(cache.glob("shard-*.parquet"))] for cache in caches]
    assert shards[0] == shards[1]
    first, second = map(read_manifest, caches)
    assert second.teacher.context is None
    assert first.to_dict() | {"self_sha256": ""} == second.to_dict() | {"self_sha256": ""}


@pytest.mark.parametrize("kind", ["rows", "both"])
def test_scores_are_those_of_a_plain_forward_of_what_the_teacher_sees(build, prompts, kind, with_system):
    file = prompts(lambda text, number: HINT + text if number % 3 else None)
    cache = scored(build, file, build.context() if kind == "rows" else with_system)
    manifest, rows = read_cache(cache)
    context = manifest.teacher.context
    assert (context.rows is not None, context.system is not None) == (True, kind == "both")
    start = f"<assistant>{SYSTEM}" if kind == "both" else ""
    for row in (0, 1, 2):
        seen = rows.teacher_prompts.of(row)
        hint = HINT if row % 3 else ""
        prompt = json.loads(file.read_text().splitlines()[row])["prompt"]
        text = f"{start}<user>{hint}{prompt}<assistant>"
        assert "".join(tokens(build.teacher)[token] for token in seen) == text
        expected = forward(build.teacher, seen.tolist(), rows.response(row).tolist())
        assert np.abs(expected - rows.column("teacher_logprobs", row)).max() < 1e-4
    unseen = [number for number in range(len(rows)) if kind == "rows" and number % 3 == 0]
    assert all(np.array_equal(rows.teacher_prompts.of(row), rows.prompt(row)) for row in unseen)
    assert verified(cache, rescorer(build.teacher)).problems == []


def tokens(model):
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return {token_id: text for text, token_id in vocabulary.items()}


def test_what_the_teacher_sees_changes_its_scores_and_not_the_rollouts(build, prompts, with_system):
    file = prompts()
    plain = read_cache(scored(build, file, build.context(), "plain"))
    seen = read_cache(scored(build, file, with_system, "seen"))
    assert np.array_equal(plain[1].response_ids, seen[1].response_ids)
    assert np.array_equal(plain[1].columns["behaviour_logprobs"], seen[1].columns["behaviour_logprobs"])
    assert np.abs(plain[1].columns["teacher_logprobs"] - seen[1].columns["teacher_logprobs"]).max() > 0.01
    assert plain[0].teacher.same_model(seen[0].teacher)
    assert plain[0].teacher.label() != seen[0].teacher.label()


def test_an_interrupted_build_resumes_to_the_same_content_and_refuses_another_context(
    build, prompts, content, stopping, with_system
):
    file = prompts()
    whole = scored(build, file, with_system, "whole")
    rollouts = build.rollouts("part-rollouts", prompts=file, context=with_system, tokenizer=build.teacher)
    stopped = replace(with_system, reporter=stopping(after=1))
    with pytest.raises(RunError, match="run_cancelled"):
        build.cache(rollouts, "part", context=stopped, allow_teacher_mismatch=True)
    other = build.rollouts("other-rollouts", prompts=file, tokenizer=build.teacher)
    with pytest.raises(IntegrityError, match="input_changed"):
        build.cache(other, "part", allow_teacher_mismatch=True)
    assert content(build.cache(rollouts, "part", context=with_system, allow_teacher_mismatch=True)) == content(whole)


def test_a_served_teacher_scores_what_it_alone_sees(build, prompts, with_system, serve_model):
    here = read_cache(scored(build, prompts(), with_system, "here"))[1]
    server = serve_model("teacher", "a key")
    try:
        context = replace(with_system, teacher_key="a key")
        remote = RemoteTeacher(name="teacher", url=server.url)
        cache = scored(build, prompts(), context, "there", remote=remote)
    finally:
        server.close()
    there = read_cache(cache)[1]
    assert np.array_equal(here.teacher_prompts.ids, there.teacher_prompts.ids)
    assert np.abs(here.columns["teacher_logprobs"] - there.columns["teacher_logprobs"]).max() < 1e-4


def test_a_damaged_prompt_of_the_teacher_is_found(build, prompts, with_system):
    cache = scored(build, prompts(), with_system)
    shard = sorted(cache.glob("shard-*.parquet"))[0]
    table = pq.read_table(shard)
    place = table.column_names.index("teacher_prompt_ids")
    swapped = table.set_column(place, table.field(place), table.column(place).take(list(range(len(table)))[::-1]))
    pq.write_table(swapped, shard)
    with pytest.raises(IntegrityError, match="CRC"):
        read_shard(shard)


def test_caches_of_one_context_merge_and_others_do_not(build, prompts, with_system):
    hinted = lambda text, number: HINT + text  # noqa: E731
    first = scored(build, prompts(hinted, "a", 8), build.context(), "first")
    second = scored(build, prompts(hinted, "b", 16), build.context(), "second")
    whole = merged(build.root / "whole", [first, second])
    assert whole.teacher.context.rows not in (None, read_manifest(first).teacher.context.rows)
    assert len(read_cache(build.root / "whole")[1]) == whole.rows
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        merged(build.root / "no", [first, scored(build, prompts(name="c"), with_system, "third")])


def test_a_student_of_the_teacher_without_its_context_is_a_mismatch(build, prompts, with_system):
    rollouts = build.rollouts("rollouts", prompts=prompts(), context=with_system, tokenizer=build.teacher)
    with pytest.raises(ConsistencyError, match=r"teacher_mismatch.*the student's prompts.*a system prompt of its own"):
        build.cache(rollouts, "cache", context=with_system)


def test_the_sft_learns_what_the_teacher_answers_with_its_context(build, prompts, example, with_system):
    file = prompts(lambda text, number: HINT + text)
    made = build.root / "responses"
    inputs = ResponsesInputs(teacher=build.teacher, prompts=file)
    stages.generate_responses(build.recipe.responses, inputs, made, with_system)
    rows = read_shard(made / "responses.parquet")
    names = tokens(build.teacher)
    shown = ["".join(names[token] for token in ids) for ids in (rows.prompt(0), rows.teacher_prompts.of(0))]
    text = json.loads(file.read_text().splitlines()[0])["prompt"]
    assert shown == [f"<user>{text}<assistant>", f"<assistant>{SYSTEM}<user>{HINT}{text}<assistant>"]
    expected = forward(build.teacher, rows.teacher_prompts.of(0).tolist(), rows.response(0).tolist())
    assert np.abs(expected - rows.column("behaviour_logprobs", 0)).max() < 1e-4
    student = build.root / "sft"
    stages.sft(build.recipe.sft, SftInputs(student=example / "student", responses=made), student, with_system)
    claim = read_lineage(student).sft_teacher
    assert (claim.basis, claim.identity.context.system is not None) == ("proven", True)
    rollouts = build.rollouts("rollouts", student=student, prompts=file, context=with_system, tokenizer=build.teacher)
    manifest = read_manifest(build.cache(rollouts, "cache", student=student, context=with_system))
    assert manifest.teacher_delta.basis == "by_construction"


def test_a_template_that_shows_no_system_prompt_is_refused(build, prompts, with_system, tmp_path):
    teacher = Path(shutil.copytree(build.teacher, tmp_path / "teacher"))
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("in messages %}", "in messages if message['role'] != 'system' %}"))
    with pytest.raises(DataError, match="system_dropped"):
        build.rollouts("rollouts", prompts=prompts(), context=with_system, tokenizer=teacher)


def test_rows_that_are_too_long_for_the_teacher_are_left_out(build, prompts):
    long = prompts(lambda text, number: "1" * 60 + text if number == 3 else None, count=12)
    short = build.recipe.prompting.model_copy(update={"max_prompt_tokens": 40})
    rollouts = build.rollouts("rollouts", prompts=long, context=Context(build.recipe.runtime, short))
    drawn = read_rollouts(rollouts)
    assert len(set(drawn.prompt_row_ids)) == 11
    assert "opd-0003" not in drawn.prompt_row_ids


@pytest.fixture
def self_cache(build, prompts, with_system):
    """A cache of the teacher's rollouts, scored by itself with a system prompt, and the claim that allows it."""
    rollouts = RolloutInputs(student=build.teacher, prompts=prompts(), tokenizer=build.teacher)
    stages.rollout(build.recipe.rollout, rollouts, build.root / "rollouts", with_system)
    identity = inspect_model(build.teacher).identity
    seen = context_of(read_prompts(prompts()), with_system.prompting)
    claim = self_claim(identity.model_copy(update={"context": seen}), identity)
    score = ScoreInputs(
        teacher=build.teacher, student=build.teacher, rollouts=build.root / "rollouts", sft_teacher=claim
    )
    stages.score(build.recipe.score, score, build.root / "cache", with_system)
    return build.root / "cache", claim


@pytest.mark.parametrize("adapter", [None, AdapterRecipe(rank=2)])
def test_a_model_learns_from_itself_with_a_context(build, self_cache, adapter, with_system):
    cache, _ = self_cache
    manifest = read_manifest(cache)
    assert manifest.sft_teacher.basis == "by_construction"
    assert manifest.teacher_delta.mean_abs == 0
    assert manifest.scores.reverse_kl_k3 > 0.001
    section = build.recipe.distill.model_copy(update={"adapter": adapter, "steps": 2})
    made = build.root / "distilled"
    stages.distill(section, DistillInputs(student=build.teacher, cache=cache), made, with_system)
    lineage = read_lineage(made)
    assert (lineage.sft_teacher.basis, lineage.distilled_from.context is not None) == ("proven", True)
    assert lineage.model.weights != manifest.behaviour.weights


def test_another_student_is_not_its_teacher(build, self_cache, example, prompts, with_system):
    claim = self_cache[1]
    rollouts = build.rollouts("others", prompts=prompts(), context=with_system, tokenizer=build.teacher)
    with pytest.raises(ConsistencyError, match="not_one_model"):
        build.cache(rollouts, "no", context=with_system, sft_teacher=claim)


@pytest.mark.parametrize("adapter", [None, AdapterRecipe(rank=2, save="adapter")])
def test_live_distillation_shows_the_teacher_the_same(build, prompts, self_cache, adapter, with_system, runtime):
    settings = {"method": "live", "adapter": adapter, "steps": 1, "batch_size": 4}
    section = build.recipe.distill.model_copy(update=settings)
    inputs = DistillInputs(
        student=build.teacher,
        teacher=build.teacher,
        prompts=prompts(),
        rollout=build.recipe.rollout,
        sft_teacher=self_cache[1],
    )
    module = sys.modules[stages.distill.__module__]
    source = module.open_live(section, inputs, with_system)
    student = load_model(build.teacher, runtime, for_training=True, generates=True, adapter=adapter)
    teacher = base_as_teacher(student, build.teacher, runtime) or load_model(build.teacher, runtime)
    steps = module.live_batches(student, teacher, source, section, build.recipe.rollout, runtime)
    rows = next(steps(0)).sequences
    for row in range(len(rows)):
        seen = rows.teacher_prompts.of(row)
        assert len(seen) == len(rows.prompt(row)) + 1 + len(SYSTEM)
        expected = forward(build.teacher, seen.tolist(), rows.response(row).tolist())
        assert np.abs(expected - rows.column("teacher_logprobs", row)).max() < 1e-4
    stages.distill(section, inputs, build.root / "live", with_system)
    assert read_lineage(build.root / "live").distilled_from.context.system is not None
    with pytest.raises(ConsistencyError, match="lineage_missing"):
        stages.distill(section, replace(inputs, sft_teacher=None), build.root / "refused", with_system)
