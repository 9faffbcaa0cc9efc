"""Keys: equal inputs find each other's results, anything else does not."""

import pytest

from opd_mcp.planning.phases import PhaseChain, cache_id_of, distillation_phases, product, request_hash, with_satisfied
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.identity import ModelIdentity, TeacherClaim
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import DataInput, ModelInput, RunInputs, RunPhase


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
        ({"runtime__devices": 2}, ["generate_responses"]),
        ({"runtime__vocabulary": "divided"}, ["generate_responses"]),
        ({"runtime__replicas": 2, "runtime__devices": 4}, ["generate_responses"]),
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
    assert keys(inputs(), runtime__devices=1, runtime__vocabulary="auto", runtime__replicas="auto") == keys(inputs())


def test_only_what_several_devices_train_has_another_key():
    """A cache that was made for one device serves the training on two; two and all are not the same."""
    made = inputs(cache=None)
    chain = {n: PhaseChain(resolve_recipe("demo", {"runtime.devices": n}), made) for n in (1, 2, "all")}
    for one in chain.values():
        one.cache_of_rollouts().distill()
    found = {n: {phase.name: phase.key for phase in one.phases} for n, one in chain.items()}
    assert found[1]["rollout"] == found[2]["rollout"] == found["all"]["rollout"]
    assert found[1]["score"] == found[2]["score"] == found["all"]["score"]
    assert len({keys_of["distill"] for keys_of in found.values()}) == 3


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


def rounds_of(given: RunInputs, **overrides: object) -> list[RunPhase]:
    recipe = resolve_recipe("demo", {f"distill.{name}": value for name, value in overrides.items()})
    return distillation_phases(recipe, given, "lightning", sft=True, benchmark=True)


def test_each_round_has_phases_of_its_own_and_one_round_is_what_it_was():
    one = rounds_of(inputs())
    assert rounds_of(inputs(), rounds=1, round_trigger="steps") == one
    assert all(phase.round is None for phase in one)
    three = rounds_of(inputs(), rounds=3)
    assert [phase.label for phase in three[2:-1]] == [
        *("rollout", "score", "distill"),
        *("rollout 2", "score 2", "distill 2"),
        *("rollout 3", "score 3", "distill 3"),
    ]
    assert len({phase.key for phase in three}) == len(three)
    assert [phase.key for phase in three[:2]] == [phase.key for phase in one[:2]]
    later = rounds_of(inputs(), rounds=3, steps=120)
    assert all(mine.key != other.key for mine, other in zip(three[2:], later[2:], strict=True))


def test_rounds_that_staleness_ends_begin_with_the_cache_of_one_round():
    one, stale = rounds_of(inputs()), rounds_of(inputs(), rounds=2, round_trigger="stale")
    assert [phase.key for phase in stale[:4]] == [phase.key for phase in one[:4]]
    assert stale[4].key != one[4].key
    given = data("cache", artifact_id="cache-1")
    assert [phase.label for phase in rounds_of(inputs(cache=given), rounds=2)[2:]] == [
        *("distill", "rollout 2", "score 2", "distill 2"),
        "benchmark",
    ]


def test_a_round_draws_what_its_steps_train_on():
    distill = resolve_recipe("demo", {"distill.rounds": 3, "distill.steps": 10, "distill.batch_size": 4}).distill
    assert [distill.rows_of_round(number) for number in (1, 2, 3)] == [12, 12, 16]
    assert [distill.steps_before(number) for number in (1, 2, 3)] == [0, 3, 6]
    assert (
        resolve_recipe("demo", {"distill.rounds": 3, "distill.round_trigger": "stale"}).distill.rows_of_round(2) is None
    )
    with pytest.raises(ArgumentError, match="at most"):
        resolve_recipe("demo", {"distill.rounds": 3, "distill.steps": 2})


def test_prompts_that_judge_a_training_are_no_evidence_of_it():
    held = {"eval_prompts": data("eval", rows=40)}
    plain, judged = keys(inputs(**held)), keys(inputs(**held), distill__evaluate_steps=5)
    assert [name for name in plain if plain[name] == judged[name]] == ["generate_responses", "sft", "rollout", "score"]
    fewer = keys(inputs(**held), distill__evaluate_steps=5, distill__evaluate_prompts=4)
    assert fewer["benchmark"] != judged["benchmark"]
    for wrong in ({}, {"eval_prompts": data("eval", rows=16)}):
        with pytest.raises(ArgumentError, match="judges the student by the first 16 eval_prompts"):
            keys(inputs(**wrong), distill__evaluate_steps=5)
