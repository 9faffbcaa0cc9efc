"""A row of the table of tools as the SDK wants it.

The SDK derives a tool from a function's signature, ignores unknown arguments, dumps nulls and prints every answer
twice. The `Tool` built here validates strictly, answers without nulls and turns every failure into one readable
ToolError.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from mcp.server.elicitation import ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.resolve import Elicit, Resolve, build_resolver_plans, find_resolved_parameters
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, ToolAnnotations
from pydantic import ConfigDict

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.server.audit import AuditLog, client_name
from opd_mcp.server.protocol.arguments import request_from_arguments, require_no_secret
from opd_mcp.server.protocol.elicitation import Consent, asked, require_agreed
from opd_mcp.server.protocol.json_schema import input_schema, output_schema
from opd_mcp.server.protocol.outgoing import Outgoing
from opd_mcp.server.protocol.waiting import StatusCalls
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.spec import ToolSpec
from opd_mcp.service import JobService
from opd_mcp.store.files import expected_failure, workspace_failure

logger = logging.getLogger(__name__)


class _RawArguments(ArgModelBase):
    """Takes any arguments: the spec's own request model validates it, with better errors."""

    model_config = ConfigDict(extra="allow")

    def model_dump_one_level(self) -> dict[str, Any]:
        return {"arguments": dict(self.model_extra or {})}


@contextmanager
def readable_errors(tool: str, outgoing: Outgoing, service: JobService) -> Iterator[None]:
    """Turn every exception inside into a ToolError that a model can act on, in one line and without secrets.

    Cancellation and the end of the process pass.
    """
    try:
        yield
    except OpdError as error:
        raise ToolError(outgoing.error(error)) from error
    except (ToolError, MCPError):
        raise
    except BaseException as error:
        expected = expected_failure(error)
        if expected is None and isinstance(error, OSError):
            expected = workspace_failure(error, service.workspace.root)
        if expected is not None:
            raise ToolError(outgoing.error(expected)) from error
        if not isinstance(error, Exception):
            raise
        logger.exception("Tool %s failed", tool)
        raise ToolError(
            f"[internal_error] {type(error).__name__} inside {tool}. "
            "Fix: see the server's log; runs that were started are not affected (list_runs)."
        ) from None


def sdk_tool(spec: ToolSpec[Any, Any], service: JobService, settings: ServerSettings) -> Tool:
    """The SDK's tool for a row; one with `ask` asks the user first, and does nothing after a no.

    No answer holds one of the secrets, or what looks like one, and no request brings any into the records.
    """
    secrets, outgoing = settings.secrets, Outgoing(settings.secrets)
    statuses = StatusCalls(service, outgoing) if spec.waits else None

    def parse(arguments: dict[str, Any]) -> Any:
        request = request_from_arguments(spec.name, spec.request, arguments)
        require_no_secret(request, secrets)
        return request

    async def answered(request: Any, context: Context) -> tuple[Schema, Callable[[Any], str]]:
        if statuses is not None:
            return await statuses.answer(request, context)
        # A thread is not cancelled with its caller: a start or a resume is done or not begun, never half.
        if spec.read_only:
            return await to_thread.run_sync(spec.call, service, request), spec.text
        audit, client = AuditLog(service.workspace, secrets), client_name(context.session)
        call = partial(spec.call, service, request)
        return await to_thread.run_sync(audit.recorded, client, spec.name, request.to_dict(), call), spec.text

    async def call(arguments: dict[str, Any], context: Context) -> CallToolResult:
        with readable_errors(spec.name, outgoing, service):
            return outgoing.result(*await answered(parse(arguments), context))

    async def ask(arguments: dict[str, Any], context: Context) -> Consent | Elicit[Consent]:
        with readable_errors(spec.name, outgoing, service):
            assert spec.ask is not None
            request = parse(arguments)
            question = await to_thread.run_sync(spec.ask, service, request, settings)
            return asked(question, request.confirm, context, outgoing)

    async def call_if_agreed(
        arguments: dict[str, Any], context: Context, consent: Annotated[ElicitationResult[Consent], Resolve(ask)]
    ) -> CallToolResult:
        with readable_errors(spec.name, outgoing, service):
            require_agreed(consent)
        return await call(arguments, context)

    questions = find_resolved_parameters(call_if_agreed) if spec.ask else {}
    # A server of some groups of tools may not offer the plan; then each tool describes all of its arguments.
    described_by = None if settings.groups or spec.request is PlanDistillation else PlanDistillation
    answer = output_schema(spec.answer, spec.opaque, brief=not spec.explained)
    if spec.repeats and not settings.groups:
        answer.pop("properties")
    return Tool(
        fn=call_if_agreed if spec.ask else call,
        resolved_params=questions,
        resolver_plans=build_resolver_plans(questions, {"arguments"}),
        meta=spec.meta,
        name=spec.name,
        title=spec.title,
        description=spec.description,
        parameters=input_schema(spec.request, described_by),
        fn_metadata=FuncMetadata(arg_model=_RawArguments, output_schema=answer),
        is_async=True,
        context_kwarg="context",
        annotations=ToolAnnotations(
            read_only_hint=spec.read_only,
            # These two say something of tools that change something only.
            destructive_hint=None if spec.read_only else spec.destructive,
            idempotent_hint=None if spec.read_only else spec.idempotent,
            open_world_hint=spec.open_world,
        ),
    )
