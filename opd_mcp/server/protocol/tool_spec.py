"""One tool as this project declares it, and as the SDK wants it.

The SDK derives a tool from a function's signature, ignores unknown arguments, dumps nulls and prints every answer
twice. A `ToolSpec` instead names its pydantic request and answer; the `Tool` built from it validates strictly,
answers without nulls and turns every failure into one readable ToolError.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from mcp.server.elicitation import ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.resolve import Elicit, Resolve, build_resolver_plans, find_resolved_parameters
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import ConfigDict

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.redaction import redacted, redacted_values
from opd_mcp.server.protocol.arguments import request_from_arguments, require_no_secret
from opd_mcp.server.protocol.elicitation import Ask, Consent, asked, require_agreed
from opd_mcp.server.protocol.json_schema import input_schema, output_schema, structured
from opd_mcp.store.files import disk_full, is_disk_full

logger = logging.getLogger(__name__)
RequestT = TypeVar("RequestT", bound=Schema)


@dataclass(frozen=True)
class Reply:
    """A tool's answer: the record for programs, and the short text for the model."""

    answer: Schema
    text: str


@dataclass(frozen=True)
class ToolSpec(Generic[RequestT]):
    """A tool: its texts, its request and answer models, and the call that turns one into the other.

    `explained` publishes the answer's descriptions and enumerations; elsewhere they would only repeat.
    """

    name: str
    title: str
    description: str
    request: type[RequestT]
    answer: type[Schema]
    call: Callable[[RequestT, Context], Awaitable[Reply]]
    read_only: bool
    destructive: bool = False
    idempotent: bool = True
    open_world: bool = False
    starts_run: bool = False
    explained: bool = False
    ask: Ask | None = None
    opaque: frozenset[str] = frozenset()
    meta: dict[str, Any] | None = None


class _RawArguments(ArgModelBase):
    """Takes whatever the client sends: the spec's own request model validates it, with better errors."""

    model_config = ConfigDict(extra="allow")

    def model_dump_one_level(self) -> dict[str, Any]:
        return {"arguments": dict(self.model_extra or {})}


@contextmanager
def readable_errors(tool: str, secrets: Sequence[str] = ()) -> Iterator[None]:
    """Turn whatever is raised inside into a ToolError that a model can act on, without secrets."""
    try:
        yield
    except OpdError as error:
        raise ToolError(redacted(str(error), secrets)) from error
    except (ToolError, MCPError):
        raise
    except Exception as error:
        if is_disk_full(error):
            raise ToolError(str(disk_full(error))) from error
        logger.exception("Tool %s failed", tool)
        raise ToolError(
            f"[internal_error] {type(error).__name__} inside {tool}. "
            "Fix: see the server's log; runs that were started are not affected (list_runs)."
        ) from None


def tool_from_spec(spec: ToolSpec[Any], secrets: Sequence[str] = ()) -> Tool:
    """The SDK's tool for a spec; one with `ask` asks the user first, and does nothing after a no.

    No answer holds one of the secrets, or what looks like one, and no request brings any into the records.
    """

    def parse(arguments: dict[str, Any]) -> Any:
        request = request_from_arguments(spec.name, spec.request, arguments)
        require_no_secret(request, secrets)
        return request

    async def call(arguments: dict[str, Any], context: Context) -> CallToolResult:
        with readable_errors(spec.name, secrets):
            reply = await spec.call(parse(arguments), context)
            return CallToolResult(
                content=[TextContent(type="text", text=redacted(reply.text, secrets))],
                structured_content=redacted_values(structured(reply.answer), secrets),
            )

    async def ask(arguments: dict[str, Any], context: Context) -> Consent | Elicit[Consent]:
        with readable_errors(spec.name, secrets):
            assert spec.ask is not None
            return await asked(spec.ask, parse(arguments), context)

    async def call_if_agreed(
        arguments: dict[str, Any], context: Context, consent: Annotated[ElicitationResult[Consent], Resolve(ask)]
    ) -> CallToolResult:
        with readable_errors(spec.name, secrets):
            require_agreed(consent)
        return await call(arguments, context)

    questions = find_resolved_parameters(call_if_agreed) if spec.ask else {}
    return Tool(
        fn=call_if_agreed if spec.ask else call,
        resolved_params=questions,
        resolver_plans=build_resolver_plans(questions, {"arguments"}),
        meta=spec.meta,
        name=spec.name,
        title=spec.title,
        description=spec.description,
        parameters=input_schema(spec.request),
        fn_metadata=FuncMetadata(
            arg_model=_RawArguments, output_schema=output_schema(spec.answer, spec.opaque, brief=not spec.explained)
        ),
        is_async=True,
        context_kwarg="context",
        annotations=ToolAnnotations(
            read_only_hint=spec.read_only,
            destructive_hint=spec.destructive,
            idempotent_hint=spec.idempotent,
            open_world_hint=spec.open_world,
        ),
    )
