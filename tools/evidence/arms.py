"""The arms of the evidence: what each is, and its figures per seed, by runs of the product itself.

An arm is a plan with a few changed arguments; its runs find responses, SFT student and teacher cache of their seed by
their keys, so each is made once. Costs are processor seconds of the workers, all stages up to the student.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opd_mcp.demo import QUICK, TaskName, embedded_task
from opd_mcp.identity.files import write_atomic
from opd_mcp.planning.arms import baseline_of
from opd_mcp.schemas.requests import BenchmarkStudent, PlanDistillation, StartDistillation
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from tools import EXAMPLE, ROOT

PARTS = (("half", 2), ("quarter", 4))
ARMS = (
    *("base", "sft", "lightning_sampled", "live_sampled", "lightning_topk", "live_topk", "trl_live", "repaired"),
    *("mismatched", "opsa", "sft_more", "rounds_2", "rounds_4", "horizon_10", "horizon_30", "lora"),
)
"""What a comparison of the methods needs; measured first."""
OBJECTIVES: dict[str, str] = {
    **dict.fromkeys(("horizon_growing", "extrapolated", "reference_kl", "iw_opd"), "lightning_sampled"),
    **dict.fromkeys(("forward_kl", "js_10", "js_50", "js_90", "entropy_mixed", "entropy_50"), "lightning_topk"),
    "live_iw_opd": "live_sampled",
}
"""Arms of an objective that is off by default, each with the arm that differs from it in nothing else."""
SHARES: dict[str, tuple[str, int]] = {
    "lightning_third": ("lightning_sampled", 3),
    **{f"{arm}_{name}": (arm, part) for arm in ("lightning_topk", "trl_live") for name, part in PARTS},
}
"""Arms that take one part in so many of another's steps, with the schedule drawn together."""
STEPS: dict[str, int] = {"arithmetic": 200, "chain_sum": 150}
"""Of every arm, on both sides of each comparison."""
LORA: dict[str, float] = {"arithmetic": 2e-2, "chain_sum": 5e-3}
"""The adapter's learning rate, chosen on tune.jsonl by adapters.py."""
SFT_STAGES = frozenset({"generate_responses", "sft"})
POLL_SECONDS = 0.2
TRL = ROOT / "tools" / "evidence" / "trl_live.py"
DRIFT = "effective_sample_share"
CHANGES: dict[str, dict[str, Any]] = {
    # A base that was never fine-tuned seldom stops, so it takes longest to measure: once per seed.
    "lightning_sampled": {"overrides": {"benchmark.references": ["base"]}},
    "live_sampled": {"method": "live"},
    "lightning_topk": {"estimator": "topk_reverse_kl"},
    "live_topk": {"method": "live", "estimator": "topk_reverse_kl"},
    "rounds_2": {"overrides": {"distill.rounds": 2}},
    "rounds_4": {"overrides": {"distill.rounds": 4}},
    "horizon_10": {"overrides": {"distill.horizon": 0.1}},
    "horizon_30": {"overrides": {"distill.horizon": 0.3}},
    "horizon_growing": {"overrides": {"distill.horizon": 0.1, "distill.horizon_growth_steps": 100}},
    "extrapolated": {"overrides": {"distill.extrapolation": 1.25}},
    "reference_kl": {"overrides": {"distill.extrapolation": 0.8}},
    "iw_opd": {"overrides": {"distill.token_weighting": "early"}},
    "live_iw_opd": {"method": "live", "overrides": {"distill.token_weighting": "early"}},
    "forward_kl": {"estimator": "topk_forward_kl"},
    "js_10": {"estimator": "topk_js", "overrides": {"distill.js_beta": 0.1}},
    "js_50": {"estimator": "topk_js", "overrides": {"distill.js_beta": 0.5}},
    "js_90": {"estimator": "topk_js", "overrides": {"distill.js_beta": 0.9}},
    "entropy_mixed": {"estimator": "topk_entropy_mixed"},
    "entropy_50": {"estimator": "topk_reverse_kl", "overrides": {"distill.entropy_share": 0.5}},
}
OWN, OTHER = "teacher", "teacher_other_style"
LIVE: dict[str, Any] = {"method": "live"}
REPAIRED: dict[str, Any] = {"overrides": {"distill.repair": "residual"}}
CROSSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mismatched": (OTHER, OWN, {}),
    "repaired": (OTHER, OWN, REPAIRED),
    "live_mismatched": (OTHER, OWN, LIVE),
    "repaired_consistent": (OWN, OWN, REPAIRED),
    "swapped": (OWN, OTHER, {}),
    "live_swapped": (OWN, OTHER, LIVE),
    "repaired_swapped": (OWN, OTHER, REPAIRED),
    "other": (OTHER, OTHER, {}),
    "live_other": (OTHER, OTHER, LIVE),
    "repaired_other": (OTHER, OTHER, REPAIRED),
}
"""Whose responses the SFT learns, which teacher distils, and how: the grid, with `*_sampled` as its first cells."""
MORE = (*OBJECTIVES, *(arm for arm in CROSSED if arm not in ARMS), *SHARES)
"""Measured after `ARMS`, on every task."""
ONE_TASK = frozenset({*CROSSED, *(arm for arm in SHARES if "_third" not in arm), "live_iw_opd"})
"""Arms of the arithmetic task alone: it has another teacher, and its steps are cheap enough for curves."""


@dataclass(frozen=True)
class Row:
    """One arm at one seed: greedy accuracy, reverse KL to the teacher, and processor seconds by stage.

    `drift` is the effective sample share of the training's last tenth, where that is known.
    """

    accuracy: float
    reverse_kl: float
    seconds: Mapping[str, float]
    drift: float | None = None

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
        if (kept := self.kept(arm, seed)) is not None:
            return kept
        found, file = self._measured(arm, seed), self._file(arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({name: asdict(row) for name, row in found.items()}, indent=1) + "\n")
        return found

    def kept(self, arm: str, seed: int) -> dict[str, Row] | None:
        """The rows that an earlier call kept of an arm; None where none did."""
        for name in (arm, "lightning_sampled") if arm in ("base", "sft") else (arm,):
            if (file := self._file(name, seed)).is_file():
                return {name: Row(**row) for name, row in json.loads(file.read_text("utf-8")).items()}
        return None

    def _file(self, arm: str, seed: int) -> Path:
        return self.work / "rows" / self.task / f"{arm}-{seed}.json"

    def drifts(self) -> dict[tuple[float, float], float]:
        """The drift of every distillation in the workspace by its accuracy and reverse KL, as its row has them.

        Rows that earlier versions kept do not say it.
        """
        found: dict[tuple[float, float], float] = {}
        page = self.service.list_runs(state="succeeded", kind="distill", limit=100)
        while True:
            for run in page.rows:
                row = next(iter(self._rows_of("", self.service.status(run.run_id)).values()))
                if row.drift is not None:
                    found[row.accuracy, row.reverse_kl] = row.drift
            if page.next_cursor is None:
                return found
            page = self.service.list_runs(state="succeeded", kind="distill", limit=100, cursor=page.next_cursor)

    def _measured(self, arm: str, seed: int) -> dict[str, Row]:
        if self.task != "arithmetic" and arm in ONE_TASK:
            return {}
        if arm in ("base", "sft"):
            return {arm: self.rows("lightning_sampled", seed)[arm]}
        if arm in CROSSED:
            return self._crossed(arm, seed)
        asked, (of, part) = self.arguments(seed), SHARES.get(arm, (arm, 1))
        if of == "trl_live":
            return {arm: self._trl(seed, part)}
        if arm in ("opsa", "sft_more"):
            plan = self.service.plan(asked)
            asked = baseline_of("opsa" if arm == "opsa" else "sft_more", asked, plan, self.service.workload(plan))
        elif arm == "lora":
            rate = LORA[self.task]
            asked = _changed(asked, overrides={"distill.adapter.rank": 8, "distill.optimizer.learning_rate": rate})
        else:
            asked = _changed(asked, **CHANGES[of])
        if part > 1:
            fewer = {"distill.steps": max(1, asked.overrides["distill.steps"] // part), "benchmark.references": []}
            asked = _changed(asked, overrides=fewer)
        return self._rows_of(arm, self.ended(asked))

    def arguments(self, seed: int) -> PlanDistillation:
        """What all arms have in common; each changes some."""
        task = embedded_task(self.task, example_files())
        given = dict(task.arguments)
        overrides = dict(given.pop("overrides", {}))
        overrides |= {"runtime.seed": seed, "distill.steps": STEPS[self.task], "benchmark.samples_per_prompt": 0}
        overrides |= {"benchmark.references": [], **(QUICK | {"distill.steps": 4} if self.quick else {})}
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
        model = result.get("paths", {}).get("model")
        rows = {arm: _row(scores[candidate], spent, drift_of(Path(model)) if model else None)}
        if arm == "lightning_sampled":
            rows["sft"] = _row(scores["sft"], {name: spent[name] for name in SFT_STAGES & spent.keys()})
            rows["base"] = _row(scores["base"], {})
        return rows

    def _crossed(self, arm: str, seed: int) -> dict[str, Row]:
        """SFT on one teacher's responses, then the distillation from another, or from the same."""
        answering, scoring, changes = CROSSED[arm]
        asked = self.arguments(seed)
        tuned = self.ended(asked.model_copy(update={"teacher": str(EXAMPLE / answering), "method": "sft"}))
        given = {"student": tuned.run_id, "teacher": str(EXAMPLE / scoring), "sft_prompts": None}
        given |= {"allow_teacher_mismatch": answering != scoring}
        status = self.ended(_changed(asked.model_copy(update=given), **changes))
        rows = self._rows_of(arm, status)
        before = spent_by_stage((tuned.result or {})["costs"])
        sft = {name: before[name] for name in SFT_STAGES & before.keys()}
        return {name: replace(row, seconds={**sft, **row.seconds}) for name, row in rows.items()}

    def _trl(self, seed: int, part: int) -> Row:
        """TRL's own trainer on the same SFT student, prompts and batch, in a process of its own.

        It takes one part in so many of the steps.
        """
        asked = self.arguments(seed)
        base = self.ended(_changed(asked, **CHANGES["lightning_sampled"])).result or {}
        student, output = base["paths"]["sft"], self.work / "trl" / self.task / f"{seed}{f'-{part}' * (part > 1)}"
        plan = self.service.plan(asked)
        distill, rollout = plan.recipe.distill, plan.recipe.rollout
        command = [sys.executable, str(TRL), "--student", student, "--teacher", asked.teacher]
        command += ["--prompts", str(asked.prompts), "--output", str(output), "--seed", str(seed)]
        command += ["--steps", str(max(1, distill.steps // part)), "--batch", str(distill.batch_size)]
        command += ["--rate", str(distill.optimizer.learning_rate), "--schedule", distill.optimizer.schedule]
        command += ["--warmup", str(distill.optimizer.warmup_steps)]
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
        return _row(score, {**sft, "distill": spent})


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


def drift_of(model: Path) -> float | None:
    """The effective sample share of the last tenth of a model's training; None where it is not told."""
    file = model / "training.json"
    told = json.loads(file.read_text("utf-8"))["final"].get(DRIFT) if file.is_file() else None
    return None if told is None else float(told)


def _row(score: Mapping[str, Any], spent: Mapping[str, float], drift: float | None = None) -> Row:
    divergence = float(score.get("reverse_kl", [float("nan")])[0])
    return Row(float(score["greedy_accuracy"][0]), divergence, dict(spent), drift)


def _changed(arguments: PlanDistillation, **changes: Any) -> PlanDistillation:
    overrides = {**arguments.overrides, **changes.pop("overrides", {})}
    return arguments.model_copy(update={**changes, "overrides": overrides})
