"""Plans with models of the Hub that are not here: sizes asked of a stand-in of the Hub, nothing downloaded."""

import json
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

from opd_mcp.devices.environment import HubAccess, hub_access
from opd_mcp.planning.hub_models import FETCHED_FILES, HubModels
from opd_mcp.schemas.errors import PathError, ResourceError
from opd_mcp.schemas.requests import GenerateTeacherResponses
from opd_mcp.schemas.runs import HubSizes
from opd_mcp.server.render.plans import plan_text
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
QWEN3_8B = {
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SHARDS = {f"model-0000{number}-of-00005.safetensors": 3_276_294_000 for number in range(1, 6)}


class StandInHub(BaseHTTPRequestHandler):
    """What the Hub answers of its repositories: a list of files with their sizes, and config.json."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append((path, self.headers.get("Authorization")))
        status, content = self.server.answers.get(path, (404, {"error": "Repository not found"}))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def repository(hub: ThreadingHTTPServer, name: str, files: dict[str, int], config: object, **listed: object) -> None:
    siblings = [{"rfilename": file, "size": size} for file, size in files.items()]
    hub.answers[f"/api/models/{name}"] = 200, {"id": name, "siblings": siblings, **listed}
    hub.answers[f"/{name}/resolve/main/config.json"] = 200, config


def published(hub: ThreadingHTTPServer, name: str, directory: Path) -> None:
    files = {file.name: file.stat().st_size for file in directory.iterdir()}
    repository(hub, name, {**files, "pytorch_model.bin": 10**9}, json.loads((directory / "config.json").read_text()))


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.answers, server.asked = {}, []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def access(hub) -> HubAccess:
    return HubAccess(f"http://127.0.0.1:{hub.server_port}")


@pytest.fixture
def online(world, access) -> JobService:
    settings = replace(world.settings, hub=access)
    return JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)


def sizes(access: HubAccess, name: str = "org/model") -> HubSizes | str:
    return HubModels(access).sizes(name)


def test_a_plan_of_hub_models_costs_what_the_same_models_cost_here(online, world, hub):
    published(hub, "org/teacher", EXAMPLES / "teacher")
    published(hub, "org/student", EXAMPLES / "student")
    here = online.plan(world.plan_arguments())
    there = online.plan(world.plan_arguments(teacher="org/teacher", student="org/student"))
    assert there.phases[0].name == "fetch"
    for mine, local in zip(there.estimates, here.estimates, strict=True):
        assert mine.peak_memory_bytes == pytest.approx(local.peak_memory_bytes, rel=0.05)
        assert mine.flops == pytest.approx(local.flops, rel=0.5)  # prompts are counted by their bytes
        assert "org/student and org/teacher as the Hub gives them" in mine.memory_basis
    assert there.recipe == here.recipe
    files = [file for folder in ("teacher", "student") for file in (EXAMPLES / folder).iterdir()]
    fetched = sum(file.stat().st_size for file in files if any(file.match(pattern) for pattern in FETCHED_FILES))
    [fetch] = [phase for phase in there.estimates[0].phases if phase.phase == "fetch"]
    assert fetch.download_bytes == fetched
    assert there.estimates[0].disk_bytes == pytest.approx(here.estimates[0].disk_bytes + fetched, rel=0.05)
    assert "after a download of" in plan_text(there)
    assert not (world.root / "home" / "hub").exists() or not list((world.root / "home" / "hub").rglob("*.*"))
    assert sorted({path for path, _ in hub.asked}) == [
        *("/api/models/org/student", "/api/models/org/teacher"),
        *("/org/student/resolve/main/config.json", "/org/teacher/resolve/main/config.json"),
    ]


def test_a_model_too_large_for_this_machine_is_refused_before_its_download(online, world, hub):
    shards = {f"model-0000{number}-of-00005.safetensors": 4 << 40 for number in range(1, 6)}
    index = {"model.safetensors.index.json": 1000}
    repository(hub, "org/huge", {**shards, **index}, {**QWEN3_8B, "num_hidden_layers": 400})
    plan = online.plan(world.plan_arguments(teacher="org/huge"))
    assert {"not_enough_memory", "not_enough_disk"} <= {finding.code for finding in plan.blocking}
    asked = GenerateTeacherResponses(teacher="org/huge", prompts=world.prompts(), preset="demo")
    with pytest.raises(ResourceError, match="not_enough_memory"):
        online.generate_teacher_responses(asked)


def test_the_batch_is_chosen_by_the_sizes_that_the_hub_gives(online, world, hub):
    repository(hub, "org/large", SHARDS, QWEN3_8B, safetensors={"parameters": {"BF16": 8_190_735_360}})
    asked = world.plan_arguments(student="org/large", teacher="org/large", preset="paper", overrides={})
    assert online.plan(asked).recipe.rollout.batch_size < online.plan(world.plan_arguments()).recipe.rollout.batch_size
    named = asked.model_copy(update={"overrides": {"rollout.batch_size": 256}})
    assert online.plan(named).recipe.rollout.batch_size == 256


def test_the_preset_is_chosen_by_the_size_that_the_hub_gives(online, world, hub):
    published(hub, "org/student", EXAMPLES / "student")
    plan = online.plan(world.plan_arguments(student="org/student", preset="auto"))
    assert "higher rates of small ones" in plan.preset_reason


def test_a_sharded_model_is_counted_by_the_hub_or_by_its_files(hub, access):
    files = {**SHARDS, "model.safetensors.index.json": 32_000, "tokenizer.json": 11_000_000, "original/a.bin": 10**12}
    counted = {"parameters": {"BF16": 8_190_735_360}, "total": 8_190_735_360}
    repository(hub, "org/model", files, QWEN3_8B, safetensors=counted)
    found = sizes(access)
    assert (found.parameters, found.weight_bytes) == (8_190_735_360, 5 * 3_276_294_000)
    assert found.download_bytes == found.weight_bytes + 32_000 + 11_000_000
    assert found.settings["head_dim"] == 128
    assert "model_type" not in found.settings
    repository(hub, "org/model", files, QWEN3_8B)
    assert sizes(access).parameters == 5 * 3_276_294_000 // 2
    misleading = {"parameters": {"BF16": 12}, "total": 12}
    repository(hub, "org/model", files, {**QWEN3_8B, "dtype": "float32"}, safetensors=misleading)
    assert sizes(access).parameters == 5 * 3_276_294_000 // 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_model_that_the_hub_does_not_have_is_one_error_of_the_plan(online, world, hub, status):
    hub.answers["/api/models/org/teacher"] = status, {"error": "no"}
    with pytest.raises(PathError, match=r"not_found.*no such model.*HF_TOKEN"):
        online.plan(world.plan_arguments(teacher="org/teacher"))


def test_a_config_that_names_other_code_is_refused_before_the_download(online, world, hub):
    config = {**QWEN3_8B, "transformers_weights": "other.bin"}
    repository(hub, "org/teacher", SHARDS, config)
    with pytest.raises(PathError, match="unsafe_config"):
        online.plan(world.plan_arguments(teacher="org/teacher"))


def broken(hub: ThreadingHTTPServer) -> None:
    hub.answers["/api/models/org/teacher"] = 500, {"error": "later"}


def no_json(hub: ThreadingHTTPServer) -> None:
    hub.answers["/api/models/org/teacher"] = 200, b"<html>sign in</html>"


def endless_config(hub: ThreadingHTTPServer) -> None:
    repository(hub, "org/teacher", SHARDS, b" " * (2 << 20))


def no_weights(hub: ThreadingHTTPServer) -> None:
    repository(hub, "org/teacher", {"pytorch_model.bin": 10**9}, QWEN3_8B)


def adapter(hub: ThreadingHTTPServer) -> None:
    repository(hub, "org/teacher", {"adapter_config.json": 500, "adapter_model.safetensors": 10**6}, QWEN3_8B)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (broken, "status 500"),
        (no_json, "no JSON object"),
        (endless_config, "more than 1048576 bytes"),
        (no_weights, "no safetensors weights"),
        (adapter, "it is an adapter"),
    ],
)
def test_what_the_hub_does_not_say_has_a_reason(hub, access, answer: Callable[[ThreadingHTTPServer], None], why: str):
    answer(hub)
    assert why in sizes(access, "org/teacher")


def test_a_plan_goes_on_without_estimates_and_says_why(online, world, hub):
    broken(hub)
    plan = online.plan(world.plan_arguments(teacher="org/teacher"))
    assert plan.estimates == []
    [warning] = [finding for finding in plan.warnings if finding.code == "no_estimates"]
    assert "status 500" in warning.message
    before = len(hub.asked)
    online.plan(world.plan_arguments(teacher="org/teacher", overrides={"sft.steps": 2}))
    assert len(hub.asked) == before  # a failure is remembered for a minute


def test_without_an_answer_the_plan_is_the_same(online, world, hub):
    published(hub, "org/teacher", EXAMPLES / "teacher")
    plan = online.plan(world.plan_arguments(teacher="org/teacher"))
    hub.answers.clear()
    hub.answers["/api/models/org/teacher"] = 500, {}
    later = JobService(online.workspace, AllowedRoots([world.root / "data"]), online.settings)
    assert later.plan(world.plan_arguments(teacher="org/teacher")).plan_id == plan.plan_id


def test_the_hub_is_asked_as_the_environment_says(hub):
    url = f"http://127.0.0.1:{hub.server_port}"
    repository(hub, "org/private", SHARDS, QWEN3_8B)
    access = hub_access({"HF_ENDPOINT": f"{url}/", "HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in repr(access)
    assert isinstance(sizes(access, "org/private"), HubSizes)
    assert {token for _, token in hub.asked} == {"Bearer hf_secret"}
    assert hub_access({"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secret"}) is None
    assert hub_access({}).endpoint == "https://huggingface.co"
    assert "switched off" in HubModels(None).sizes("org/private")
