"""Every shipped recipe is arguments that plan_distillation accepts, and resolves to what it says."""

import pytest

from opd_mcp.demo import TOPK_STEPS
from opd_mcp.planning.asked_recipes import distillation_recipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.resolve import recipe_arguments, resolve_recipe

NAMES = [
    "arithmetic.toml",
    "one_gpu_quick.toml",
    "qwen3_1.7b_from_8b.toml",
    "qwen3_4b_from_8b.toml",
    "qwen3_8b_from_32b.toml",
]
# What the embedded example, or the command line, gives where a recipe names no models or data.
GIVEN = {"student": "/m/student", "teacher": "/m/teacher", "prompts": "/d/prompts.jsonl"}


def test_these_are_all_recipes(examples):
    assert sorted(path.name for path in (examples / "recipes").glob("*.toml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_and_each_of_its_settings_arrives(examples, name):
    arguments = PlanDistillation.model_validate(GIVEN | recipe_arguments(examples / "recipes" / name))
    resolved = resolve_recipe(arguments.preset, arguments.overrides)
    assert arguments.overrides
    for key, value in arguments.overrides.items():
        found = resolved
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    assert distillation_recipe(arguments).distill.estimator == arguments.estimator


def test_a_recipe_that_names_its_optimizer_keeps_warm_up_and_schedule(examples):
    quick = recipe_arguments(examples / "recipes" / "one_gpu_quick.toml")
    optimizer = resolve_recipe(quick["preset"], quick["overrides"]).sft.optimizer
    assert (optimizer.schedule, optimizer.warmup_steps) == ("cosine", 12)


def test_the_arithmetic_recipe_is_the_demos_topk_arm(examples):
    arguments = recipe_arguments(examples / "recipes" / "arithmetic.toml")
    demo = resolve_recipe("demo", TOPK_STEPS)
    assert arguments["estimator"] == "topk_reverse_kl"
    assert resolve_recipe(arguments["preset"], arguments["overrides"]) == demo


def test_tables_become_dotted_keys_and_template_arguments_stay_whole(examples, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        'preset = "quick"\n[rollout]\nsampling = { top_p = 0.9 }\n'
        "[prompting]\nchat_template_kwargs = { enable_thinking = false }\n"
    )
    assert recipe_arguments(file) == {
        "preset": "quick",
        "overrides": {"rollout.sampling.top_p": 0.9, "prompting.chat_template_kwargs": {"enable_thinking": False}},
    }
