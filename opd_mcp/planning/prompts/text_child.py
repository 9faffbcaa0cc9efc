"""The child that works on a model's tokenizer and chat template, which strangers wrote, under the kernel's limits.

    python -m opd_mcp.planning.prompts.text_child CPU_SECONDS MEMORY_BYTES < REQUEST > REPLY

Request and reply are one JSON object each; `text_work.py` has the parent's side and says what both hold. Whatever
fails is the reply's `error`; what the kernel ends is seen by the parent.
"""

import json
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from opd_mcp.identity.chat.rendering import FAILURES, NO_MOMENT, names_read
from opd_mcp.identity.chat.sft_targets import TargetWriter
from opd_mcp.identity.chat.tokenizer import (
    ANSWER,
    QUESTION,
    THINK,
    ChatTokenizer,
    load_chat_tokenizer,
    template_error,
)
from opd_mcp.identity.data.rows import PromptRow, ResponseRow
from opd_mcp.schemas.errors import DataError, OpdError
from opd_mcp.schemas.recipes import PromptingRecipe
from opd_mcp.schemas.texts import shortened

# Seconds of processor time, of those that the child has, for counting; what is left is an estimate.
COUNTING_SECONDS = 4.0
TEXT_CHARACTERS = 600
EXAMPLE_CHARACTERS = 120
MADE_UP_RESPONSE = "This is a response."
DOUBLED_THINK = re.compile(r"<think>\s*<think>")


def main() -> None:
    """Answer the request on standard input."""
    cpu_seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    for what, most in (
        (resource.RLIMIT_CPU, max(1, int(cpu_seconds))),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    request = json.load(sys.stdin)
    try:
        reply = answer(request)
    except OpdError as error:
        reply = {"error": {"code": error.code, "message": error.message, "value": error.value, "fix": error.fix}}
    except MemoryError:
        reply = {"error": {"code": "memory"}}
    except BaseException as error:  # native code raises panics past Exception
        reply = {"error": {"code": "failed", "message": f"{type(error).__name__}: {error}"[:300]}}
    json.dump(reply, sys.stdout)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: `decoded`, `counts` and `preview`, as far as it asks for them."""
    path = Path(request["model"])
    if "decode" in request:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        return {"decoded": [tokenizer.decode(ids, skip_special_tokens=False) for ids in request["decode"]]}
    moment = datetime.fromisoformat(request["moment"]) if "moment" in request else NO_MOMENT
    chat = load_chat_tokenizer(path, PromptingRecipe.model_validate(request["prompting"]), moment)
    reply = {"counts": counts(chat, **request["counts"])}
    if "preview" in request:
        reply["preview"] = preview(chat, path, request["preview"])
    return reply


def counts(chat: ChatTokenizer, texts: Sequence[str], long_texts: Sequence[str], limit: int) -> dict[str, Any]:
    """Tokens of texts without the template's, and how many of the long ones counted are over the limit."""
    lengths = [len(chat.encoded(text)) for text in texts]
    over = counted = 0
    started = time.process_time()
    for text in long_texts:
        if time.process_time() - started > COUNTING_SECONDS:
            break
        over += len(chat.encoded(text)) > limit
        counted += 1
    mean = sum(lengths) / len(lengths) if lengths else None
    return {"mean": mean, "longest": max(lengths, default=0), "over": over, "counted": counted}


def preview(chat: ChatTokenizer, path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What prompts become, where responses end, what SFT learns of a row, and what the template did."""
    rows = [_prompt_row(row) for row in asked["rows"]]
    reply = _template_facts(chat)
    if "error" not in reply["template"]:
        stops, end = chat.stop_ids(path)
        reply |= _prompts(chat, rows, asked["shown"], {*asked["watched"]})
        reply["watched"] = sorted({*reply["watched"], end} & {*asked["watched"]})
        reply["stops"] = [[token_id, chat.decode([token_id])] for token_id in stops[:16]]
        reply["end"] = end
        reply["sft"] = _learnt(chat, TargetWriter(chat, stops, end, asked["train_turns"]), rows, asked["taught"])
    return reply


def _prompts(chat: ChatTokenizer, rows: Sequence[PromptRow], shown: int, watched: set[int]) -> dict[str, Any]:
    prompts: list[dict[str, Any]] = []
    lengths: list[int] = []
    spelt: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    doubled: list[str] = []
    seen: set[int] = set()
    spelling, started = 0, time.process_time()
    control = {token_id: text for text, token_id in chat.control_tokens.items()}
    for row in rows:
        if time.process_time() - started > COUNTING_SECONDS:
            break
        try:
            text = chat.plain(chat.prompt_text(row))
            ids = chat.prompt_ids(row)
            seen_by_teacher = row.for_teacher(chat.prompting.teacher_system)
            teacher_ids = ids if seen_by_teacher is row else chat.prompt_ids(seen_by_teacher)
        except DataError as error:
            roles = [str(turn["role"]) for turn in row.messages or ()]
            failures.append(
                {"id": row.id, "code": error.code, "message": error.message, "fix": error.fix, "roles": roles}
            )
            continue
        lengths.append(max(len(ids), len(teacher_ids)))
        seen |= watched.intersection(ids)
        found = chat.spelt_control_tokens(row)
        spelling += bool(found)
        spelt += found
        if chat.template is not None:
            dropped.update(_dropped_roles(row, text))
            if _doubles_think(row, text):
                doubled.append(row.id)
        if len(prompts) < shown:
            written = Counter(control[token_id] for token_id in ids if token_id in control)
            decoded = _middle_cut(chat.decode(ids), TEXT_CHARACTERS)
            prompts.append({"id": row.id, "text": decoded, "ids": ids, "control": dict(written.most_common(12))})
            if seen_by_teacher is not row:
                prompts[-1]["teacher_text"] = _middle_cut(chat.decode(teacher_ids), TEXT_CHARACTERS)
    return {
        "prompts": prompts,
        "lengths": lengths,
        "watched": sorted(seen),
        "spelling": spelling,
        "spelt": dict(spelt.most_common(8)),
        "failures": len(failures),
        "failed": failures[:3],
        "refused_roles": _refused_roles(chat, failures),
        "dropped_roles": dict(dropped),
        "doubled": len(doubled),
        "doubled_first": doubled[0] if doubled else None,
    }


def _refused_roles(chat: ChatTokenizer, failures: Sequence[dict[str, Any]]) -> list[str]:
    """The roles of the prompts that failed which the template refuses also in the plainest chat."""
    refused = []
    for role in dict.fromkeys(role for failure in failures for role in failure["roles"]):
        turns = [{"role": role, "content": QUESTION}]
        if role != "user":
            turns.insert(0 if role in ("assistant", "tool") else 1, {"role": "user", "content": QUESTION})
        if _tried(chat, turns, to_answer=True)[1] is not None:
            refused.append(role)
    return refused


def _dropped_roles(row: PromptRow, text: str) -> set[str]:
    """Roles of users' turns whose content is not in the rendered text."""
    return {
        str(turn["role"])
        for turn in row.messages or ()
        if turn["role"] != "assistant" and (said := str(turn["content"]).strip()) and said[:200] not in text
    }


def _doubles_think(row: PromptRow, text: str) -> bool:
    """Whether the template opens `<think>` where the prompt's own text has just opened it."""
    said = row.whole_text().rstrip()
    return bool(DOUBLED_THINK.search(text)) or (said.endswith(THINK) and text.rstrip().endswith(THINK))


def _template_facts(chat: ChatTokenizer) -> dict[str, Any]:
    """What the template reads, and what it does with thinking, system prompts and several turns."""
    if chat.template is None:
        return {"template": {"none": True}, "reads": []}
    try:
        reads = sorted(names_read(chat.template))
    except FAILURES as error:
        return {"template": {"error": template_error(error)}, "reads": []}
    user, answered = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    facts = {"thinking": "not read by the template"}
    if "enable_thinking" in reads:
        facts["thinking"] = _thinking(chat, [user])
    alone, _ = _tried(chat, [user], to_answer=True)
    prompted, refusal = _tried(chat, [{"role": "system", "content": "SYSTEM"}, user], to_answer=True)
    facts["system"] = refusal or ("shown" if "SYSTEM" in (prompted or "") else "dropped")
    if alone and QUESTION in alone and (before := alone.partition(QUESTION)[0].strip()):
        facts["system"] += f"; without one a prompt begins with {shortened(before, EXAMPLE_CHARACTERS)!r}"
    thought = {**answered, "reasoning_content": "THOUGHT", "content": f"<think>\nTHOUGHT\n</think>\n\n{ANSWER}"}
    text, refusal = _tried(chat, [user, thought, {"role": "user", "content": "AGAIN"}], to_answer=True)
    facts["turns"] = refusal or _turns(text or "")
    return {"template": facts, "reads": reads}


def _turns(text: str) -> str:
    if QUESTION not in text or ANSWER not in text or "AGAIN" not in text:
        return "earlier turns are dropped"
    return f"all shown; thinking of earlier turns is {'kept' if 'THOUGHT' in text else 'dropped'}"


def _thinking(chat: ChatTokenizer, turns: list[dict[str, str]]) -> str:
    ends = []
    for value in (True, False):
        options = {**chat.prompting.chat_template_kwargs, "enable_thinking": value}
        prompting = chat.prompting.model_copy(update={"chat_template_kwargs": options})
        other = ChatTokenizer(chat.backend, chat.template, chat.names, prompting, chat.moment)
        text, refusal = _tried(other, turns, to_answer=True)
        ends.append(refusal or (text or "").rpartition(QUESTION)[2])
    given = chat.prompting.chat_template_kwargs.get("enable_thinking")
    here = "as the template decides" if given is None else repr(given)
    if ends[0] == ends[1]:
        return f"read, but a prompt is the same with and without; here {here}"
    shown = [shortened(end, EXAMPLE_CHARACTERS) for end in ends]
    return f"True: a prompt ends {shown[0]!r}; False: {shown[1]!r}; here {here}"


def _tried(chat: ChatTokenizer, turns: list[dict[str, Any]], *, to_answer: bool) -> tuple[str | None, str | None]:
    """The rendered turns, or how the template refused them."""
    try:
        return chat.plain(chat.rendered(turns, to_answer=to_answer)), None
    except FAILURES as error:
        return None, f"refused ({template_error(error)})"


def _learnt(
    chat: ChatTokenizer, writer: TargetWriter, rows: Sequence[PromptRow], taught: dict[str, Any] | None
) -> dict[str, Any] | None:
    """One row of SFT as it is learnt; a made-up response to the first prompt where there is no row yet."""
    if taught is not None:
        row = ResponseRow(**{**taught, "prompt": _prompt_row(taught["prompt"])})
    elif rows:
        row = ResponseRow(prompt=rows[0], response=rows[0].answer or MADE_UP_RESPONSE)
    else:
        return None
    try:
        targets = writer.targets(row)
    except FAILURES:
        return None  # the prompts, or the run's own counts, say why
    target = targets[-1] if targets else None
    if target is None:
        return None
    return {
        "made_up": taught is None,
        "prompt": _middle_cut(chat.decode(target.prompt), TEXT_CHARACTERS),
        "response": _middle_cut(chat.decode(target.response), TEXT_CHARACTERS),
        "ids": [target.prompt, target.response],
        "doubled": bool(DOUBLED_THINK.search(chat.decode([*target.prompt, *target.response]))),
    }


def _middle_cut(text: str, characters: int) -> str:
    """The text, or its beginning and its end: both show what the template does."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} … {text[-half:]}"


def _prompt_row(row: dict[str, Any]) -> PromptRow:
    messages, seen = (
        None if turns is None else tuple(turns) for turns in (row["messages"], row.get("teacher_messages"))
    )
    return PromptRow(str(row["id"]), row["prompt"], messages, row["answer"], seen)


if __name__ == "__main__":
    main()
