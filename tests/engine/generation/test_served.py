"""Generation by an engine over HTTP: as the model alone, seeded by row, and refused where it is something else."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_cache, read_record, read_rollouts
from opd_mcp.engine.context import (
    BenchmarkInputs,
    Context,
    EngineAddress,
    ResponsesInputs,
    SilentReporter,
    TeacherInputs,
)
from opd_mcp.engine.generation.batch_state import Generated
from opd_mcp.engine.generation.served import Ask, draw_body, read_drawn
from opd_mcp.engine.runtime import seed_for
from opd_mcp.engine.scoring.dialects import WireError
from opd_mcp.identity.lineage import read_lineage
from opd_mcp.schemas.errors import ConsistencyError, DataError, IntegrityError, RunError
from opd_mcp.schemas.recipes import Sampling

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
KEY = "the-engine-s-key"
STOPS = [1]
SHORT = Sampling(max_new_tokens=12)
SMALL = {"count": 16, "shard_rows": 4}
ASK = Ask([5, 6, 7], Sampling(temperature=0.8, top_p=0.9, max_new_tokens=3), STOPS, seed=7)


def stand_in():
    file = Path(__file__).resolve().parents[2] / "stand_ins" / "stand_in_engine.py"
    spec = importlib.util.spec_from_file_location("stand_in_engine", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engines():
    """`engines(model, **options)`: the stand-in's wire before a model, closed at the end."""
    module, opened = stand_in(), []

    def started(path: Path, *, processed: bool = False, **options):
        wire = module.Wire(path.name, module.model_answers(path, processed=processed), **options)
        opened.append(wire.serve_in_background())
        return wire

    yield started
    for wire in opened:
        wire.close()


@pytest.fixture(scope="module")
def served(engines, student):
    """vLLM's wire before the student."""
    return engines(student, key=KEY)


@pytest.fixture
def drawn_by(build):
    """`drawn_by(url, name)`: rollouts that an engine draws."""

    def made(url: str, name: str = "rollouts", *, context: Context | None = None, **changes) -> Path:
        section = build.recipe.rollout.model_copy(update={"engine": url, **SMALL, **changes})
        return build.rollouts(name, recipe=section, context=context or build.context(teacher_key=KEY))

    return made


def test_rows_are_the_model_s_own_and_resuming_changes_nothing(served, build, drawn_by, stopping, content):
    whole = drawn_by(served.url)
    record, rows = read_record(whole), read_rollouts(whole)
    assert record.generated_by.to_dict() == {"name": "vllm", "version": "0.32.0", "managed": False}
    assert record.engine_gap.mean <= 1e-5
    assert record.statistics.eos_fraction > 0
    with pytest.raises(RunError, match="run_cancelled"):
        drawn_by(served.url, "again", context=build.context(teacher_key=KEY, reporter=stopping(after=7)))
    kept = len(list((build.root / "again").glob("*.parquet")))
    assert 0 < kept < 4
    again = read_rollouts(drawn_by(served.url, "again"))
    assert np.array_equal(again.response_ids, rows.response_ids)
    assert np.array_equal(again.columns["behaviour_logprobs"], rows.columns["behaviour_logprobs"])
    cache = build.cache(whole, "cache")
    manifest = read_cache(cache)[0]
    assert manifest.generated_by == record.generated_by
    assert read_lineage(cache).engines == {"rollout": record.generated_by}


def test_every_setting_is_said_and_every_row_has_its_own_seed(served, drawn_by, build):
    served.asked.clear()
    drawn_by(served.url)
    bodies = [body for body in served.asked if body.get("return_token_ids") and body["temperature"] != 0.5]
    assert {body["seed"] for body in bodies} == {
        seed_for(0, f"rollout/{shard}", row) for shard in range(4) for row in range(4)
    }
    for body in bodies:
        assert (body["top_k"], body["min_p"], body["repetition_penalty"], body["logprobs"]) == (-1, 0.0, 1.0, 0)
        assert (body["presence_penalty"], body["frequency_penalty"], body["ignore_eos"]) == (0.0, 0.0, True)
        assert body["stop_token_ids"]
        assert isinstance(body["prompt"][0], int)


def test_log_probs_after_temperature_are_refused_before_any_row(engines, student, drawn_by, build):
    server = engines(student, processed=True, key=KEY)
    with pytest.raises(ConsistencyError, match=r"engine_untrue.*after temperature.*raw_logprobs"):
        drawn_by(server.url)
    assert not list((build.root / "rollouts").glob("*.parquet"))


def test_another_model_s_rows_are_found_out_by_the_model_here(engines, drawn_by, build):
    server = engines(build.teacher, key=KEY)
    with pytest.raises(RunError, match="engine_disagrees"):
        drawn_by(server.url)
    assert not list((build.root / "rollouts").glob("*.parquet"))


def test_a_context_that_is_too_short_is_told_before_any_row(engines, student, drawn_by, build):
    server = engines(student, key=KEY, length=20)
    with pytest.raises(DataError, match=r"too_long.*takes 20 in all"):
        drawn_by(server.url)
    assert not list((build.root / "rollouts").glob("*.parquet"))


def test_one_long_prompt_of_a_later_shard_is_told_before_any_row(engines, student, drawn_by, build):
    whole = read_rollouts(drawn_by(engines(student, key=KEY).url, sampling=SHORT))
    longest = [len(whole.prompt(row)) for row in range(len(whole))]
    assert max(longest[:4]) < max(longest)
    server = engines(student, key=KEY, length=max(longest[:4]) + SHORT.max_new_tokens)
    with pytest.raises(DataError, match="too_long"):
        drawn_by(server.url, "short", sampling=SHORT)
    assert not list((build.root / "short").glob("*.parquet"))
    assert not any(body.get("return_token_ids") and body["temperature"] != 0.5 for body in server.asked)


def test_rows_that_the_teacher_s_server_cannot_take_are_told_before_they_are_drawn(engines, build):
    server = engines(build.teacher, key=KEY, length=20)
    given = TeacherInputs(student=build.student, teacher=build.teacher)
    context = build.context(teacher_key=KEY)
    longest = stages.check_teacher(build.scoring(engine=server.url), given, context)
    assert longest == 19
    with pytest.raises(DataError, match=r"too_long.*server takes 19"):
        build.rollouts("rollouts", longest=longest)
    assert not list((build.root / "rollouts").glob("*.parquet"))


def test_the_server_s_own_words_reach_the_user(student, drawn_by, build):
    module = stand_in()
    real = module.model_answers(student)

    def answer(body):
        if body.get("return_token_ids") and body["temperature"] != 0.5:
            return 400, {"error": {"message": "VLLM says no", "code": 400}}
        return real(body)

    wire = module.Wire(student.name, answer).serve_in_background()
    try:
        with pytest.raises(RunError, match=r"bad_rows.*HTTP 400: VLLM says no"):
            drawn_by(wire.url)
    finally:
        wire.close()


def test_another_version_may_not_go_on_with_a_build(served, drawn_by, build, stopping):
    with pytest.raises(RunError, match="run_cancelled"):
        drawn_by(served.url, context=build.context(teacher_key=KEY, reporter=stopping(after=7)))
    file = build.root / "rollouts" / "build.json"
    values = json.loads(file.read_text())
    values["record"]["engine"]["version"], values["self_sha256"] = "0.31.0", ""
    file.write_text(json.dumps(values))
    with pytest.raises(IntegrityError, match=r"input_changed.*another engine.*vllm 0\.31\.0"):
        drawn_by(served.url)


def test_rescored_rows_hold_the_log_probs_of_the_scorer_here(served, drawn_by, build, runtime):
    from opd_mcp.engine.models.loading import load_model
    from opd_mcp.engine.scoring.local import score_sequences

    rollouts = drawn_by(served.url, rescore="local")
    rows = read_rollouts(rollouts)
    model = load_model(build.student, runtime)
    ours = score_sequences(model, rows.slice(0, 4), topk=0, micro_batch_tokens=16384, runtime=runtime).logprobs
    assert np.array_equal(rows.slice(0, 4).columns["behaviour_logprobs"], ours)
    assert read_record(rollouts).rescored is True


def test_the_teacher_answers_and_scores_on_an_engine_and_a_managed_one_is_given_what_it_serves(
    engines, build, drawn, finished
):
    server, wishes = engines(build.teacher, key="managed-key"), []

    def start_engine(wish):
        from contextlib import nullcontext

        wishes.append(wish)
        return nullcontext([EngineAddress(server.url, "managed-key", wish.dtype, managed=True)])

    context = replace(build.context(), start_engine=start_engine)
    section = build.recipe.responses.model_copy(update={"engine": "vllm", "limit": 8, "sampling": SHORT})
    inputs = ResponsesInputs(teacher=build.teacher, prompts=EXAMPLE / "sft.jsonl")
    stages.generate_responses(section, inputs, build.root / "responses", context)
    facts = read_lineage(build.root / "responses").engines["responses"]
    assert facts.label() == "vllm 0.32.0 float32"
    cache = build.cache(drawn, "cache", recipe=build.scoring(engine="vllm"), context=context)
    (manifest, ours), (_, local) = read_cache(cache), read_cache(finished)
    assert np.abs(ours.columns["teacher_logprobs"] - local.columns["teacher_logprobs"]).max() <= 1e-4
    assert (manifest.scored_by.managed, manifest.scored_by.dtype) == (True, "float32")
    assert manifest.scorer_gap.mean <= 1e-5
    assert manifest.teacher.same_model(read_cache(finished)[0].teacher)
    assert [(wish.kind, wish.model, wish.topk) for wish in wishes] == [
        ("vllm", build.teacher, 0),
        ("vllm", build.teacher, 4),
    ]
    assert all(16 < wish.length < 200 for wish in wishes)


def test_an_engine_that_scores_as_another_model_is_found_out(engines, student, build, drawn):
    server = engines(student, key=KEY)
    with pytest.raises(RunError, match="engine_disagrees"):
        build.cache(drawn, "cache", recipe=build.scoring(engine=server.url), context=build.context(teacher_key=KEY))
    assert not list((build.root / "cache").glob("*.parquet"))


def test_a_benchmark_s_candidate_answers_on_a_user_s_server_and_its_baseline_here(served, build):
    section = build.recipe.benchmark.model_copy(
        update={"engine": served.url, "limit": 4, "samples_per_prompt": 1, "kl_prompts": 2, "sampling": SHORT}
    )
    inputs = BenchmarkInputs(
        models={"candidate": build.student, "before": EXAMPLE / "student"},
        prompts=EXAMPLE / "eval.jsonl",
        recipe_hash="x",
        teacher=build.teacher,
    )
    report = stages.benchmark(section, inputs, build.root / "report", build.context(teacher_key=KEY))
    local = stages.benchmark(section.model_copy(update={"engine": None}), inputs, build.root / "local", build.context())
    assert report.models[0].generated_by.name == "vllm"
    assert report.models[1].generated_by is None
    assert read_lineage(build.root / "report").engines == {"benchmark": report.models[0].generated_by}
    assert read_lineage(build.root / "local").engines is None
    assert report.models[0].greedy_accuracy == local.models[0].greedy_accuracy
    assert report.models[0].reverse_kl.value == pytest.approx(local.models[0].reverse_kl.value, abs=0.5)
    assert "Responses of candidate by vllm 0.32.0." in (build.root / "report" / "report.md").read_text()


@pytest.fixture(scope="module")
def teacher_server(serve_model) -> Iterator:
    server = serve_model("student", KEY)
    yield server
    server.close()


def test_serve_teacher_generates_what_the_model_draws_alone(teacher_server, build):
    builder = replace(build, student=EXAMPLE / "student")
    section = build.recipe.rollout.model_copy(update={"engine": teacher_server.url, "count": 8})
    rollouts = builder.rollouts("rollouts", recipe=section, context=build.context(teacher_key=KEY))
    record = read_record(rollouts)
    assert (record.generated_by.name, record.generated_by.dtype) == ("opd-mcp", "float32")
    assert record.engine_gap.mean <= 1e-5
    assert record.statistics.rows == 8


GOOD = {
    "prompt_token_ids": [5, 6, 7],
    "token_ids": [8, 1],
    "logprobs": {"token_logprobs": [-0.5, -0.1]},
    "finish_reason": "stop",
}


def test_a_good_answer_is_read():
    assert read_drawn("vllm", {"choices": [GOOD]}, ASK) == Generated([8, 1], [-0.5, -0.1], "eos")
    meta = {"prompt_tokens": 3, "finish_reason": {"type": "length"}}
    meta["output_token_logprobs"] = [[-0.5, 8, None], [-0.25, 9, None], [-1.0, 4, None]]
    assert read_drawn("sglang", {"meta_info": meta}, ASK) == Generated([8, 9, 4], [-0.5, -0.25, -1.0], "length")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt_token_ids": [5, 6]}, "another prompt"),
        ({"token_ids": [8, 9, 1]}, "another length"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "another length"),
        ({"token_ids": [1, 8]}, "goes on behind a stop id"),
        ({"token_ids": [8, 9]}, "stops without a stop id"),
        ({"token_ids": [8, 9], "finish_reason": "length"}, "ends before its limit"),
        ({"finish_reason": "abort"}, "ended by the server"),
        ({"logprobs": {"token_logprobs": [-0.5, 0.2]}}, "above 0"),
        ({"logprobs": {"token_logprobs": [-0.5, None]}}, "expected fields"),
        ({"token_ids": None}, "expected fields"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(change, why):
    with pytest.raises(WireError, match=why):
        read_drawn("vllm", {"choices": [GOOD | change]}, ASK)


def test_sglang_is_asked_for_the_same_in_its_words():
    body = draw_body("sglang", "m", ASK)
    drawn = body["sampling_params"]
    assert (body["input_ids"], body["return_logprob"], drawn["max_new_tokens"]) == ([5, 6, 7], True, 3)
    assert (drawn["top_k"], drawn["min_p"], drawn["stop_token_ids"], drawn["sampling_seed"]) == (-1, 0.0, [1], 7)


def test_a_library_has_no_engine_to_start(drawn_by, build):
    with pytest.raises(Exception, match=r"engine_failed.*a worker does that"):
        drawn_by("vllm", context=build.context(reporter=SilentReporter()))
