"""Asking the user, on both protocol eras; a client that cannot ask repeats an id in `confirm` instead."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import Elicit
from pydantic import BaseModel, Field

from opd_mcp.planning.confirmation import Question, confirm_needed, is_confirmed
from opd_mcp.schemas.errors import PlanError


class Consent(BaseModel):
    """The form that the user fills in."""

    agreed: Annotated[bool, Field(description="Yes, go on.")]


Ask = Callable[[Any], Awaitable[Question | None]]
"""From a request to what must be asked about it, if anything; the same answer for the same request."""


async def asked(ask: Ask, request: Any, context: Context) -> Consent | Elicit[Consent]:
    """The question for the user, or a yes where there is nothing to ask or `confirm` has answered it.

    Raises ArgumentError `confirm_needed` for a client that cannot ask.
    """
    question = await ask(request)
    if question is None or is_confirmed(question, request.confirm):
        return Consent(agreed=True)
    if not can_ask(context):
        raise confirm_needed(question)
    return Elicit(question.text, Consent)


def can_ask(context: Context) -> bool:
    """Whether the client puts questions to its user; one that says nothing of how has forms."""
    capabilities = context.client_capabilities
    elicitation = capabilities.elicitation if capabilities else None
    return elicitation is not None and (elicitation.form is not None or elicitation.url is None)


def require_agreed(answer: ElicitationResult[Consent]) -> None:
    """Raise PlanError `declined` unless the user said yes."""
    if isinstance(answer, AcceptedElicitation) and answer.data.agreed:
        return
    raise PlanError("declined", "The user did not agree; nothing was started or deleted.", fix="Ask what they want.")
