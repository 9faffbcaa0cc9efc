"""The next step as data: which tool to call, with which arguments, and why; each front end words it for its readers."""

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import Field

from opd_mcp.schemas.base import Schema


class NextAction(Schema):
    """The next step of an answer or an error; without a `tool` there is nothing to call, only `why` to read."""

    tool: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    missing: list[str] | None = Field(None, description="arguments to add")
    why: str | None = Field(None, description="reason, and what to do first")

    def call_text(self) -> str:
        """The call as agents read it, e.g. `Call get_run_status(run_id='x', wait_seconds=25)`; empty without a tool."""
        given = [f"{name}={value!r}" for name, value in self.arguments.items()]
        added = [f"{name}='…'" for name in self.missing or ()]
        return f"Call {self.tool}({', '.join([*added, *given])})" if self.tool else ""

    def with_why(self, why: str) -> "NextAction":
        """The same call with another reason."""
        return self.model_copy(update={"why": why})

    def filled(self, **known: Any) -> "NextAction":
        """The same call with those of its missing arguments that are known by now."""
        added = {name: value for name, value in known.items() if value is not None and name in (self.missing or ())}
        missing = [name for name in self.missing or () if name not in added]
        return self.model_copy(update={"arguments": self.arguments | added, "missing": missing or None})


CallText = Callable[[NextAction], str]
"""How a front end words a call: agents call a tool, people run a command."""


def next_call(tool: str, why: str | None = None, *, missing: Iterable[str] = (), **arguments: Any) -> NextAction:
    """The next step that is a call of a tool."""
    return NextAction(tool=tool, arguments=arguments, missing=list(missing) or None, why=why)


def resume_call(run_id: str | None = None) -> NextAction:
    """Resuming a run; the failing run fills in its own id."""
    return next_call("resume_run", run_id=run_id) if run_id else next_call("resume_run", missing=["run_id"])


def plan_call(why: str | None = None) -> NextAction:
    """Planning a distillation whose models and prompts the caller knows."""
    return next_call("plan_distillation", why, missing=("student", "teacher", "prompts"))


def advice_text(sentence: str | None, action: NextAction | None, call_text: CallText = NextAction.call_text) -> str:
    """A sentence of advice with the call that belongs to it."""
    return " ".join(part for part in (sentence, call_text(action) if action else None) if part)
