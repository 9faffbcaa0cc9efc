"""The stages in the order of the data, each a function of a recipe's section, its inputs, an output and a context.

prompts ─► generate_responses ─► sft ─► rollout ─► score ─► [teacher cache] ─► distill ─► benchmark ─► report

Every stage fills `output`, an empty or new directory, and writes its lineage.json last; `rollout` and `score` also
continue in a directory that an earlier, interrupted call left. The caller decides where a finished directory lives. A
stage stops with RunError `run_cancelled` when its reporter asks for it. `sample` shows a few responses of any model,
`benchmark_task` asks a task of lm-eval instead of prompts, `export` writes a model for use elsewhere, with its card;
`assess` measures two models before a run; `distill_adapters` is `distill` for several adapters on one loaded base.
The inputs are in `opd_mcp.engine.context`, which needs no torch. May import all of the engine.
"""

from opd_mcp.engine.stages.assess import assess
from opd_mcp.engine.stages.benchmark import benchmark
from opd_mcp.engine.stages.distill import distill, distill_adapters
from opd_mcp.engine.stages.export import export
from opd_mcp.engine.stages.responses import generate_responses
from opd_mcp.engine.stages.rollout import rollout
from opd_mcp.engine.stages.sample import sample
from opd_mcp.engine.stages.score import check_teacher, score
from opd_mcp.engine.stages.sft import sft
from opd_mcp.engine.stages.task import benchmark_task

__all__ = [
    "assess",
    "benchmark",
    "benchmark_task",
    "check_teacher",
    "distill",
    "distill_adapters",
    "export",
    "generate_responses",
    "rollout",
    "sample",
    "score",
    "sft",
]
