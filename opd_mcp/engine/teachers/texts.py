"""What ids mean to vLLM and SGLang, as far as they can be asked: `/detokenize` gives the text of an id, not its token.

vLLM answers {tokens: [id]} with {prompt: text} (vllm/entrypoints/serve/tokenize/protocol.py), SGLang a list of lists
with {text: [text, …]} (sglang/srt/entrypoints/openai/serving_tokenize.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_mcp.engine.teachers.connection import Refusal, Server
from opd_mcp.engine.teachers.wire import Dialect
from opd_mcp.schemas.errors import ConsistencyError, ResourceError

DETOKENIZE_PATH = "/detokenize"


def require_same_texts(server: Server, dialect: Dialect, model: str, tokenizer: Path, ids: Sequence[int]) -> None:
    """Raise ConsistencyError `tokenizer_mismatch` where most of the ids have another text on the server than here.

    Single texts may differ between two decoders of one vocabulary, and not every server can be asked: then nothing is
    raised, since nothing is known.
    """
    ours = _own_texts(tokenizer, ids)
    try:
        theirs = _served_texts(server, dialect, model, ids)
    except (Refusal, ResourceError, KeyError, TypeError):
        return
    telling = [(id_, here, there) for id_, here, there in zip(ids, ours, theirs, strict=False) if _squeezed(here)]
    differing = [(id_, here, there) for id_, here, there in telling if _squeezed(here) != _squeezed(there)]
    if 2 * len(differing) <= len(telling):
        return
    id_, here, there = differing[0]
    raise ConsistencyError(
        "tokenizer_mismatch",
        f"{len(differing)} of {len(telling)} ids have another text on the teacher's server than here, first id {id_}: "
        f"teacher has {there!a}, student has {here!a}.",
        value=server.url,
        fix="Choose a student with the teacher's tokenizer, e.g. a smaller model of the same family.",
    )


def _own_texts(tokenizer: Path, ids: Sequence[int]) -> list[str]:
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [decoder.decode([id_], skip_special_tokens=False) for id_ in ids]


def _served_texts(server: Server, dialect: Dialect, model: str, ids: Sequence[int]) -> list[str]:
    def asked(tokens: Any, **more: Any) -> Any:
        return server.ask("POST", DETOKENIZE_PATH, {"model": model, "tokens": tokens, **more})

    if dialect == "sglang":
        return [str(text) for text in asked([[id_] for id_ in ids], skip_special_tokens=False)["text"]]
    return [str(asked([id_])["prompt"]) for id_ in ids]


def _squeezed(text: str) -> str:
    """A text without white space, which decoders trim, and without halves of characters, which say nothing."""
    return "".join(text.replace("\N{REPLACEMENT CHARACTER}", "").split())
