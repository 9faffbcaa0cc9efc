"""Models from strangers: loading one runs none of its code, and its template cannot hold a worker up."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.data.prompts import prompt_ids
from opd_mcp.engine.models.loading import load_model, load_tokenizer
from opd_mcp.identity.data import PromptRow
from opd_mcp.schemas.errors import DataError
from opd_mcp.schemas.recipes import PromptingRecipe, RuntimeRecipe

ROW = PromptRow(id="0", prompt="1+1=?")


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def stranger(example, tmp_path) -> Path:
    return Path(shutil.copytree(example / "student", tmp_path / "stranger"))


@pytest.fixture
def no_pickles(monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("a pickle was loaded")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)


def with_config(model: Path, file: str, **changes: object) -> None:
    config = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(config | changes))


def test_pickles_beside_the_weights_are_not_loaded(stranger, runtime, tmp_path, no_pickles):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "adapter_model.bin"):
        (stranger / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    load_model(stranger, runtime)
    assert not (tmp_path / "executed").exists()


def test_code_beside_a_known_model_is_not_run(stranger, runtime, tmp_path):
    (stranger / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    with_config(stranger, "config.json", auto_map=classes)
    with_config(stranger, "tokenizer_config.json", auto_map=classes)
    load_model(stranger, runtime)
    load_tokenizer(stranger)
    assert not (tmp_path / "executed").exists()


def test_a_model_that_is_only_code_is_refused(stranger, runtime, tmp_path):
    (stranger / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    with_config(stranger, "config.json", auto_map=classes, model_type="evil")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(stranger, runtime)
    assert not (tmp_path / "executed").exists()


LONG = "{% for a in range(90000) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LONG, "took more than"),
        ("{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "wrote 90000000 characters"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ messages[0].pop('content') }}{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ 'x' * 10 ** 30 }}", "OverflowError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_hostile_template_is_one_clear_error(stranger, template, why, monkeypatch):
    monkeypatch.setattr("opd_mcp.engine.data.prompts.TEMPLATE_SECONDS", 0.5)
    (stranger / "chat_template.jinja").write_text(template)
    context = Context(RuntimeRecipe(), PromptingRecipe(), SilentReporter())
    with pytest.raises(DataError, match=why) as caught:
        prompt_ids(ROW, load_tokenizer(stranger), context)
    assert caught.value.code == "unusable_template"


def test_a_template_gives_the_ids_that_the_tokenizer_gives_itself(example):
    tokenizer = load_tokenizer(example / "student")
    context = Context(RuntimeRecipe(), PromptingRecipe(), SilentReporter())
    turns = [{"role": "user", "content": ROW.prompt}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompt_ids(ROW, tokenizer, context) == list(expected)
