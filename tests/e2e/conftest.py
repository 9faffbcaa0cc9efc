"""A real stdio server over its own workspace, the embedded tiny models, and a few prompts."""

import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
SHORT = {
    "responses.limit": 8,
    "sft.steps": 3,
    "sft.batch_size": 4,
    "rollout.count": 8,
    "distill.steps": 3,
    "distill.batch_size": 4,
    "benchmark.samples_per_prompt": 1,
    "benchmark.kl_prompts": 4,
    "benchmark.sampling.max_new_tokens": 16,
    "rollout.sampling.max_new_tokens": 16,
    "responses.sampling.max_new_tokens": 16,
    "sft.on_truncated": "keep",
}


@dataclass(frozen=True)
class World:
    """Where everything of one test is."""

    root: Path
    workspace: Path
    data: Path

    def environment(self) -> dict[str, str]:
        """For the server's process and all that it starts."""
        # Leases of their own: tests neither wait for runs on this machine nor hold them up.
        return {
            "OPD_HOME": str(self.workspace),
            "XDG_RUNTIME_DIR": str(self.root / "runtime"),
            "PATH": os.environ["PATH"],
        }

    def plan_arguments(self, **changes: Any) -> dict[str, Any]:
        """A distillation of the embedded models that takes seconds."""
        return {
            "student": str(EXAMPLES / "student"),
            "teacher": str(EXAMPLES / "teacher"),
            "prompts": str(self.data / "prompts.jsonl"),
            "sft_prompts": str(self.data / "sft.jsonl"),
            "eval_prompts": str(self.data / "eval.jsonl"),
            "preset": "demo",
            "overrides": SHORT,
            **changes,
        }


@pytest.fixture
def world(tmp_path: Path) -> World:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "runtime").mkdir(mode=0o700)
    for name, source in (("prompts", "opd"), ("sft", "sft"), ("eval", "eval")):
        lines = (EXAMPLES / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:8]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return World(tmp_path, tmp_path / "workspace", data)


Connect = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def connect(world: World) -> Connect:
    """Starts a server process and connects to it; several may follow each other on one workspace."""

    @asynccontextmanager
    async def opened(*options: str) -> AsyncIterator[Client]:
        command = ["-m", "opd_mcp.cli", "serve", "--allow-root", str(world.data), *options]
        server = StdioServerParameters(command=sys.executable, args=command, env=world.environment())
        async with Client(server) as client:
            yield client

    return opened


@pytest.fixture
def answer() -> Callable[..., Any]:
    """Calls a tool that must succeed and gives its structured answer."""

    async def called(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
        result = await client.call_tool(tool, arguments)
        assert not result.is_error, result.content[0].text
        assert result.structured_content == json.loads(json.dumps(result.structured_content, allow_nan=False))
        return result.structured_content

    return called


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
