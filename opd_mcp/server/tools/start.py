"""The tools that start a run; each answers at once with the run's id, and the run is a process of its own."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.planning.confirmation import Question
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.requests import (
    BenchmarkStudent,
    BuildTeacherCache,
    GenerateTeacherResponses,
    SampleModel,
    StartDistillation,
    StartSft,
)
from opd_mcp.schemas.runs import RunSnapshot
from opd_mcp.server.protocol.elicitation import Ask
from opd_mcp.server.protocol.tool_spec import Reply, ToolSpec
from opd_mcp.server.render.runs import snapshot_text
from opd_mcp.server.serve import ServerSettings
from opd_mcp.service import JobService

RequestT = TypeVar("RequestT", bound=Schema)


def specs(service: JobService, settings: ServerSettings) -> list[ToolSpec[Any]]:
    """The tools of this topic."""

    async def ask_start(request: StartDistillation) -> Question | None:
        return await to_thread.run_sync(service.start_question, request, settings.gpu_hours)

    async def ask_cache(request: BuildTeacherCache) -> Question | None:
        return await to_thread.run_sync(service.cache_question, request)

    return [
        _start_spec(
            "generate_teacher_responses",
            "Generate teacher responses",
            "The teacher answers prompts; the responses are what start_sft trains on.",
            GenerateTeacherResponses,
            service.generate_teacher_responses,
        ),
        _start_spec(
            "start_sft",
            "Start SFT",
            "Fine-tunes a student on responses (of generate_teacher_responses, or any JSONL/Parquet with "
            "prompt and response).",
            StartSft,
            service.start_sft,
        ),
        _start_spec(
            "build_teacher_cache",
            "Build a teacher cache",
            "Draws the SFT student's rollouts and stores the teacher's log-probs of every token: all that "
            "lightning distillation needs of the teacher. Answers with `cache_id`.",
            BuildTeacherCache,
            service.build_teacher_cache,
            ask_cache,
        ),
        _start_spec(
            "start_distillation",
            "Start a distillation",
            "Give one of: `plan_id`; the arguments of plan_distillation; or `student` and `cache_id`. Missing "
            "stages (responses, SFT, cache) become phases of the run. Ends with a report when `benchmark`.",
            StartDistillation,
            service.start_distillation,
            ask_start,
        ),
        _start_spec(
            "benchmark_student",
            "Benchmark a student",
            "Accuracy with 95 % intervals, pass@k, reverse KL to the teacher and lengths, against baselines on the "
            "same prompts.",
            BenchmarkStudent,
            service.benchmark_student,
        ),
        _start_spec(
            "sample_model",
            "Sample a model",
            "A model answers up to 8 prompts; the run's result holds the texts.",
            SampleModel,
            service.sample_model,
        ),
    ]


def _start_spec(
    name: str,
    title: str,
    description: str,
    request: type[RequestT],
    start: Callable[[RequestT], RunSnapshot],
    ask: Ask | None = None,
) -> ToolSpec[RequestT]:
    return ToolSpec(
        name=name,
        title=title,
        description=f"{description} Returns at once with a run_id for get_run_status.",
        request=request,
        answer=RunSnapshot,
        call=_call(start),
        read_only=False,
        open_world=True,
        starts_run=True,
        ask=ask,
        opaque=frozenset({"Failure", "Progress"}),
    )


def _call(start: Callable[[RequestT], RunSnapshot]) -> Callable[[RequestT, Context], Awaitable[Reply]]:
    async def call(request: RequestT, context: Context) -> Reply:
        # A thread is not cancelled with its caller: a start is done or not begun, never half.
        snapshot = await to_thread.run_sync(start, request)
        return Reply(snapshot, snapshot_text(snapshot))

    return call
