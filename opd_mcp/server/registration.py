"""One tool as this project declares it, and as the SDK wants it.

The SDK derives a tool from a function's signature, ignores unknown arguments, dumps nulls and prints every answer
twice. A `ToolSpec` instead names its pydantic request and answer; the `Tool` built from it validates strictly,
answers without nulls and turns every failure into one readable ToolError.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import ConfigDict

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import OpdError
from opd_mcp.server.answers import structured
from opd_mcp.server.arguments import request_from_arguments
from opd_mcp.server.json_schema import input_schema, output_schema

logger = logging.getLogger(__name__)
RequestT = TypeVar("RequestT", bound=Schema)


@dataclass(frozen=True)
class Reply:
    """A tool's answer: the record for programs, and the short text for the model."""

    answer: Schema
    text: str


@dataclass(frozen=True)
class ToolSpec(Generic[RequestT]):
    """A tool: its texts, its request and answer models, and the call that turns one into the other."""

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
    opaque: frozenset[str] = frozenset()


class _RawArguments(ArgModelBase):
    """Takes whatever the client sends: the spec's own request model validates it, with better errors."""

    model_config = ConfigDict(extra="allow")

    def model_dump_one_level(self) -> dict[str, Any]:
        return {"arguments": dict(self.model_extra or {})}


def tool_from_spec(spec: ToolSpec[Any]) -> Tool:
    """The SDK's tool for a spec."""

    async def call(arguments: dict[str, Any], context: Context) -> CallToolResult:
        try:
            request = request_from_arguments(spec.name, spec.request, arguments)
            reply = await spec.call(request, context)
            return CallToolResult(
                content=[TextContent(type="text", text=reply.text)], structured_content=structured(reply.answer)
            )
        except OpdError as error:
            raise ToolError(str(error)) from error
        except ToolError:
            raise
        except Exception as error:
            logger.exception("Tool %s failed", spec.name)
            raise ToolError(
                f"[internal_error] {type(error).__name__} inside {spec.name}. "
                "Fix: see the server's log; runs that were started are not affected (list_runs)."
            ) from None

    return Tool(
        fn=call,
        name=spec.name,
        title=spec.title,
        description=spec.description,
        parameters=input_schema(spec.request),
        fn_metadata=FuncMetadata(arg_model=_RawArguments, output_schema=output_schema(spec.answer, spec.opaque)),
        is_async=True,
        context_kwarg="context",
        annotations=ToolAnnotations(
            read_only_hint=spec.read_only,
            destructive_hint=spec.destructive,
            idempotent_hint=spec.idempotent,
            open_world_hint=spec.open_world,
        ),
    )
