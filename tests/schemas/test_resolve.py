"""From preset and overrides to a recipe."""

import sys

import pytest

from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.recipes import AdapterRecipe, Recipe, base_form
from opd_mcp.schemas.resolve import FEW_STEPS, few_steps, recipe_keys, resolve_recipe

PRESETS = ("quick", "paper", "demo")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_survives_json(preset: str) -> None:
    recipe = resolve_recipe(preset, {})
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_the_paper_preset_holds_the_published_settings() -> None:
    recipe = resolve_recipe("paper", {})
    assert (recipe.sft.steps, recipe.sft.batch_size, recipe.sft.optimizer.learning_rate) == (3000, 256, 8e-5)
    assert (recipe.rollout.sampling.temperature, recipe.rollout.sampling.max_new_tokens) == (0.8, 4096)
    assert (recipe.distill.steps, recipe.distill.batch_size, recipe.distill.advantage_clip) == (150, 256, 10.0)
    assert recipe.distill.optimizer.betas == (0.9, 0.98)
    assert recipe.distill.normalize == "sample"


def test_dotted_overrides_reach_every_depth() -> None:
    recipe = resolve_recipe("quick", {"distill.steps": 7, "sft.optimizer.learning_rate": 1e-3, "runtime.seed": 5})
    assert (recipe.distill.steps, recipe.sft.optimizer.learning_rate, recipe.runtime.seed) == (7, 1e-3, 5)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ArgumentError, match=r"unknown_override.*distill\.steps"):
        resolve_recipe("quick", {"distil.steps": 7})


@pytest.mark.parametrize(
    ("key", "value"), [("distill.steps", -1), ("rollout.sampling.top_p", 2), ("runtime.seed", "x")]
)
def test_a_bad_value_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"invalid_argument.*{key}"):
        resolve_recipe("quick", {key: value})


@pytest.mark.parametrize(
    ("parameters", "changes", "few"),
    [
        (400_000, {}, True),
        (400_000, {"distill.steps": FEW_STEPS + 1}, False),
        (400_000, {"distill.optimizer.learning_rate": 1e-4}, False),
        (400_000, {"distill.estimator": "topk_reverse_kl"}, False),
        (400_000, {"distill.method": "live"}, False),
        (4_000_000_000, {}, False),
        (None, {}, False),
    ],
)
def test_few_steps_are_those_at_a_small_student_s_rate_as_measured(parameters, changes, few) -> None:
    recipe = resolve_recipe("demo", {"distill.steps": 50, **changes})
    assert (few_steps(recipe, parameters) is not None) == few


def test_every_listed_key_can_be_overridden_with_its_own_value() -> None:
    recipe = resolve_recipe("demo", {})
    for key in recipe_keys():
        section, value = None, recipe
        for part in key.split("."):
            section, value = value, getattr(value, part, None)
        if section is not None:
            assert resolve_recipe("demo", {key: value}) == recipe, key


def test_a_quantization_is_an_adapters_and_keeps_it_apart_from_its_base() -> None:
    recipe = resolve_recipe("demo", {"distill.adapter.quantization": "nf4"})
    adapter = recipe.distill.adapter
    assert adapter is not None
    assert (adapter.quantization, adapter.rank) == ("nf4", 32)
    assert (adapter.saved_as("float32"), AdapterRecipe().saved_as("float32")) == ("adapter", "merged")
    assert base_form(adapter) == "nf4"
    assert base_form(recipe.sft.adapter) == base_form(AdapterRecipe()) == "as_saved"
    with pytest.raises(ArgumentError, match="nf4"):
        resolve_recipe("demo", {"distill.adapter.quantization": "int3"})


@pytest.mark.parametrize("section", ["sft", "distill"])
def test_an_adapter_is_off_until_it_or_one_of_its_keys_is_named(section: str) -> None:
    off, name = resolve_recipe("quick", {}), f"{section}.adapter"
    assert getattr(off, section).adapter is None
    assert "adapter" not in off.to_dict()[section], "recipes without one keep their hashes"
    plain = resolve_recipe("quick", {name: {}})
    assert getattr(plain, section).adapter == AdapterRecipe()
    ranked = resolve_recipe("quick", {f"{name}.rank": 8, f"{name}.targets": ["q_proj"]})
    assert getattr(ranked, section).adapter == AdapterRecipe(rank=8, targets=["q_proj"])
    assert getattr(ranked, section).adapter.scale == 2.0
    assert resolve_recipe("quick", {name: {"rank": 4}, f"{name}.alpha": 4}).content_hash() != plain.content_hash()
    with pytest.raises(ArgumentError, match=rf"{name}\.rank"):
        resolve_recipe("quick", {f"{name}.rnk": 8})
    with pytest.raises(ArgumentError, match="fp32_master"):
        resolve_recipe("quick", {name: {}, f"{section}.optimizer.precision": "split_master"})


def test_equal_recipes_have_equal_hashes() -> None:
    same = resolve_recipe("demo", {"distill.steps": 400})
    assert same.content_hash() == resolve_recipe("demo", {}).content_hash()
    assert same.content_hash() != resolve_recipe("demo", {"distill.steps": 401}).content_hash()


def test_overriding_one_key_leaves_its_neighbours_alone() -> None:
    plain, changed = resolve_recipe("quick", {}), resolve_recipe("quick", {"sft.optimizer.learning_rate": 1e-5})
    assert changed.sft.optimizer == plain.sft.optimizer.model_copy(update={"learning_rate": 1e-5})


@pytest.mark.parametrize("section", ["sft", "distill"])
def test_a_precision_that_loses_the_updates_is_refused_with_the_number(section: str) -> None:
    low = {f"{section}.optimizer.precision": "bf16", f"{section}.optimizer.learning_rate": 2e-6}
    with pytest.raises(ArgumentError, match="98% of the updates") as caught:
        resolve_recipe("paper", low)
    assert caught.value.code == "lossy_precision"
    assert f"{section}.optimizer.precision" in caught.value.fix
    resolve_recipe("paper", low | {f"{section}.optimizer.precision": "bf16_stochastic"})


@pytest.mark.parametrize("devices", [2, "all"])
@pytest.mark.parametrize(
    ("overrides", "way_out"),
    [
        ({"sft.optimizer.precision": "split_master"}, "'sft.optimizer.precision' to 'fp32_master'"),
        ({"distill.adapter.quantization": "nf4"}, "'distill.adapter.quantization'"),
        ({"distill.method": "live", "rollout.engine": "vllm"}, "Leave out 'rollout.engine'"),
    ],
)
def test_what_several_devices_cannot_share_is_refused_with_the_way_out(devices, overrides, way_out: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        resolve_recipe("paper", overrides | {"runtime.devices": devices})
    assert caught.value.code == "devices_unsupported"
    assert way_out in caught.value.fix
    assert "'runtime.devices' to 1" in caught.value.fix
    resolve_recipe("paper", {"runtime.devices": devices, "distill.rounds": 2})
    resolve_recipe("paper", {"runtime.devices": devices, "distill.method": "live", "distill.evaluate_steps": 10})
    resolve_recipe("paper", overrides)


@pytest.mark.parametrize(("devices", "replicas"), [(1, 2), (8, 3)])
def test_replicas_that_devices_cannot_hold_evenly_are_refused(devices: int, replicas: int) -> None:
    with pytest.raises(ArgumentError, match="equally many devices each") as caught:
        resolve_recipe("paper", {"runtime.devices": devices, "runtime.replicas": replicas})
    assert caught.value.code == "devices_unsupported"
    resolve_recipe("paper", {"runtime.devices": 8, "runtime.replicas": 4})


@pytest.mark.parametrize("section", ["sft", "distill"])
def test_8_bit_moments_are_refused_without_their_library(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {f"{section}.optimizer.precision": "fp32_master_8bit"}
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    with pytest.raises(ResourceError, match="not installed") as caught:
        resolve_recipe("paper", wanted)
    assert caught.value.code == "missing_package"
    assert f"{section}.optimizer.precision" in caught.value.value
    assert "opd-mcp[int8]" in caught.value.fix
    resolve_recipe("paper", {})


@pytest.mark.needs("torchao")
def test_8_bit_moments_are_a_recipe_s_choice_with_their_library() -> None:
    recipe = resolve_recipe("paper", {"sft.optimizer.precision": "fp32_master_8bit"})
    assert recipe.sft.optimizer.precision == "fp32_master_8bit"


def test_a_named_grader_takes_the_place_of_the_presets_pattern() -> None:
    assert resolve_recipe("demo", {}).benchmark.answer_pattern is not None
    assert resolve_recipe("demo", {"benchmark.grader": "gsm8k"}).benchmark.answer_pattern is None
    with pytest.raises(ArgumentError, match="answer_pattern is for the grader 'regex'"):
        resolve_recipe("demo", {"benchmark.grader": "gsm8k", "benchmark.answer_pattern": "x"})


@pytest.mark.parametrize(
    ("overrides", "message", "fix"),
    [
        ({"distill.steps": 0}, "Override distill.steps: ", "Set 'distill.steps' to: integer > 0."),
        ({"sft.optimizer.schedule": "step"}, "Override sft.optimizer.schedule: ", "constant, linear, cosine."),
        ({"sft.optimizer.betas": [1, 2, 3]}, "Override sft.optimizer.betas: ", "Set 'sft.optimizer.betas' to: array"),
        ({"distill.horizon_growth_steps": 3}, "needs a distill.horizon to grow from.", "Change one of the keys"),
    ],
)
def test_a_wrong_value_is_told_with_what_the_key_takes(overrides, message, fix):
    with pytest.raises(ArgumentError, match="invalid_argument") as refused:
        resolve_recipe("quick", overrides)
    assert message in refused.value.message
    assert "Value error" not in refused.value.message
    assert fix in refused.value.fix
