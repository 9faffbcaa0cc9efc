"""The trace of a tool call goes on in its run's worker."""

import pytest
from mcp import Client
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from opd_mcp.server.app import build_server
from opd_mcp.supervisor.records import current_trace
from opd_mcp.worker.main import run_span


@pytest.fixture(scope="module")
def exporter():
    """What the spans of this process are written to."""
    found = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    trace.set_tracer_provider(provider)
    return found


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_the_runs_span_is_a_child_of_the_tool_call(world, service, busy_machine, exporter):
    arguments = {"teacher": world.teacher, "prompts": ["1+1=?"], "preset": "demo"}
    async with Client(build_server(service)) as client:
        answer = await client.call_tool("generate_teacher_responses", arguments)
    run_id = answer.structured_content["run_id"]
    record = service.store.record(run_id)
    with run_span(record):
        pass
    service.cancel(run_id)
    spans = exporter.get_finished_spans()
    call = next(
        span for span in spans if span.name == "tools/call generate_teacher_responses" and span.kind.name == "SERVER"
    )
    run = next(span for span in spans if span.name == "run generate")
    assert run.context.trace_id == call.context.trace_id
    assert run.parent.span_id == call.context.span_id
    assert run.attributes["opd.run_id"] == run_id


def test_without_a_trace_there_is_no_context():
    assert current_trace() == {}
