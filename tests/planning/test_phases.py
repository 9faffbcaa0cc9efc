"""Keys: equal inputs find each other's results, anything else does not."""

import pytest

from opd_mcp.planning.phases import PhaseChain, cache_id_of, distillation_phases, product, request_hash, with_satisfied
from opd_mcp.schemas.identity import ModelIdentity, TeacherClaim
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import DataInput, ModelInput, RunInputs


def model(name: str, **fields: object) -> ModelInput:
    identity = ModelIdentity(name=name, weights=name[0] * 64, tokenizer="t" * 64, special_tokens="s" * 64)
    return ModelInput(**{"reference": name, "path": f"/{name}", "identity": identity, **fields})


def inputs(**changes: object) -> RunInputs:
    given = {"student": model("student"), "teacher": model("teacher"), "prompts": data("prompts"), **changes}
    return RunInputs(**given)


def data(name: str, **fields: object) -> DataInput:
    return DataInput(**{"reference": name, "path": f"/{name}", "sha256": name[0] * 64, **fields})


def keys(given: RunInputs, method: str = "lightning", **overrides: object) -> dict[str, str]:
    recipe = resolve_recipe("demo", {key.replace("__", "."): value for key, value in overrides.items()})
    phases = distillation_phases(recipe, given, method, sft=True, benchmark=True)
    return {phase.name: phase.key for phase in phases}


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ({"distill__steps": 7}, ["generate_responses", "sft", "rollout", "score"]),
        ({"score__topk": 3}, ["generate_responses", "sft", "rollout"]),
        ({"sft__steps": 7}, ["generate_responses"]),
        ({"benchmark__limit": 7}, ["generate_responses", "sft", "rollout", "score", "distill"]),
        ({"runtime__seed": 7}, []),
        ({"distill__adapter": {}}, ["generate_responses", "sft", "rollout", "score"]),
        ({"distill__adapter": {"quantization": "nf4"}}, ["generate_responses", "sft"]),
    ],
)
def test_a_setting_changes_its_phase_and_all_that_follow(overrides, kept):
    before, after = keys(inputs()), keys(inputs(), **overrides)
    assert [name for name in before if before[name] == after[name]] == kept


def test_a_setting_that_came_later_changes_no_key_at_its_default():
    assert keys(inputs(), distill__repair="none") == keys(inputs())
    assert keys(inputs(), distill__repair="residual")["distill"] != keys(inputs())["distill"]
    assert "repair" not in resolve_recipe("demo", {}).distill.key_settings()
    assert "repair" in resolve_recipe("demo", {"distill.repair": "residual"}).distill.key_settings()


def test_where_a_model_lies_and_how_it_is_called_does_not_matter():
    moved = model("student", reference="elsewhere", path="/elsewhere/model")
    moved = moved.model_copy(update={"identity": moved.identity.model_copy(update={"name": "model"})})
    assert keys(inputs(student=moved)) == keys(inputs())
    assert keys(inputs(student=model("pupil"))) != keys(inputs())


def test_an_artifact_stands_for_the_phase_that_made_it():
    recipe = resolve_recipe("demo", {})
    whole = distillation_phases(recipe, inputs(), "lightning", sft=True, benchmark=False)
    made = product("sft", whole[1].key).artifact_id
    proven = TeacherClaim(basis="proven", name="teacher")
    student = model("anything", artifact_id=made, sft_teacher=proven)
    rest = distillation_phases(recipe, inputs(student=student), "lightning", sft=False, benchmark=False)
    assert [phase.key for phase in rest] == [phase.key for phase in whole[2:]]


def test_what_is_asserted_or_allowed_is_part_of_the_cache():
    def cache(**changes: object) -> str | None:
        given = inputs(**changes)
        return cache_id_of(PhaseChain(resolve_recipe("demo", {}), given).cache_of_rollouts().phases)

    asserted = model("student", sft_teacher=TeacherClaim(basis="asserted", name="teacher"))
    assert len({cache(), cache(student=asserted), cache(allow_teacher_mismatch=True)}) == 3


def test_rollouts_are_satisfied_by_their_cache():
    chain = PhaseChain(resolve_recipe("demo", {}), inputs()).cache_of_rollouts()
    cache_id = cache_id_of(chain.phases)
    found = with_satisfied(chain.phases, {chain.phases[-1].key: cache_id})
    assert [phase.satisfied_by for phase in found] == [cache_id, cache_id]
    assert [phase.satisfied_by for phase in with_satisfied(found, {})] == [None, None]


def test_a_model_of_the_hub_is_fetched_first():
    chain = PhaseChain(resolve_recipe("demo", {}), inputs(teacher=ModelInput(reference="o/t", hub_id="o/t")))
    assert [phase.name for phase in chain.generate_responses().phases] == ["fetch", "generate_responses"]


def test_the_request_hash_is_of_kind_and_keys_only():
    phases = PhaseChain(resolve_recipe("demo", {}), inputs()).generate_responses().phases
    satisfied = with_satisfied(phases, {phases[0].key: "responses-1"})
    assert request_hash("generate", phases) == request_hash("generate", satisfied)
    assert request_hash("generate", phases) != request_hash("sft", phases)
