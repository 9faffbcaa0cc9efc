"""A workspace in words: its set-up, its artifacts, and what gc removes from it."""

from opd_mcp.schemas.answers import ArtifactList, DeletedArtifact, DeletedRun, GarbageReport, SetupReport
from opd_mcp.schemas.texts import byte_size, shortened
from opd_mcp.server.render.plans import finding_text
from opd_mcp.server.render.runs import facts, next_line

LIST_CHARACTERS = 6_000


def setup_text(report: SetupReport) -> str:
    """The machine, the workspace, the active runs and the example's paths."""
    lines = [f"opd-mcp {report.version}, Python {report.python}"]
    lines += [
        f"{device.kind}: {device.name}, {byte_size(device.free_memory_bytes)} of "
        f"{byte_size(device.total_memory_bytes)} memory free, {device.slots_busy}/{device.slots} slots busy"
        for device in report.devices
    ]
    lines += [f"executor {found.name} ({found.kind}): {found.state}" for found in report.executors or []]
    lines.append(f"workspace: {report.workspace} ({byte_size(report.free_disk_bytes)} free)")
    lines.append(f"allowed roots: {', '.join(report.allowed_roots)}")
    if report.export_roots:
        lines.append(f"export roots: {', '.join(report.export_roots)}")
    lines += [facts(run.run_id, run.kind, run.state, run.phase) for run in report.active_runs] or ["no active runs"]
    lines.append(f"presets: {', '.join(report.presets)}; wait_seconds ≤ {report.limits.wait_seconds}")
    lines += [f"quota: {name} = {value}" for name, value in report.quotas.to_dict().items()]
    if report.problem:
        lines.append(finding_text("PROBLEM", report.problem))
    if report.example:
        lines.append("example task:")
        lines += [f"  {name}: {path}" for name, path in report.example.to_dict().items()]
    return "\n".join([*lines, next_line(report.next_action)])


def garbage_text(report: GarbageReport) -> str:
    """What was or would be removed, one line per item, with the sum and what had to be kept."""
    verb = "removed" if report.removed else "would remove"
    lines = [f"{verb} {item.kind}: {item.path} ({byte_size(item.bytes)})" for item in report.items]
    lines.append(f"{verb} {len(report.items)} in all, {byte_size(report.bytes)}")
    if report.kept:
        lines.append("builds and artifacts were kept, since what these would need is not known:")
        lines += [f"  {reason}" for reason in report.kept]
    return "\n".join(lines)


def artifacts_text(found: ArtifactList) -> str:
    """One line an artifact."""
    lines = [f"{len(found.rows)} of {found.total} artifacts"]
    lines += [
        f"{row.artifact_id}, {row.kind}, {byte_size(row.bytes)}, {row.created_at}, {row.path}" for row in found.rows
    ]
    lines += [f"{artifact_id}: its record is damaged, `opd-mcp doctor` says how" for artifact_id in found.damaged or []]
    if found.next_cursor:
        lines.append(f"next_cursor: {found.next_cursor}")
    return shortened("\n".join(lines), LIST_CHARACTERS, "the structured answer has all of it, or give a smaller limit")


def deleted_run_text(deleted: DeletedRun) -> str:
    """What is gone and what stays."""
    lines = [f"deleted {deleted.run_id}: {byte_size(deleted.freed_bytes)} freed"]
    lines += [f"deleted with it: {artifact_id}" for artifact_id in deleted.artifacts]
    lines += [f"stays: {artifact_id} ({why})" for artifact_id, why in deleted.kept.items()]
    return shortened("\n".join([*lines, next_line(deleted.next_action)]), LIST_CHARACTERS)


def deleted_text(deleted: DeletedArtifact) -> str:
    """What is gone."""
    return f"deleted {deleted.artifact_id}: {byte_size(deleted.freed_bytes)} freed\n{next_line(deleted.next_action)}"
