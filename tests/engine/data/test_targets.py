"""What SFT learns of text, ids and chats, with a byte tokenizer and ChatML templates; tests/families has real ones."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.data.targets import SftTargets, sft_targets
from opd_mcp.engine.models.loading import AdoptedTokenizer, adopt_tokenizer
from opd_mcp.identity.data.reading import read_responses
from opd_mcp.schemas.errors import ArgumentError, DataError
from opd_mcp.schemas.recipes import PromptingRecipe, SftRecipe

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eom|>")
TURN = "{{ '<|im_start|>' + message.role + '\\n' + message.content + CALLS + '<|im_end|>\\n' }}"
CALLS = "(' CALL ' + message.tool_calls[0].function.arguments.a|string if message.tool_calls else '')"
TEXT_CALLS = "(' CALL ' + message.tool_calls[0].function.arguments if message.tool_calls else '')"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for message in messages %}" + TURN.replace("CALLS", CALLS) + "{% endfor %}" + BEGIN
THINKING = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + BEGIN
)
# Opens the thinking itself and shows none of earlier turns, as DeepSeek-R1's does.
OPENED = (
    CHATML.replace("message.content", "message.content.split('</think>')[-1]").removesuffix(BEGIN)
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


class Listening(SilentReporter):
    def __init__(self) -> None:
        self.alerts: dict[str, str] = {}

    def alert(self, code: str, message: str) -> None:
        self.alerts[code] = message


class Taught:
    """A tokenizer with a template, and the targets of rows."""

    def __init__(self, folder: Path, template: str | None = CHATML, **generation: object) -> None:
        self.folder, self.reporter = folder, Listening()
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)

    def adopted(self, **prompting: object) -> AdoptedTokenizer:
        return adopt_tokenizer(self.folder, PromptingRecipe(**prompting))

    def targets(self, *rows: dict, **section: object) -> SftTargets:
        file = self.folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return sft_targets(read_responses(file), self.adopted(), SftRecipe(**section), Context(reporter=self.reporter))

    def texts(self, *rows: dict, **section: object) -> list[tuple[str, str]]:
        sequences, decode = self.targets(*rows, **section).sequences, self.adopted().tokenizer.decode
        return [(decode(sequences.prompt(row)), decode(sequences.response(row))) for row in range(len(sequences))]

    def names(self, ids: tuple[int, ...] | list[int]) -> list[str]:
        return self.adopted().tokenizer.convert_ids_to_tokens(list(ids))


@pytest.fixture
def taught(tmp_path: Path) -> Taught:
    return Taught(tmp_path / "model", eos_token_id=[256, 259])


ASKED = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def test_the_template_names_the_end_and_all_files_the_stops(taught, tmp_path):
    adopted = taught.adopted()
    assert taught.names([adopted.end_of_turn]) == ["<|im_end|>"]
    assert taught.names(adopted.eos_token_ids) == ["<|endoftext|>", "<|im_end|>", "<|eom|>"]
    bare = Taught(tmp_path / "bare", None).adopted()
    assert (bare.eos_token_ids, bare.end_of_turn) == ((256,), 256)


def test_a_recipe_s_stops_hold_alone(taught):
    assert taught.adopted(eos_token_ids=[259, 258]).end_of_turn == 258
    only = taught.adopted(eos_token_ids=[259])
    assert (only.eos_token_ids, only.end_of_turn) == ((259,), 259)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>", ""),
        CHATML.replace("<|im_end|>", " and so on <|im_end|>"),
        "{{ raise_exception('no such roles') }}",
        "{% for message in messages %}{{ message.content|upper + message.nothing.more }}{% endfor %}",
    ],
)
def test_a_template_without_an_end_leaves_it_to_the_tokenizer(tmp_path, template):
    assert Taught(tmp_path / "model", template).adopted().end_of_turn == 256


def test_a_template_that_does_not_end_is_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_mcp.engine.data.encoding.TEMPLATE_SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
    with pytest.raises(ArgumentError, match="too_slow"):
        Taught(tmp_path / "model", endless).adopted()


@pytest.mark.parametrize("response", ["2", "2<|im_end|>", "2<|endoftext|>", "2<|im_end|>\n", "2<|eom|>and more"])
def test_text_has_one_end_and_nothing_after_it(taught, response):
    assert taught.texts({"prompt": "1+1?", "response": response}) == [(ASKED, "2<|im_end|>")]
    assert taught.targets({"prompt": "1+1?", "response": response}).rows.cut == response.endswith("more")


def test_ids_keep_the_end_that_was_sampled(taught):
    rows = [{"prompt": "1+1?", "response_ids": ids} for ids in ([17, 256], [17], [17, 258, 18])]
    sequences = taught.targets(*rows).sequences
    assert [sequences.response(row).tolist() for row in range(3)] == [[17, 256], [17, 258], [17, 258]]


def test_ids_outside_the_vocabulary_are_refused_with_their_row(taught):
    rows = [{"id": "a", "prompt": "x", "response_ids": [1]}, {"id": "b", "prompt": "x", "response_ids": [2, 260]}]
    with pytest.raises(DataError, match=r"unknown_token.*response_ids of row b holds the id 260.*ends at 259"):
        taught.targets(*rows)


def test_cut_responses_are_left_out_counted_and_told_above_a_tenth(taught):
    whole, cut = {"prompt": "1+1?", "response": "2"}, {"prompt": "1+1?", "response": "2 be", "finish_reason": "length"}
    found = taught.targets(*[whole] * 9, cut).rows
    assert (found.rows, found.targets, found.truncated, taught.reporter.alerts) == (10, 9, 1, {})
    taught.targets(*[whole] * 8, cut)
    assert "1 of 9 responses (11%)" in taught.reporter.alerts["responses_truncated"]
    assert taught.texts(cut, on_truncated="keep") == [(ASKED, "2 be")], "no end is taught that was not there"
    with pytest.raises(DataError, match=r"empty_data.*1 of 1 responses"):
        taught.targets(cut)


def test_what_is_left_out_is_told(taught):
    rows = [{"prompt": "1+1?", "response": text} for text in ("2", "", "2" * 200)]
    found = taught.targets(*rows, max_length=100).rows
    assert (found.targets, found.empty, found.too_long) == (1, 1, 1)
    assert taught.reporter.alerts == {
        "responses_dropped": "Of 3 rows these are left out: 1 are empty, 1 are over 100 tokens with their prompt."
    }


def test_all_turns_or_the_last_are_learnt(taught):
    chat = {"messages": [user("1+1?"), answer("2"), user("3?"), answer("4")]}
    later = f"{ASKED}2<|im_end|>\n<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n"
    assert taught.texts(chat) == [(ASKED, "2<|im_end|>"), (later, "4<|im_end|>")]
    assert taught.texts(chat, train_turns="last") == [(later, "4<|im_end|>")]


def test_reasoning_stands_where_the_template_puts_it(tmp_path):
    chat = {"messages": [user("1+1?"), answer("2", reasoning_content="easy"), user("3?"), answer("4")]}
    first, second = Taught(tmp_path / "thinking", THINKING).texts(chat)
    assert first == (ASKED, "<think>\neasy\n</think>\n\n2<|im_end|>")
    assert "easy" not in second[0], "shown without the thinking of earlier turns, as when responses are drawn"
    assert second[1] == "<think>\n\n</think>\n\n4<|im_end|>"


def test_thinking_that_the_prompt_opens_is_not_opened_twice(tmp_path):
    opened = Taught(tmp_path / "opened", OPENED)
    expected = [(f"{ASKED}<think>\n", "easy\n</think>\n\n2<|im_end|>")]
    assert opened.texts({"messages": [user("1+1?"), answer("2", reasoning_content="easy")]}) == expected
    assert opened.texts({"prompt": "1+1?", "response": "<think>\neasy\n</think>\n\n2"}) == expected


@pytest.mark.parametrize("template", [CHATML, CHATML.replace(CALLS, TEXT_CALLS)])
@pytest.mark.parametrize("arguments", ['{"a": 7}', {"a": 7}])
def test_tool_calls_are_rendered_in_the_form_that_the_template_wants(tmp_path, template, arguments):
    taught = Taught(tmp_path / "model", template.replace("' CALL '", "message.tool_calls[0].function.name + ' '"))
    call = {"function": {"name": "double", "arguments": arguments}}
    ((_, response),) = taught.texts({"messages": [user("2*7?"), answer("", tool_calls=[call])]})
    assert response == ("double 7" if CALLS in template else 'double {"a": 7}') + "<|im_end|>"


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_definitions_reach_the_template(tmp_path, as_text):
    tools = [{"type": "function", "function": {"name": "double", "parameters": {}}}]
    taught = Taught(tmp_path / "model", "{{ tools[0].function.name + '\\n' if tools }}" + CHATML)
    rows = [{"messages": [user("1+1?"), answer("2")], "tools": json.dumps(tools) if as_text else tools}]
    rows.append({"messages": [user("1+1?"), answer("2")], "tools": "[]" if as_text else None})
    assert [prompt for prompt, _ in taught.texts(*rows)] == ["double\n" + ASKED, ASKED]


def test_chats_that_the_template_has_no_place_for_are_counted(tmp_path):
    taught = Taught(tmp_path / "model", CHATML.replace(CALLS, "''"))
    call = {"function": {"name": "double", "arguments": {}}}
    rows = [{"messages": [user("2*7?"), answer("", tool_calls=[call])]}, {"messages": [user("1?"), answer("2")]}]
    found = taught.targets(*rows).rows
    assert (found.rows, found.targets, found.refused) == (2, 1, 1)
    assert "1 are chats that the template refuses" in taught.reporter.alerts["responses_dropped"]


def test_without_a_template_a_chat_is_its_text(tmp_path):
    bare = Taught(tmp_path / "bare", None)
    assert bare.texts({"messages": [user("1+1?"), answer("2")]}) == [("1+1?", "2<|endoftext|>")]
