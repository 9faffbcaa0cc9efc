"""What a server and its worker write is for its user alone, whatever the shell's umask and the folder were."""

import os

import pytest

pytestmark = pytest.mark.anyio

FINAL = {"succeeded", "failed", "cancelled", "lost"}


@pytest.fixture
def generous_umask():
    before = os.umask(0)
    yield
    os.umask(before)


async def test_every_file_of_a_workspace_is_private(generous_umask, world, connect, answer):
    world.workspace.mkdir(mode=0o777)
    async with connect() as client:
        student = world.plan_arguments()["student"]
        run = await answer(client, "sample_model", model=student, prompts=["1+1=?"], max_new_tokens=4)
        await answer(client, "plan_distillation", **world.plan_arguments(prompts=["1+1=?"], sft_prompts=["2+2=?"]))
        for _ in range(20):
            status = await answer(client, "get_run_status", run_id=run["run_id"], wait_seconds=25)
            if status["state"] in FINAL:
                break
    assert status["state"] == "succeeded", status
    paths = [world.workspace, *world.workspace.rglob("*"), *(world.root / "runtime").rglob("*")]
    assert {"worker.log", "journal.jsonl", "opd.sqlite", "samples.json"} <= {path.name for path in paths}
    assert [path for path in paths if path.lstat().st_mode & 0o077] == []
