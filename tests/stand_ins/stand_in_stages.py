"""A stand-in for the engine: the same stages, in milliseconds and without torch.

They write what their readers need (models, lineage, manifest, report) and obey `steps` and `should_stop`. A learning
rate of 666 makes `sft` fail, one of 777 after the noise that libraries make, one of 28 fills the disk, one of 555 makes
it stand still until it is cancelled, one of 440 to 445 makes it not answer, as `HANGS` says; a file `die-once` next to
the building directory kills the worker in `score`.
"""

import atexit
import json
import logging
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

from opd_mcp.identity.consistency import proven_claim, require_behaviour, require_consistent, vouched
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.identity.lineage import data_hashes, read_lineage, write_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.cache import CacheManifest, EngineGap, RolloutStatistics, ScoreStatistics
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.identity import Lineage, Parent
from opd_mcp.schemas.reports import BenchmarkReport, Estimate95, ModelScore, StageCost, TaskMetric, TrainingSummary

STEP_SECONDS = 0.01
library = logging.getLogger("a_library")
library.addHandler(logging.StreamHandler())  # as transformers does when it is imported
library.propagate = False


def generate_responses(section, inputs, output, context):
    rows = read_prompts(inputs.prompts)[: section.limit]
    lines = [json.dumps({"id": row.id, "prompt": row.text(), "response": "#1"}) for row in rows]
    (output / "responses.jsonl").write_text("\n".join(lines) + "\n")
    claim = proven_claim(inspect_model(inputs.teacher).identity)
    files = data_hashes(output, ["responses.jsonl"])
    write_lineage(output, Lineage(kind="responses", stage="responses", recipe={}, sft_teacher=claim, files=files))
    return cost("generate_responses", len(rows))


def sft(section, inputs, output, context):
    if section.optimizer.learning_rate == 777:
        make_noise(context)
    if section.optimizer.learning_rate in (666, 777):
        raise ZeroDivisionError("the learning rate of the beast")
    if section.optimizer.learning_rate == 28:
        raise OSError(28, "No space left on device", str(output))
    steps(context, section.steps)
    if section.optimizer.learning_rate in HANGS:
        context.reporter.phase("hangs")
        HANGS[section.optimizer.learning_rate](context)
    if section.optimizer.learning_rate == 555:
        stand_still(context)
    lineage = read_lineage(inputs.responses) if inputs.responses.is_dir() else None
    return trained(inputs.student, output, sft_teacher=(lineage.sft_teacher if lineage else None) or inputs.sft_teacher)


def rollout(section, inputs, output, context):
    output.mkdir(exist_ok=True)
    rows = read_prompts(inputs.prompts)
    if (output / "rollouts.json").exists():
        (output / "taken_up").touch()
    (output / "rollouts.json").write_text(json.dumps({"rows": len(rows), "prompts": prompts_hash(rows)}))
    context.reporter.progress(len(rows), len(rows), "rollouts")
    return cost("rollout", len(rows))


def score(section, inputs, output, context):
    rollouts = inputs.rollouts
    drawn = json.loads((rollouts / "rollouts.json").read_text())
    fatal = output.parent / "die-once"
    if fatal.exists():
        fatal.unlink()
        (output / "shard-00000.parquet").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if (rollouts / "taken_up").exists():
        (output / "taken_up").touch()
    identity, behaviour = inspect_model(inputs.teacher).identity, inspect_model(inputs.student).identity
    claim = claim_of(inputs.student, context) or inputs.sft_teacher
    require_consistent(identity, claim, allowed=inputs.allow_teacher_mismatch)
    manifest = CacheManifest(
        teacher=identity,
        behaviour=behaviour,
        sft_teacher=claim,
        prompts_sha256=drawn["prompts"],
        sampling={"temperature": 1.0},
        seed=0,
        eos_token_ids=[1],
        topk=section.topk,
        dtype="float32",
        vocab_size=24,
        shards=[],
        rollouts=RolloutStatistics(
            rows=drawn["rows"],
            response_tokens=10,
            mean_response_tokens=1.0,
            truncated_fraction=0.5,
            eos_fraction=1.0,
            empty_responses=2,
            duplicate_rows=0,
        ),
        scores=ScoreStatistics(
            mean_teacher_logprob=-1.0, mean_behaviour_logprob=-1.0, reverse_kl_k1=0.0, reverse_kl_k3=0.0
        ),
        engine_gap=EngineGap(tokens=10, mean=0.0001, largest=0.001),
    )
    (output / "manifest.json").write_text(manifest.to_json())
    parents = [Parent(role="teacher", identity=identity), Parent(role="student", identity=behaviour)]
    files = data_hashes(output, ["manifest.json"])
    write_lineage(output, Lineage(kind="cache", stage="score", recipe={}, parents=parents, files=files))
    return cost("score", 10)


def distill(section, inputs, output, context):
    if section.method == "lightning":
        manifest = CacheManifest.from_json((inputs.cache / "manifest.json").read_bytes())
        require_behaviour(manifest.behaviour, inspect_model(inputs.student).identity)
    steps(context, section.steps)
    claim = claim_of(inputs.student, context) or inputs.sft_teacher
    return trained(inputs.student, output, sft_teacher=claim, stage="distill")


def benchmark(section, inputs, output, context):
    rows = read_prompts(inputs.prompts)
    answered = sum(row.answer is not None for row in rows)
    accuracy = Estimate95(value=0.5, low=0.4, high=0.6, samples=answered, basis="stand-in") if answered else None
    report = BenchmarkReport(
        recipe=section,
        suite=inputs.suite,
        seed=0,
        prompts_sha256=prompts_hash(rows),
        prompts=len(rows),
        prompts_with_answer=answered,
        teacher=inspect_model(inputs.teacher).identity if inputs.teacher else None,
        models=[
            ModelScore(
                name=name,
                identity=inspect_model(path).identity,
                greedy_accuracy=accuracy,
                mean_response_tokens=1.0,
                truncated_fraction=0.0,
                eos_rate=1.0,
                seconds=0.1,
                tokens=10,
            )
            for name, path in inputs.models.items()
        ],
        hardware="stand-in",
        recipe_hash=inputs.recipe_hash,
        costs=list(inputs.costs),
        alerts=list(inputs.alerts),
    )
    (output / "report.json").write_text(report.to_json())
    return report


def benchmark_task(section, inputs, output, context):
    metrics = {"acc": TaskMetric(value=0.5, low=0.4, high=0.6, samples=9)}
    report = BenchmarkReport(
        recipe=section,
        suite=f"lm_eval:{inputs.task}",
        seed=0,
        prompts_sha256="0" * 64,
        prompts=9,
        prompts_with_answer=9,
        models=[
            ModelScore(name=name, identity=inspect_model(path).identity, task_metrics=metrics, seconds=0.1, tokens=0)
            for name, path in inputs.models.items()
        ],
        hardware="stand-in",
        recipe_hash=inputs.recipe_hash,
    )
    (output / "report.json").write_text(report.to_json())
    return report


def sample(section, inputs, output, context):
    output.mkdir()
    rows = [
        {"prompt": row.text(), "response": "#1" * 1000, "tokens": 2, "finish_reason": "eos"}
        for row in read_prompts(inputs.prompts)
    ]
    (output / "samples.json").write_text(json.dumps(rows))
    return cost("sample", 2 * len(rows))


def export(section, inputs, output, context):
    trained(inputs.model, output, sft_teacher=claim_of(inputs.model, context))
    (output / "README.md").write_text(f"{section.format}: {[origin.name for origin in inputs.models]}")
    fatal = output.parents[1] / "die-once"
    if fatal.exists():
        fatal.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return cost("export", 0)


def make_noise(context):
    for number in range(40):
        with warnings.catch_warnings():  # whatever changes the filters makes Python forget what it has shown
            warnings.simplefilter("default")
            warnings.warn("`old` is deprecated.\n  Use `new`.", FutureWarning, stacklevel=1)
        if number % 20 == 0:
            warnings.warn(f"number {number}", UserWarning, stacklevel=1)
    library.warning("a file is missing")
    library.info("nobody wants to know")
    context.reporter.phase("after the noise")


def native_call(context=None):
    """A comparison that takes years, in one call that holds the interpreter's lock."""
    one, other = [0] * 10_000, [0] * 10_000
    for _ in range(6):
        one, other = [one] * 10_000, [other] * 10_000
    return one == other


def native_call_under_a_limit(context):
    """The same, with a limit on processor time that only Python code would notice."""

    def too_slow(number, frame):
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.1, 0.1)
    native_call()


def deaf(context):
    """Every signal that can be blocked is."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(STEP_SECONDS)


def busy(context):
    """Python code that asks nobody."""
    while True:
        time.sleep(STEP_SECONDS)


def hears_sigterm(context):
    """Python code that ends on SIGTERM only."""
    while not context.reporter.terminated:
        time.sleep(STEP_SECONDS)
    steps(context, 1)


def never_exits(context):
    """The run ends, its process does not."""
    atexit.register(native_call)


HANGS = {
    440: native_call,
    441: deaf,
    442: busy,
    443: hears_sigterm,
    444: never_exits,
    445: native_call_under_a_limit,
}


def stand_still(context):
    context.reporter.metric(10**6, {"loss": 0.0})
    while not context.reporter.should_stop():
        time.sleep(STEP_SECONDS)
    steps(context, 1)


def steps(context, count):
    for step in range(1, count + 1):
        if context.reporter.should_stop():
            raise RunError("run_cancelled", "The run was asked to stop.", fix="Start it again.")
        time.sleep(STEP_SECONDS)
        context.reporter.metric(step, {"loss": 1.0 / step})
        context.reporter.progress(step, count, "steps")


def trained(student: Path, output: Path, *, sft_teacher, stage="sft"):
    """A copy of the student whose weights differ in their last byte."""
    for file in student.iterdir():
        if file.name not in ("lineage.json", "artifact.json", "cost.json"):
            shutil.copy(file, output / file.name)
    weights = bytearray((output / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (output / "model.safetensors").write_bytes(weights)
    summary = TrainingSummary(
        steps=3, seconds=0.03, seconds_per_step=0.01, trained_tokens=30, parameters=1, device="stand-in"
    )
    (output / "training.json").write_text(summary.to_json())
    identity = inspect_model(output).identity
    write_lineage(output, Lineage(kind="model", stage=stage, recipe={}, model=identity, sft_teacher=sft_teacher))
    return summary


def claim_of(student: Path, context):
    lineage = read_lineage(student)
    return vouched(lineage.sft_teacher if lineage else None, made_here=context.made_here(student))


def cost(stage, tokens):
    return StageCost(stage=stage, seconds=0.01, tokens=tokens, device="stand-in")
