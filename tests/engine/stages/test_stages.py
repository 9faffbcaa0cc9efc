"""The stages on the arithmetic example: real models, few steps, every border checked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_cache
from opd_mcp.engine.context import (
    BenchmarkInputs,
    Context,
    DistillInputs,
    RolloutInputs,
    ScoreInputs,
    SftInputs,
    SilentReporter,
)
from opd_mcp.engine.models.loading import copy_tokenizer
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.lineage import read_lineage, read_manifest, verified_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import ConsistencyError, IntegrityError, OpdError, RunError
from opd_mcp.schemas.recipes import DistillRecipe
from opd_mcp.schemas.reports import TrainingSummary
from opd_mcp.schemas.resolve import resolve_recipe
from tests.engine.stages.conftest import SHORT, Made, weights_of


def test_the_cache_holds_exact_tokens_scores_and_provenance(made: Made) -> None:
    manifest, rows = read_cache(made.cache)
    assert len(rows) == manifest.rollouts.rows == 40
    assert [shard.rows for shard in manifest.shards] == [16, 16, 8]
    assert manifest.teacher.weights == inspect_model(made.teacher).identity.weights
    assert manifest.behaviour.weights == inspect_model(made.sft).identity.weights
    assert manifest.sft_teacher is not None
    assert manifest.sft_teacher.basis == "proven"
    assert (rows.columns["teacher_logprobs"] <= 0).all()
    eos = manifest.eos_token_ids[0]
    for row in range(len(rows)):
        assert (rows.response(row)[-1] == eos) == (rows.finish_reasons[row] == "eos")
    top = rows.columns["topk_logprobs"]
    assert top.shape[1] == 8
    assert (np.diff(top, axis=1) <= 0).all()


def test_lightning_trains_and_records_where_it_comes_from(made: Made) -> None:
    output = made.distill("lightning")
    lineage = verified_lineage(output, full=True)
    assert lineage is not None
    assert lineage.distilled_from is not None
    assert lineage.distilled_from.weights == inspect_model(made.teacher).identity.weights
    assert lineage.sft_teacher == read_lineage(made.sft).sft_teacher
    before, after = weights_of(made.sft), weights_of(output)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_recipe_gives_the_same_bits(made: Made) -> None:
    first, second = weights_of(made.distill("once")), weights_of(made.distill("twice"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "topk_js", "js_beta": 0.9},
        {"estimator": "topk_entropy_mixed", "topk": 4},
        {"estimator": "opsa"},
        {"extrapolation": 1.5},
        {"token_weighting": "early", "entropy_share": 0.5},
    ],
)
def test_every_objective_trains_from_a_cache(made: Made, changes: dict) -> None:
    values = {**made.recipe.distill.model_dump(), "steps": 2, **changes}
    folder = made.distill("-".join(map(str, changes)), recipe=DistillRecipe.model_validate(values))
    summary = TrainingSummary.from_json((folder / "training.json").read_bytes())
    assert np.isfinite(summary.final["loss"])
    assert (folder / "model.safetensors").read_bytes() != (made.sft / "model.safetensors").read_bytes()


def test_a_horizon_trains_on_the_beginnings_of_the_rollouts(made: Made) -> None:
    recipe = made.recipe.distill.model_copy(update={"steps": 2})
    whole, some = made.distill("whole", recipe=recipe), recipe.model_copy(update={"horizon": 3.0})
    tokens = [
        TrainingSummary.from_json((folder / "training.json").read_bytes()).trained_tokens
        for folder in (whole, made.distill("three", recipe=some))
    ]
    assert tokens[1] <= 2 * 3 * recipe.batch_size < tokens[0]


@pytest.mark.parametrize("estimator", ["sampled", "topk_reverse_kl"])
def test_live_shares_the_loop_and_needs_no_cache(made: Made, estimator: str) -> None:
    recipe = made.recipe.distill.model_copy(update={"method": "live", "estimator": estimator})
    output = made.distill(
        f"live-{estimator}",
        recipe=recipe,
        cache=None,
        teacher=made.teacher,
        prompts=made.prompts,
        rollout=made.recipe.rollout,
    )
    assert verified_lineage(output).stage == "distill"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("fp32_master", torch.float32),
        pytest.param("fp32_master_8bit", torch.float32, marks=pytest.mark.needs("torchao")),
        ("split_master", torch.float32),
        ("bf16_stochastic", torch.bfloat16),
    ],
)
def test_the_saved_student_is_what_the_master_weights_say(made: Made, precision: str, dtype: torch.dtype) -> None:
    optimizer = made.recipe.distill.optimizer.model_copy(update={"precision": precision})
    output = made.distill(
        f"saved-{precision}", recipe=made.recipe.distill.model_copy(update={"optimizer": optimizer, "steps": 2})
    )
    weights, before = weights_of(output), weights_of(made.sft)
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert any(not torch.equal(weights[name].float(), before[name]) for name in before)
    exact = all(torch.equal(tensor.bfloat16().float(), tensor.float()) for tensor in weights.values())
    assert exact == (dtype is torch.bfloat16)
    assert TrainingSummary.from_json((output / "training.json").read_bytes()).precision == precision


def test_a_class_that_does_not_pack_is_padded_and_alert_summary_and_report_say_so(made: Made, tmp_path: Path) -> None:
    """Gemma-2's soft-capped attention scores are unknown to the packed attention."""
    torch.manual_seed(0)
    settings = {"vocab_size": 22, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Gemma2ForCausalLM(Gemma2Config(**settings, **heads)).save_pretrained(tmp_path / "student")
    copy_tokenizer(made.teacher, tmp_path / "student")

    class Listening(SilentReporter):
        def __init__(self) -> None:
            self.alerts: list[tuple[str, str]] = []

        def alert(self, code: str, message: str) -> None:
            self.alerts.append((code, message))

    reporter = Listening()
    context = replace(made.context, reporter=reporter)
    summary = stages.sft(
        made.recipe.sft.model_copy(update={"steps": 2}),
        SftInputs(student=tmp_path / "student", responses=made.root / "responses"),
        tmp_path / "sft",
        context,
    )
    assert not summary.packed
    ((code, message),) = reporter.alerts
    assert code == "padded_rows"
    assert "Gemma2ForCausalLM" in message
    report = stages.benchmark(
        made.recipe.benchmark.model_copy(update={"limit": 4, "kl_prompts": 2}),
        BenchmarkInputs(
            models={"student": tmp_path / "sft"}, prompts=made.prompts, recipe_hash="abc", teacher=made.teacher
        ),
        tmp_path / "report",
        context,
    )
    assert report.warnings[0] == message
    assert f"Note: {message}" in (tmp_path / "report" / "report.md").read_text()


def test_another_teacher_is_refused_with_both_identities(made: Made, example: Path) -> None:
    other = example / "teacher_other_style"
    with pytest.raises(ConsistencyError, match="teacher_mismatch") as caught:
        stages.score(
            made.recipe.score,
            ScoreInputs(teacher=other, student=made.sft, rollouts=made.root / "rollouts"),
            made.root / "other-cache",
            made.context,
        )
    for model in (other, made.teacher):
        assert inspect_model(model).identity.label() in str(caught.value)


def test_another_teacher_may_be_allowed_and_is_recorded(made: Made, example: Path) -> None:
    allowed = {"allow_teacher_mismatch": True}
    cache = made.root / "allowed-cache"
    inputs = ScoreInputs(
        student=made.sft, rollouts=made.root / "rollouts", teacher=example / "teacher_other_style", **allowed
    )
    stages.score(made.recipe.score, inputs, cache, made.context)
    assert read_manifest(cache).teacher_mismatch_allowed
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        made.distill("refused", cache=cache)
    assert read_lineage(made.distill("allowed", cache=cache, **allowed)).teacher_mismatch_allowed

    mending = made.recipe.distill.model_copy(update={"repair": "residual"})
    mended = made.distill("mended", cache=cache, recipe=mending, **allowed)
    repair = json.loads((mended / "training.json").read_text())["repair"]
    assert repair["tokens"] == read_manifest(cache).tokens
    assert repair["mean_residual"] == pytest.approx(repair["mean_difference"], rel=0.2)
    assert "'repair': 'residual'" in str(read_lineage(mended).recipe)
    unmended = weights_of(made.root / "allowed")
    assert any(values.ne(unmended[name]).any() for name, values in weights_of(mended).items())


def test_rollouts_of_another_policy_are_refused(made: Made) -> None:
    other = made.distill("other-policy")
    with pytest.raises(ConsistencyError, match="behaviour_mismatch"):
        made.distill("refused-policy", student=other)


def test_a_copied_artifact_proves_itself_elsewhere(made: Made, tmp_path: Path) -> None:
    student = Path(shutil.copytree(made.sft, tmp_path / "renamed student"))
    cache = Path(shutil.copytree(made.cache, tmp_path / "renamed cache"))
    copied, original = made.distill("from-copy", student=student, cache=cache), made.distill("from-original")
    assert all(
        torch.equal(a, b) for a, b in zip(weights_of(copied).values(), weights_of(original).values(), strict=True)
    )


def test_a_student_without_lineage_needs_a_declared_teacher(made: Made, tmp_path: Path) -> None:
    stranger = Path(shutil.copytree(made.sft, tmp_path / "stranger"))
    (stranger / "lineage.json").unlink()
    inputs = ScoreInputs(teacher=made.teacher, student=stranger, rollouts=made.root / "rollouts")
    with pytest.raises(ConsistencyError, match="lineage_missing"):
        stages.score(made.recipe.score, inputs, tmp_path / "refused", made.context)
    declared = asserted_claim(inspect_model(made.teacher).identity)
    stages.score(made.recipe.score, replace(inputs, sft_teacher=declared), tmp_path / "cache", made.context)
    assert read_manifest(tmp_path / "cache").sft_teacher.basis == "asserted", "never proven"


def test_a_tampered_shard_stops_training_before_it_starts(made: Made, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made.cache, tmp_path / "cache", ignore=shutil.ignore_patterns("flat.bin")))
    shard = cache / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"shard-00001\.parquet"):
        made.distill("tampered", cache=cache)


def test_a_flipped_byte_beside_weights_and_shards_is_seen(made: Made, tmp_path: Path) -> None:
    student, cache = shutil.copytree(made.sft, tmp_path / "student"), shutil.copytree(made.cache, tmp_path / "cache")
    for file, changes in (
        (student / "config.json", {"student": student}),
        (cache / "tokenizer" / "chat_template.jinja", {"cache": cache}),
    ):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(IntegrityError, match=file.name):
            made.distill("never", **changes)


def test_a_changed_student_is_not_what_its_lineage_says(made: Made, tmp_path: Path) -> None:
    student = Path(shutil.copytree(made.sft, tmp_path / "student"))
    shutil.copyfile(made.distill("changed") / "model.safetensors", student / "model.safetensors")
    with pytest.raises(IntegrityError, match="lineage_mismatch"):
        made.distill("from-changed", student=student)


def test_an_estimator_needs_its_columns_in_the_cache(made: Made) -> None:
    recipe = made.recipe.distill.model_copy(update={"estimator": "topk_reverse_kl", "topk": 16})
    with pytest.raises(ConsistencyError, match="topk_missing"):
        made.distill("no-topk", recipe=recipe)


def test_the_student_adopts_the_teacher_s_template_and_eos(made: Made, tmp_path: Path, example: Path) -> None:
    student = Path(shutil.copytree(example / "student", tmp_path / "student"))
    (student / "chat_template.jinja").write_text("{{ messages[0].content }}")
    output = tmp_path / "sft"
    stages.sft(made.recipe.sft, SftInputs(student=student, responses=made.root / "responses"), output, made.context)
    adopted, teacher = inspect_model(output), inspect_model(made.teacher)
    assert adopted.identity.chat_template == teacher.identity.chat_template
    assert adopted.eos_token_ids == teacher.eos_token_ids


def test_text_responses_without_ids_train_too(made: Made, tmp_path: Path, example: Path) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text('{"prompt": "1+1=?", "response": "1+1=2;#2"}\n{"prompt": "2+2=?", "response": "2+2=4;#4"}\n')
    summary = stages.sft(
        made.recipe.sft, SftInputs(student=example / "student", responses=file), tmp_path / "sft", made.context
    )
    assert summary.trained_tokens == made.recipe.sft.steps * 2 * len("1+1=2;#2 ")
    assert read_lineage(tmp_path / "sft").sft_teacher is None


class Stopping(SilentReporter):
    """Asks to stop once a number of progress reports has come."""

    def __init__(self, after: int) -> None:
        self.left = after

    def progress(self, done: int, total: int, unit: str) -> None:
        self.left -= 1

    def should_stop(self) -> bool:
        return self.left <= 0


def test_distillation_stops_when_asked_and_leaves_no_result(made: Made) -> None:
    context = Context(made.recipe.runtime, made.recipe.prompting, Stopping(after=2))
    with pytest.raises(RunError, match="run_cancelled"):
        made.distill("stopped", context=context)
    assert not (made.root / "stopped").exists()


@pytest.mark.parametrize("method", ["sft", "lightning", "live"])
def test_a_training_that_goes_on_gives_the_model_it_would_have_given(made: Made, tmp_path: Path, method: str) -> None:
    def train(output: Path, reporter: SilentReporter, checkpoints: Path | None) -> dict[str, torch.Tensor]:
        context = Context(made.recipe.runtime, made.recipe.prompting, reporter, checkpoints=checkpoints)
        if method == "sft":
            student, responses = made.teacher.parent / "student", made.root / "responses"
            stages.sft(made.recipe.sft, SftInputs(student=student, responses=responses), output, context)
        else:
            distill = made.recipe.distill.model_copy(update={"method": method})
            live = {"teacher": made.teacher, "prompts": made.prompts, "rollout": made.recipe.rollout}
            source = {"cache": made.cache} if method == "lightning" else live
            stages.distill(distill, DistillInputs(student=made.sft, **source), output, context)
        return weights_of(output)

    expected = train(tmp_path / "whole", SilentReporter(), None)
    with pytest.raises(RunError, match="run_cancelled"):
        train(tmp_path / "stopped", Stopping(after=2), tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    resumed = train(tmp_path / "resumed", SilentReporter(), tmp_path / "checkpoints")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_rollouts_stop_when_asked_and_leave_no_record(made: Made, tmp_path: Path) -> None:
    context = Context(made.recipe.runtime, made.recipe.prompting, Stopping(after=2))
    with pytest.raises(RunError, match="run_cancelled"):
        stages.rollout(
            made.recipe.rollout, RolloutInputs(student=made.sft, prompts=made.prompts), tmp_path / "out", context
        )
    assert not (tmp_path / "out" / "rollouts.json").exists()


def test_over_long_prompts_are_counted_aloud(made: Made, tmp_path: Path) -> None:
    alerts: list[tuple[str, str]] = []

    class Listening(SilentReporter):
        def alert(self, code: str, message: str) -> None:
            alerts.append((code, message))

    recipe = resolve_recipe("demo", SHORT | {"prompting.max_prompt_tokens": 9})
    stages.rollout(
        recipe.rollout,
        RolloutInputs(student=made.sft, prompts=made.prompts),
        tmp_path / "rollouts",
        Context(recipe.runtime, recipe.prompting, Listening()),
    )
    assert [code for code, _ in alerts] == ["prompts_dropped"]


def test_no_prompt_left_is_an_error(made: Made, tmp_path: Path) -> None:
    recipe = resolve_recipe("demo", SHORT | {"prompting.max_prompt_tokens": 1})
    with pytest.raises(OpdError, match="empty_data"):
        stages.rollout(
            recipe.rollout,
            RolloutInputs(student=made.sft, prompts=made.prompts),
            tmp_path / "rollouts",
            Context(recipe.runtime, recipe.prompting),
        )
