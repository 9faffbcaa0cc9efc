"""What a run's report is made of: the rows besides the student, suites, tasks of lm-eval, and what the result says."""

import json
from pathlib import Path

from opd_mcp.planning import suites
from opd_mcp.schemas.reports import BenchmarkReport
from opd_mcp.schemas.requests import BenchmarkStudent
from opd_mcp.server.render.runs import status_text

SHORT = {
    "responses.limit": 24,
    "sft.steps": 6,
    "sft.batch_size": 8,
    "sft.on_truncated": "keep",
    "rollout.count": 16,
    "distill.steps": 2,
    "distill.batch_size": 8,
    "benchmark.limit": 24,
    "benchmark.samples_per_prompt": 2,
    "benchmark.kl_prompts": 2,
}


def report_of(status) -> BenchmarkReport:
    return BenchmarkReport.from_json((Path(status.result["paths"]["report"]) / "report.json").read_bytes())


def test_a_distillation_s_report_has_teacher_and_base_and_the_share_of_the_gap(world, real_service, finished):
    example = Path(world.teacher).parent
    inputs = {"prompts": str(example / "opd.jsonl"), "eval_prompts": str(example / "eval.jsonl")}
    arguments = world.start_arguments(**inputs, sft_prompts=str(example / "sft.jsonl"), overrides=SHORT)
    status = finished(real_service, real_service.start_distillation(arguments).run_id)
    assert status.state == "succeeded", status.error
    report = report_of(status)
    assert [model.name for model in report.models] == ["distilled", "sft", "teacher", "base"]
    assert report.teacher_row == "teacher"
    assert [(gap.baseline, gap.teacher) for gap in report.gap_closed] == [("sft", "teacher"), ("base", "teacher")]
    assert report.teacher_responses.right.samples == 24
    assert report.teacher_responses.right.value > 0.9
    text = status_text(status)
    assert "score of teacher: " in text
    assert "share of the gap closed from base to teacher: " in text
    assert "had no extractable answer; they end: `…" in text
    assert "before the SFT: 24 of 24 responses of the teacher are right by `regex`" in text
    assert "worse than teacher" not in text, "a student below its teacher is no news"
    assert f"VERDICT {report.verdict.judgement.replace('_', ' ')}: {report.verdict.sentence}" in text
    assert f"report_page: {Path(status.result['paths']['report']) / 'report.html'}" in text
    assert {curve.key for curve in report.curves} >= {"sft.loss", "distill.reverse_kl_k1"}
    assert set(report.planned_seconds) >= {"sft", "distill"}
    assert list(report.samples[0].responses) == ["distilled", "sft", "teacher", "base"]
    assert report.samples[0].right["teacher"]


def test_what_is_not_measured_is_said_with_its_reason(world, real_service, finished):
    example = Path(world.teacher).parent
    prompts = {"prompts": str(example / "opd.jsonl")}
    first = finished(
        real_service,
        real_service.start_distillation(world.start_arguments(**prompts, method="sft", overrides=SHORT)).run_id,
    )
    arguments = world.start_arguments(
        **prompts,
        student=first.result["paths"]["sft"],
        eval_prompts=str(example / "eval.jsonl"),
        overrides=SHORT | {"benchmark.references": ["base"], "benchmark.limit": 4},
    )
    status = finished(real_service, real_service.start_distillation(arguments).run_id)
    assert status.state == "succeeded", status.error
    assert [model.name for model in report_of(status).models] == ["distilled", "sft"]
    assert list(status.result["not_measured"]) == ["base"]
    assert "not measured: base: the student came with its SFT done" in status_text(status)


def test_a_second_round_is_compared_with_the_round_before_and_not_with_an_sft_student(world, service, finished):
    first = finished(service, service.start_distillation(world.start_arguments()).run_id)
    assert [model.name for model in report_of(first).models] == ["distilled", "sft"]
    second = service.start_distillation(world.start_arguments(student=first.result["paths"]["model"]))
    status = finished(service, second.run_id)
    assert status.state == "succeeded", status.error
    assert [model.name for model in report_of(status).models] == ["distilled", "earlier_round"]


def test_a_suite_goes_through_the_worker_and_its_name_is_in_the_report(world, service, finished):
    file = world.file("gsm8k.jsonl", json.dumps({"question": "1+1=?", "answer": "#### 2"}) + "\n")
    overrides = {"benchmark.sampling.max_new_tokens": 64}
    arguments = BenchmarkStudent(model=world.teacher, suite="GSM8K", prompts=file, overrides=overrides)
    started = service.benchmark_student(arguments)
    status = finished(service, started.run_id)
    assert status.state == "succeeded", status.error
    assert report_of(status).suite == "gsm8k"


def test_a_task_of_lm_eval_has_its_metrics_in_the_status(world, service, finished, monkeypatch):
    monkeypatch.setattr(suites, "find_spec", lambda name: object())
    arguments = BenchmarkStudent(model=world.student, baselines=[world.other_teacher], suite="lm_eval:arc_easy")
    status = finished(service, service.benchmark_student(arguments).run_id)
    assert status.state == "succeeded", status.error
    assert report_of(status).suite == "lm_eval:arc_easy"
    assert "score of student: acc 0.5 [0.4, 0.6]" in status_text(status)
