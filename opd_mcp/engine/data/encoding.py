"""Prompts to token ids, by the chat template where the tokenizer has one, within a limit of time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context
from opd_mcp.engine.runtime import TooSlow, processor_seconds
from opd_mcp.identity.chat.rendering import NO_MOMENT, system_dropped
from opd_mcp.identity.chat.tokenizer import ChatTokenizer
from opd_mcp.identity.consistency import teacher_context
from opd_mcp.identity.data.rows import PromptRow, TeacherTurnsHash
from opd_mcp.identity.tokenizers import reads_clock
from opd_mcp.schemas.errors import ArgumentError, DataError
from opd_mcp.schemas.identity import TeacherContext
from opd_mcp.schemas.recipes import PromptingRecipe

# far above what a template and a tokenizer take for a prompt
TEMPLATE_SECONDS = 20.0
TEMPLATE_SECONDS_A_ROW = 0.05


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt with its token ids, and those that the teacher sees; None for all prompts where they are the same."""

    row: PromptRow
    ids: list[int]
    teacher_ids: list[int] | None = None

    def for_teacher(self) -> "EncodedPrompt":
        """The prompt that the teacher answers."""
        return self if self.teacher_ids is None else EncodedPrompt(self.row, self.teacher_ids)


def encode_prompts(
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    teacher: PreTrainedTokenizerBase | None = None,
) -> list[EncodedPrompt]:
    """Every prompt that fits `prompting.max_prompt_tokens`, as both see it; the others are reported in an alert.

    `teacher` is the tokenizer of what the teacher sees, by default the same. Raises DataError `empty_data` if none
    fits, `system_dropped` for a template that does not show the teacher its system prompt, ArgumentError `too_slow` for
    a chat template that does not end.
    """
    limit, system = context.prompting.max_prompt_tokens, context.prompting.teacher_system
    chat = chat_of(tokenizer, context.prompting, context.rendered_at)
    seen = [row.for_teacher(system) for row in rows]
    with limited_rendering(2 * len(rows)):
        encoded = [EncodedPrompt(row, chat.prompt_ids(row)) for row in rows]
        spelt = sum(bool(chat.spelt_control_tokens(row)) for row in rows)
        if system is not None or any(row.teacher_messages is not None for row in rows):
            other = chat if teacher is None else chat_of(teacher, context.prompting, context.rendered_at)
            encoded = _with_teacher_ids(encoded, seen, other)
    kept = [prompt for prompt in encoded if 0 < len(prompt.ids) <= limit]
    kept = [prompt for prompt in kept if prompt.teacher_ids is None or 0 < len(prompt.teacher_ids) <= limit]
    if len(kept) < len(encoded):
        context.reporter.alert(
            "prompts_dropped", f"{len(encoded) - len(kept)} of {len(encoded)} prompts are empty or over {limit} tokens."
        )
    if spelt:
        context.reporter.alert(
            "control_tokens_spelt",
            f"{spelt} of {len(rows)} prompts spell control tokens of the tokenizer; they are encoded as "
            f"{'text' if chat.writes_spelt_as_text else 'tokens'} (prompting.control_tokens).",
        )
    if not kept:
        raise DataError(
            "empty_data",
            f"No prompt has between 1 and {limit} tokens.",
            value=len(encoded),
            fix="Raise 'prompting.max_prompt_tokens' or give other prompts.",
        )
    return kept


def by_domain(prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """The prompts, those of one domain after the other, so that each of several teachers is loaded once."""
    return sorted(prompts, key=lambda prompt: prompt.row.teacher_domain or "")


def student_side(rows: Sequence[PromptRow], context: Context) -> tuple[list[PromptRow], Context]:
    """Prompts and context without what a teacher alone sees."""
    prompting = context.prompting.model_copy(update={"teacher_system": None})
    return [replace(row, teacher_messages=None) for row in rows], replace(context, prompting=prompting)


def _with_teacher_ids(
    encoded: Sequence[EncodedPrompt], seen: Sequence[PromptRow], chat: ChatTokenizer
) -> list[EncodedPrompt]:
    """The prompts with what the teacher sees, for all of them as soon as one differs; raises `system_dropped`."""
    own = [prompt.ids if row is prompt.row else chat.prompt_ids(row) for prompt, row in zip(encoded, seen, strict=True)]
    if chat.prompting.teacher_system and encoded and own[0] == chat.prompt_ids(encoded[0].row.for_teacher(None)):
        raise system_dropped()
    return [replace(prompt, teacher_ids=ids) for prompt, ids in zip(encoded, own, strict=True)]


def context_of(rows: Sequence[PromptRow], prompting: PromptingRecipe) -> TeacherContext | None:
    """What the teacher of these prompts sees that the student does not; None where it sees the same."""
    turns = TeacherTurnsHash()
    turns.add([row.parts() for row in rows])
    return teacher_context(prompting.teacher_system, turns.hexdigest())


def ids_of(prompts: Sequence[EncodedPrompt]) -> set[int]:
    """Every id that stands in one of the prompts, as the student sees them."""
    return set().union(*(prompt.ids for prompt in prompts))


def chat_of(
    tokenizer: PreTrainedTokenizerBase, prompting: PromptingRecipe, moment: datetime = NO_MOMENT
) -> ChatTokenizer:
    """The tokenizer as prompts are encoded by it; its `chat_template` is the one that renders, at this moment."""
    names = dict(tokenizer.special_tokens_map)
    return ChatTokenizer(tokenizer.backend_tokenizer, tokenizer.chat_template, names, prompting, moment)


def recorded_moment(tokenizer: PreTrainedTokenizerBase, context: Context) -> str | None:
    """The moment of rendering as records name it; None for a template that does not ask for it."""
    return context.rendered_at.isoformat() if reads_clock(tokenizer.chat_template) else None


@contextmanager
def limited_rendering(rows: int) -> Iterator[None]:
    """Raise ArgumentError `too_slow` inside when templates take far longer than `rows` rows should."""
    seconds = TEMPLATE_SECONDS + TEMPLATE_SECONDS_A_ROW * rows
    try:
        with processor_seconds(seconds):
            yield
    except TooSlow:
        raise ArgumentError(
            "too_slow",
            f"The chat template took more than {seconds:.0f} s for {rows} rows.",
            fix="Look at the model's chat_template.jinja; use a model whose template ends.",
        ) from None
