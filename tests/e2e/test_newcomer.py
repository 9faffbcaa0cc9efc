"""A newcomer's session: an own task and teacher from a folder, default settings, to an exported student that answers.

What the session calls next is what the last answer said, or what the guide says.
"""

import json
import shutil
import sys
from pathlib import Path

import anyio
import pytest

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
MOST_CALLS = 12
TEXT_CHARACTERS = {"plan_distillation": 8_000}
USUAL_CHARACTERS = 6_100
POLL_BYTES = 240
LOADED = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "1+1=?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print("tokens:", model.generate(**inputs, max_new_tokens=8).shape[1] - inputs["input_ids"].shape[1])
"""


class Newcomer:
    """Counts its calls besides waiting; every text stays within its budget."""

    def __init__(self, client) -> None:
        self.client, self.calls = client, 0

    async def call(self, tool: str, **arguments):
        """An answer that is no error."""
        self.calls += 1
        result = await self.client.call_tool(tool, arguments)
        text = result.content[0].text
        assert not result.is_error, text
        assert len(text) <= TEXT_CHARACTERS.get(tool, USUAL_CHARACTERS), text
        return result.structured_content

    async def ended(self, started):
        """The run's last status; waiting does not count."""
        status = started
        while status["state"] in ("queued", "running"):
            arguments = {"run_id": status["run_id"], "wait_seconds": 25}
            result = await self.client.call_tool("get_run_status", arguments)
            status, text = result.structured_content, result.content[0].text
            assert len(text) <= USUAL_CHARACTERS
            assert not status.get("unchanged") or len(text.encode()) <= POLL_BYTES
        assert status["state"] == "succeeded", status
        return status, text


async def test_from_a_folder_to_an_exported_student(world, connect):
    task = world.data / "task"
    task.mkdir()
    for name in ("teacher", "student"):
        shutil.copytree(EXAMPLES / name, task / name)
    for name in ("prompts", "sft", "eval"):
        rows = [json.loads(line) for line in (world.data / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps({"question": row["prompt"], "answer": row["answer"]}) for row in rows]
        (task / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    given = {name: str(task / name) for name in ("teacher", "student")}
    files = {"prompts": "prompts", "sft_prompts": "sft", "eval_prompts": "eval"}
    given |= {name: str(task / f"{file}.jsonl") for name, file in files.items()}
    short, exports = world.plan_arguments()["overrides"], world.root / "exports"
    exports.mkdir()

    async with connect("--export-root", str(exports)) as client:
        newcomer = Newcomer(client)
        with anyio.fail_after(300):
            setup = await newcomer.call("inspect_setup")
            assert str(exports) in setup["export_roots"]
            plan = await newcomer.call("plan_distillation", **given, overrides=short, name="my first")
            assert not plan.get("blocking"), plan["blocking"]
            start = plan["next_action"]
            first, text = await newcomer.ended(await newcomer.call(start["tool"], **start["arguments"]))
            assert first["name"] == "my first"
            assert f"VERDICT {first['result']['verdict']['judgement'].replace('_', ' ')}: " in text

            second = await newcomer.call(
                "start_distillation",
                student=first["run_id"],
                teacher=given["teacher"],
                prompts=given["prompts"],
                eval_prompts=given["eval_prompts"],
                overrides=short,
            )
            second, text = await newcomer.ended(second)
            assert "VERDICT" in text
            assert second["result"]["artifacts"]["model"] != first["result"]["artifacts"]["model"]

            grid = {"distill.advantage_clip": [1, 5, 10]}
            cache = first["result"]["artifacts"]["cache"]
            swept = await newcomer.call(
                "sweep",
                cache_id=cache,
                student=first["result"]["artifacts"]["sft"],
                eval_prompts=given["eval_prompts"],
                grid=grid,
                overrides=short,
            )
            assert len(swept["runs"]) == 3
            for run in swept["runs"]:
                await newcomer.ended(run)
            compared = await newcomer.call("compare_runs", tag=swept["sweep_id"])
            assert compared["settings"] == ["distill.advantage_clip"]
            assert sorted(run["settings"]["distill.advantage_clip"] for run in compared["runs"]) == [1, 5, 10]

            destination = exports / "mine"
            exported = await newcomer.call("export_student", model=second["run_id"], destination=str(destination))
            await newcomer.ended(exported)
        assert newcomer.calls <= MOST_CALLS

    loaded = await anyio.run_process([sys.executable, "-c", LOADED, str(destination)])
    [line] = [line for line in loaded.stdout.decode().splitlines() if line.startswith("tokens:")]
    assert 0 < int(line.split()[1]) <= 8
    assert second["result"]["verdict"]["sentence"][:20] in (destination / "README.md").read_text()
