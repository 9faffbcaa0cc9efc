"""One trace from the tool call to its run: the call's context goes into run.json, the worker's span continues it.

Without an OpenTelemetry SDK that was set up (`opentelemetry-instrument opd-mcp serve`; the worker inherits it through
its environment) all of this does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from opd_mcp.schemas.runs import RunRecord


def current_trace() -> dict[str, str]:
    """The W3C trace context of the present span; empty where nothing is traced."""
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


@contextmanager
def run_span(record: RunRecord) -> Iterator[None]:
    """A span around a run's work, a child of the tool call that started it."""
    from opentelemetry import propagate, trace

    attributes = {"opd.run_id": record.run_id, "opd.kind": record.request.kind}
    context = propagate.extract(record.trace_context)
    name = f"run {record.request.kind}"
    with trace.get_tracer("opd-mcp").start_as_current_span(name, context=context, attributes=attributes):
        yield
