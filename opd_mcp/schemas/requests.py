"""The arguments of the tools that plan and start runs; the server's signatures mirror these models."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.recipes import Estimator, Method, Preset

Reference = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=1024),
    Field(description="absolute path, artifact id, run id or Hub id"),
]
Prompts = Annotated[
    Reference | Annotated[list[Annotated[str, StringConstraints(max_length=20_000)]], Field(max_length=200)],
    Field(description="reference to JSONL/Parquet prompts, or up to 200 inline"),
]
Overrides = Annotated[
    dict[str, Any],
    Field(description="dotted recipe keys, e.g. {'distill.steps': 100, 'runtime.seed': 1}", max_length=100),
]


class PlanDistillation(Schema):
    """Arguments of `plan_distillation`."""

    student: Reference
    teacher: Reference
    prompts: Prompts
    sft_prompts: Prompts | None = None
    eval_prompts: Prompts | None = None
    method: Method = "lightning"
    estimator: Estimator = "sampled"
    preset: Preset = "quick"
    declared_teacher: Reference | None = None
    allow_teacher_mismatch: bool = False
    overrides: Overrides = Field(default_factory=dict)


class GenerateTeacherResponses(Schema):
    """Arguments of `generate_teacher_responses`."""

    teacher: Reference
    prompts: Prompts
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)


class StartSft(Schema):
    """Arguments of `start_sft`."""

    student: Reference
    responses: Reference
    declared_teacher: Reference | None = None
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)


class BuildTeacherCache(Schema):
    """Arguments of `build_teacher_cache`."""

    teacher: Reference
    student: Reference
    prompts: Prompts
    topk: Annotated[int, Field(ge=0, le=256)] | None = None
    declared_teacher: Reference | None = None
    allow_teacher_mismatch: bool = False
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)


class StartDistillation(Schema):
    """Arguments of `start_distillation`: a plan, or a plan's arguments, or a student and a cache."""

    plan_id: str | None = None
    student: Reference | None = None
    cache_id: Reference | None = None
    teacher: Reference | None = None
    prompts: Prompts | None = None
    sft_prompts: Prompts | None = None
    eval_prompts: Prompts | None = None
    method: Method = "lightning"
    estimator: Estimator = "sampled"
    preset: Preset = "quick"
    declared_teacher: Reference | None = None
    allow_teacher_mismatch: bool = False
    benchmark: bool = True
    overrides: Overrides = Field(default_factory=dict)


class BenchmarkStudent(Schema):
    """Arguments of `benchmark_student`."""

    model: Reference
    prompts: Prompts
    teacher: Reference | None = None
    baselines: Annotated[list[Reference], Field(max_length=8)] = Field(default_factory=list)
    samples_per_prompt: Annotated[int, Field(ge=0, le=64)] | None = None
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)
