"""One tool as this project declares it: texts, request, answer, call, flags, and the command line's equivalent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from opd_mcp.planning.confirmation import Question
from opd_mcp.schemas.base import Schema

if TYPE_CHECKING:  # the command line reads the table without a service
    from opd_mcp.server.serve import ServerSettings
    from opd_mcp.service import JobService

RequestT = TypeVar("RequestT", bound=Schema)
AnswerT = TypeVar("AnswerT", bound=Schema)


@dataclass(frozen=True)
class ToolSpec(Generic[RequestT, AnswerT]):
    """A tool: `call` turns a request into the answer for programs, `text` the answer into words for the model.

    `command`: what does the same on the command line, with the request's fields in braces; `options`: the other fields
    are its options.
    `waits`: the answer may be held back until there is news. `explained`: the listing has the answer's descriptions and
    enumerations; elsewhere they would only repeat. `repeats`: start_distillation names its fields. `opaque`: the
    answer's parts that are listed as plain objects. `ask`: what the user must agree to before this call. `deletes`:
    only offered where the server was told to.
    """

    name: str
    title: str
    description: str
    request: type[RequestT]
    answer: type[AnswerT]
    call: "Callable[[JobService, RequestT], AnswerT]"
    text: Callable[[AnswerT], str]
    command: str | None = None
    options: bool = False
    read_only: bool = False
    destructive: bool = False
    idempotent: bool = True
    open_world: bool = False
    starts_run: bool = False
    waits: bool = False
    explained: bool = False
    repeats: bool = False
    deletes: bool = False
    ask: "Callable[[JobService, RequestT, ServerSettings], Question | None] | None" = None
    opaque: frozenset[str] = frozenset()
    meta: dict[str, Any] | None = None
