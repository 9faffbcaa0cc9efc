"""A plan's preview: prompts as the run encodes them, and what blocks a plan in templates, options and lengths."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Literal

from opd_mcp.identity.chat.rendering import system_dropped
from opd_mcp.identity.models import ModelFacts
from opd_mcp.identity.tokenizers import chat_template, clock_examples, reads_clock
from opd_mcp.planning.checks import Findings, PlanInputs
from opd_mcp.planning.prompts.text_work import Asked, TextFacts, TextWork
from opd_mcp.schemas.errors import OpdError, nearest
from opd_mcp.schemas.plans import Finding, LearntPreview, LimitShare, Preview, PromptPreview
from opd_mcp.schemas.recipes import Recipe, Sampling
from opd_mcp.schemas.runs import PhaseName

# Names that `apply_chat_template` takes for itself, or that the run sets: no template option.
RESERVED_OPTIONS = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
    }
)
# Beyond any machine, and beyond what a run could be estimated for.
LARGEST_SETTINGS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "n_routed_experts": 1 << 14,
}


def text_facts(work: TextWork, asked: Asked | None, found: Findings) -> TextFacts:
    """What a child finds out about the prompts; that it cannot is `blocking`."""
    if asked is None:
        return TextFacts()
    try:
        return work.facts(asked)
    except OpdError as error:
        found.blocking.append(Finding.of_error(error))
        return TextFacts()


def judge_clock(model: ModelFacts, moment: datetime, found: Findings) -> datetime | None:
    """The moment for a template that asks for the time, of which the plan then warns; None for any other."""
    template = chat_template(model.path)
    if template is None or not reads_clock(template):
        return None
    shown = ", ".join(map(repr, clock_examples(template, moment))) or "the date"
    found.warn(
        "template_dated",
        f"The chat template writes the time into prompts, here {shown} (UTC); a run writes that of its start in all of "
        "its phases and attempts, and records it.",
        "Nothing has to be done; a fixed date needs a template that takes one from 'prompting.chat_template_kwargs'.",
    )
    return moment


def judge_sizes(inputs: PlanInputs, found: Findings) -> None:
    """Block what a configuration claims to be and no machine could hold."""
    for role, model in (("teacher", inputs.teacher), ("student", inputs.student)):
        for name, value in _excessive(model.facts):
            found.blocking.append(
                Finding(
                    code="too_large",
                    message=f"The {role}'s config.json has {name} = {str(value)[:40]}, beyond any machine.",
                    fix="Restore the model's config.json from its source, or give another model.",
                )
            )


def _excessive(facts: ModelFacts | None) -> Iterator[tuple[str, int]]:
    if facts is None:
        return
    nested = facts.config.get("text_config")
    for config in (facts.config, nested if isinstance(nested, dict) else {}):
        for name, largest in LARGEST_SETTINGS.items():
            value = config.get(name)
            if isinstance(value, int) and not 0 <= value <= largest:
                yield name, value


def plan_preview(
    facts: TextFacts, inputs: PlanInputs, recipe: Recipe, phases: Sequence[PhaseName], found: Findings
) -> Preview | None:
    """The preview of what the child found, for the phases that are to run; adds what blocks them."""
    reply = facts.preview
    _judge_options(recipe, None if reply is None else reply["reads"], found)
    if reply is None:
        return None
    tokenizer: Literal["teacher", "student"] = "teacher" if inputs.teacher.facts else "student"
    template = reply["template"]
    if "error" in template:
        found.blocking.append(
            Finding(
                code="template_failed",
                message=f"The {tokenizer}'s chat template cannot be read: {template['error']}.",
                fix="Look at its chat_template.jinja, or give another model.",
            )
        )
        return Preview(tokenizer=tokenizer, of=inputs.prompts.scan.rows)
    _judge_rendering(reply, found)
    if recipe.prompting.teacher_system and str(template.get("system")).startswith(("dropped", "refused")):
        found.blocking.append(Finding.of_error(system_dropped()))
    limits = list(_limits(reply["lengths"], inputs, recipe, phases))
    _judge_positions(limits, found)
    learnt = reply["sft"]
    return Preview(
        tokenizer=tokenizer,
        prompts=[
            PromptPreview(
                id=row["id"],
                text=row["text"],
                tokens=len(row["ids"]),
                control_tokens=row["control"],
                teacher_text=row.get("teacher_text"),
            )
            for row in reply["prompts"]
        ],
        measured=len(reply["lengths"]),
        of=inputs.prompts.scan.rows,
        stops={str(token_id): text for token_id, text in reply["stops"]},
        end_of_turn=reply["end"],
        learnt=None
        if learnt is None or "sft" not in phases
        else LearntPreview(
            source="made up" if learnt["made_up"] else "responses",
            prompt=learnt["prompt"],
            learnt=learnt["response"],
            prompt_tokens=len(learnt["ids"][0]),
            learnt_tokens=len(learnt["ids"][1]),
        ),
        limits=[share for share, _ in limits],
        template={"none": "contents are encoded as they are"} if "none" in template else template,
        control_tokens=recipe.prompting.control_tokens,
        prompts_spelling_control_tokens=reply["spelling"],
        spelt_control_tokens=reply["spelt"],
    )


def _judge_options(recipe: Recipe, reads: Sequence[str] | None, found: Findings) -> None:
    """Block options of the template that are no options, or that it never reads."""
    options = recipe.prompting.chat_template_kwargs
    reserved = [name for name in options if name in RESERVED_OPTIONS]
    unread = [] if reads is None else [name for name in options if name not in {*reads, *RESERVED_OPTIONS}]
    if reserved:
        found.blocking.append(
            Finding(
                code="reserved_template_option",
                message=f"chat_template_kwargs names {', '.join(reserved)}, which the run sets itself.",
                fix="Leave it out of 'prompting.chat_template_kwargs'; tools stand in the rows of the data.",
            )
        )
    if unread:
        known = sorted(set(reads or ()) - RESERVED_OPTIONS)
        close = nearest(unread[0], known)
        found.blocking.append(
            Finding(
                code="unknown_template_option",
                message=f"The chat template never reads {', '.join(name[:80] for name in unread)}, named in "
                "chat_template_kwargs"
                + (f"; it reads {', '.join(known[:12])}." if known else "; it reads no options."),
                fix=f"Set {close[0]} in 'prompting.chat_template_kwargs'."
                if close
                else "Leave it out of 'prompting.chat_template_kwargs'.",
            )
        )


def _judge_rendering(reply: dict[str, Any], found: Findings) -> None:
    """Block what the template refuses and what it would write twice; warn of what it leaves out."""
    tried = reply["failures"] + len(reply["lengths"])
    if reply["failures"]:
        first, roles = reply["failed"][0], reply["refused_roles"]
        why = f" It has no place for the role {', '.join(map(repr, roles))}." if roles else ""
        found.blocking.append(
            Finding(
                code=first["code"],
                message=f"{reply['failures']} of {tried} prompts looked at cannot be encoded.{why} {first['message']}",
                fix="Give prompts without these roles, e.g. a system prompt as the beginning of the user's turn, or a "
                "model whose template has them."
                if roles
                else first["fix"],
            )
        )
    learnt = reply["sft"]
    if reply["doubled"] or (learnt and learnt["doubled"]):
        where = f"{reply['doubled']} of {tried} prompts (the first: {reply['doubled_first']})"
        found.blocking.append(
            Finding(
                code="doubled_think",
                message="The chat template opens <think> where the text has just opened it, in "
                f"{where if reply['doubled'] else 'the row of SFT that was looked at'}.",
                fix="Remove <think> from the end of the prompts, or from the beginning of the response ids.",
            )
        )
    if reply["dropped_roles"]:
        roles_of = ", ".join(f"{role} ({count} prompts)" for role, count in reply["dropped_roles"].items())
        found.warn(
            "roles_dropped",
            f"The chat template leaves out what these roles say, or changes it: {roles_of}.",
            "Look at the preview; move that text into the user's turn if the model is to see it.",
        )
    if reply["spelling"]:
        names = ", ".join(f"{count} × {token}" for token, count in reply["spelt"].items())
        found.warn(
            "control_tokens_spelt",
            f"{reply['spelling']} of {tried} prompts looked at spell control tokens: {names}.",
            "They are encoded as 'prompting.control_tokens' says: 'text' (the default) keeps them from ending a turn, "
            "'tokens' makes them the tokens themselves.",
        )


def _limits(
    lengths: Sequence[int], inputs: PlanInputs, recipe: Recipe, phases: Sequence[PhaseName]
) -> Iterator[tuple[LimitShare, tuple[int, Sampling] | None]]:
    """The limits that prompts meet in these phases; with a model's positions: the longest prompt, and what follows."""
    most = recipe.prompting.max_prompt_tokens
    used = [length for length in lengths if length <= most]
    yield LimitShare(limit="prompting.max_prompt_tokens", tokens=most, over=len(lengths) - len(used)), None
    if "sft" in phases:
        room = recipe.sft.max_length
        yield LimitShare(limit="sft.max_length", tokens=room, over=sum(length >= room for length in used)), None
    models = [model.facts for model in (inputs.teacher, inputs.student) if model.facts]
    positions = [facts.positions for facts in models if facts.positions is not None]
    drawn: dict[str, Sampling] = {}
    if "generate_responses" in phases:
        drawn["responses"] = recipe.responses.sampling
    if "rollout" in phases or ("distill" in phases and recipe.distill.method == "live"):
        drawn["rollout"] = recipe.rollout.sampling
    if positions and used:
        for name, sampling in drawn.items():
            room = min(positions) - sampling.max_new_tokens
            over = sum(length > room for length in used)
            limit = f"max_position_embeddings with {name}.sampling.max_new_tokens"
            yield LimitShare(limit=limit, tokens=min(positions), over=over), (max(used), sampling)
        # These prompts are not the evaluation's: only what is too much for the shortest of them is surely too much.
        if "benchmark" in phases and min(used) + recipe.benchmark.sampling.max_new_tokens > min(positions):
            limit = "max_position_embeddings with benchmark.sampling.max_new_tokens"
            yield (
                LimitShare(limit=limit, tokens=min(positions), over=len(used)),
                (min(used), recipe.benchmark.sampling),
            )


def _judge_positions(limits: Sequence[tuple[LimitShare, tuple[int, Sampling] | None]], found: Findings) -> None:
    # What has room after the longest prompt of any stage: those of the evaluation may be as long.
    room = min((share.tokens - longest[0] for share, longest in limits if longest is not None), default=0)
    for share, longest in limits:
        if longest is None or not share.over:
            continue
        tokens, sampling = longest
        key = share.limit.rpartition(" ")[2]
        found.blocking.append(
            Finding(
                code="too_long",
                message=f"A prompt of {tokens} tokens and {sampling.max_new_tokens} new ones ({key}) are more than the "
                f"{share.tokens} positions of the models; so it is with {share.over} of the prompts looked at.",
                fix=(f"Set '{key}' to at most {room}, or lower" if room > 0 else "Lower")
                + " 'prompting.max_prompt_tokens', or give models with more positions.",
                overrides={key: room} if room > 0 else None,
            )
        )
