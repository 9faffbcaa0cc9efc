"""Plans: teacher consistency, what is already there, what blocks, and what it costs."""

import json
import re
from dataclasses import replace

import pytest

from opd_mcp.identity.models import ModelCache
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, DataError, PathError, PlanError, ResourceError
from opd_mcp.schemas.requests import PlanDistillation, StartDistillation
from opd_mcp.server.render.plans import plan_text
from opd_mcp.server.render.runs import list_text
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.runs import JOURNAL_FILE

NEEDS_SFT = ["generate_responses", "sft", "rollout", "score", "distill", "benchmark"]
HAS_SFT = ["rollout", "score", "distill", "benchmark"]


def names(plan):
    return [phase.name for phase in plan.phases]


def codes(findings):
    return [finding.code for finding in findings]


def test_a_plain_student_gets_its_sft_on_this_teacher_first(service, world):
    plan = service.plan(world.plan_arguments(sft_prompts=world.prompts("sft")))
    assert names(plan) == NEEDS_SFT
    assert (plan.consistency.status, plan.consistency.basis) == ("consistent", "by_construction")
    assert plan.blocking == []
    assert plan.next_action.call_text() == f"Call start_distillation(plan_id='{plan.plan_id}')"
    assert plan.sample[0] == "1+0=?"


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        ("live", ["generate_responses", "sft", "distill", "benchmark"]),
        ("sft", ["generate_responses", "sft", "benchmark"]),
    ],
)
def test_the_method_decides_the_phases(service, world, method, phases):
    assert names(service.plan(world.plan_arguments(method=method))) == phases


def test_a_student_of_this_teacher_is_consistent_and_proven(service, world, sft_student):
    plan = service.plan(world.plan_arguments(student=sft_student(world.teacher)))
    assert names(plan) == HAS_SFT
    assert (plan.consistency.status, plan.consistency.basis) == ("consistent", "proven")


def test_a_student_of_another_teacher_is_stopped_with_both_identities(service, world, sft_student):
    student = sft_student(world.other_teacher)
    plan = service.plan(world.plan_arguments(student=student))
    assert codes(plan.blocking) == ["teacher_mismatch"]
    finding = plan.blocking[0]
    assert plan.consistency.teacher.label() in finding.message
    assert plan.consistency.sft_teacher.label() in finding.message
    assert "allow_teacher_mismatch=True" in finding.fix
    assert "it won back little (docs/results.md)" in finding.fix
    key, value = re.search(r"override ([\w.]+)='(\w+)'", finding.fix).groups()
    repaired = service.plan(world.plan_arguments(student=student, allow_teacher_mismatch=True, overrides={key: value}))
    assert (repaired.blocking, repaired.recipe.distill.repair) == ([], "residual")
    before = service.list_runs().total
    with pytest.raises(PlanError, match=r"plan_blocked.*teacher_mismatch.*teacher_other_style@.*teacher@"):
        service.start_distillation(world.start_arguments(student=student))
    assert service.list_runs().total == before


def test_a_mismatch_can_be_allowed_and_is_said_and_recorded(service, world, sft_student, finished):
    student = sft_student(world.other_teacher)
    plan = service.plan(world.plan_arguments(student=student, allow_teacher_mismatch=True))
    assert plan.blocking == []
    assert "teacher_mismatch" in codes(plan.warnings)
    assert plan.consistency.mismatch_allowed
    started = service.start_distillation(world.start_arguments(student=student, allow_teacher_mismatch=True))
    assert finished(service, started.run_id).state == "succeeded"
    assert service.store.record(started.run_id).request.inputs.allow_teacher_mismatch


def test_a_declared_teacher_is_asserted_never_proven(service, world):
    for declared in (world.teacher, "teacher"):
        plan = service.plan(world.plan_arguments(declared_teacher=declared))
        assert names(plan) == HAS_SFT
        assert (plan.consistency.status, plan.consistency.basis) == ("consistent", "asserted")
        assert "lineage_asserted" in codes(plan.warnings)


def test_a_declared_teacher_that_is_another_one_is_a_mismatch(service, world):
    for declared in (world.other_teacher, "some-other-model"):
        plan = service.plan(world.plan_arguments(declared_teacher=declared))
        assert codes(plan.blocking) == ["teacher_mismatch"]


def test_tokenizers_that_differ_are_refused_with_the_first_token(service, world):
    student = world.copy_of(world.student, "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["@"] = vocabulary.pop("7")
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*'7'.*'@'"):
        service.plan(world.plan_arguments(student=str(student)))


def test_a_plan_says_what_it_assumes_about_the_prompts(service, world):
    plan = service.plan(world.plan_arguments())
    assert codes(plan.warnings) == ["sft_prompts_default", "no_eval_prompts"]
    overlapping = world.plan_arguments(sft_prompts=world.prompts("sft", start=90), eval_prompts=world.prompts(start=3))
    found = {finding.code: finding.message for finding in service.plan(overlapping).warnings}
    assert "6 of 6" in found["eval_overlap"]
    without = world.file("no-answers.jsonl", '{"prompt": "9+9=?"}\n')
    assert "no_answers" in codes(service.plan(world.plan_arguments(eval_prompts=without)).warnings)


def test_what_earlier_runs_made_is_satisfied_and_costs_nothing(service, world, finished):
    before = service.plan(world.plan_arguments(overrides={"sft.steps": 3, "distill.steps": 3}))
    finished(service, service.start_distillation(world.start_arguments()).run_id)
    after = service.plan(world.plan_arguments(overrides={"sft.steps": 3, "distill.steps": 3}))
    assert after.plan_id == before.plan_id
    assert all(phase.satisfied_by for phase in after.phases)
    assert after.estimates[0].seconds == 0
    live = next(estimate for estimate in after.estimates if estimate.method == "live")
    assert [phase.phase for phase in live.phases] == ["process_start", "distill", "benchmark"]


def test_live_and_lightning_stand_side_by_side_with_their_basis(service, world):
    plan = service.plan(world.plan_arguments())
    by_method = {estimate.method: estimate for estimate in plan.estimates}
    assert list(by_method) == ["lightning", "live"]
    assert [phase.phase for phase in by_method["lightning"].phases] == ["process_start", *NEEDS_SFT]
    flops = {name: {phase.phase: phase.flops for phase in found.phases} for name, found in by_method.items()}
    assert flops["live"]["distill"] > flops["lightning"]["distill"]
    for estimate in plan.estimates:
        assert estimate.memory_basis
        assert estimate.disk_basis
        assert all("assumed" in phase.basis for phase in estimate.phases)
        assert estimate.peak_memory_bytes > 0


def test_what_does_not_fit_blocks_the_plan_with_numbers(service, world):
    huge = {"sft.micro_batch_tokens": 10**9, "sft.batch_size": 10**6, "rollout.count": 10**9}
    plan = service.plan(world.plan_arguments(overrides=huge))
    assert codes(plan.blocking) == ["not_enough_memory", "not_enough_disk"]
    assert "GiB" in plan.blocking[0].message
    assert plan.blocking[0].fix in plan.next_action.why
    assert plan.next_action.tool is None, "the same arguments would be blocked again"


def test_the_top_k_estimator_gets_a_cache_that_holds_its_k(service, world):
    plan = service.plan(world.plan_arguments(preset="quick", estimator="topk_reverse_kl"))
    assert (plan.recipe.score.topk, plan.recipe.distill.topk) == (8, 8)
    sampled = service.plan(world.plan_arguments(preset="quick"))
    assert sampled.recipe.score.topk == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"distill.step": 3}, r"unknown_override.*distill\.steps"),
        ({"distill.steps": 0}, r"invalid_argument.*distill\.steps"),
        ({"distill.method": "live"}, "contradicts the argument method"),
        ({"distill.estimator": "topk_reverse_kl"}, "contradicts the argument estimator"),
    ],
)
def test_overrides_are_checked(service, world, overrides, message):
    with pytest.raises(ArgumentError, match=message):
        service.plan(world.plan_arguments(overrides=overrides))


def test_a_gpu_that_is_not_there_is_refused_before_the_start(service, world, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError, match="device_unavailable"):
        service.plan(world.plan_arguments(overrides={"runtime.device": "cuda"}))


def test_models_of_the_hub_are_planned_with_what_is_not_known_yet(service, world):
    plan = service.plan(world.plan_arguments(teacher="org/teacher", declared_teacher="org/teacher"))
    assert names(plan) == ["fetch", *HAS_SFT]
    assert plan.consistency.status == "unknown"
    assert "checked_after_fetch" in codes(plan.warnings)
    assert plan.estimates == []


BAD_DATA = {
    "empty.jsonl": ("", DataError, "empty_data"),
    "malformed.jsonl": ('{"prompt": 1}\n{"prompt": \n', DataError, r"malformed_line.*2 rows.*malformed\.jsonl line 1"),
    "fieldless.jsonl": ('{"body": "1+1=?"}\n', DataError, r'missing_field.*Nearest: columns={"prompt": "body"}'),
    "data.docx": ("prompt\n1+1=?\n", DataError, "unknown_format"),
}


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("role", ["prompts", "sft_prompts", "eval_prompts"])
def test_bad_data_is_one_error_and_nothing_starts(service, world, name, role):
    content, error, message = BAD_DATA[name]
    with pytest.raises(error, match=message):
        service.start_distillation(world.start_arguments(**{role: world.file(name, content)}))
    assert service.list_runs().total == 0


def test_a_plan_says_what_was_understood_and_warns_of_skipped_rows(service, world):
    rows = "".join(f'{{"question": "{i}+1=?", "answer": "#### {i + 1}"}}\n' for i in range(8))
    prompts = world.file("gsm8k.jsonl", rows + "broken\n{}\n")
    plan = service.plan(world.plan_arguments(prompts=prompts))
    understood = plan.inputs.prompts.understood
    assert (understood.shape, understood.rows, understood.skipped) == ("question/answer", 8, 2)
    warning = next(finding for finding in plan.warnings if finding.code == "rows_skipped")
    assert "2 of 10 rows of prompts" in warning.message
    assert "gsm8k.jsonl line 9: not JSON" in warning.message


def test_columns_map_each_argument_and_start_the_same_run(service, world):
    own = world.file("own.jsonl", '{"q": "1+1=?"}\n')
    held_out = world.file("held.jsonl", '{"task": {"q": "2+2=?"}, "gold": 4}\n')
    columns = {"prompt": "q", "eval_prompts.prompt": "task.q", "eval_prompts.answer": "gold"}
    plan = service.plan(world.plan_arguments(prompts=own, eval_prompts=held_out, columns=columns))
    assert plan.sample == ["1+1=?"]
    assert plan.inputs.eval_prompts.rows_with_answer == 1
    plain = world.file("plain.jsonl", '{"prompt": "1+1=?"}\n')
    same_columns = {key: path for key, path in columns.items() if key != "prompt"}
    same = service.plan(world.plan_arguments(prompts=plain, eval_prompts=held_out, columns=same_columns))
    assert [phase.key for phase in same.phases] == [phase.key for phase in plan.phases]


def test_data_of_the_hub_is_planned_with_what_is_not_known_yet(service, world):
    plan = service.plan(world.plan_arguments(prompts="openai/gsm8k:main@train"))
    assert names(plan)[0] == "fetch"
    assert plan.estimates == []
    assert "checked_after_fetch" in codes(plan.warnings)
    other = service.plan(world.plan_arguments(prompts="openai/gsm8k:main@train", columns={"prompt": "question"}))
    assert other.phases[1].key != plan.phases[1].key


def test_a_plan_is_its_id_and_starts_once(service, world, busy_machine):
    arguments = world.plan_arguments()
    plan = service.plan(arguments)
    assert service.plan(arguments).plan_id == plan.plan_id
    first = service.start_distillation(StartDistillation(plan_id=plan.plan_id))
    again = world.service().start_distillation(StartDistillation(plan_id=plan.plan_id))
    by_arguments = service.start_distillation(StartDistillation(**arguments.model_dump()))
    assert {first.run_id} == {again.run_id, by_arguments.run_id}
    with pytest.raises(ArgumentError, match="given next to it: preset"):
        service.start_distillation(StartDistillation(plan_id=plan.plan_id, preset="paper"))
    service.cancel(first.run_id)


@pytest.mark.parametrize(
    ("change", "named"),
    [("student", r"student\.identity\.weights"), ("prompts", r"prompts\.sha256"), ("teacher", r"not_found")],
)
def test_a_plan_that_no_longer_matches_names_what_changed(service, world, change, named):
    student, teacher = world.copy_of(world.student, "student"), world.copy_of(world.teacher, "teacher")
    plan = service.plan(world.plan_arguments(student=str(student), teacher=str(teacher)))
    if change == "student":
        weights = bytearray((student / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (student / "model.safetensors").write_bytes(weights)
    elif change == "prompts":
        world.prompts(count=7)
    else:
        teacher.rename(teacher.with_name("moved"))
    with pytest.raises((PlanError, PathError), match=named) as caught:
        service.start_distillation(StartDistillation(plan_id=plan.plan_id))
    assert caught.value.code in {"plan_changed", "not_found"}
    assert service.list_runs().total == 0


def test_the_plan_shows_what_is_odd_in_the_prompts(service, world):
    prompts = world.root / "data" / "odd.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("1+1=?", "1+1=?", "2+2=?", "1" * 300)))
    evaluation = world.root / "data" / "odd-eval.jsonl"
    evaluation.write_text('{"prompt": "1+1=?", "answer": "2"}\n{"prompt": " 2 + 2 = ? ", "answer": "4"}\n')
    overrides = {"prompting.max_prompt_tokens": 100}
    arguments = world.plan_arguments(prompts=str(prompts), eval_prompts=str(evaluation), overrides=overrides)
    plan = service.plan(arguments)
    assert plan.hygiene.to_dict() == {
        "prompts": 4,
        "over_long_prompts": 1,
        "duplicate_prompts": 1,
        "eval_overlap_exact": 2,  # both copies of 1+1=?
        "eval_overlap_normalised": 3,
    }
    assert "prompts read as prompt (prompt" in plan_text(plan)
    assert "prompts: 4, over-long 1, duplicates 1, in the evaluation set 2 exactly, 3 normalised" in plan_text(plan)
    found = {warning.code: warning.message for warning in plan.warnings}
    assert "1 of 4 prompts are duplicates" in found["duplicate_prompts"]
    assert "1 of 4 prompts are over 100 tokens" in found["over_long_prompts"]
    assert "2 of 2 eval prompts are also training prompts (1 to the letter" in found["eval_overlap"]


def test_a_start_uses_the_plan_that_was_made_while_its_files_stay_what_they_are(world, service, monkeypatch, finished):
    """The plan of a start is made once; a file that changes in between is seen all the same."""
    made, plan = [], service._planner.plan
    monkeypatch.setattr(type(service._planner), "plan", lambda self, arguments: made.append(1) or plan(arguments))
    prompts = world.prompts()
    arguments = world.start_arguments(prompts=prompts)
    assert service.start_question(arguments, gpu_hours=8.0) is None
    run = service.start_distillation(arguments)
    assert len(made) == 1
    assert service.start_distillation(arguments).run_id == run.run_id
    service.cancel(run.run_id)
    finished(service, run.run_id)
    world.prompts(count=7)
    other = service.start_distillation(arguments)
    assert len(made) == 2
    assert service.store.record(other.run_id).request.inputs.prompts.rows == 7
    service.cancel(other.run_id)


def test_what_would_fit_is_listed_with_numbers(service, world):
    plan = service.plan(world.plan_arguments())
    full, lora, packed = plan.fits
    assert (full.name, full.fits, full.overrides) == ("full", True, {})
    assert (lora.name, lora.fits, lora.overrides) == ("lora", True, {"sft.adapter": {}, "distill.adapter": {}})
    nf4 = {"quantization": "nf4"}
    assert (packed.name, packed.fits) == ("lora_4bit", True)
    assert packed.overrides == {"sft.adapter": nf4, "distill.adapter": nf4}
    assert "a LoRA adapter on a 4-bit base fits" in plan_text(plan)
    mine = next(estimate for estimate in plan.estimates if estimate.method == plan.method)
    assert full.peak_memory_bytes == mine.peak_memory_bytes


def test_a_device_too_small_for_the_batches_is_offered_smaller_ones_in_a_call_that_fits(service, world, gpu):
    """All weights first: smaller micro-batches give the same gradient."""
    overrides = {"runtime.device": "auto", "rollout.batch_size": 4096, "rollout.count": 4096}
    needed = service.plan(world.plan_arguments(overrides=overrides)).fits[0].peak_memory_bytes >> 20
    gpu(total=80_000, free=needed - 100)
    plan = service.plan(world.plan_arguments(overrides=overrides))
    [shortage] = plan.blocking
    assert shortage.code == "not_enough_memory"
    assert "smaller batches" in shortage.fix
    assert plan.next_action.tool == "plan_distillation"
    again = service.plan(PlanDistillation(**plan.next_action.arguments))
    assert not again.blocking
    assert again.recipe.rollout.batch_size < 4096
    assert again.recipe.distill.adapter is None


def test_the_batch_follows_from_all_memory_of_the_device_not_from_what_is_free(service, world, gpu):
    """1024 rows of the preset have 198 MiB of keys and values; a plan and a cache of the same rows agree."""
    overrides = {"runtime.device": "auto", "rollout.count": 4096}
    declared = {"declared_teacher": world.teacher}
    plans = []
    for free in (860, 300):
        gpu(total=860, free=free)
        plans.append(service.plan(world.plan_arguments(overrides=overrides, **declared)))
    assert [plan.recipe.rollout.batch_size for plan in plans] == [512, 512]
    assert plans[0].plan_id == plans[1].plan_id
    [rollout] = [phase for phase in plans[0].estimates[0].phases if phase.phase == "rollout"]
    assert rollout.batch_size == 512
    assert "rollout 512 rows, 98.8 MiB" in plan_text(plans[0])
    cache = service._builder.cache(world.cache_arguments(world.student, overrides=overrides, **declared))
    assert [phase.key for phase in cache.phases] == [phase.key for phase in plans[0].phases][:2]
    named = service.plan(world.plan_arguments(overrides=overrides | {"rollout.batch_size": 1024}, **declared))
    assert named.recipe.rollout.batch_size == 1024
    gpu(total=80_000, free=80_000)
    assert service.plan(world.plan_arguments(overrides=overrides, **declared)).recipe.rollout.batch_size == 1024


def test_nothing_fits_a_device_that_is_smaller_than_a_process(service, world, gpu):
    gpu(total=400, free=300)
    plan = service.plan(world.plan_arguments(overrides={"runtime.device": "auto"}))
    assert [option.fits for option in plan.fits] == [False, False, False]
    assert "Neither full training nor LoRA, 4-bit or not, fits" in plan.blocking[0].fix


def test_a_device_too_small_for_a_bf16_base_is_offered_one_in_4_bits(service, world, gpu, monkeypatch):
    """The student's files say 8B; both sections get the quantization, and the same plan then blocks no more."""
    inspect = ModelCache.inspect_model
    sizes = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128}

    def large(cache, path):
        facts = inspect(cache, path)
        if path.name != "student":
            return facts
        config = facts.config | sizes | {"intermediate_size": 12288, "num_key_value_heads": 8}
        return replace(facts, parameters=8_190_735_360, weight_bytes=2 * 8_190_735_360, config=config)

    monkeypatch.setattr(ModelCache, "inspect_model", large)
    gpu(total=80_000, free=79_000)
    few = {f"{name}.batch_size": 1 for name in ("sft", "distill", "responses", "rollout", "benchmark")}
    full = {f"{name}.activation_checkpointing": "full" for name in ("sft", "distill")}
    overrides = {"runtime.device": "auto", "runtime.dtype": "bfloat16"} | few | full
    arguments = world.plan_arguments(overrides=overrides)
    full, lora, packed = service.plan(arguments).fits
    assert packed.peak_memory_bytes < lora.peak_memory_bytes < full.peak_memory_bytes
    gpu(total=80_000, free=(packed.peak_memory_bytes + lora.peak_memory_bytes) // 2 >> 20)
    blocked = service.plan(arguments)
    assert codes(blocked.blocking)[0] == "not_enough_memory"
    assert [option.fits for option in blocked.fits] == [False, False, True]
    assert "4-bit base" in blocked.blocking[0].fix
    again = service.plan(PlanDistillation(**blocked.next_action.arguments))
    assert "not_enough_memory" not in codes(again.blocking)
    assert again.recipe.sft.adapter.quantization == again.recipe.distill.adapter.quantization == "nf4"


@pytest.mark.parametrize(
    ("sft", "distill", "blocked"),
    [
        ({"save": "merged"}, {"quantization": "nf4"}, True),
        ({"save": "both", "quantization": "nf4"}, {"quantization": "nf4"}, True),
        ({"quantization": "nf4"}, {"quantization": "nf4"}, False),
        ({"quantization": "nf4", "save": "merged"}, {}, False),
        (None, {"quantization": "nf4"}, False),
    ],
)
def test_a_merged_sft_is_not_rounded_to_4_bits_again(world, service, sft, distill, blocked):
    overrides = {"distill.adapter": distill} | ({} if sft is None else {"sft.adapter": sft})
    plan = service.plan(world.plan_arguments(overrides=overrides))
    assert ("lossy_precision" in codes(plan.blocking)) == blocked


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        ("demo", {}, {}),
        (
            "demo",
            {"distill.optimizer.learning_rate": 0.3},
            {"learning_rate_far": "is too high: 0.3, 100 times the 0.003 at which a student of 0.108M"},
        ),
        ("quick", {}, {"preset_rates": "as preset 'quick' has it, is too low: "}),
        ("quick", {"sft.optimizer.learning_rate": 4e-3, "distill.optimizer.learning_rate": 3e-3}, {}),
    ],
)
def test_rates_that_do_not_fit_the_student_are_a_warning_with_the_plan_that_does(
    service, world, preset, overrides, told
):
    warnings = service.plan(world.plan_arguments(preset=preset, overrides=overrides)).warnings
    found = [warning for warning in warnings if warning.code in ("learning_rate_far", "preset_rates")]
    assert {warning.code for warning in found} == set(told)
    assert ("student_untrained" in codes(warnings)) == (preset == "quick"), "its norms are as they were initialised"
    for warning in found:
        assert told[warning.code] in warning.message
        fitting = service.plan(PlanDistillation(**warning.call.arguments))
        assert not {"learning_rate_far", "preset_rates"} & set(codes(fitting.warnings))


def rates_far(plan):
    return [warning for warning in plan.warnings if warning.code == "learning_rate_far"]


def test_a_rate_at_which_a_run_of_the_student_collapsed_is_not_named_as_fitting(service, world, finished):
    low = {"distill.optimizer.learning_rate": 1e-4}
    [warning] = rates_far(service.plan(world.plan_arguments(overrides=low)))
    assert warning.message.startswith("'distill.optimizer.learning_rate' is too low: 0.0001, 1/30 of the 0.003")
    run_id = finished(service, service.start_distillation(world.start_arguments()).run_id).run_id
    with JournalWriter(service.workspace.run(run_id) / JOURNAL_FILE, 1) as journal:
        journal.append("alert", {"code": "collapse", "message": "It has collapsed."})
    assert rates_far(service.plan(world.plan_arguments(overrides=low))) == []


def test_a_small_student_s_rate_comes_with_the_steps_that_it_takes(service, world):
    auto = service.plan(world.plan_arguments(preset="auto"))
    distill = auto.recipe.distill
    assert (distill.steps, distill.optimizer.learning_rate, distill.optimizer.schedule) == (400, 3e-3, "linear")
    assert "few_steps" not in codes(auto.warnings)
    assert "400 distill.steps" in auto.preset_reason
    few = service.plan(world.plan_arguments(preset="auto", overrides={"distill.steps": 50, "runtime.seed": 3}))
    [warning] = [warning for warning in few.warnings if warning.code == "few_steps"]
    assert warning.message.startswith("'distill.steps' is 50, at a rate of 0.003: ")
    assert warning.fix.startswith("Set 'distill.steps' to 400")
    again = service.plan(PlanDistillation(**warning.call.arguments))
    assert "few_steps" not in codes(again.warnings)
    assert (again.recipe.distill.steps, again.recipe.runtime.seed) == (400, 3)
    quick = service.plan(world.plan_arguments(preset="quick"))
    [rates] = {warning.call.call_text() for warning in quick.warnings if warning.code == "preset_rates"}
    assert "'distill.steps': 400" in rates, "rates alone would end worse"


def test_inline_prompts_are_to_be_added_to_the_call_that_plans_again(service, world):
    plan = service.plan(world.plan_arguments(preset="quick", prompts=["1+1=?"]))
    [call] = {warning.call.call_text() for warning in plan.warnings if warning.code == "preset_rates"}
    assert call.startswith("Call plan_distillation(prompts='…', student=")


def test_a_run_alerts_of_a_rate_that_does_not_fit(service, world, finished):
    arguments = world.start_arguments(overrides={"distill.optimizer.learning_rate": 0.3})
    status = finished(service, service.start_distillation(arguments).run_id)
    assert [alert.code for alert in status.alerts] == ["learning_rate_far"]
    assert status.result["verdict"]["judgement"] == "unknown", "the stand-in measures nothing"
    [row] = service.list_runs().rows
    assert row.note == "unknown"
    assert "succeeded (verdict unknown)" in list_text(service.list_runs())
