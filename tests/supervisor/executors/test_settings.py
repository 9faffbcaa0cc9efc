"""What `[executors.NAME]` may say, and what naming an executor changes before anything is started."""

import pytest
from typer.testing import CliRunner

from opd_mcp.cli import app, starting
from opd_mcp.devices.hardware import Gpu, declared_target, nodes_of, visible_gpus
from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.executors import Claim, Placing, SlurmExecutor
from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.schemas.requests import StartDistillation
from opd_mcp.store.workspace import read_settings
from opd_mcp.supervisor.executors.interface import Work
from opd_mcp.supervisor.executors.slurm import Slurm

PLACING = Placing(executor="big", kind="slurm", lease_seconds=10)


@pytest.mark.parametrize(
    ("table", "code", "said"),
    [
        ('[executors.big]\nkind = "pbs"\nmemory_gb = 1', "invalid_setting", "'pbs'"),
        ('[executors.big]\nkind = "ray"\nmemory_gb = 1', "invalid_setting", "address"),
        ('[executors.big]\nkind = "ray"\nmemory_gb = 1\naddress = "http://me:key@head"', "invalid_setting", "address"),
        ('[executors.big]\nkind = "ray"\nmemory_gb = 1\naddress = "ray://head:10001"', "invalid_setting", "address"),
        ('[executors.big]\nkind = "slurm"', "invalid_setting", "memory_gb"),
        (
            '[executors.big]\nkind = "slurm"\nmemory_gb = 1\npartitoin = "a"',
            "unknown_setting",
            "executors.big.partition",
        ),
        ('[executors.big]\nkind = "slurm"\nmemory_gb = 1\noptions = ["rm"]', "invalid_setting", "options"),
        ('[executors.big]\nkind = "ssh"\nmemory_gb = 1\nhosts = ["-oProxyCommand=x"]', "invalid_setting", "hosts"),
        ('[executors.big]\nkind = "ssh"\nmemory_gb = 1\nhosts = []', "invalid_setting", "hosts"),
        ('[executors.local]\nkind = "slurm"\nmemory_gb = 1', "invalid_setting", "this machine"),
        ('[executors."a;b"]\nkind = "slurm"\nmemory_gb = 1', "invalid_setting", "executors"),
    ],
)
def test_settings_that_would_not_do_are_refused_by_name(service, table, code, said):
    (service.workspace.root / "settings.toml").write_text(table)
    with pytest.raises(ArgumentError) as error:
        read_settings(service.workspace)
    assert error.value.code == code
    assert said in error.value.text()


def test_an_unknown_executor_is_refused_with_the_known_ones(world, placed, cluster):
    for start in (
        lambda: placed.start_sft(world.sft_arguments().model_copy(update={"executor": "bgi"})),
        lambda: placed.plan(world.plan_arguments(executor="bgi")),
    ):
        with pytest.raises(ArgumentError) as error:
            start()
        assert error.value.code == "unknown_executor"
        assert error.value.nearest == ["big"]
    assert cluster.calls("sbatch") == []


def test_the_command_line_names_an_executor_too(world, placed, monkeypatch):
    monkeypatch.setattr(starting, "open_service", lambda *roots, **more: placed)
    models = ["--student", world.student, "--teacher", world.teacher, "--prompts", world.prompts(), "--preset", "demo"]
    with pytest.raises(ArgumentError, match="no such executor"):
        CliRunner().invoke(app, ["plan", *models, "--executor", "bgi"], catch_exceptions=False)
    done = CliRunner().invoke(app, ["plan", *models, "--executor", "desks", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_local_is_this_machine_and_needs_no_settings(world, service, finished):
    run_id = service.start_sft(world.sft_arguments(**{"sft.steps": 1}).model_copy(update={"executor": "local"})).run_id
    assert finished(service, run_id).state == "succeeded"
    assert service.store.record(run_id).request.executor is None
    assert not (service.workspace.run(run_id) / "attempts").exists()


def test_a_plan_is_made_for_the_executor_s_memory_and_started_there(world, placed, cluster, finished):
    settings = placed.workspace.root / "settings.toml"
    text = settings.read_text()
    settings.write_text(text.replace("memory_gb = 64", "memory_gb = 0.01", 1))
    [shortage] = placed.plan(world.plan_arguments(executor="big")).blocking
    assert (shortage.code, "CPU thread of big has" in shortage.message) == ("not_enough_memory", True)
    settings.write_text(text)
    plan = placed.plan(world.plan_arguments(executor="big", overrides={"sft.steps": 1, "distill.steps": 1}))
    assert plan.plan_id != placed.plan(world.plan_arguments(overrides={"sft.steps": 1, "distill.steps": 1})).plan_id
    run_id = placed.start_distillation(StartDistillation(plan_id=plan.plan_id)).run_id
    assert finished(placed, run_id).state == "succeeded"
    assert placed.store.record(run_id).request.executor == "big"
    assert len(cluster.calls("sbatch")) == 1


def test_a_shared_workspace_has_an_index_per_machine_and_finds_what_others_made(
    world, placed, tmp_path, finished, monkeypatch
):
    assert placed.workspace.index.parent.parent == tmp_path
    settings = placed.workspace.root / "settings.toml"
    text, index = settings.read_text(), placed.workspace.index
    run_id = placed.start_sft(world.sft_arguments(**{"sft.steps": 1})).run_id
    assert finished(placed, run_id).state == "succeeded"
    settings.write_text(f'index_folder = "{tmp_path / "elsewhere"}"\n{text}')
    other = world.service()
    assert other.workspace.index.parent == tmp_path / "elsewhere"
    assert {row.run_id for row in other.list_runs().rows} == {run_id}
    settings.write_text(text)
    later = placed.start_sft(world.sft_arguments(**{"sft.steps": 2})).run_id
    assert finished(placed, later).state == "succeeded"
    assert placed.store.index.path == index
    assert {row.run_id for row in other.list_runs().rows} == {run_id, later}
    assert placed.store.view(later).artifacts["sft"] in {row.artifact_id for row in other.store.artifacts.list()}


def test_an_executor_s_device_is_what_its_settings_say():
    gpus = SlurmExecutor(kind="slurm", memory_gb=80, gpus=2)
    assert declared_target(RuntimeRecipe(), "big", gpus).kind == "cuda"
    assert declared_target(RuntimeRecipe(devices="all"), "big", gpus).devices == 2
    assert declared_target(RuntimeRecipe(device="cpu"), "big", gpus).kind == "cpu"
    with pytest.raises(ResourceError, match="asks for 3 GPUs"):
        declared_target(RuntimeRecipe(devices=3), "big", gpus)
    with pytest.raises(ResourceError, match="gets none on the executor 'big'"):
        declared_target(RuntimeRecipe(device="cuda"), "big", SlurmExecutor(kind="slurm", memory_gb=80))


def test_a_job_uses_the_gpus_that_it_was_given():
    found = [Gpu(f"GPU-{name}", "H", 1, 1) for name in ("aa", "bb", "cc")]
    assert visible_gpus(found, None) == found
    assert visible_gpus(found, "0,2") == [found[0], found[2]]
    assert visible_gpus(found, "GPU-bb") == [found[1]]
    assert visible_gpus(found, "") == []


def test_what_goes_into_the_script_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a b;c")
    directory = tmp_path / "it's $(here)"
    claim = Claim(attempt=1, placing=PLACING, ticket="t")
    settings = SlurmExecutor(kind="slurm", memory_gb=80, gpus=2, gpu_option="gpus-per-node", time_limit="1-0")
    work = Work(directory, claim, ["python", "worker", "$(id)", "--ticket", "t"])
    slurm = Slurm("big", settings)
    lines = slurm.script(work).splitlines()
    assert f"cd '{tmp_path}/it'\"'\"'s $(here)'" in lines
    assert "export PYTHONPATH='/a b;c'" in lines
    assert any(line.startswith("python worker '$(id)' --ticket t --life ") for line in lines)
    assert {"--gpus-per-node=2", "--time=1-0"} <= set(slurm.command(work))


@pytest.mark.parametrize(
    ("devices", "gpus", "device", "nodes", "even"),
    [
        (1, 4, "auto", 1, 1),
        (4, 4, "auto", 1, 1),
        (6, 4, "auto", 2, 2),
        (7, 4, "auto", 2, 1),
        ("all", 4, "auto", 3, 3),
        (5, 0, "cpu", 3, 1),
        (2, 4, "cpu", 1, 1),
    ],
)
def test_a_run_gets_as_many_machines_as_its_devices_need(devices, gpus, device, nodes, even):
    settings = SlurmExecutor(kind="slurm", memory_gb=80, gpus=gpus, cpus=2, nodes=3)
    runtime = RuntimeRecipe(devices=devices, device=device)
    assert nodes_of(runtime, settings) == nodes
    target = declared_target(runtime, "big", settings)
    assert target.devices == (12 if devices == "all" else devices)
    assert target.nodes == even


def test_more_gpus_than_all_machines_have_are_refused():
    settings = SlurmExecutor(kind="slurm", memory_gb=80, gpus=4, nodes=3)
    with pytest.raises(ResourceError, match=r"device_unavailable.*13 GPUs"):
        nodes_of(RuntimeRecipe(devices=13), settings)


def test_a_job_on_several_nodes_is_told_which(tmp_path):
    claim = Claim(attempt=1, placing=PLACING, ticket="t")
    slurm = Slurm("big", SlurmExecutor(kind="slurm", memory_gb=80, gpus=4, nodes=3))
    wide, narrow = (Work(tmp_path, claim, ["worker"], nodes=nodes) for nodes in (2, 1))
    assert {"--nodes=2", "--ntasks-per-node=1"} <= set(slurm.command(wide))
    assert '--hosts "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"' in slurm.script(wide)
    assert "--hosts" not in slurm.script(narrow)
