"""The scripted agent: the whole workflow over a real server, and what it does with a refusal."""

import json


def test_the_session_goes_from_inspection_to_the_report(run_example, tmp_path):
    done = run_example("agent_session.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [line.split("(")[0].removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]
    assert calls[:3] == ["inspect_setup", "plan_distillation", "start_distillation"]
    assert set(calls[3:]) == {"get_run_status"}
    assert "# Benchmark" in done.stdout
    run_json = next((tmp_path / "workspace" / "runs").glob("*/run.json"))
    assert json.loads(run_json.read_bytes())["request"]["recipe"]["distill"]["steps"] == 5


def test_a_refused_plan_ends_the_session_with_the_servers_own_words(run_example):
    done = run_example("agent_session.py", "--student", "relative/model.safetensors")
    assert done.returncode == 1
    assert "Fix: " in done.stdout
    assert "Traceback" not in done.stderr
    assert "start_distillation(" not in done.stdout.split("> plan_distillation")[1]
