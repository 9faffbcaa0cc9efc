"""The tools that start a run; each answers at once with the run's id, and the run is a process of its own."""

from typing import Any

from opd_mcp.schemas.answers import SweepStarted
from opd_mcp.schemas.requests import (
    AssessOverhead,
    BenchmarkStudent,
    BuildTeacherCache,
    ExportStudent,
    GenerateTeacherResponses,
    SampleModel,
    StartDistillation,
    StartSft,
    Sweep,
)
from opd_mcp.schemas.runs import RunSnapshot
from opd_mcp.server.render.runs import snapshot_text, sweep_text
from opd_mcp.server.tools.spec import ToolSpec

RETURNS = "Returns a run_id at once."
SHARED: dict[str, Any] = {
    "answer": RunSnapshot,
    "text": snapshot_text,
    "open_world": True,
    "starts_run": True,
    "repeats": True,
    "opaque": frozenset({"Failure", "Progress", "NextAction"}),
}

TOOLS: tuple[ToolSpec[Any, Any], ...] = (
    ToolSpec(
        name="assess_overhead",
        title="Assess the overhead",
        description="Measures speeds and memory of two models here, in a minute or two: live against lightning for the "
        f"recipe, and whether the pair will work. {RETURNS}",
        request=AssessOverhead,
        call=lambda service, request: service.assess_overhead(request),
        command="assess",
        options=True,
        **SHARED,
    ),
    ToolSpec(
        name="generate_teacher_responses",
        title="Generate teacher responses",
        description=f"The teacher answers prompts; the responses are what start_sft trains on. {RETURNS}",
        request=GenerateTeacherResponses,
        call=lambda service, request: service.generate_teacher_responses(request),
        command="responses",
        options=True,
        **SHARED,
    ),
    ToolSpec(
        name="start_sft",
        title="Start SFT",
        description=f"Fine-tunes a student on responses (of generate_teacher_responses, or your own). {RETURNS}",
        request=StartSft,
        call=lambda service, request: service.start_sft(request),
        command="sft",
        options=True,
        **SHARED,
    ),
    ToolSpec(
        name="build_teacher_cache",
        title="Build a teacher cache",
        description="Draws the SFT student's rollouts and stores the teacher's log-probs of every token: all that "
        f"lightning distillation needs of the teacher. Answers with `cache_id`. {RETURNS}",
        request=BuildTeacherCache,
        call=lambda service, request: service.build_teacher_cache(request),
        command="cache build",
        options=True,
        ask=lambda service, request, settings: service.cache_question(request),
        **SHARED,
    ),
    ToolSpec(
        name="start_distillation",
        title="Start a distillation",
        description="Give one of: `plan_id`; the arguments of plan_distillation; or `student` and `cache_id`. Missing "
        f"stages (responses, SFT, cache) become phases of the run. {RETURNS}",
        request=StartDistillation,
        call=lambda service, request: service.start_distillation(request),
        command="start",
        options=True,
        ask=lambda service, request, settings: service.start_question(request, settings.gpu_hours),
        **SHARED | {"repeats": False},
    ),
    ToolSpec(
        name="sweep",
        title="Sweep settings",
        description="Starts up to 32 distillations from one cache, one per point of `grid` or `points`. They queue and "
        "share the tag `sweep_id`, for compare_runs and cancel_run; the same call finds them again.",
        request=Sweep,
        answer=SweepStarted,
        call=lambda service, request: service.sweep(request),
        text=sweep_text,
        command="sweep {cache_id}",
        open_world=True,
        ask=lambda service, request, settings: service.sweep_question(request, settings.gpu_hours),
        opaque=frozenset({"SweptRun", "NextAction"}),
    ),
    ToolSpec(
        name="benchmark_student",
        title="Benchmark a student",
        description="Accuracy with 95 % intervals, pass@k, reverse KL to the teacher and lengths, against baselines on "
        f"the same prompts. {RETURNS}",
        request=BenchmarkStudent,
        call=lambda service, request: service.benchmark_student(request),
        command="benchmark {model}",
        options=True,
        **SHARED,
    ),
    ToolSpec(
        name="sample_model",
        title="Sample a model",
        description=f"A model answers up to 8 prompts; the run's result holds the texts. {RETURNS}",
        request=SampleModel,
        call=lambda service, request: service.sample_model(request),
        command="sample {model} {prompts}",
        **SHARED,
    ),
    ToolSpec(
        name="export_student",
        title="Export a student",
        description="Writes a model (merged or its adapter) with tokenizer and model card to a new folder, or to a new "
        f"private repository of the Hub. {RETURNS}",
        request=ExportStudent,
        call=lambda service, request: service.export_student(request),
        command="export {model} {destination}",
        ask=lambda service, request, settings: service.export_question(request),
        **SHARED,
    ),
)
