"""Token ids and expected answers are looked at before any work: what could not be learnt or graded is refused."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_mcp.schemas.errors import ConsistencyError, DataError
from opd_mcp.schemas.requests import PlanDistillation, StartSft
from opd_mcp.server.render.plans import plan_text

GOOD = {"prompt": "1+1=?", "response_ids": [4, 5, 1]}


@pytest.fixture
def requested(world, service):
    """`requested(rows, kind, **overrides)`: the request of an SFT on a file of these rows."""

    def make(rows: list[dict], kind: str = "jsonl", teacher: str | None = None, **overrides: object):
        if kind == "jsonl":
            file = world.file("ids.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:
            file = str(world.root / "data" / "ids.parquet")
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000)
        arguments = StartSft(
            student=world.student,
            responses=file,
            preset="demo",
            overrides=overrides,
            declared_teacher=teacher or "name",
        )
        return service._builder.sft(arguments)

    return make


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        ({**GOOD, "response_ids": [4, 99]}, "unknown_token", "holds the id 99, and the vocabulary ends at 21"),
        ({**GOOD, "prompt_ids": [24]}, "unknown_token", "holds the id 24"),
        ({**GOOD, "response_ids": [4] * 300}, "too_large", "has 30[03] ids, and the student was made for 256"),
    ],
)
def test_ids_that_cannot_be_learnt_are_refused_before_work(requested, kind, bad, code, said):
    good = {"prompt_ids": [2, 4, 3], **GOOD}
    rows = [good] * 2500 + [{"prompt_ids": [2, 4, 3], **bad}] + [good] * 10
    assert requested([good] * 3, kind, **{"sft.max_length": 4096}).inputs.responses.rows == 3
    with pytest.raises(DataError, match=rf"{code}.*Row 2500 {said}"):
        requested(rows, kind, **{"sft.max_length": 4096})


def test_longer_rows_are_left_out_where_the_recipe_says_so(requested):
    rows = [GOOD, {**GOOD, "response_ids": [4] * 300}]
    assert requested(rows, **{"sft.max_length": 256}).inputs.responses.rows == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_that_are_all_too_long_leave_nothing_to_learn(requested, kind):
    with pytest.raises(DataError, match=r"empty_data.*the shortest has 3"):
        requested([GOOD, {**GOOD, "response_ids": [4] * 9}], kind, **{"sft.max_length": 2})


def test_negative_ids_far_down_a_table_are_found(requested):
    with pytest.raises(DataError, match=r"malformed_line.*row 2000 holds the id -1"):
        requested([GOOD] * 2000 + [{**GOOD, "response_ids": [-1]}], "parquet")


@pytest.mark.parametrize("response", ["#2", "#<pad>"])
def test_special_tokens_that_the_prompts_of_responses_have_must_be_the_student_s(requested, world, response):
    teacher = world.copy_of(world.teacher, "renamed")
    text = (teacher / "tokenizer.json").read_text()
    (teacher / "tokenizer.json").write_text(text.replace('"<pad>"', '"<fill>"'))
    rows = [{"prompt": "1+1=?", "response": response}]
    assert requested(rows, teacher=str(teacher)).inputs.teacher is not None
    for name in ("tokenizer.json", "chat_template.jinja"):
        content = text if name == "tokenizer.json" else (teacher / name).read_text()
        (teacher / name).write_text(content.replace("<user>", "<person>"))
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*'<person>'"):
        requested(rows, teacher=str(teacher))
    shutil.rmtree(teacher)


def evaluated(service, world, golds: list[str], **overrides: object):
    rows = [{"id": f"g{n}", "prompt": f"{n}+1=?", "answer": gold} for n, gold in enumerate(golds)]
    prompts = world.file("golds.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return service.plan(world.plan_arguments(eval_prompts=prompts, overrides=overrides, preset="quick"))


def problems(plan) -> str:
    return " ".join(f.message for f in plan.blocking if f.code == "golds_not_gradable")


@pytest.mark.parametrize(
    ("golds", "grader"),
    [
        (["1", "2.0", "1,000"], "auto"),
        (["A", "b", "(C)"], "auto"),
        (["Paris", "New York"], "auto"),
        (["x^2+1", "\\frac{1}{2}", "(1, 2)"], "math"),
    ],
)
def test_golds_that_their_grader_takes_for_right_block_nothing(service, world, golds, grader):
    assert problems(evaluated(service, world, golds, **{"benchmark.grader": grader})) == ""


def test_the_plan_names_its_grader_and_a_few_answers_that_decided_it(service, world):
    plan = evaluated(service, world, ["1", "2", "3"])
    assert plan.grading.to_dict() == {"grader": "number", "why": "every answer is a number", "right": 3, "graded": 3}
    assert "answers are graded by 'number' (every answer is a number); 3 of 3" in plan_text(plan)
    odd = evaluated(service, world, ["1"] * 20 + ["n/a"])
    (warning,) = [finding for finding in odd.warnings if finding.code == "golds_of_two_kinds"]
    assert "1 of 21 expected answers do not fit the grader 'number'" in warning.message
    assert "g20: 'n/a'" in warning.message
    assert service.plan(world.plan_arguments(eval_prompts=None)).grading is None


@pytest.mark.parametrize(
    ("golds", "grader", "first"),
    [
        (["1", "no number", "2"], "number", "g1: 'no number'"),
        (["A", "B", "F and G"], "choice", "g2: 'F and G'"),
        (["1", "x", "many words"], "gsm8k", "g1: 'x'"),
        (["not json"], "reasoning_gym", "g0: 'not json'"),
    ],
)
def test_golds_that_no_response_could_meet_block_with_examples(service, world, golds, grader, first):
    if grader == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    plan = evaluated(service, world, golds, **{"benchmark.grader": grader})
    assert first in problems(plan)
    assert f"of all {len(golds)} expected answers are graded as wrong by the grader '{grader}'" in problems(plan)


def test_golds_that_a_pattern_would_cut_short_block_with_the_way_out(service, world):
    """The preset's pattern reads one digit: it is for the embedded task, not for everybody's answers."""
    plan = evaluated(service, world, ["7", "12", "3"], **{"benchmark.answer_pattern": r"#(\d)"})
    assert "1 of all 3" in problems(plan)
    assert "g1: '12'" in problems(plan)
    fixes = [finding.fix for finding in plan.blocking if finding.code == "golds_not_gradable"]
    assert "'benchmark.answer_pattern' to null" in fixes[0]
    whole = evaluated(service, world, ["7", "12", "3"], **{"benchmark.answer_pattern": r"#(\d+)"})
    assert problems(whole) == ""
    assert problems(service.plan(PlanDistillation(**plan.next_action.arguments))) == "", "the next call has the fix"


def test_a_sample_of_many_golds_is_graded_and_said(service, world):
    golds = ["1"] * 5000
    assert problems(evaluated(service, world, golds)) == ""
    text = problems(evaluated(service, world, ["one hundred", *golds], **{"benchmark.grader": "number"}))
    assert "sampled of 5001" in text


def test_a_grader_that_cannot_work_here_blocks(service, world, monkeypatch):
    monkeypatch.setattr("opd_mcp.grading.graders.find_spec", lambda name: None)
    plan = evaluated(service, world, ["x"], **{"benchmark.grader": "math"})
    assert "missing_package" in [finding.code for finding in plan.blocking]
