"""Every call and every command of the guide works on tiny stand-ins, and its tables are what the formulas give."""

import ast
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from opd_mcp.cli import app
from opd_mcp.devices.hardware import Target
from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.consistency import proven_claim
from opd_mcp.identity.lineage import write_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.planning.costs.estimates import CostModel, room_of
from opd_mcp.planning.costs.workload import PROCESS_BYTES, DataSize, Workload
from opd_mcp.planning.exports import export_request
from opd_mcp.planning.start_arguments import plan_arguments
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.identity import Lineage
from opd_mcp.schemas.memory import ModelShape
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import RunPhase
from opd_mcp.server.protocol.arguments import request_from_arguments
from opd_mcp.server.tools.spec import ToolSpec
from opd_mcp.server.tools.table import TOOLS
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from tests.conftest import WORKER

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"
PAGES = sorted(GUIDE.glob("*.md"))
GIB = 1 << 30
CARD = Target(kind="cuda", name="a GPU", memory=79 * GIB)
SHAPES = {
    "0.6B": ModelShape(596_049_920, 28, 1024, 2048, 1024, 3072, 151_936),
    "1.7B": ModelShape(1_720_574_976, 28, 2048, 2048, 1024, 6144, 151_936),
    "4B": ModelShape(4_022_468_096, 36, 2560, 4096, 1024, 9728, 151_936),
    "8B": ModelShape(8_190_735_360, 36, 4096, 4096, 1024, 12_288, 151_936),
}


def blocks(kind: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a kind, each with its page."""
    for page in PAGES:
        for block in re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield page.name, block


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Page, tool and arguments of every call."""
    for page, block in blocks("python"):
        for statement in ast.parse(block).body:
            assert isinstance(statement, ast.Expr)
            assert isinstance(statement.value, ast.Call)
            yield (
                page,
                statement.value.func.id,
                {word.arg: ast.literal_eval(word.value) for word in statement.value.keywords},
            )


CALLS = list(calls())
COMMANDS = [
    (page, line) for page, block in blocks("bash") for line in block.splitlines() if line.startswith("opd-mcp ")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[JobService, dict[str, str]]:
    """A service, and what stands in for the guide's models, files and ids."""
    root = tmp_path_factory.mktemp("guide")
    for name in ("data", "exports"):
        (root / name).mkdir()
    settings = JobSettings(
        lease_folder=root / "leases",
        cpu_slots=2,
        export_roots=(root / "exports",),
        worker_command=(sys.executable, str(WORKER)),
    )
    service = JobService(Workspace(root / "home"), AllowedRoots([root / "data"]), settings)
    task = settings.examples / "arithmetic"
    for name in ("teacher", "teacher_other_style", "student"):  # with room for the lengths of real models
        model = Path(shutil.copytree(task / name, root / "data" / name))
        config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 65_536}
        (model / "config.json").write_text(json.dumps(config))
    teacher, student = (
        root / "data" / "teacher",
        Path(shutil.copytree(root / "data" / "student", root / "data" / "mine")),
    )
    lineage = Lineage(
        kind="model",
        stage="distill",
        recipe={},
        model=inspect_model(student).identity,
        sft_teacher=proven_claim(inspect_model(teacher).identity),
    )
    write_lineage(student, lineage)
    service.store.artifacts.key.key.sign(student)
    responses = root / "data" / "responses.jsonl"
    responses.write_text('{"prompt": "1+1=?", "response": "1+1=2;#2"}\n')
    domains = root / "data" / "domains.jsonl"
    rows = [{"prompt": f"1+{n}=?", "teacher_domain": "math" if n % 2 else "code"} for n in range(6)]
    domains.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stands = {
        "Qwen/Qwen3-8B": str(teacher),
        **dict.fromkeys(["Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"], str(root / "data" / "student")),
        "/data/mine/sft.jsonl": str(task / "sft.jsonl"),
        "/data/mine/opd.jsonl": str(task / "tune.jsonl"),
        "/data/mine/eval.jsonl": str(task / "eval.jsonl"),
        "/data/mine/responses.jsonl": str(responses),
        "/data/mine/domains.jsonl": str(domains),
        "/models/math-teacher": str(teacher),
        "/models/code-teacher": str(teacher.with_name("teacher_other_style")),
        "responses-4be1c09d2a77": str(responses),
        "/data/teacher": str(teacher),
        "/data": str(root / "data"),
        "/exports/qwen3-1.7b-mine": str(student),
        "/exports": str(root / "exports"),
        "lightning-qwen3-1.7b-7f3a12": str(student),
        "cache-0123456789ab": str(cache_of(student, teacher, root / "data" / "cache")),
    }
    return service, stands


def cache_of(student: Path, teacher: Path, cache: Path) -> Path:
    """The manifest of a cache of this student by this teacher."""
    cache.mkdir()
    manifest = {
        "teacher": inspect_model(teacher).identity.to_dict(),
        "behaviour": inspect_model(student).identity.to_dict(),
        "prompts_sha256": "0" * 64,
        "sampling": {},
        "seed": 0,
        "eos_token_ids": [1],
        "topk": 0,
        "dtype": "float32",
        "vocab_size": 24,
        "shards": [],
        "rollouts": {
            "rows": 1,
            "response_tokens": 1,
            "mean_response_tokens": 1.0,
            "truncated_fraction": 0.0,
            "eos_fraction": 1.0,
            "empty_responses": 0,
            "duplicate_rows": 0,
        },
        "scores": {"mean_teacher_logprob": -1.0},
    }
    (cache / "manifest.json").write_text(json.dumps(manifest))
    return cache


def standing_in(value: Any, stands: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [standing_in(part, stands) for part in value]
    if isinstance(value, dict):
        return {name: standing_in(part, stands) for name, part in value.items()}
    return stands.get(value, value) if isinstance(value, str) else value


def asked(tool: str, arguments: dict[str, Any], stands: dict[str, str]) -> tuple[ToolSpec[Any, Any], Any]:
    """The tool of a call, and its request about the stand-ins."""
    spec = next(spec for spec in TOOLS if spec.name == tool)
    given = {name: standing_in(value, stands) for name, value in arguments.items()}
    if tool == "export_student":  # of a new name: the exported directory of the other calls is there
        given["destination"] = f"{stands['/exports']}/{Path(arguments['destination']).name}"
    if "overrides" in given:  # the stand-ins' template knows no thinking
        given["overrides"] = {
            name: value for name, value in given["overrides"].items() if name != "prompting.chat_template_kwargs"
        }
        if "prompting.teacher_system" in given["overrides"]:  # and their tokenizer no letters
            given["overrides"]["prompting.teacher_system"] = "1;2"
    return spec, request_from_arguments(spec.name, spec.request, given)


@pytest.mark.parametrize(("page", "tool", "arguments"), CALLS, ids=[f"{page}-{tool}" for page, tool, _ in CALLS])
def test_a_call_of_the_guide_makes_a_plan_or_a_run_request(place, page, tool, arguments):
    service, stands = place
    spec, request = asked(tool, arguments, stands)
    builder = service._builder
    if tool == "plan_distillation" or (tool == "start_distillation" and request.prompts is not None):
        plan = service.plan(request if tool == "plan_distillation" else plan_arguments(request))
        assert not plan.blocking, plan.blocking
    elif tool == "start_distillation" and request.cache_id is not None:
        assert [phase.name for phase in builder.from_cache(request).phases] == ["distill", "benchmark"]
    elif tool == "sweep":
        assert len(service._swept(request)[1]) == 6
    elif tool == "export_student":
        assert export_request(builder, service.exports, request).inputs.export.format == "bfloat16"
    elif tool in (
        made := {
            "generate_teacher_responses": builder.responses,
            "start_sft": builder.sft,
            "build_teacher_cache": builder.cache,
            "benchmark_student": builder.benchmark,
            "sample_model": builder.sample,
        }
    ):
        assert made[tool](request).phases
    else:  # an id of a run or a plan is all that it names
        assert spec.read_only or request.plan_id


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{line.split()[1]}" for page, line in COMMANDS])
def test_a_command_of_the_guide_is_one(place, page, line):
    _, stands = place
    words = [standing_in(word, stands) for word in shlex.split(line)[1:]]
    group = typer.main.get_command(app)
    if words[0].startswith("--"):
        assert any(words[0] in option.opts for option in group.params)
    else:
        assert group.commands[words[0]].make_context(words[0], words[1:]).params


def test_every_run_that_the_guide_starts_ends_well(place, finished):
    """With stand-ins for the stages as well: what is shown here is that each call starts, queues and ends a run."""
    service, stands = place
    _, _, planned = next(call for call in CALLS if call[:2] == ("your-model.md", "plan_distillation"))
    plan = service.plan(asked("plan_distillation", planned, stands)[1])
    run_ids: dict[str, str] = {}
    for page, tool, arguments in CALLS:
        spec, request = asked(tool, arguments, stands)
        if spec.read_only or arguments.get("teacher_url"):  # no server listens here
            continue
        if tool == "start_distillation" and request.plan_id:
            request = request.model_copy(update={"plan_id": plan.plan_id})
        started = spec.call(service, request)
        rows = [row.run_id for row in started.runs] if tool == "sweep" else [started.run_id]
        run_ids |= dict.fromkeys(rows, f"{tool} of {page}")
    assert len(run_ids) > 12
    ends = {run_id: finished(service, run_id) for run_id in run_ids}
    assert {run_ids[run_id]: end.error for run_id, end in ends.items() if end.state != "succeeded"} == {}


def test_another_teacher_in_a_second_round_is_refused(place):
    service, stands = place
    _, tool, arguments = next(call for call in CALLS if call[0] == "rounds.md" and call[1] == "build_teacher_cache")
    given = {name: standing_in(value, stands) for name, value in arguments.items()}
    other = str(Path(given["teacher"]).with_name("teacher_other_style"))
    spec = next(spec for spec in TOOLS if spec.name == tool)
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        service._builder.cache(request_from_arguments(tool, spec.request, given | {"teacher": other}))


def table(page: str, name: str) -> list[str]:
    text = (GUIDE / page).read_text(encoding="utf-8")
    return re.search(rf"<!-- {name}:start -->\n(.*?)\n<!-- {name}:end -->", text, re.DOTALL)[1].splitlines()[2:]


def test_the_estimate_of_the_first_page_is_what_the_formulas_give_for_its_call():
    _, _, arguments = next(call for call in CALLS if call[0] == "your-model.md" and call[1] == "plan_distillation")
    recipe = resolve_recipe(arguments["preset"], arguments["overrides"])
    data = DataSize(7473, 120.0, sft_prompts=7473, eval_prompts=1319, references=frozenset({"teacher", "base"}))
    workload = Workload(recipe, SHAPES["1.7B"], SHAPES["8B"], data, room_of(CARD))
    names = ("generate_responses", "sft", "rollout", "score", "distill", "benchmark")
    estimate = CostModel(workload, CARD).estimate("lightning", [RunPhase(name=name, key="k") for name in names])
    minutes = {phase.phase: phase.seconds / 60 for phase in estimate.phases}
    rows = [
        f"| `{name}` | {minutes[name]:.0f} | {workload.work(name).memory / GIB:.0f} | {workload.disk(name) / GIB:.2f} |"
        for name in names
    ]
    rows.append(
        f"| all | {estimate.seconds / 60:.0f} | {estimate.peak_memory_bytes / GIB:.0f} "
        f"| {estimate.disk_bytes / GIB:.0f} |"
    )
    assert table("your-model.md", "estimate") == rows


def test_the_sizes_page_is_what_the_formulas_give():
    ways = ({}, {"distill.optimizer.precision": "split_master"}, {"distill.adapter": {}})
    rows = []
    for name, shape in SHAPES.items():
        cells = []
        for changes in ways:
            recipe = resolve_recipe("quick", {"runtime.dtype": "bfloat16", **changes})
            work = Workload(recipe, shape, shape, DataSize(3000, 120.0), room_of(CARD)).work("distill")
            fits = "" if work.memory + PROCESS_BYTES <= CARD.memory else ": does not fit"
            cells.append(f"{work.memory / GIB:.0f} GiB, {work.checkpointing}{fits}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    assert table("settings.md", "sizes") == rows
