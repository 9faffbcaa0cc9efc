"""Files that could run code in a model's directory are left unread, or the directory is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from opd_mcp.engine.models.loading import load_model, load_tokenizer
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import IntegrityError, PathError
from opd_mcp.schemas.recipes import RuntimeRecipe

STUDENT = Path(__file__).resolve().parents[3] / "examples" / "arithmetic" / "student"
UNSAFE = ("pytorch_model.bin", "model.pt", "training_args.bin", "adapter_model.bin", "optimizer.pkl")


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def trapped(tmp_path):
    """A good model with pickles, custom code and `auto_map` next to its weights, and where the traps would strike."""
    model, struck = tmp_path / "model", tmp_path / "struck"
    shutil.copytree(STUDENT, model)
    for name in UNSAFE:
        (model / name).write_bytes(pickle.dumps(_Trap(struck)))
    (model / "custom.py").write_text(f"import os\nos.mkdir({str(struck)!r})\n")
    return model, struck


@pytest.fixture
def no_unpickling(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_pickles_beside_safetensors_are_left_unread(trapped, no_unpickling):
    model, struck = trapped
    runtime = open_runtime(RuntimeRecipe(device="cpu"))
    assert load_model(model, runtime).facts.identity.weights == inspect_model(STUDENT).identity.weights
    load_tokenizer(model)
    assert not struck.exists()


def test_custom_code_is_not_run(trapped, no_unpickling):
    model, struck = trapped
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "custom.Model", "AutoConfig": "custom.Config"})
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Tokenizer", None]})
    load_model(model, open_runtime(RuntimeRecipe(device="cpu")))
    load_tokenizer(model)
    assert not struck.exists()


@pytest.mark.parametrize("name", UNSAFE)
def test_pickles_instead_of_safetensors_are_refused_unread(trapped, no_unpickling, name):
    model, struck = trapped
    for file in model.glob("*.safetensors"):
        file.unlink()
    for other in set(UNSAFE) - {name}:
        (model / other).unlink()
    with pytest.raises(PathError, match="unsafe_weights"):
        load_model(model, open_runtime(RuntimeRecipe(device="cpu")))
    assert not struck.exists()


def test_an_adapter_or_kernels_to_fetch_are_refused(trapped):
    model, _ = trapped
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(PathError, match="LoRA adapter"):
        inspect_model(model)
    (model / "adapter_config.json").unlink()
    change(model / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(PathError, match="unsafe_config"):
        inspect_model(model)


def test_an_index_that_leads_elsewhere_is_refused(trapped):
    model, _ = trapped
    (model / "model.safetensors").unlink()  # the loader prefers it to an index
    index = {"weight_map": {"w": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="damaged_file"):
        inspect_model(model)
