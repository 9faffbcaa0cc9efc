"""The arms of the evidence: what each is, and its figures per seed, by runs of the product itself.

An arm is a plan with a few changed arguments; its runs find responses, SFT student and teacher cache of their seed by
their keys, so each is made once. Costs are processor seconds of the workers, all stages up to the student.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_mcp.demo import QUICK, TaskName, embedded_task
from opd_mcp.identity.files import write_atomic
from opd_mcp.planning.arms import baseline_of
from opd_mcp.schemas.requests import BenchmarkStudent, PlanDistillation, StartDistillation
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from tools import EXAMPLE, ROOT

ARMS = (
    *("base", "sft", "lightning_sampled", "live_sampled", "lightning_topk", "live_topk", "trl_live", "repaired"),
    *("mismatched", "opsa", "sft_more", "rounds_2", "rounds_4", "horizon_10", "horizon_30", "lora"),
)
STEPS: dict[str, int] = {"arithmetic": 200, "chain_sum": 150}
"""Of every arm, on both sides of each comparison."""
LORA: dict[str, float] = {"arithmetic": 1e-2, "chain_sum": 1e-2}
"""The adapter's learning rate, chosen on tune.jsonl by adapters.py."""
SFT_STAGES = frozenset({"generate_responses", "sft"})
POLL_SECONDS = 0.2
TRL = ROOT / "tools" / "evidence" / "trl_live.py"
CHANGES: dict[str, dict[str, Any]] = {
    "lightning_sampled": {},
    "live_sampled": {"method": "live"},
    "lightning_topk": {"estimator": "topk_reverse_kl"},
    "live_topk": {"method": "live", "estimator": "topk_reverse_kl"},
    "rounds_2": {"overrides": {"distill.rounds": 2}},
    "rounds_4": {"overrides": {"distill.rounds": 4}},
    "horizon_10": {"overrides": {"distill.horizon": 0.1}},
    "horizon_30": {"overrides": {"distill.horizon": 0.3}},
}
MISMATCHED: dict[str, dict[str, Any]] = {"mismatched": {}, "repaired": {"distill.repair": "residual"}}


@dataclass(frozen=True)
class Row:
    """One arm at one seed: greedy accuracy, reverse KL to the teacher, and processor seconds by stage."""

    accuracy: float
    reverse_kl: float
    seconds: Mapping[str, float]

    @property
    def processor_seconds(self) -> float:
        """All stages up to the student."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Bench:
    """Where a task's arms are measured: the service, the folder of kept rows, and whether it is the quick part."""

    task: TaskName
    service: JobService
    work: Path
    quick: bool = False

    def rows(self, arm: str, seed: int) -> dict[str, Row]:
        """The rows that measuring an arm gives, by arm: kept ones are not measured again; none where it has no sense.

        The run of `lightning_sampled` measures the base and the SFT student as well.
        """
        file = self.work / "rows" / self.task / f"{arm}-{seed}.json"
        if file.is_file():
            return {name: Row(**row) for name, row in json.loads(file.read_text("utf-8")).items()}
        found = self._measured(arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({name: asdict(row) for name, row in found.items()}, indent=1) + "\n")
        return found

    def _measured(self, arm: str, seed: int) -> dict[str, Row]:
        if arm in ("base", "sft"):
            return {arm: self.rows("lightning_sampled", seed)[arm]}
        if arm in MISMATCHED:
            return self._mismatched(arm, seed)
        if arm == "trl_live":
            return self._trl(seed)
        asked = self.arguments(seed)
        if arm in ("opsa", "sft_more"):
            plan = self.service.plan(asked)
            asked = baseline_of("opsa" if arm == "opsa" else "sft_more", asked, plan, self.service.workload(plan))
        elif arm == "lora":
            rate = LORA[self.task]
            asked = _changed(asked, overrides={"distill.adapter.rank": 8, "distill.optimizer.learning_rate": rate})
        else:
            asked = _changed(asked, **CHANGES[arm])
        return self._rows_of(arm, self.ended(asked))

    def arguments(self, seed: int) -> PlanDistillation:
        """Those of `lightning_sampled`; every other arm changes some."""
        task = embedded_task(self.task, example_files())
        given = dict(task.arguments)
        overrides = dict(given.pop("overrides", {}))
        overrides |= {"runtime.seed": seed, "distill.steps": STEPS[self.task], "benchmark.samples_per_prompt": 0}
        overrides |= {"benchmark.references": ["base"], **(QUICK | {"distill.steps": 4} if self.quick else {})}
        return PlanDistillation(
            student=task.files["student"],
            teacher=task.files["teacher"],
            prompts=task.files["prompts_opd"],
            sft_prompts=task.files["prompts_sft"],
            eval_prompts=task.files["prompts_eval"],
            overrides=overrides,
            **given,
        )

    def ended(self, arguments: PlanDistillation | StartDistillation | BenchmarkStudent) -> RunStatus:
        """The run of these arguments once it has succeeded; raises RuntimeError with its error otherwise."""
        service = self.service
        if isinstance(arguments, BenchmarkStudent):
            started = service.benchmark_student(arguments)
        else:
            started = service.start_distillation(StartDistillation(**arguments.model_dump()))
        while (status := service.status(started.run_id)).state in ACTIVE_STATES:
            time.sleep(POLL_SECONDS)
        if status.state != "succeeded":
            raise RuntimeError(f"{status.run_id} {status.state}: {status.error}")
        return status

    def _rows_of(self, arm: str, status: RunStatus) -> dict[str, Row]:
        result = status.result or {}
        scores, spent = candidate_scores(result), spent_by_stage(result["costs"])
        candidate = "distilled" if "distilled" in scores else "sft"
        rows = {arm: _row(scores[candidate], spent)}
        if arm == "lightning_sampled":
            rows["sft"] = _row(scores["sft"], {name: spent[name] for name in SFT_STAGES & spent.keys()})
            rows["base"] = _row(scores["base"], {})
        return rows

    def _mismatched(self, arm: str, seed: int) -> dict[str, Row]:
        """SFT on another teacher's responses, then the distillation; only the arithmetic task has another teacher."""
        if self.task != "arithmetic":
            return {}
        asked = self.arguments(seed)
        other = str(EXAMPLE / "teacher_other_style")
        tuned = self.ended(asked.model_copy(update={"teacher": other, "method": "sft"}))
        overrides = MISMATCHED[arm]
        given = {"student": tuned.run_id, "sft_prompts": None, "allow_teacher_mismatch": True}
        status = self.ended(_changed(asked.model_copy(update=given), overrides=overrides))
        rows = self._rows_of(arm, status)
        before = spent_by_stage((tuned.result or {})["costs"])
        sft = {name: before[name] for name in SFT_STAGES & before.keys()}
        return {name: Row(row.accuracy, row.reverse_kl, {**sft, **row.seconds}) for name, row in rows.items()}

    def _trl(self, seed: int) -> dict[str, Row]:
        """TRL's own trainer on the same SFT student, prompts, steps and batch, in a process of its own."""
        asked = self.arguments(seed)
        base = self.ended(asked).result or {}
        student, output = base["paths"]["sft"], self.work / "trl" / self.task / str(seed)
        plan = self.service.plan(asked)
        distill, rollout = plan.recipe.distill, plan.recipe.rollout
        command = [sys.executable, str(TRL), "--student", student, "--teacher", asked.teacher]
        command += ["--prompts", str(asked.prompts), "--output", str(output), "--seed", str(seed)]
        command += ["--steps", str(distill.steps), "--batch", str(distill.batch_size)]
        command += ["--rate", str(distill.optimizer.learning_rate), "--schedule", distill.optimizer.schedule]
        sampling = rollout.sampling
        command += ["--tokens", str(sampling.max_new_tokens), "--temperature", str(sampling.temperature)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        spent = json.loads(done.stdout.splitlines()[-1])["processor_seconds"]
        measured = self.ended(
            BenchmarkStudent(
                model=str(output),
                teacher=asked.teacher,
                prompts=asked.eval_prompts,
                preset=asked.preset,
                overrides={k: v for k, v in asked.overrides.items() if k.startswith(("benchmark.", "runtime."))},
            )
        )
        [score] = [s for name, s in (measured.result or {})["scores"].items() if name == output.name]
        shared = spent_by_stage(base["costs"])
        sft = {name: shared[name] for name in SFT_STAGES & shared.keys()}
        return {"trl_live": _row(score, {**sft, "distill": spent})}


def example_files() -> dict[str, str]:
    """The arithmetic task's paths by role, as `inspect_setup` names them."""
    names = {"student": "student", "teacher": "teacher"}
    names |= {f"prompts_{name}": f"{name}.jsonl" for name in ("sft", "opd", "eval")}
    return {role: str(EXAMPLE / name) for role, name in names.items()}


def candidate_scores(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What a run measured, by model."""
    scores: Mapping[str, Mapping[str, Any]] = result["scores"]
    return scores


def spent_by_stage(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Processor seconds of each stage but the benchmark; an older artifact's wall seconds where it has no others."""
    return {
        cost["stage"]: float(cost.get("processor_seconds", cost["seconds"]))
        for cost in costs
        if cost["stage"] != "benchmark"
    }


def _row(score: Mapping[str, Any], spent: Mapping[str, float]) -> Row:
    return Row(float(score["greedy_accuracy"][0]), float(score.get("reverse_kl", [float("nan")])[0]), dict(spent))


def _changed(arguments: PlanDistillation, **changes: Any) -> PlanDistillation:
    overrides = {**arguments.overrides, **changes.pop("overrides", {})}
    return arguments.model_copy(update={**changes, "overrides": overrides})
