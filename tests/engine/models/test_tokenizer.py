"""The tokenizer is built of what was hashed, as transformers would build it, and of nothing that a file names."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from opd_mcp.engine.models.loading import adopt_tokenizer, load_tokenizer
from opd_mcp.identity.encoding import encoding_hash, special_tokens
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.tokenizers import token_map, tokenizer_content
from opd_mcp.schemas.errors import IntegrityError, PathError
from opd_mcp.schemas.recipes import PromptingRecipe

TEACHER = Path(__file__).resolve().parents[3] / "examples" / "arithmetic" / "teacher"
TEXTS = ("Hello  world, it's 12 o'clock!\n\tÄöü 你好 🙂", "<|end|> in the midst <|user|>", "  leading", "")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [*TEXTS, *(f"the number {n} and its square {n * n}" for n in range(200))]


def bpe_tokenizer() -> Tokenizer:
    """Byte-level BPE, as Qwen, Llama 3 and GPT-2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    """Unigram with metaspace, as T5, and SentencePiece models that were converted, have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("  ", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer, config: object, **changes: object) -> Path:
    """A directory as the Hub has it: tokenizer.json, tokenizer_config.json, chat_template.jinja, config.json."""
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "normalized": False},
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **changes,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    config.save_pretrained(directory)
    return directory


FAMILIES = {
    "llama": (bpe_tokenizer, LlamaConfig, {}),
    "qwen3": (bpe_tokenizer, Qwen3Config, {"bos_token": None}),
    "qwen2": (bpe_tokenizer, Qwen2Config, {"clean_up_tokenization_spaces": True}),
    "gpt2": (bpe_tokenizer, GPT2Config, {"added_tokens_decoder": {"1": {"content": "<|end|>", "special": True}}}),
    "unigram": (unigram_tokenizer, LlamaConfig, {"unk_token": "<unk>"}),
    "image": (
        bpe_tokenizer,
        LlamaConfig,
        {"extra_special_tokens": {"image_token": "<|user|>"}, "additional_special_tokens": None},
    ),
}


def change(file: Path, **fields: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **fields}))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_encodes_decodes_and_renders_as_transformers_does(tmp_path, family):
    make, config, changes = FAMILIES[family]
    directory = write_tokenizer(tmp_path / family, make(), config(), **changes)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for with_special in (False, True):
            ids = ours.encode(text, add_special_tokens=with_special)
            assert ids == theirs.encode(text, add_special_tokens=with_special)
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    rendered = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<|user|>1+1=?<|end|>" in rendered
    tokens = token_map(directory)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids) & tokens.keys()  # Qwen2's class adds one of its own
    assert ours.get_vocab() == {token: id_ for id_, token in tokens.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TEACHER, tmp_path / "tree" / "models" / "model"))


@pytest.fixture
def other_tokenizer(model: Path) -> dict[str, object]:
    """A tokenizer.json that swaps two digits."""
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    return content


@pytest.mark.parametrize("name", ["tokenizer.4.0.0.json", "../../tokenizer.4.0.0.json", "../tokenizer.0.0.1.json"])
def test_another_file_that_is_named_as_the_tokenizer_is_refused(model, other_tokenizer, name):
    (model / name).resolve().write_text(json.dumps(other_tokenizer))
    change(model / "tokenizer_config.json", fast_tokenizer_files=[name])
    for read in (inspect_model, load_tokenizer, lambda path: adopt_tokenizer(path, PromptingRecipe())):
        with pytest.raises(PathError) as caught:
            read(model)
        assert caught.value.code == "unsafe_config"
        assert name in str(caught.value)


def test_the_name_of_the_file_itself_is_harmless(model):
    change(model / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json"])
    assert load_tokenizer(model).encode("1") == load_tokenizer(TEACHER).encode("1")


def test_classes_and_code_that_are_named_are_not_used(model):
    plain = load_tokenizer(model)
    for name in ("GPT2Tokenizer", "BertTokenizer", "LlamaTokenizer", "NoSuchTokenizer", "../x.Tokenizer"):
        change(model / "tokenizer_config.json", tokenizer_class=name, auto_map={"AutoTokenizer": [name, None]})
        change(model / "config.json", tokenizer_class=name)
        tokenizer = load_tokenizer(model)
        assert type(tokenizer) is type(plain)
        assert tokenizer.encode("1+2=") == plain.encode("1+2=")
    assert any("auto_map" in text for text in inspect_model(model).unused)


def test_files_that_are_named_as_arguments_are_not_opened(model, other_tokenizer):
    other = model.parent / "other.json"
    other.write_text(json.dumps(other_tokenizer))
    change(
        model / "tokenizer_config.json",
        tokenizer_file=str(other), vocab_file=str(other), merges_file=str(other), name_or_path=str(other.parent),
        tokenizer_object="x", init_inputs=["x"], gguf_file="x.gguf",
    )  # fmt: skip
    assert load_tokenizer(model).encode("12") == load_tokenizer(TEACHER).encode("12")


def test_other_templates_are_not_used(model):
    messages = [{"role": "user", "content": "1+1=?"}]

    def rendered() -> object:
        return load_tokenizer(model).apply_chat_template(messages, tokenize=False)

    before, identity = rendered(), inspect_model(model).identity
    extra = model / "additional_chat_templates"
    extra.mkdir()
    for name in ("default", "rag", "tool_use"):
        (extra / f"{name}.jinja").write_text("another")
    change(model / "tokenizer_config.json", chat_template=[{"name": "default", "template": "another"}])
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    assert rendered() == before
    assert inspect_model(model).identity == identity
    assert any("additional_chat_templates" in text for text in inspect_model(model).unused)
    (model / "chat_template.jinja").unlink()
    assert rendered() == "another"
    assert inspect_model(model).identity.chat_template != identity.chat_template
    change(model / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "another"}])
    assert load_tokenizer(model).chat_template is None
    assert any("chat templates" in text for text in inspect_model(model).unused)


def test_tokens_outside_the_map_are_not_added(model):
    size, known = len(load_tokenizer(model)), token_map(model)
    change(
        model / "tokenizer_config.json",
        bos_token="<new>",
        extra_special_tokens=["<newer>", "<user>"],
        added_tokens_decoder={"1": {"content": "+", "special": True}, "900": {"content": "<late>"}},
    )
    (model / "added_tokens.json").write_text(json.dumps({"<later>": 901}))
    (model / "special_tokens_map.json").write_text(json.dumps({"cls_token": "<cls>"}))
    tokenizer = load_tokenizer(model)
    assert len(tokenizer) == size
    assert {id_: token for token, id_ in tokenizer.get_vocab().items()} == known
    assert tokenizer.bos_token is None
    unused = " ".join(inspect_model(model).unused)
    assert "'<new>'" in unused
    assert "'<late>'" in unused


def test_the_older_file_of_names_counts_and_is_hashed(model):
    before = inspect_model(model).identity
    change(model / "tokenizer_config.json", eos_token=None, pad_token=None)
    change(model / "special_tokens_map.json", eos_token="<eos>", pad_token={"content": "<pad>"})
    tokenizer = load_tokenizer(model)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert inspect_model(model).identity.encoding == before.encoding
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "="}))
    assert inspect_model(model).identity.encoding != before.encoding


def test_how_text_becomes_ids_is_part_of_the_identity(model):
    before = inspect_model(model).identity
    content = json.loads((model / "tokenizer.json").read_text())
    changes = [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"added_tokens": [{**token, "lstrip": True} for token in content["added_tokens"]]},
        {"decoder": {"type": "ByteLevel"}},
    ]
    for changed in changes:
        (model / "tokenizer.json").write_text(json.dumps({**content, **changed}))
        now = inspect_model(model).identity
        assert now.differences(before) == {"encoding"}
        assert now.same_model(before)
    cut = {"max_length": 2, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    (model / "tokenizer.json").write_text(json.dumps({**content, "truncation": cut}))
    assert inspect_model(model).identity == before


def test_a_tokenizer_that_is_saved_again_has_the_same_hash(tmp_path):
    directory = write_tokenizer(tmp_path / "first", bpe_tokenizer(), LlamaConfig())
    load_tokenizer(directory).save_pretrained(tmp_path / "second")

    def hashed(path: Path) -> str:
        return encoding_hash(tokenizer_content(path), special_tokens(path, token_map(path)))

    assert hashed(tmp_path / "second") == hashed(directory)
    older = copy.deepcopy(tokenizer_content(directory))
    older["model"]["merges"] = [" ".join(pair) for pair in older["model"]["merges"]]
    for name in ("byte_fallback", "ignore_merges", "dropout", "unk_token"):
        older["model"].pop(name, None)
    (directory / "tokenizer.json").write_text(json.dumps(older))
    assert hashed(tmp_path / "second") == hashed(directory)


def test_a_tokenizer_that_the_library_refuses_is_damage(model):
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**content, "pre_tokenizer": {"type": "NoSuch"}}))
    with pytest.raises(IntegrityError) as caught:
        load_tokenizer(model)
    assert caught.value.code == "damaged_file"
