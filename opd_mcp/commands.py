"""What the command line says where the server's texts name a tool: errors and next steps are written for agents."""

import re

# by tool, the command that does the same; what an argument of the call names takes the place of its last word
COMMANDS = {
    "get_run_status": "status RUN_ID",
    "list_runs": "list",
    "cancel_run": "cancel RUN_ID",
    "resume_run": "resume RUN_ID",
    "get_run_logs": "logs RUN_ID",
    "inspect_cache": "cache inspect CACHE",
}
CLIENTS_ONLY = (
    "inspect_setup",
    "plan_distillation",
    "generate_teacher_responses",
    "start_sft",
    "build_teacher_cache",
    "start_distillation",
    "benchmark_student",
    "sample_model",
    "get_run_metrics",
    "list_artifacts",
    "delete_artifact",
    "open_dashboard",
    "dashboard_feed",
)
_CALL = re.compile(rf"\b(?:([Cc])all )?({'|'.join(COMMANDS)})\b(\([^()]*\))?")
_SUBJECT = re.compile(r"\b(?:run_id|cache)='([^']*)'")
_CLIENTS_ONLY = re.compile(rf"\b(?:{'|'.join(CLIENTS_ONLY)})\b")


def in_commands(text: str) -> str:
    """The text with commands in place of tools; tools that have none are said to be for clients of `opd-mcp serve`."""
    told = _CALL.sub(_command, text)
    tools = list(dict.fromkeys(_CLIENTS_ONLY.findall(told)))
    if not tools:
        return told
    return f"{told} (Tools that an MCP client of opd-mcp serve calls: {', '.join(tools)}.)"


def _command(call: re.Match[str]) -> str:
    verb, tool, arguments = call.groups()
    subject = _SUBJECT.search(arguments or "")
    command = COMMANDS[tool]
    if subject:
        command = f"{command.rpartition(' ')[0]} {subject[1]}"
    return f"{'Run ' if verb == 'C' else 'run ' if verb else ''}opd-mcp {command}"
