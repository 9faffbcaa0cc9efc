"""The stdio wire: one JSON-RPC message a line, and an answer to every line that asks for one.

The SDK's transport drops a line that it cannot read, takes a request with a bad id for a notification, and ends with an
answer that it cannot write. Here a line that is no JSON is answered with -32700, one that is no message, a batch and a
bad id with -32600, and an answer that cannot be written with -32603.
"""

import fcntl
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, BinaryIO

import anyio
from anyio import to_thread
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, PARSE_ERROR, ErrorData, JSONRPCError, jsonrpc_message_adapter
from mcp_types.jsonrpc import JSONRPCMessage
from pydantic import ValidationError
from pydantic_core import from_json

logger = logging.getLogger(__name__)
LINE_BYTES = 32 << 20
Incoming = MemoryObjectReceiveStream[SessionMessage | Exception]
Outgoing = MemoryObjectSendStream[SessionMessage]


@contextmanager
def claimed_wire() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """stdin and stdout for the protocol alone: meanwhile fd 0 is empty, and what is written to fd 1 goes to stderr."""
    sys.stdout.flush()
    # Above the standard range and close-on-exec: no child gets hold of the wire.
    descriptors = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1)]
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    try:
        # Left open: a thread may still be blocked in a read of it.
        yield os.fdopen(descriptors[0], "rb", closefd=False), os.fdopen(descriptors[1], "wb", closefd=False)
    finally:
        sys.stdout.flush()
        for fd, descriptor in enumerate(descriptors):
            os.dup2(descriptor, fd)


@asynccontextmanager
async def stdio_streams() -> AsyncIterator[tuple[Incoming, Outgoing]]:
    """The streams of a session over this process's stdin and stdout; the first one ends with stdin."""
    to_session, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, from_session = anyio.create_memory_object_stream[SessionMessage](0)

    with claimed_wire() as (stdin, stdout):

        async def read(refusals: Outgoing) -> None:
            async with to_session, refusals:
                while line := await to_thread.run_sync(_line, stdin):
                    if not line.strip():
                        continue
                    message = message_of(line)
                    try:
                        if isinstance(message, JSONRPCError) and message.error.code in (PARSE_ERROR, INVALID_REQUEST):
                            await refusals.send(SessionMessage(message))
                        else:
                            await to_session.send(SessionMessage(message))
                    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                        return  # the session has ended

        async def write() -> None:
            async with from_session:
                async for answer in from_session:
                    await to_thread.run_sync(_write, stdout, written(answer.message))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, outgoing.clone())
            tasks.start_soon(write)
            yield incoming, outgoing


def message_of(line: bytes) -> JSONRPCMessage:
    """The message of a line, or the error that answers it; the error has the line's id where that can be read."""
    if len(line) > LINE_BYTES:
        return refusal(None, INVALID_REQUEST, f"Invalid request: a line has more than {LINE_BYTES} bytes")
    try:
        values = from_json(line)
    except ValueError as error:
        return refusal(readable_id(line), PARSE_ERROR, f"Parse error: {error}")
    if not isinstance(values, dict):
        return refusal(None, INVALID_REQUEST, "Invalid request: not a single JSON-RPC object")
    if "method" in values and "id" in values and not is_id(values["id"]):
        return refusal(None, INVALID_REQUEST, "Invalid request: the id is neither a text nor a whole number")
    try:
        return jsonrpc_message_adapter.validate_python(values, by_name=False)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        given = values.get("id")
        return refusal(given if is_id(given) else None, INVALID_REQUEST, f"Invalid request: {place}: {first['msg']}")


def written(message: JSONRPCMessage) -> bytes:
    """The line of a message; an error in its place when it has something that cannot be written."""
    try:
        return message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
    except ValueError:  # pydantic's errors, and those of half surrogates
        logger.exception("A message could not be written")
        error = refusal(getattr(message, "id", None), INTERNAL_ERROR, "The answer cannot be written as JSON")
        return error.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"


def refusal(request_id: str | int | None, code: int, text: str) -> JSONRPCError:
    """A JSON-RPC error."""
    return JSONRPCError(jsonrpc="2.0", id=request_id, error=ErrorData(code=code, message=text[:500]))


def is_id(value: Any) -> bool:
    """Whether JSON-RPC accepts it as the id of a request here: a text or a whole number."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def readable_id(line: bytes) -> str | int | None:
    """The id of a line that is nearly JSON (a half surrogate, for instance), so that its request is answered."""
    try:
        found = json.loads(line)
        given = found.get("id") if isinstance(found, dict) else None
        return given if is_id(given) and str(given).encode() else None
    except (ValueError, RecursionError):
        return None


def _line(stdin: BinaryIO) -> bytes:
    """The next line, cut where it is too long; empty at the end."""
    line = rest = stdin.readline(LINE_BYTES + 1)
    while len(rest) > LINE_BYTES and not rest.endswith(b"\n"):
        rest = stdin.readline(LINE_BYTES + 1)
    return line


def _write(stdout: BinaryIO, line: bytes) -> None:
    stdout.write(line)
    stdout.flush()
