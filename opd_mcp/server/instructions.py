"""What every client reads once: how the tools belong together (at most 400 tokens)."""

INSTRUCTIONS = """\
Distills a teacher model into a student with Lightning OPD (offline on-policy distillation) in background runs.
Workflow:
1. inspect_setup: paths you may use, and an example task.
2. plan_distillation(student, teacher, prompts, sft_prompts?, eval_prompts?): costs, `blocking`, `warnings`, plan_id.
3. start_distillation(plan_id): returns a run_id at once. The run does every missing stage: teacher responses, SFT, \
rollouts, teacher scores, distillation, report.
4. get_run_status(run_id, wait_seconds=25), again until the state is succeeded, failed, cancelled or lost. A wait that \
expires is not a failure: never start the same work again. The result holds the model's path and the report's figures.
Stages can also be run one by one: generate_teacher_responses → start_sft → build_teacher_cache → \
start_distillation(student, cache_id) → benchmark_student.
Models and data are named by absolute path below an allowed root, artifact id, run id (its result) or Hub id.
The teacher of the cache must be the teacher of the student's SFT; a mismatch is refused with the ways out.
Settings: preset quick, paper or demo; overrides with dotted recipe keys, which the plan lists and opd://recipe-keys \
explains.
Runs survive this server; starts are idempotent; resume_run takes up a failed, cancelled or lost run; \
errors read "[code] what. Got: value. Fix: next step"."""
