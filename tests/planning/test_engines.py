"""Engines in a recipe: keys that stay as they were without one, hosts, programs, and what `auto` becomes."""

import pytest

from opd_mcp.devices.hardware import Target
from opd_mcp.planning.engines import require_engines_used, with_engines
from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import EngineSettings
from opd_mcp.server.render.plans import plan_text

URL = "http://127.0.0.1:8000"


@pytest.fixture
def program(tmp_path) -> str:
    file = tmp_path / "vllm"
    file.write_text("#!/bin/true\n")
    file.chmod(0o755)
    return str(file)


def test_local_is_the_absence_of_an_engine():
    plain, local = resolve_recipe("quick", {}), resolve_recipe("quick", {"rollout.engine": "local"})
    assert plain.content_hash() == local.content_hash()
    assert "engine" not in plain.rollout.to_dict()
    assert "rescore" not in plain.rollout.to_dict()


@pytest.mark.parametrize(
    "value", ["tgi", "ftp://host", "127.0.0.1:8000", 3, [], ["vllm"], f"{URL},vllm", f"{URL},{URL}"]
)
def test_what_is_no_engine_is_refused(value):
    with pytest.raises(ArgumentError, match=r"invalid_argument.*rollout\.engine"):
        resolve_recipe("quick", {"rollout.engine": value})


def test_a_url_must_be_of_an_allowed_host():
    recipe = resolve_recipe("quick", {"score.engine": "http://gpu.example:8000"})
    with pytest.raises(ArgumentError, match=r"teacher_host_not_allowed"):
        with_engines(recipe, EngineSettings(), ())
    assert with_engines(recipe, EngineSettings(), ("gpu.example",)) == (recipe, [])
    assert with_engines(resolve_recipe("quick", {"score.engine": URL}), EngineSettings(), ())[1] == []
    with pytest.raises(ArgumentError, match=r"invalid_argument"):
        with_engines(resolve_recipe("quick", {"score.engine": "http://user:key@127.0.0.1"}), EngineSettings(), ())


def test_several_urls_are_one_engine_each_of_an_allowed_host():
    text = "http://127.0.0.1:1, http://gpu.example:2"
    recipe = resolve_recipe("quick", {"rollout.engine": text})
    assert recipe.rollout.engine == "http://127.0.0.1:1,http://gpu.example:2"
    listed = resolve_recipe("quick", {"rollout.engine": text.split(", ")})
    assert listed.content_hash() == recipe.content_hash()
    assert with_engines(recipe, EngineSettings(), ("gpu.example",)) == (recipe, [])
    with pytest.raises(ArgumentError, match="teacher_host_not_allowed"):
        with_engines(recipe, EngineSettings(), ())


def test_a_managed_engine_must_be_named_by_the_settings(program):
    recipe = resolve_recipe("quick", {"rollout.engine": "vllm"})
    for settings in (EngineSettings(), EngineSettings(vllm="/nowhere/vllm"), EngineSettings(vllm="vllm")):
        with pytest.raises(ResourceError, match=r"missing_package.*\[engines\] vllm"):
            with_engines(recipe, settings, ())
    assert with_engines(recipe, EngineSettings(vllm=program), ())[0] == recipe


def test_auto_is_local_on_a_cpu_and_says_why(program):
    recipe = resolve_recipe("quick", {"rollout.engine": "auto", "runtime.device": "cpu"})
    chosen, [finding] = with_engines(recipe, EngineSettings(vllm=program), ())
    assert chosen.rollout.engine is None
    assert (finding.code, "rollout.engine is local: on a CPU" in finding.message) == ("engine_chosen", True)


def test_auto_takes_what_the_settings_name_on_a_gpu(program, monkeypatch):
    monkeypatch.setattr("opd_mcp.planning.engines.target_of", lambda runtime: Target("cuda", "H200", 1 << 37))
    recipe = resolve_recipe("quick", {"rollout.engine": "auto", "score.engine": "auto"})
    chosen, found = with_engines(recipe, EngineSettings(sglang=program), ())
    assert (chosen.rollout.engine, chosen.score.engine, len(found)) == ("sglang", "sglang", 2)
    assert with_engines(recipe, EngineSettings(), ())[0].rollout.engine is None


def test_a_plan_chooses_and_a_live_one_refuses(world, service):
    plan = service.plan(world.plan_arguments(overrides={"rollout.engine": "auto", "runtime.device": "cpu"}))
    assert "engine_chosen" in [finding.code for finding in plan.warnings]
    assert plan.recipe.rollout.engine is None
    other = service.plan(world.plan_arguments(overrides={"rollout.engine": URL}))
    keys = [{phase.name: phase.key for phase in made.phases} for made in (plan, other)]
    assert keys[0]["generate_responses"] == keys[1]["generate_responses"]
    assert keys[0]["rollout"] != keys[1]["rollout"]
    basis = {phase.phase: phase.basis for phase in other.estimates[0].phases}
    assert basis["rollout"].startswith("on a server, ")
    assert not basis["score"].startswith("on ")
    with pytest.raises(ArgumentError, match=r"invalid_argument.*live"):
        service.plan(world.plan_arguments(method="live", overrides={"rollout.engine": URL}))


def test_a_live_distillation_has_an_engine_that_is_started_for_it(world, service, program):
    (service.workspace.root / "settings.toml").write_text(f'[engines]\nvllm = "{program}"\n')
    overrides = {"rollout.engine": "vllm", "rollout.reload_steps": 20, "distill.steps": 50, "runtime.device": "cpu"}
    plan = service.plan(world.plan_arguments(method="live", overrides=overrides))
    [live] = [made for made in plan.estimates if made.method == "live"]
    basis = {phase.phase: phase.basis for phase in live.phases}["distill"]
    assert basis.startswith("on vllm, ")
    assert "starts of engines: 3 min in distill" in plan_text(plan)
    assert "180 s for its engine's start" in basis, "the others are weights given in place"
    with pytest.raises(ArgumentError, match=r"invalid_argument.*whole models, and this distillation trains an adapter"):
        service.plan(world.plan_arguments(method="live", overrides=overrides | {"distill.adapter": {}}))


def test_auto_is_local_for_a_live_distillation(program, monkeypatch):
    monkeypatch.setattr("opd_mcp.planning.engines.target_of", lambda runtime: Target("cuda", "H200", 1 << 37))
    recipe = resolve_recipe("quick", {"rollout.engine": "auto", "distill.method": "live"})
    chosen, [finding] = with_engines(recipe, EngineSettings(vllm=program), ())
    assert (chosen.rollout.engine, "new weights" in finding.message) == (None, True)


def test_no_engine_draws_the_rollouts_of_a_4_bit_student(program, monkeypatch):
    """It would serve the stored weights; the others of the run's models are served as they are."""
    monkeypatch.setattr("opd_mcp.planning.engines.target_of", lambda runtime: Target("cuda", "a GPU", 1 << 36))
    nf4 = {"distill.adapter.quantization": "nf4", "rollout.engine": "vllm"}
    with pytest.raises(ArgumentError, match=r"invalid_argument.*dequantised weights"):
        require_engines_used(resolve_recipe("quick", nf4), "lightning")
    auto = resolve_recipe("quick", nf4 | {"rollout.engine": "auto", "responses.engine": "auto"})
    require_engines_used(auto, "lightning")
    recipe, found = with_engines(auto, EngineSettings(vllm=program), ())
    assert (recipe.rollout.engine, recipe.responses.engine) == (None, "vllm")
    assert "4 bits" in found[1].message


def test_an_sft_student_that_will_be_an_adapter_has_no_engine(world, service):
    overrides = {"rollout.engine": URL, "sft.adapter": {"save": "adapter"}}
    with pytest.raises(ArgumentError, match=r"invalid_argument.*sft\.adapter\.save"):
        service.plan(world.plan_arguments(overrides=overrides))
    assert service.plan(world.plan_arguments(overrides=overrides | {"sft.adapter": {"save": "both"}})).plan_id


def test_a_start_checks_the_host_before_any_work(world, service):
    overrides = {"rollout.engine": "http://elsewhere.example"}
    arguments = world.cache_arguments(world.student, declared_teacher="teacher", overrides=overrides)
    with pytest.raises(ArgumentError, match="teacher_host_not_allowed"):
        service.build_teacher_cache(arguments)
