"""What every client reads once: how the tools belong together (at most 400 tokens)."""

from typing import Any

from mcp.server import MCPServer

INSTRUCTIONS = """\
Distills a teacher model into a student with Lightning OPD (offline on-policy distillation) in background runs.
Workflow:
1. inspect_setup: paths you may use, and an example task.
2. plan_distillation(student, teacher, prompts, sft_prompts?, eval_prompts?): costs, `blocking`, `warnings`, plan_id.
3. start_distillation(plan_id): returns a run_id at once. The run does every missing stage: teacher responses, SFT, \
rollouts, teacher scores, distillation, report.
4. get_run_status(run_id, wait_seconds=25), again until the state is succeeded, failed, cancelled or lost. A wait that \
expires is not a failure: never start the same work again. The result holds verdict, paths and figures; \
succeeded is not yet better: read the verdict.
Stages can also be run one by one: generate_teacher_responses → start_sft → build_teacher_cache → \
start_distillation(student, cache_id) → benchmark_student.
Models and data are named by absolute path below an allowed root, artifact id, run id (its result) or Hub id; prompts \
also as a task: reasoning_gym:NAME?size=N&seed=S.
The teacher of the cache must be the teacher of the student's SFT; a mismatch is refused with the ways out.
sweep tries settings on one cache; compare_runs(tag=…) puts runs into one table; give runs a name and tags.
Settings: preset quick, paper or demo; overrides with dotted recipe keys, which the plan lists and opd://recipe-keys \
explains.
Runs survive this server; starts are idempotent; resume_run continues a failed, cancelled or lost run; \
errors read "[code] what. Got: value. Fix: next step"."""


DISTILL = """\
Distill the teacher {teacher} into the student {student} with Lightning OPD, using the prompts {prompts}.

1. Call inspect_setup and check that the paths are below an allowed root.
2. Call plan_distillation(student='{student}', teacher='{teacher}', prompts='{prompts}'{more}). A student that was not \
fine-tuned on this teacher's responses needs sft_prompts; ask me for them if there are none.
3. Tell me the plan's time, memory and disk, every `warnings` entry, and what `blocking` asks for. Wait for my yes.
4. Call start_distillation(plan_id=…). If the answer is [confirm_needed], ask me first.
5. Call get_run_status(run_id=…, wait_seconds=25) again and again until the state is final. A wait that expires is \
normal; never start the run a second time.
6. When it succeeded, report the verdict with its cause first, also a loss; then each model's accuracy and reverse \
KL with their intervals, the paired difference, the \
training seconds, and the model's path. Say which teacher the report names and whether its lineage is proven.
7. When it failed, follow the error's fix; get_run_metrics and get_run_logs have the details.
"""
DIAGNOSE = """\
Find out how the run {run_id} is doing, and what to change.

1. Call get_run_status(run_id='{run_id}'). Note state, phase, alerts, error and its suggested override.
2. Call get_run_metrics(run_ids=['{run_id}']). Read the diagnosis first, then the trend of reverse_kl_k1 and loss. If \
there is an earlier run of the same models (list_runs), compare both in one call: `differences` names the settings.
3. If the run failed or was lost, call get_run_logs(run_id='{run_id}', contains='Error').
4. If a model came out, call sample_model(model='{run_id}', prompts=[…]) with two prompts and read its answers.
5. Tell me in five sentences: what happened, the evidence with numbers, the likely cause, one change, and the exact \
next call. Change one thing at a time; finished phases are reused.
"""


def add_prompts(server: MCPServer[Any]) -> None:
    """Register `distill_model` and `diagnose_run`."""

    @server.prompt(title="Distill a model", description="Plan, start and follow a distillation, and report it.")
    def distill_model(student: str, teacher: str, prompts: str, eval_prompts: str = "") -> str:
        more = f", eval_prompts='{eval_prompts}'" if eval_prompts else ""
        return DISTILL.format(student=student, teacher=teacher, prompts=prompts, more=more)

    @server.prompt(title="Diagnose a run", description="Find out how a run is doing, and what to change.")
    def diagnose_run(run_id: str = "latest") -> str:
        return DIAGNOSE.format(run_id=run_id)
