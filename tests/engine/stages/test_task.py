"""A task of lm-eval on this engine: a local task file, the example's models, exact log-probs."""

import json
from pathlib import Path

import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, TaskInputs
from opd_mcp.engine.data.encoding import encode_prompts
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.reports import BenchmarkReport
from opd_mcp.schemas.resolve import resolve_recipe

pytestmark = pytest.mark.needs("lm_eval")
COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
WRITES = """\
task: sums
output_type: generate_until
doc_to_target: "#{{answer}}"
generation_kwargs:
  until: [";#never"]
  do_sample: false
filter_list:
  - name: last
    filter:
      - function: regex
        regex_pattern: "(#\\\\d)"
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOOSES = """\
task: choices
output_type: multiple_choice
doc_to_choice: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
doc_to_target: "{{answer}}"
target_delimiter: ""
"""


@pytest.fixture
def tasks(tmp_path: Path, example: Path) -> Path:
    """A folder of task files over the example's first prompts."""
    rows = [json.loads(line) for line in (example / "eval.jsonl").read_text().splitlines()[:12]]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": r["prompt"], "answer": int(r["answer"])}) + "\n" for r in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("sums", WRITES), ("choices", CHOOSES)):
        (folder / f"{name}.yaml").write_text(COMMON.format(data=data) + text)
    return folder


def measured(task: str, tasks: Path, example: Path, tmp_path: Path) -> BenchmarkReport:
    recipe = resolve_recipe("demo", {"benchmark.batch_size": 8})
    models = {"student": example / "student", "teacher": example / "teacher"}
    inputs = TaskInputs(models=models, task=task, data=tmp_path / "hub", recipe_hash="abc", tasks=tasks)
    context = Context(recipe.runtime, recipe.prompting)
    return stages.benchmark_task(recipe.benchmark, inputs, tmp_path / "report", context)


def test_a_generating_task_is_answered_by_our_generator(tasks: Path, example: Path, tmp_path: Path) -> None:
    report = measured("sums", tasks, example, tmp_path)
    student, teacher = report.models
    metric = teacher.task_metrics["exact_match (last)"]
    assert metric.value > 0.9
    assert metric.samples == 12
    assert teacher.eos_rate > 0.9
    assert student.task_metrics["exact_match (last)"].value < metric.value
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Suite `lm_eval:sums`" in text
    assert "| exact_match (last) | " in text
    assert "with the task's own metrics" in text
    assert not list((tmp_path / "report").glob("*.arrow"))
    assert any((tmp_path / "hub").rglob("*.arrow")), "its data is kept where it was told to"


def test_a_task_that_scores_has_our_log_probs(tasks: Path, example: Path, tmp_path: Path) -> None:
    report = measured("choices", tasks, example, tmp_path)
    for score in report.models:
        assert set(score.task_metrics) >= {"acc", "acc_norm"}
        assert score.mean_response_tokens is None, "nothing was generated"


def test_log_probs_and_greedy_marks_equal_a_plain_forward_pass(example: Path) -> None:
    import torch

    from opd_mcp.engine.evaluation.harness import EngineModel

    recipe = resolve_recipe("demo", {})
    context = Context(recipe.runtime, recipe.prompting)
    runtime = open_runtime(recipe.runtime)
    model, adopted = load_model(example / "teacher", runtime), adopt_tokenizer(example / "teacher", recipe.prompting)
    asking = EngineModel(model, adopted, recipe.benchmark, runtime, context)
    (prompt,) = encode_prompts([PromptRow("0", prompt="1+2*3=?")], adopted.tokenizer, context)
    text = asking.apply_chat_template([{"role": "user", "content": "1+2*3=?"}])
    assert asking.tok_encode(text) == prompt.ids
    continuation = asking.tok_encode("2*3=6;1+6=7;#7")
    found = asking._loglikelihood_tokens([((text, ""), prompt.ids, continuation), ((text, ""), prompt.ids, [5, 5])])
    with torch.no_grad():
        for (logprob, greedy), answer in zip(found, (continuation, [5, 5]), strict=True):
            logits = model.model(torch.tensor([prompt.ids + answer])).logits[0, len(prompt.ids) - 1 : -1]
            expected = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(answer)[:, None]).sum()
            assert logprob == pytest.approx(float(expected), abs=1e-3)
            assert greedy == (logits.argmax(-1).tolist() == answer)


def test_unknown_tasks_and_metrics_that_are_programs_of_the_hub_are_refused(
    tasks: Path, example: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="no task of that name") as unknown:
        measured("sum", tasks, example, tmp_path)
    assert unknown.value.nearest == ["sums"]
    program = (tasks / "sums.yaml").read_text().replace("exact_match", "a_program_of_the_hub").replace("sums", "bad")
    (tasks / "bad.yaml").write_text(program)
    with pytest.raises(ArgumentError, match="nothing fetched is run here"):
        measured("bad", tasks, example, tmp_path)


def test_stop_texts_cut_at_the_first() -> None:
    from opd_mcp.engine.evaluation.harness import until

    assert until("a;b#c", ["#", ";"]) == ("a", True)
    assert until("abc", ["x"]) == ("abc", False)
    assert until("abc", None) == ("abc", False)
    assert until("abc", "b") == ("a", True)
