"""Paths, models and addresses that lead elsewhere: a clear error through the real tools, and nothing started."""

import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
from mcp import Client

from opd_mcp.devices.settings import JobSettings
from opd_mcp.server.app import build_server
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
ROW = '{"prompt": "1+1=?", "answer": "2"}\n'


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def tree(tmp_path):
    """data/ is the allowed root, with prompts and a student; outside/ has prompts as well."""
    for name in ("data", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.jsonl").write_text(ROW)
    shutil.copytree(EXAMPLES / "student", tmp_path / "data" / "student")
    shutil.copytree(EXAMPLES / "student", tmp_path / "outside" / "student")
    return tmp_path


@pytest.fixture
def service(tree):
    settings = JobSettings(lease_folder=tree / "leases", cpu_slots=1, worker_command=("/bin/false",))
    return JobService(Workspace(tree / "home"), AllowedRoots([tree / "data"]), settings)


@pytest.fixture
def refusal(service, tree):
    """`refusal(tool, **arguments)`: the text of the error; nothing is started and no plan is kept."""

    async def called(tool: str = "plan_distillation", **arguments: object) -> str:
        plan = {"student": str(tree / "data" / "student"), "teacher": str(EXAMPLES / "teacher")}
        prompts = {"prompts": str(tree / "data" / "prompts.jsonl")}
        async with Client(build_server(service)) as client:
            answer = await client.call_tool(tool, {**plan, **prompts, **arguments})
        assert answer.is_error, answer.structured_content
        assert not list(service.workspace.runs.iterdir())
        assert not list(service.workspace.plans.iterdir())
        text = answer.content[0].text
        assert "Fix: " in text
        assert "internal_error" not in text
        return text

    return called


def copied(tree, name: str) -> Path:
    return Path(shutil.copytree(tree / "data" / "student", tree / "data" / name))


LEADING_OUT = [
    "{root}/outside/prompts.jsonl",
    "{root}/data/../outside/prompts.jsonl",
    "{root}/data/./../outside/../outside/prompts.jsonl",
    "{root}/data/link.jsonl",
    "{root}/data/chain.jsonl",
    "{root}/data/folder/prompts.jsonl",
    "/proc/self/root{root}/outside/prompts.jsonl",
    "/proc/self/cwd/../../../../../../../../etc/passwd",
    "/proc/self/environ",
    "/dev/fd/0",
    "/dev/stdin",
    "/dev/zero",
    "/dev/null",
    "//host/share/prompts.jsonl",
    "/etc/passwd",
    "/",
]
MEANING_NOTHING = [
    "\\\\host\\share\\prompts.jsonl",
    "\\\\?\\C:\\prompts.jsonl",
    "C:\\prompts.jsonl",
    "file:///etc/passwd",
    "../outside/prompts.jsonl",
    "~/prompts.jsonl",
    "{root}/data/a\0b.jsonl",
    "{root}/data/" + "x" * 900,
    "{root}/data/" + "x/" * 400 + "y",
    "{root}/data/loop.jsonl",
    "{root}/data/nothing.jsonl",
    "x" * 1025,
    "",
]


@pytest.fixture
def links(tree):
    data = tree / "data"
    (data / "link.jsonl").symlink_to(tree / "outside" / "prompts.jsonl")
    (data / "chain.jsonl").symlink_to(data / "link.jsonl")
    (data / "folder").symlink_to(tree / "outside")
    (data / "loop.jsonl").symlink_to(data / "loop.jsonl")


@pytest.mark.parametrize("reference", LEADING_OUT)
async def test_no_reference_leads_out_of_the_roots(tree, links, refusal, reference):
    for argument in ("prompts", "student", "eval_prompts"):
        assert "[outside_roots]" in await refusal(**{argument: reference.format(root=tree)})


@pytest.mark.parametrize("reference", MEANING_NOTHING, ids=range(len(MEANING_NOTHING)))
async def test_what_means_no_file_is_one_clear_error(tree, links, refusal, reference):
    for argument in ("prompts", "teacher"):
        text = await refusal(**{argument: reference.replace("{root}", str(tree))})
        assert text.count("Fix: ") == 1


async def test_the_way_round_by_proc_leads_to_the_real_place_and_no_further(tree, service):
    plan = {"student": str(tree / "data" / "student"), "teacher": str(EXAMPLES / "teacher"), "preset": "demo"}
    async with Client(build_server(service)) as client:
        answer = await client.call_tool(
            "plan_distillation", plan | {"prompts": f"/proc/self/root{tree}/data/prompts.jsonl"}
        )
    assert not answer.is_error
    assert answer.structured_content["inputs"]["prompts"]["path"] == str(tree / "data" / "prompts.jsonl")


@pytest.mark.parametrize("place", ["pipe.jsonl", "student/tokenizer_config.json", "student/special_tokens_map.json"])
async def test_a_pipe_is_refused_and_not_waited_for(tree, refusal, place):
    path = tree / "data" / place
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    argument = {"prompts": str(path)} if place == "pipe.jsonl" else {}
    assert "[special_file]" in await refusal(**argument)


async def test_a_socket_is_refused(tree, refusal, monkeypatch):
    monkeypatch.chdir(tree / "data")  # an address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jsonl")
        assert "[special_file]" in await refusal(prompts=str(tree / "data" / "s.jsonl"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth", "model.ckpt"])
async def test_a_pickle_instead_of_weights_is_refused_unread(tree, refusal, name):
    model = copied(tree, "pickled")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Trap(tree / "executed")))
    (model / name).chmod(0)
    assert "[unsafe_weights]" in await refusal(student=str(model))
    assert not (tree / "executed").exists()


async def test_a_pickle_that_is_called_safetensors_is_damage(tree, refusal):
    model = copied(tree, "disguised")
    (model / "model.safetensors").write_bytes(pickle.dumps(Trap(tree / "executed")))
    assert "[damaged_file]" in await refusal(student=str(model))
    assert not (tree / "executed").exists()


@pytest.mark.parametrize(
    "shard", ["../outside/student/model.safetensors", "/etc/passwd", "pytorch_model.bin", "a/b.safetensors"]
)
async def test_an_index_names_nothing_but_safetensors_beside_it(tree, refusal, shard):
    model = copied(tree, "indexed")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    assert "[damaged_file]" in await refusal(student=str(model))


@pytest.mark.parametrize(
    "change",
    [
        {"transformers_weights": "adapter_model.bin"},
        {"transformers_weights": "../outside/student/model.safetensors"},
        {"text_config": {"transformers_weights": "other.safetensors"}},
        {"attn_implementation": "somebody/kernels"},
        {"_attn_implementation": "somebody/kernels:f"},
    ],
)
async def test_a_config_that_leads_the_loader_elsewhere_is_refused(tree, refusal, change):
    model = copied(tree, "led")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    assert "[unsafe_config]" in await refusal(student=str(model))


async def test_an_adapter_beside_a_model_is_refused(tree, refusal):
    model = copied(tree, "adapted")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tree / "outside/student")}))
    assert "[not_a_model]" in await refusal(student=str(model))


async def test_a_directory_with_a_link_that_leads_out_is_refused(tree, refusal):
    model = copied(tree, "linked")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tree / "outside" / "student" / "model.safetensors")
    assert "[outside_roots]" in await refusal(student=str(model))


@pytest.mark.parametrize(
    "hub_id",
    [
        "örg/name",
        "org/na\u0301me",
        "org/..",
        "../org",
        "org/a..b",
        "org--x/name",
        "org/" + "x" * 97,
        "a/b/c",
        "org/\u2215etc",
    ],
)
async def test_what_is_no_hub_id_is_not_fetched(service, refusal, hub_id):
    assert (await refusal(student=hub_id)).count("Fix: ") == 1
    assert not list(service.workspace.hub.iterdir())


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://example.org:8000", "teacher_host_not_allowed"),
        ("https://169.254.169.254/latest", "teacher_host_not_allowed"),
        ("http://localhost.example.org", "teacher_host_not_allowed"),
        ("http://127.0.0.1.example.org", "teacher_host_not_allowed"),
        ("http://0.0.0.0:1", "teacher_host_not_allowed"),
        ("http://2130706433/", "teacher_host_not_allowed"),
        ("http://[::ffff:10.0.0.1]/", "teacher_host_not_allowed"),
        ("http://127.0.0.1@example.org/", "secret_in_arguments"),
        ("http://:x@example.org/", "secret_in_arguments"),
        ("file:///etc/passwd", "invalid_argument"),
        ("http://example.org/?x=1", "invalid_argument"),
    ],
)
async def test_prompts_are_sent_to_no_host_that_was_not_allowed(refusal, url, code):
    text = await refusal("build_teacher_cache", teacher_url=url)
    assert f"[{code}]" in text
    if code == "teacher_host_not_allowed":
        assert "--allow-teacher-host" in text


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://GPU.example.org"]
)
async def test_this_machine_and_allowed_hosts_are_reached(tree, url):
    settings = JobSettings(
        lease_folder=tree / "leases", cpu_slots=1, worker_command=("/bin/true",), teacher_hosts=("gpu.example.org",)
    )
    service = JobService(Workspace(tree / "home"), AllowedRoots([tree / "data"]), settings)
    arguments = {
        "student": str(tree / "data" / "student"), "teacher": str(EXAMPLES / "teacher"), "teacher_url": url,
        "prompts": str(tree / "data" / "prompts.jsonl"), "declared_teacher": str(EXAMPLES / "teacher"),
        "preset": "demo",
    }  # fmt: skip
    async with Client(build_server(service)) as client:
        answer = await client.call_tool("build_teacher_cache", arguments)
    assert not answer.is_error, answer.content[0].text
