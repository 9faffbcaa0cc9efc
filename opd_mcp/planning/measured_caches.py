"""What caches that exist already measured, for a plan that computes nothing itself: Δ, the engine gap, the rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

from opd_mcp.identity.consistency import delta_by_construction, proven_claim
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.planning.checks import Findings, judge_rollouts
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.identity import Lineage, ModelIdentity
from opd_mcp.schemas.plans import ConsistencyVerdict
from opd_mcp.schemas.recipes import Method
from opd_mcp.schemas.runs import RunInputs, RunPhase
from opd_mcp.store.artifacts import Artifact, ArtifactStore


@dataclass(frozen=True)
class MeasuredCache:
    """A finished cache and whether it is the very one that the plan would build."""

    artifact_id: str
    manifest: CacheManifest
    own: bool


def measured_cache(artifacts: ArtifactStore, inputs: RunInputs, phases: Sequence[RunPhase]) -> MeasuredCache | None:
    """The cache of these phases where it exists, else the newest one of the same student and teacher, by weights.

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
    verdict: ConsistencyVerdict,
    cache: MeasuredCache | None,
    inputs: RunInputs,
    phases: Sequence[RunPhase],
    method: Method,
    found: Findings,
) -> ConsistencyVerdict:
    """The verdict with Δ and the engine gap and where they come from, or why they are absent; warns of odd rollouts."""
    if method == "sft":
        return verdict
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
        at_hand = fine_tuned_here or inputs.sft_teacher_path is not None
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
        return None  # a damaged cache stops whoever uses it, not a plan beside it


def _has(lineage: Lineage, role: str, model: ModelIdentity) -> bool:
    return any(
        parent.role == role and parent.identity is not None and parent.identity.same_model(model)
        for parent in lineage.parents
    )
