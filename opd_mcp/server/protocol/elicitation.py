"""Asking the user, on both protocol eras; a client that cannot ask repeats an id in `confirm` instead."""

from typing import Annotated

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import Elicit
from pydantic import BaseModel, Field

from opd_mcp.planning.confirmation import Question, confirm_needed, is_confirmed
from opd_mcp.schemas.errors import PlanError
from opd_mcp.server.protocol.outgoing import Outgoing


class Consent(BaseModel):
    """The form that the user fills in."""

    agreed: Annotated[bool, Field(description="Yes, go on.")]


def asked(
    question: Question | None, confirm: str | None, context: Context, outgoing: Outgoing
) -> Consent | Elicit[Consent]:
    """The question for the user, or a yes where there is nothing to ask or `confirm` has answered it.

    Raises ArgumentError `confirm_needed` for a client that cannot ask.
    """
    if question is None or is_confirmed(question, confirm):
        return Consent(agreed=True)
    if not can_ask(context):
        raise confirm_needed(question)
    return Elicit(outgoing.line(question.text), Consent)


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
