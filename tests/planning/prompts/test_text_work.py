"""Hostile tokenizers and templates end a child, one finding says so, and the server plans on."""

import json
from pathlib import Path

import pytest

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.encoding import encode_prompts
from opd_mcp.engine.models.loading import adopt_tokenizer
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.planning.prompts.text_work import Asked, TextLimits, TextWork, bounded_reply
from opd_mcp.schemas.errors import ArgumentError, DataError, IntegrityError
from opd_mcp.schemas.recipes import PromptingRecipe
from opd_mcp.schemas.requests import SampleModel
from tests.conftest import EXAMPLES

EXAMPLE = EXAMPLES / "arithmetic"
LONG = json.dumps({"prompt": "1+" * 60 + "1=?"}) + "\n"
SHORT = TextLimits(cpu_seconds=2, wall_seconds=60, memory_bytes=1 << 30)


def doubling(times: int, factor: int) -> dict:
    """A normaliser under which every digit becomes `factor ** times` of them."""
    step = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "1" * factor}
    return {"type": "Sequence", "normalizers": [step] * times}


def splitting(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TOKENIZERS = {
    "a normaliser that doubles": {"normalizer": doubling(30, 8)},
    "a normaliser with long content": {"normalizer": doubling(3, 4000)},
    "a normaliser that prepends": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": ""}, "content": "12345678"}] * 12}},
    "a pattern that backtracks": {"pre_tokenizer": splitting(r"(([0-9]|\+|-|\*)+)+$b")},
    "a pattern with nested repeats": {"pre_tokenizer": splitting(r"([0-9+=?]|[0-9+=?]{2})+c")},
    "a pattern that is none": {"pre_tokenizer": splitting(r"((((")},
    "a merge of unknown tokens": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
}  # fmt: skip
TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "one long call": "{{ (10 ** (10 ** 8)) % 7 }}",
    "deep recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a huge string": "{{ 'x' * (10 ** 11) }}",
    "a string that doubles": "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "a padded string": "{{ 'x'.ljust(10 ** 11) }}",
    "text without end": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 99 }}{% endfor %}{% endfor %}",
}


def hostile(world, template: str | None = None, **parts: object) -> Path:
    """A teacher whose tokenizer.json or template was changed."""
    folder = world.copy_of(world.teacher, "hostile")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def planned(service, world, folder: Path):
    """The plan of that teacher, and of the honest one after it."""
    service._references.texts.limits = SHORT
    student = world.copy_of(world.student, "hostile-student")
    (student / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    plan = service.plan(
        world.plan_arguments(teacher=str(folder), student=str(student), prompts=world.file("long.jsonl", LONG))
    )
    assert service.plan(world.plan_arguments()).blocking == []
    return plan


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_one_finding(service, world, name):
    (finding,) = planned(service, world, hostile(world, **TOKENIZERS[name])).blocking
    assert finding.code in ("damaged_file", "too_slow", "too_large"), finding
    assert "another model" in finding.fix or "tokenizer" in finding.fix


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_one_finding(service, world, name):
    (finding,) = planned(service, world, hostile(world, TEMPLATES[name])).blocking
    assert finding.code in ("too_slow", "too_large", "template_failed"), finding
    assert "chat_template.jinja" in finding.fix


def test_a_start_is_refused_as_the_plan_is(service, world):
    service._references.texts.limits = SHORT
    folder = hostile(world, **TOKENIZERS["a pattern that backtracks"])
    with pytest.raises(IntegrityError, match=r"damaged_file.*PanicException"):
        service.sample_model(SampleModel(model=str(folder), prompts=["1+" * 60 + "1"]))


@pytest.mark.parametrize(
    ("limits", "kind", "code"),
    [
        (TextLimits(cpu_seconds=1), ArgumentError, "too_slow"),
        (TextLimits(wall_seconds=0.5), ArgumentError, "too_slow"),
        (TextLimits(memory_bytes=1 << 20), DataError, "too_large"),
    ],
)
def test_each_limit_ends_the_child(tmp_path, world, limits, kind, code):
    folder = hostile(world, TEMPLATES["one long call"])
    asked = Asked(folder, PromptingRecipe(), scan_prompts(Path(world.prompts())), "all")
    with pytest.raises(kind, match=code):
        bounded_reply(asked.request(), limits)


def test_what_a_child_said_is_known_until_a_file_changes(world, monkeypatch):
    folder, work = world.copy_of(world.teacher, "model"), TextWork()
    asked = Asked(folder, PromptingRecipe(), scan_prompts(Path(world.prompts())), "all")
    first = work.facts(asked)
    with monkeypatch.context() as patched:
        patched.setattr(
            "opd_mcp.planning.prompts.text_work.bounded_reply", lambda *_: pytest.fail("a child was started")
        )
        assert work.facts(asked) == first
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}1")
    assert work.facts(asked).preview["lengths"] != first.preview["lengths"]


@pytest.mark.parametrize("data", ["opd.jsonl", "eval.jsonl", "tune.jsonl"])
def test_the_child_encodes_as_the_engine_does(data):
    prompting = PromptingRecipe()
    reply = TextWork().facts(Asked(EXAMPLE / "teacher", prompting, scan_prompts(EXAMPLE / data), "all")).preview
    adopted = adopt_tokenizer(EXAMPLE / "teacher", prompting)
    encoded = encode_prompts(read_prompts(EXAMPLE / data), adopted.tokenizer, Context(prompting=prompting))
    assert [row["ids"] for row in reply["prompts"]] == [prompt.ids for prompt in encoded[:3]]
    assert [token_id for token_id, _ in reply["stops"]] == list(adopted.eos_token_ids)
    assert reply["end"] == adopted.end_of_turn
    prompt, response = reply["sft"]["ids"]
    assert prompt == encoded[0].ids
    assert response[-1] == adopted.end_of_turn
