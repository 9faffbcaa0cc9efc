"""Tokenizers from their files."""

import json

import pytest

from opd_mcp.identity.tokenizers import (
    chat_template,
    eos_token_ids,
    first_difference,
    require_same_tokens,
    token_map,
    token_map_hash,
)
from opd_mcp.schemas.errors import ConsistencyError, IntegrityError


def test_the_token_map_holds_vocabulary_and_added_tokens(make_model):
    model = make_model("teacher")
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 9, "content": "<think>"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    tokens = token_map(model)
    assert tokens[2] == "0"
    assert tokens[9] == "<think>"


def test_a_unigram_vocabulary_is_a_list(make_model):
    model = make_model("teacher")
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}}))
    assert token_map(model) == {0: "<unk>", 1: "a"}


def test_equal_tokens_agree_whatever_the_weights(make_model):
    teacher, student = make_model("teacher", seed=1), make_model("student", seed=2)
    assert first_difference(teacher, student) is None
    require_same_tokens(teacher, student)


def test_the_first_differing_id_is_named_with_both_tokens(make_model):
    teacher = make_model("teacher")
    student = make_model("student", vocabulary=("<pad>", "<eos>", "0", "1", "2", "-", "="))
    with pytest.raises(ConsistencyError, match=r"id 5: teacher has '\+', student has '-'") as caught:
        require_same_tokens(teacher, student)
    assert caught.value.code == "tokenizer_mismatch"


def test_a_token_that_only_one_side_has_is_a_difference(make_model):
    teacher = make_model("teacher")
    student = make_model("student", vocabulary=("<pad>", "<eos>", "0", "1", "2", "+"))
    difference = first_difference(teacher, student)
    assert difference is not None
    assert (difference.id, difference.teacher, difference.student) == (6, "=", None)


def test_the_hash_does_not_confuse_neighbouring_tokens():
    assert token_map_hash({0: "ab", 1: "c"}) != token_map_hash({0: "a", 1: "bc"})
    assert token_map_hash({0: "a", 1: "b"}) == token_map_hash({1: "b", 0: "a"})
    assert token_map_hash({0: "\ud800"}) != token_map_hash({0: "?"})


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": null}}}'])
def test_a_damaged_tokenizer_is_named(make_model, content):
    model = make_model("teacher")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        token_map(model)


def test_the_eos_comes_from_the_generation_config_then_the_config_then_the_tokenizer(make_model):
    model = make_model("teacher")
    tokens = token_map(model)
    assert eos_token_ids(model, tokens) == (1,)
    (model / "generation_config.json").write_text('{"eos_token_id": [6, 1]}')
    assert eos_token_ids(model, tokens) == (1, 6)
    (model / "generation_config.json").write_text("{}")
    (model / "config.json").write_text('{"text_config": {"eos_token_id": 4}}')
    assert eos_token_ids(model, tokens) == (4,)
    (model / "config.json").write_text("{}")
    assert eos_token_ids(model, tokens) == (1,)
    (model / "tokenizer_config.json").unlink()
    assert eos_token_ids(model, tokens) == ()


def test_the_chat_template_file_wins_over_the_one_in_the_config(make_model):
    model = make_model("teacher")
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template(model) == "{{ messages[0].content }}"
    (model / "chat_template.jinja").unlink()
    assert chat_template(model) == "a"
    (model / "tokenizer_config.json").unlink()
    assert chat_template(model) is None
