"""What a resume is refused for before it is queued: no room for the phases that are left."""

from opd_mcp.devices.hardware import Target, free_disk
from opd_mcp.planning.estimates import resource_findings
from opd_mcp.planning.phases import FindArtifact, with_satisfied
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.plans import MethodEstimate
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.runs import CHECKPOINTS
from opd_mcp.store.workspace import Workspace

WAYS_OUT = {
    "not_enough_memory": "Resume the run once memory is free, or start again with lower micro_batch_tokens, "
    "rollout.batch_size or max_new_tokens; finished phases whose settings stay are reused.",
    "not_enough_disk": "Free disk space (opd-mcp gc shows what is unused), then resume the run.",
}


def with_phases_left(record: RunRecord, find: FindArtifact) -> RunRecord:
    """The record with those phases marked as satisfied whose artifact is there by now."""
    request = record.request
    phases = with_satisfied(request.phases, request.recipe.distill.method, find)
    return record.model_copy(update={"request": request.model_copy(update={"phases": phases})})


def require_room(record: RunRecord, estimate: MethodEstimate | None, target: Target, workspace: Workspace) -> None:
    """Raise ResourceError `not_enough_memory` or `not_enough_disk` where the estimate of what is left does not fit.

    None: a model of the run is still to be fetched, and nothing is known. Checkpoints that are there are written.
    """
    if estimate is None:
        return
    room = free_disk(workspace.root) + tree_bytes(workspace.run(record.run_id) / CHECKPOINTS)
    for finding in resource_findings(estimate, target, room):
        fix, call = WAYS_OUT[finding.code], resume_call(record.run_id)
        raise ResourceError(finding.code, finding.message, value=record.run_id, fix=fix, call=call)
