"""What a plan needs of tokenizers and chat templates, worked out by a child under limits: `text_child.py`.

A tokenizer's normaliser may need any amount of memory, its pattern may panic in native code, a template may never end:
the child ends then, the server goes on, and the plan has one finding that says so.
"""

import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from opd_mcp.devices.environment import bounded_environment
from opd_mcp.identity.data.rows import PromptRow, ResponseRow
from opd_mcp.identity.data.scan import PromptScan
from opd_mcp.identity.files import path_signature
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ArgumentError, DataError, IntegrityError, OpdError, ResourceError
from opd_mcp.schemas.recipes import PromptingRecipe, TrainTurns
from opd_mcp.schemas.texts import byte_size

SHOWN_PROMPTS = 3
# Characters of sampled prompts that are rendered for a preview; a sample of long ones is smaller.
SAMPLE_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class TextLimits:
    """What one child may take: processor seconds, wall seconds (a stopped or swapping child), bytes of memory."""

    cpu_seconds: float = 30.0
    wall_seconds: float = 120.0
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Asked:
    """What is asked of a model's tokenizer: counts over a scan, and a preview where `train_turns` is given."""

    model: Path
    prompting: PromptingRecipe
    scan: PromptScan
    train_turns: TrainTurns | None = None
    taught: ResponseRow | None = None
    watched: tuple[int, ...] = ()
    """Ids of which it is told whether prompts, or the end of a turn, have them."""
    moment: datetime | None = None
    """What the template's clock shows, for a template that asks for it."""

    def request(self) -> dict[str, Any]:
        """The request, as JSON-ready values."""
        scan = self.scan
        texts = _within([row.whole_text() for row in scan.sample])
        request: dict[str, Any] = {
            "model": str(self.model),
            "prompting": self.prompting.to_dict(),
            "counts": {"texts": texts, "long_texts": list(scan.long_texts), "limit": scan.long_bytes},
        }
        if self.moment is not None:
            request["moment"] = self.moment.isoformat()
        if self.train_turns is not None:
            first = scan.first[:SHOWN_PROMPTS]
            rows = [*first, *(row for row in scan.sample if row not in first)]
            kept = len(_within([row.whole_text() for row in rows]))
            request["preview"] = {
                "rows": [_row(row) for row in rows[:kept]],
                "shown": SHOWN_PROMPTS,
                "train_turns": self.train_turns,
                "watched": list(self.watched),
                "taught": None if self.taught is None else _response(self.taught),
            }
        return request


@dataclass(frozen=True)
class TextFacts:
    """What a child said; nothing of models that are still to be fetched, or of a tokenizer that fails.

    `mean_prompt_tokens` and `longest_prompt_tokens` are over sampled prompts and `over` counts those of the `counted`
    long texts that are over the limit, all without the template's tokens.
    """

    mean_prompt_tokens: float | None = None
    over: int = 0
    counted: int = 0
    preview: dict[str, Any] | None = None
    longest_prompt_tokens: int = 0


@dataclass
class TextWork:
    """Asks children, and remembers what they said for as long as the model's files are as they were."""

    limits: TextLimits = TextLimits()
    _known: "OrderedDict[str, dict[str, Any]]" = field(default_factory=OrderedDict)
    size: int = 32

    def facts(self, asked: Asked) -> TextFacts:
        """What a child finds out about prompts.

        Raises IntegrityError `damaged_file` for a tokenizer that fails, ArgumentError `too_slow` and DataError
        `too_large` for one or a template that needs more than the limits; ResourceError `child_failed` where no child
        can be started.
        """
        reply = self._reply(asked.request())
        counts = reply["counts"]
        mean = counts["mean"]
        return TextFacts(
            None if mean is None else round(mean, 2),
            counts["over"],
            counts["counted"],
            reply.get("preview"),
            counts["longest"],
        )

    def decoded(self, model: Path, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Token ids as texts, special tokens included; raises as `facts`."""
        reply = self._reply({"model": str(model), "decode": [list(ids) for ids in sequences]})
        return [str(text) for text in reply["decoded"]]

    def _reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        key = content_hash([request, path_signature(Path(request["model"]))])
        if key not in self._known:
            self._known[key] = bounded_reply(request, self.limits)
            while len(self._known) > self.size:
                self._known.popitem(last=False)
        return self._known[key]


def bounded_reply(request: Mapping[str, Any], limits: TextLimits) -> dict[str, Any]:
    """The reply of a child of its own; raises as `TextWork.facts`."""
    command = [sys.executable, "-P", "-m", "opd_mcp.planning.prompts.text_child"]
    try:
        done = subprocess.run(
            [*command, str(limits.cpu_seconds), str(limits.memory_bytes)],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limits.wall_seconds,
            env=bounded_environment(os.environ),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _too_slow(request, f"{limits.wall_seconds:.0f} s") from None
    except OSError as error:
        raise ResourceError(
            "child_failed",
            f"No process for the tokenizer can be started ({error}).",
            fix="Free memory or processes on this machine, then call again.",
        ) from error
    if -done.returncode in _SLOW_SIGNALS:
        raise _too_slow(request, f"{limits.cpu_seconds:.0f} s of processor time")
    if done.returncode != 0 or not done.stdout:
        raise _too_large(request, limits)
    reply = json.loads(done.stdout)
    if "error" in reply:
        raise _error_of(reply["error"], request, limits)
    assert isinstance(reply, dict)
    return reply


# At the limit; and where that did not end it.
_SLOW_SIGNALS = (signal.SIGXCPU, signal.SIGKILL)


def _error_of(error: Mapping[str, Any], request: Mapping[str, Any], limits: TextLimits) -> OpdError:
    if error["code"] == "memory":
        return _too_large(request, limits)
    if error["code"] == "failed":
        return IntegrityError(
            "damaged_file",
            f"The tokenizer or the chat template fails ({error['message']}).",
            value=request["model"],
            fix="Look at the model's tokenizer.json and chat_template.jinja, or give another model.",
        )
    kind = {"damaged_file": IntegrityError, "too_large": DataError, "unknown_token": DataError}
    return kind.get(error["code"], ArgumentError)(
        error["code"], error["message"], value=error.get("value"), fix=error["fix"]
    )


def _too_slow(request: Mapping[str, Any], limit: str) -> ArgumentError:
    return ArgumentError(
        "too_slow",
        f"The model's tokenizer and chat template took more than {limit} for a few prompts.",
        value=request["model"],
        fix="Look at its tokenizer.json and chat_template.jinja; give a model whose template ends.",
    )


def _too_large(request: Mapping[str, Any], limits: TextLimits) -> DataError:
    return DataError(
        "too_large",
        f"The model's tokenizer and chat template need more than {byte_size(limits.memory_bytes)} of memory for a few "
        "prompts, or end the process that uses them.",
        value=request["model"],
        fix="Look at its tokenizer.json and chat_template.jinja, or give another model.",
    )


def _within(texts: Sequence[str]) -> list[str]:
    """The first texts, so many that they stay within `SAMPLE_CHARACTERS`; at least one."""
    kept: list[str] = []
    size = 0
    for text in texts:
        size += len(text)
        if kept and size > SAMPLE_CHARACTERS:
            break
        kept.append(text)
    return kept


def _row(row: PromptRow) -> dict[str, Any]:
    plain = {"id": row.id, "prompt": row.prompt, "messages": row.messages, "answer": row.answer}
    return plain if row.teacher_messages is None else {**plain, "teacher_messages": row.teacher_messages}


def _response(row: ResponseRow) -> dict[str, Any]:
    return {
        "prompt": _row(row.prompt),
        "response": row.response,
        "response_ids": row.response_ids,
        "prompt_ids": row.prompt_ids,
        "chat": row.chat,
        "truncated": row.truncated,
        "tools": row.tools,
    }
