"""What a finished cache has measured of a plan's models: the teachers' distance, the engine gap, odd rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

from opd_mcp.identity.consistency import delta_by_construction, proven_claim
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.planning.checks import TRUNCATED_SHARE, Findings
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.identity import Lineage, ModelIdentity
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.plans import ConsistencyVerdict
from opd_mcp.schemas.recipes import Method
from opd_mcp.schemas.runs import RunInputs, RunPhase, RunRequest
from opd_mcp.store.artifacts import Artifact, ArtifactStore


def judge_rollouts(manifest: CacheManifest, cache_id: str, found: Findings) -> None:
    """Warn when many rollouts of an existing cache have no end or no content, or rows were left out of it."""
    statistics, hygiene = manifest.rollouts, manifest.hygiene
    if statistics.truncated_fraction > TRUNCATED_SHARE:
        found.warn(
            "rollouts_truncated",
            f"{statistics.truncated_fraction:.0%} of the rollouts in {cache_id} have no end (on_truncated: "
            f"{hygiene.on_truncated}, {hygiene.truncated_dropped} dropped, {hygiene.truncated_capped} capped).",
            "Raise 'rollout.sampling.max_new_tokens', or set 'score.on_truncated' to 'drop' or 'cap'.",
        )
    if statistics.empty_responses:
        found.warn(
            "rollouts_empty",
            f"{statistics.empty_responses} of {statistics.rows} rollouts in {cache_id} hold no token but the end; they "
            "teach when to stop, nothing else.",
            "Look at some rows; a student that often ends at once needs more SFT.",
            next_call("inspect_cache", cache=cache_id),
        )
    if hygiene.quarantined:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in hygiene.quarantined.items())
        found.warn("rows_left_out", f"Rows were left out of {cache_id}: {reasons}.", "Nothing has to be done.")


@dataclass(frozen=True)
class MeasuredCache:
    """A finished cache and whether it is the very one that the plan would build."""

    artifact_id: str
    manifest: CacheManifest
    own: bool


def measured_cache(artifacts: ArtifactStore, inputs: RunInputs, phases: Sequence[RunPhase]) -> MeasuredCache | None:
    """The cache of these phases where it exists, else the newest one of the same student and teacher.

    A student that is still to be fine-tuned has none, and a cache of another plan that cannot be read is passed over.
    Raises IntegrityError `damaged_file` for the plan's own.
    """
    own = next((phase.satisfied_by for phase in phases if phase.name == "score" and phase.satisfied_by), None)
    if own is not None:
        return MeasuredCache(own, read_manifest(artifacts.get(own).path, own), own=True)
    student, teacher = (model.identity if model else None for model in (inputs.student, inputs.teacher))
    if student is None or teacher is None or any(phase.name == "sft" for phase in phases):
        return None
    for artifact in reversed(artifacts.list("cache")):
        manifest = _manifest_of(artifact, student, teacher)
        if manifest is not None:
            return MeasuredCache(artifact.artifact_id, manifest, own=False)
    return None


def with_measures(
    verdict: ConsistencyVerdict, cache: MeasuredCache | None, request: RunRequest, found: Findings
) -> ConsistencyVerdict:
    """The verdict with Δ and the engine gap and where they come from, or why they are absent; warns of odd rollouts."""
    if request.kind == "sft":
        return verdict
    method, phases = request.recipe.distill.method, request.phases
    if cache is not None:
        judge_rollouts(cache.manifest, cache.artifact_id, found)
    delta = cache.manifest.teacher_delta if cache else None
    gap = cache.manifest.engine_gap if cache else None
    fine_tuned_here = any(phase.name == "sft" for phase in phases)
    if delta is None and verdict.teacher is not None:
        claim = proven_claim(verdict.teacher) if fine_tuned_here else verdict.sft_teacher
        delta = delta_by_construction(verdict.teacher, claim)
    absent = []
    if delta is None:
        at_hand = fine_tuned_here or request.inputs.sft_teacher_path is not None
        absent.append(_absence("teacher_delta", method, cache, at_hand=at_hand))
    if gap is None:
        absent.append(_absence("engine_gap", method, cache, at_hand=True))
    return verdict.model_copy(
        update={
            "teacher_delta": delta,
            "engine_gap": gap,
            "measured_in": cache.artifact_id if cache else None,
            "not_measured": ", ".join(absent) or None,
        }
    )


def _absence(name: str, method: Method, cache: MeasuredCache | None, *, at_hand: bool) -> str:
    if method == "live":
        return f"{name} (a live run builds no cache to measure it on)"
    if not at_hand:
        return f"{name} (the SFT teacher's files are not at hand)"
    if cache is not None and cache.own:
        return f"{name} (left out when {cache.artifact_id} was built)"
    return f"{name} (measured when the cache is built)"


def _manifest_of(artifact: Artifact, student: ModelIdentity, teacher: ModelIdentity) -> CacheManifest | None:
    """The manifest of a cache of these two; its lineage, which is short, is asked first."""
    try:
        lineage = read_lineage(artifact.path)
        if lineage is None or not (_has(lineage, "student", student) and _has(lineage, "teacher", teacher)):
            return None
        return read_manifest(artifact.path)
    except OpdError:
        return None  # a damaged cache stops the runs that use it, not other plans


def _has(lineage: Lineage, role: str, model: ModelIdentity) -> bool:
    identities = [parent.identity for parent in lineage.parents if parent.role == role and parent.identity]
    return any(identity.same_model(model) and identity.same_context(model) for identity in identities)
