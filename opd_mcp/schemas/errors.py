"""One tree of errors; each carries a code, the offending value and the way out.

OpdError
├── InputError (also ValueError)   what the caller gave cannot be used
│   ├── PathError                  relative_path · outside_roots · not_found · not_a_model · not_a_cache ·
│   │                              unsafe_weights · unsupported_head · special_file · unsafe_folder ·
│   │                              unsafe_config · cannot_be_saved · workspace_missing · unusable_name ·
│   │                              unsupported_model · unsupported_adapter · base_missing · destination_exists
│   ├── DataError                  empty_data · malformed_line · missing_field · no_answers · unknown_format ·
│   │                              too_large · unknown_token · template_failed · too_long · doubled_think ·
│   │                              golds_not_gradable · system_dropped · unknown_domain
│   ├── ArgumentError              unknown_argument · invalid_argument · unknown_override · wait_too_long ·
│   │                              confirm_needed · secret_in_arguments · unknown_setting · invalid_setting ·
│   │                              teacher_host_not_allowed · too_slow · lossy_precision ·
│   │                              unknown_template_option · reserved_template_option · devices_unsupported ·
│   │                              unknown_executor
│   └── UnknownIdError             unknown_run · unknown_artifact · unknown_plan
├── ConsistencyError               tokenizer_mismatch · teacher_mismatch · behaviour_mismatch · lineage_missing ·
│                                  topk_missing · caches_differ · teacher_untrue · behaviour_missing ·
│                                  no_adapter · engine_untrue · not_one_model · nothing_to_learn
├── PlanError                      plan_blocked · plan_changed · declined
├── IntegrityError                 damaged_file · damaged_journal · lineage_mismatch · input_changed ·
│                                  artifact_exists · artifact_needed
├── ResourceError                  not_enough_memory · not_enough_disk · quota_exceeded · device_unavailable · offline ·
│                                  missing_package · teacher_unreachable · teacher_refused · grader_failed ·
│                                  sandbox_unavailable · workspace_busy · workspace_unusable · child_failed ·
│                                  engine_failed · engine_unreachable · engine_refused · missing_token
└── RunError                       run_not_active · run_active · run_locked · run_cancelled · launch_failed ·
                                   worker_lost · worker_terminated · attempt_superseded · same_request_active ·
                                   run_starting · bad_number · bad_rows · engine_disagrees · rank_lost
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from opd_mcp.schemas.redaction import redacted

if TYPE_CHECKING:  # so that an error alone does not load pydantic
    from opd_mcp.schemas.next_action import CallText, NextAction


class OpdError(Exception):
    """A failure that says what happened, which value caused it and what to do next.

    `code` is one of the names in this module's tree, `message` one sentence, `value` the offending value,
    `nearest` valid values close to it, `fix` one next step in words, and `call` the tool call that belongs to it.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        fix: str,
        value: object = None,
        nearest: Iterable[str] = (),
        call: "NextAction | None" = None,
    ) -> None:
        self.code = code
        # Messages quote exceptions and foreign values; every later reader sees at most this much of them.
        self.message = redacted(message)
        self.fix = fix
        self.call = call
        self.value = None if value is None else redacted(str(value)[:4096])[:500]
        self.nearest = [redacted(name) for name in nearest]
        super().__init__(str(self))

    def __str__(self) -> str:
        return self.text()

    def text(self, call_text: "CallText | None" = None) -> str:
        """The error in one line; `call_text` words its call for readers other than agents."""
        parts = [f"[{self.code}] {self.message}"]
        if self.value is not None:
            parts.append(f"Got: {self.value!r}.")
        if self.nearest:
            parts.append(f"Nearest: {', '.join(self.nearest)}.")
        parts.append(f"Fix: {self.fix}")
        if self.call is not None:
            parts.append(call_text(self.call) if call_text else self.call.call_text())
        return " ".join(parts)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        rest = {"fix": self.fix, "value": self.value, "nearest": self.nearest, "call": self.call}
        return _rebuild, (type(self), self.code, self.message, rest)


def _rebuild(kind: type[OpdError], code: str, message: str, rest: dict[str, Any]) -> OpdError:
    return kind(code, message, **rest)


class InputError(OpdError, ValueError):
    """The caller's input cannot be used."""


class PathError(InputError):
    """A path that is relative, outside the allowed roots, missing, or not what it should be."""


class DataError(InputError):
    """Prompts or responses that cannot be read."""


class ArgumentError(InputError):
    """An argument, override or setting that is unknown or out of range."""


class UnknownIdError(InputError):
    """A run, artifact or plan id that does not exist in this workspace."""


class ConsistencyError(OpdError):
    """Teacher, student, tokenizer or cache do not belong together."""


class PlanError(OpdError):
    """A plan that must not be started."""


class IntegrityError(OpdError):
    """A file whose content is not what was written."""


class ResourceError(OpdError):
    """Memory, disk, a device or the network is missing."""


class RunError(OpdError):
    """A run that is not in the state the call needs, or that could not continue."""


def nearest(value: str, valid: Iterable[str]) -> list[str]:
    """Up to three valid values that look like the given one."""
    return get_close_matches(value, list(valid), n=3, cutoff=0.5)


def converter_missing() -> ResourceError:
    """The error of an export as GGUF where llama.cpp's converter is unknown."""
    return ResourceError(
        "missing_package",
        "GGUF files are written by llama.cpp's convert_hf_to_gguf.py, which is in no package of its own; this "
        "workspace's settings do not name it.",
        value="format='gguf'",
        fix='Check out llama.cpp, and write its path in settings.toml: [export] gguf_converter = "/…/'
        'convert_hf_to_gguf.py" (docs/guide/serving.md).',
    )
