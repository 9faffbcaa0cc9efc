"""Models measured by a task of lm-eval (the extra `eval`) on this engine, and the report."""

import time
from pathlib import Path

from opd_mcp.engine.context import Context, TaskInputs
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model, model_warnings
from opd_mcp.engine.runtime import hardware_name, open_runtime
from opd_mcp.engine.stages.benchmark import truncation_warnings, write_report
from opd_mcp.grading.verdicts import verdict_of
from opd_mcp.schemas.recipes import BenchmarkRecipe
from opd_mcp.schemas.reports import BenchmarkReport, ModelScore
from opd_mcp.schemas.runs import LM_EVAL


def benchmark_task(section: BenchmarkRecipe, inputs: TaskInputs, output: Path, context: Context) -> BenchmarkReport:
    """Measure every model with the task's own prompts, settings and metrics; writes report.json and report.md.

    Of the section count `limit`, `batch_size` and, as a limit, `sampling.max_new_tokens`. Raises ArgumentError
    `invalid_argument` for a task that is unknown or runs programs; ResourceError `offline` or `missing_package`.
    """
    # Imported here: the extra is heavy, and most runs have no use for it.
    from opd_mcp.engine.evaluation.harness import EngineModel, Harness

    runtime = open_runtime(context.runtime)
    harness = Harness(inputs.task, inputs.data, inputs.tasks)
    scores, warnings, documents, asked = [], [], 0, ""
    for name, path in inputs.models.items():
        context.reporter.phase(f"measuring {name}")
        started, model = time.perf_counter(), load_model(path, runtime, generates=True)
        warnings += model_warnings(context, model)
        asking = EngineModel(model, adopt_tokenizer(path, context.prompting), section, runtime, context)
        run = harness.measure(asking, section, runtime.seed)
        documents, asked = run.documents, asked or run.asked_sha256
        score = ModelScore(
            name=name,
            identity=model.facts.identity,
            task_metrics=run.metrics,
            **run.lengths(),
            seconds=time.perf_counter() - started,
            tokens=sum(len(text.response_ids) for text in run.drawn),
        )
        scores.append(score)
    cut = truncation_warnings(scores, section)
    report = BenchmarkReport(
        recipe=section,
        suite=f"{LM_EVAL}{inputs.task}",
        seed=runtime.seed,
        prompts_sha256=asked,
        prompts=documents,
        prompts_with_answer=documents,
        grader_reason=harness.described(),
        models=scores,
        hardware=hardware_name(runtime.device),
        recipe_hash=inputs.recipe_hash,
        warnings=list(dict.fromkeys([*warnings, *cut])),
    )
    report = report.model_copy(update={"verdict": verdict_of(report)})
    write_report(report, output, context, inputs.models.values())
    for message in cut:
        context.reporter.alert("answers_truncated", message)
    return report
