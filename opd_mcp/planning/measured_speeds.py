"""How fast this machine is: costs recorded with artifacts, and what is assumed where nothing was measured."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from opd_mcp.devices.hardware import Target
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.runs import PhaseName

COST_FILE = "cost.json"
MEASUREMENTS_READ = 60
PROCESS_START = "process_start"


class PhaseCost(Schema):
    """One phase as it was estimated and as it went; `cost.json` of an artifact holds those that made it."""

    work: str
    device: str
    expected_flops: float
    cost: StageCost


def work_name(phase: str, method: str) -> str:
    """What measured costs are compared by: the phase, and for `distill` its method as well."""
    return f"{phase}:{method}" if phase == "distill" else phase


class ArtifactCosts(Schema):
    """`cost.json`: what the phases that made an artifact took."""

    phases: list[PhaseCost]


@dataclass(frozen=True)
class Speed:
    """Assumed operations a second by kind of work, and the seconds that one layer's forward pass takes at least."""

    generation: float
    training: float
    scoring: float
    layer_seconds: float
    label: str


def assumed_speed(target: Target, recipe: Recipe) -> Speed:
    """What is assumed of a device on which nothing was measured yet."""
    if target.kind == "cpu":
        each = recipe.runtime.threads * 1e9
        label = f"{target.name} at 20 GFLOP/s a thread (generating 8, scoring 40)"
        return Speed(8 * each, 20 * each, 40 * each, 2.5e-4, label)
    if recipe.runtime.dtype == "bfloat16":
        # about half of the operations a second that an H200 did (docs/performance.md), and its time a layer when steps
        # are replayed: which GPU it will be is not known
        return Speed(1e13, 2e14, 3e14, 1.5e-4, f"{target.name} at 200 TFLOP/s (generating 10, scoring 300)")
    return Speed(2e12, 2e13, 3e13, 1.5e-4, f"{target.name} at 20 TFLOP/s (generating 2, scoring 30)")


def measured_costs(artifacts: Path) -> list[PhaseCost]:
    """The newest phase costs recorded with the artifacts `<kind>/<id>/cost.json` below the folder."""
    found = [(path.stat().st_mtime, path) for path in artifacts.glob(f"*/*/{COST_FILE}")]
    costs: list[PhaseCost] = []
    for _, path in sorted(found, reverse=True)[:MEASUREMENTS_READ]:
        try:
            costs += ArtifactCosts.from_json(path.read_bytes()).phases
        except (OSError, ValidationError):
            continue  # a hint for estimates only: another version's file is as good as none
    return costs


def recorded_cost(artifact: Path, name: PhaseName) -> StageCost | None:
    """What a phase took when it made this artifact; None when its cost.json does not say."""
    try:
        costs = ArtifactCosts.from_json((artifact / COST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return next((known.cost for known in costs.phases if known.cost.stage == name), None)
