"""What SFT learns: from rows of text, of token ids or of chats to sequences, and what became of each row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.encoding import chat_of, limited_rendering
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.models.loading import AdoptedTokenizer
from opd_mcp.identity.chat.rendering import REFUSALS
from opd_mcp.identity.chat.sft_targets import Target, TargetWriter
from opd_mcp.identity.data.rows import ResponseRow
from opd_mcp.schemas.errors import DataError
from opd_mcp.schemas.recipes import SftRecipe
from opd_mcp.schemas.reports import SftRows

TRUNCATED_SHARE_TO_ALERT = 0.1


@dataclass(frozen=True)
class SftTargets:
    """The sequences to learn, and what became of the rows."""

    sequences: Sequences
    rows: SftRows


def sft_targets(
    rows: Sequence[ResponseRow], adopted: AdoptedTokenizer, section: SftRecipe, context: Context
) -> SftTargets:
    """Every row's targets that fit `section.max_length` tokens; what is left out is counted, and told in alerts.

    Raises DataError `unknown_token` for ids outside the vocabulary, `empty_data` if nothing is left; ArgumentError
    `too_slow` for a chat template that does not end.
    """
    _require_known_ids(rows, adopted)
    chat = chat_of(adopted.tokenizer, context.prompting, context.rendered_at)
    writer = TargetWriter(chat, adopted.eos_token_ids, adopted.end_of_turn, section.train_turns)
    kept: list[Target] = []
    counts: Counter[str] = Counter()
    with limited_rendering(len(rows)):
        for row in rows:
            if row.truncated and section.on_truncated == "drop":
                counts["truncated"] += 1
                continue
            try:
                targets = writer.targets(row)
            except REFUSALS as error:
                if isinstance(error, DataError) or row.chat is None:
                    raise
                counts["refused"] += 1
                continue
            usable = [target for target in targets if target.prompt and target.response]
            fitting = [target for target in usable if len(target) <= section.max_length]
            counts["empty"] += not usable
            counts["too_long"] += len(usable) - len(fitting)
            counts["cut"] += sum(target.cut for target in fitting)
            kept += fitting
    found = SftRows(rows=len(rows), targets=len(kept), **counts)
    _report(found, section, context)
    return SftTargets(build_sequences([t.prompt for t in kept], [t.response for t in kept]), found)


def _require_known_ids(rows: Sequence[ResponseRow], adopted: AdoptedTokenizer) -> None:
    for row in rows:
        for name, ids in (("prompt_ids", row.prompt_ids), ("response_ids", row.response_ids)):
            largest = max(ids, default=0) if ids else 0
            if largest >= adopted.tokens:
                raise DataError(
                    "unknown_token",
                    f"{name} of row {row.prompt.id} holds the id {largest}, and the vocabulary ends at "
                    f"{adopted.tokens - 1}.",
                    value=largest,
                    fix="Give ids of the teacher's tokenizer, or leave the ids out and give text.",
                )


def _report(found: SftRows, section: SftRecipe, context: Context) -> None:
    """Alerts for what is left out; raises DataError `empty_data` if that is everything."""
    left_out = [
        (found.empty, "are empty"),
        (found.too_long, f"are over {section.max_length} tokens with their prompt"),
        (found.refused, "are chats that the template refuses"),
    ]
    reasons = [f"{count} {why}" for count, why in left_out if count]
    if reasons:
        context.reporter.alert("responses_dropped", f"Of {found.rows} rows these are left out: {', '.join(reasons)}.")
    share = found.truncated / found.rows if found.rows else 0.0
    truncated = f"{found.truncated} of {found.rows} responses ({share:.0%}) were cut by the length limit"
    if share > TRUNCATED_SHARE_TO_ALERT:
        context.reporter.alert(
            "responses_truncated",
            f"{truncated} and are left out; raise responses.sampling.max_new_tokens and generate them again.",
        )
    if not found.targets:
        reasons += [truncated] if found.truncated else []
        raise DataError(
            "empty_data",
            f"No response can be learnt: {', '.join(reasons) or 'there are no rows'}.",
            value=found.rows,
            fix="Raise 'sft.max_length', set 'sft.on_truncated' to 'keep', or give other responses.",
        )
