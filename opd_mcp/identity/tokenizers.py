"""Tokenizers by their files: the id → token map, special tokens, EOS ids and chat template, without transformers."""

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from opd_mcp.identity.files import MAX_CONFIG_BYTES, bounded_bytes, read_json_object
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ConsistencyError, IntegrityError, PathError
from opd_mcp.schemas.recipes import PromptingRecipe

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# The largest known tokenizer.json has 33 MB.
MAX_TOKENIZER_BYTES = 64 << 20
MAX_TOKENIZER_CONFIG_BYTES = 4 << 20
# The largest known templates, with tools and thinking, are about 20 kB.
MAX_TEMPLATE_BYTES = 1 << 20
# Beyond any vocabulary.
MAX_TOKEN_ID = 1 << 24


@dataclass(frozen=True)
class TokenDifference:
    """The lowest id on which two tokenizers disagree; None where a tokenizer has no such id."""

    id: int
    teacher: str | None
    student: str | None


def token_map(path: Path) -> dict[int, str]:
    """The id → token map of a model directory's `tokenizer.json`, added tokens included.

    Raises PathError `not_a_model` when the file is missing, IntegrityError `damaged_file` when it is not a tokenizer.
    """
    return tokens_of(tokenizer_content(path), path / TOKENIZER_FILE)


def tokenizer_content(path: Path) -> dict[str, Any]:
    """The content of a model directory's `tokenizer.json`; raises as `token_map`."""
    file = path / TOKENIZER_FILE
    if not file.is_file():
        raise PathError(
            "not_a_model",
            f"This directory has no {TOKENIZER_FILE}.",
            value=path,
            fix=f"Save the model's fast tokenizer into it (tokenizer.save_pretrained(DIR) writes {TOKENIZER_FILE}).",
        )
    return read_json_object(file, MAX_TOKENIZER_BYTES)


def tokens_of(content: dict[str, Any], file: Path) -> dict[int, str]:
    """The id → token map of the content of the tokenizer.json `file`; raises IntegrityError `damaged_file`."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    try:
        tokens = _vocabulary_map(vocabulary)
        for added in content.get("added_tokens") or []:
            tokens[_token_id(added["id"])] = str(added["content"])
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise IntegrityError(
            "damaged_file",
            f"{TOKENIZER_FILE} holds no vocabulary that can be read.",
            value=file,
            fix="Save the tokenizer again with tokenizer.save_pretrained(DIR).",
        ) from error
    return tokens


def token_map_hash(tokens: dict[int, str]) -> str:
    """sha256 (hex) of an id → token map."""
    digest = hashlib.sha256()
    for token_id in sorted(tokens):
        # A JSON file can hold lone surrogates; they must be hashed, not crash.
        token = tokens[token_id].encode("utf-8", "surrogatepass")
        digest.update(f"{token_id}:{len(token)}:".encode() + token)
    return digest.hexdigest()


def map_difference(teacher: dict[int, str], student: dict[int, str]) -> TokenDifference | None:
    """The lowest id that is not the same token in both maps; None when they agree."""
    if teacher == student:
        return None
    differing = (i for i in teacher.keys() | student.keys() if teacher.get(i) != student.get(i))
    first = min(differing)
    return TokenDifference(first, teacher.get(first), student.get(first))


def special_differences(teacher: Path, student: Path) -> tuple[TokenDifference, ...]:
    """The ids at which two model directories with the same vocabulary have other special tokens, or one has none.

    Such a pair fits as long as no prompt has one of these ids: `require_unused`. Raises ConsistencyError
    `tokenizer_mismatch`, naming the first differing id, where an ordinary token differs, or where the teacher's ids
    reach beyond the student's embeddings.
    """
    contents = [tokenizer_content(path) for path in (teacher, student)]
    maps = [
        tokens_of(content, path / TOKENIZER_FILE) for content, path in zip(contents, (teacher, student), strict=True)
    ]
    if maps[0] == maps[1]:
        return ()
    special = [_special_ids(content) for content in contents]
    size = optional_json(student / "config.json")
    nested = size.get("text_config")
    rows = {**size, **(nested if isinstance(nested, dict) else {})}.get("vocab_size")
    found = []
    for token_id in sorted(maps[0].keys() | maps[1].keys()):
        difference = TokenDifference(token_id, maps[0].get(token_id), maps[1].get(token_id))
        if difference.teacher == difference.student:
            continue
        ordinary = any(token_id in tokens and token_id not in ids for tokens, ids in zip(maps, special, strict=True))
        if ordinary or (token_id in maps[0] and isinstance(rows, int) and token_id >= rows):
            raise mismatch_error(difference, f"{teacher} and {student}")
        found.append(difference)
    return tuple(found)


def require_unused(
    differences: Sequence[TokenDifference], used: Collection[int], prompting: PromptingRecipe, value: object
) -> None:
    """Raise ConsistencyError `tokenizer_mismatch` where prompts, or the end of a turn, have one of the ids that differ.

    `prompting.differing_tokens` may say that the student is to learn them.
    """
    if prompting.differing_tokens == "learn":
        return
    for difference in differences:
        if difference.id in used:
            raise mismatch_error(difference, value, used=True)


def differences_text(differences: Sequence[TokenDifference], most: int = 8) -> str:
    """What differs, id by id, the teacher's token first."""
    shown = [f"{item.id}: {_quoted(item.teacher)} / {_quoted(item.student)}" for item in differences[:most]]
    return ", ".join(shown) + (f" and {len(differences) - most} more" if len(differences) > most else "")


def _special_ids(content: dict[str, Any]) -> set[int]:
    """Ids of tokens that no ordinary text has: added ones that are special, or in brackets as templates write them."""
    return {
        token["id"]
        for token in content.get("added_tokens") or ()
        if token.get("special") or re.fullmatch(r"<\S+>|\[\S+\]", str(token["content"]))
    }


def mismatch_error(difference: TokenDifference, value: object, *, used: bool = False) -> ConsistencyError:
    """The error `tokenizer_mismatch` that names the first differing id and both its tokens.

    `used` says that it is a special token, which would be no matter if no prompt had it.
    """
    why = ", and the chat template or the prompts use it" if used else ""
    other_way = (
        ", or set 'prompting.differing_tokens' to 'learn': the student then learns these ids in its SFT, with the "
        "teacher's meaning"
        if used
        else ""
    )
    return ConsistencyError(
        "tokenizer_mismatch",
        f"Teacher and student tokenizers differ, first at id {difference.id}: "
        f"teacher has {_quoted(difference.teacher)}, student has {_quoted(difference.student)}{why}.",
        value=value,
        fix=f"Choose a student with the teacher's tokenizer, e.g. a smaller model of the same family{other_way}.",
    )


def chat_template(path: Path) -> str | None:
    """The chat template of a model directory: `chat_template.jinja`, else the one in `tokenizer_config.json`."""
    file = path / TEMPLATE_FILE
    if file.is_file():
        return _bounded(file, bounded_bytes(file, 4 * MAX_TEMPLATE_BYTES).decode("utf-8", "surrogateescape"))
    template = tokenizer_config(path).get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return _bounded(path / CONFIG_FILE, template) if isinstance(template, str) else None


def reads_clock(template: str | None) -> bool:
    """Whether a template asks for the time, so that its prompts are those of one moment."""
    return template is not None and "strftime_now" in template


def clock_examples(template: str, moment: datetime) -> list[str]:
    """What the clock shows at this moment in the forms that stand in the template."""
    forms = re.findall(r"""strftime_now\(\s*(["'])(.+?)\1""", template)
    return list(dict.fromkeys(moment.strftime(form) for _, form in forms))


def tokenizer_config(path: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, empty when there is no such file."""
    return optional_json(path / CONFIG_FILE, MAX_TOKENIZER_CONFIG_BYTES)


def special_token_names(path: Path) -> dict[str, str]:
    """The special tokens that `tokenizer_config.json` names, e.g. {"eos_token": "<eos>"}."""
    names: dict[str, str] = {}
    for key, value in tokenizer_config(path).items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            names[key] = content
    return names


def eos_token_ids(path: Path, tokens: dict[int, str]) -> tuple[int, ...]:
    """The ids that end a response: of generation_config.json, else config.json, else the tokenizer's EOS token.

    Sorted, without duplicates; empty when no file names one.
    """
    for name in ("generation_config.json", "config.json"):
        config = optional_json(path / name)
        nested = config.get("text_config")
        sources: list[dict[str, Any]] = [config, nested] if isinstance(nested, dict) else [config]
        for source in sources:
            value = source.get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            valid = {item for item in ids if type(item) is int and 0 <= item < MAX_TOKEN_ID}
            if valid:
                return tuple(sorted(valid))
    eos = special_token_names(path).get("eos_token")
    return tuple(token_id for token_id, token in tokens.items() if eos is not None and token == eos)


def special_tokens_hash(eos_ids: tuple[int, ...], names: dict[str, str]) -> str:
    """sha256 (hex) of the EOS ids and the special tokens' names."""
    return content_hash({"eos": list(eos_ids), "names": {k: ascii(v) for k, v in names.items()}})


def optional_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes, empty when there is no such file."""
    return read_json_object(path, limit) if path.is_file() else {}


def _vocabulary_map(vocabulary: Any) -> dict[int, str]:
    if isinstance(vocabulary, dict):
        return {_token_id(token_id): token for token, token_id in vocabulary.items()}
    if isinstance(vocabulary, list):  # Unigram: [token, score] by id
        return {token_id: str(entry[0]) for token_id, entry in enumerate(vocabulary)}
    raise TypeError("no vocabulary")


def _bounded(file: Path, template: str) -> str:
    if len(template) <= MAX_TEMPLATE_BYTES:
        return template
    raise IntegrityError(
        "damaged_file",
        f"{file.name} holds a chat template of more than {MAX_TEMPLATE_BYTES} characters.",
        value=file,
        fix="Use a model with a chat template of a sensible size.",
    )


def _token_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_TOKEN_ID:
        raise ValueError("not a token id")
    return value


def _quoted(token: str | None) -> str:
    return "no such id" if token is None else ascii(token)
