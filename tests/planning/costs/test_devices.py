"""Costs of several devices: what they share, what each holds, and what a plan counts of one node."""

from dataclasses import replace

import pytest

from opd_mcp.devices.hardware import Target
from opd_mcp.planning.costs.estimates import CostModel, room_of
from opd_mcp.planning.costs.workload import PROCESS_BYTES, DataSize, Room, Workload
from opd_mcp.schemas.memory import ModelShape
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import RunPhase

SMALL = ModelShape(10**6, layers=2, hidden=64, query_width=64, kv_width=64, intermediate=128, vocab=1000)
LARGE = ModelShape(10**7, layers=4, hidden=256, query_width=256, kv_width=256, intermediate=512, vocab=1000)
DATA = DataSize(prompts=1000, prompt_tokens=10.0, sft_prompts=500, eval_prompts=100)
CPU = Target("cpu", "1 CPU thread", 8 << 30)
PHASES = [RunPhase(name=name, key=name) for name in ("rollout", "score", "distill", "benchmark")]


def cost_on(recipe, target):
    return CostModel(Workload(recipe, SMALL, LARGE, DATA, Room("cpu", target.memory - PROCESS_BYTES)), target)


def test_several_devices_share_what_is_drawn_and_scored_here():
    """On the CPU each of their processes holds the model; an engine is one device's."""

    def phases(**overrides):
        target = replace(CPU, devices=overrides.get("runtime.devices", 1))
        found = cost_on(resolve_recipe("demo", overrides), target).estimate("lightning", PHASES)
        return {phase.phase: phase for phase in found.phases}

    one, two = phases(), phases(**{"runtime.devices": 2})
    for name in ("rollout", "score", "benchmark"):
        assert "2 devices at 80% of that each" in two[name].basis
        assert "devices" not in one[name].basis
        assert two[name].memory_bytes - PROCESS_BYTES == 2 * (one[name].memory_bytes - PROCESS_BYTES)
    served = phases(**{"runtime.devices": 2, "rollout.engine": "vllm"})["rollout"]
    assert "devices" not in served.basis
    assert served.memory_bytes == phases(**{"rollout.engine": "vllm"})["rollout"].memory_bytes


def test_several_devices_hold_whole_models_where_the_student_draws_within_its_training():
    def memory(kind="cpu", **overrides):
        devices = overrides.get("runtime.devices", 1)
        room = Room(kind, devices=devices)
        return Workload(resolve_recipe("demo", overrides), LARGE, LARGE, DATA, room=room).work("distill").memory

    two, judged = {"runtime.devices": 2}, {"distill.evaluate_steps": 2}
    student, teacher = 4 * LARGE.parameters, 4 * LARGE.parameters
    for kind in ("cpu", "cuda"):  # one device judges, by a copy and the teacher
        assert memory(kind, **two, **judged) - memory(kind, **two) == student + teacher
        assert memory(kind, **judged) == memory(kind)
    live = {"distill.method": "live"}
    for kind, processes in (("cpu", 2), ("cuda", 1)):  # of what a plan counts
        more = memory(kind, **two, **live) - memory(kind, **two)
        alone = memory(kind, **live) - memory(kind)
        assert more == pytest.approx(processes * (alone + student))
        assert memory(kind, **two, **live, **judged) == memory(kind, **two, **live)


def test_a_plan_for_several_nodes_counts_a_replica_on_each_and_says_so():
    """What does not fit a node is divided among all; each rank of a replica needs more than one of all."""

    def found(memory: int, nodes: int = 2, **overrides):
        target = Target("cuda", "each of 4 GPUs", memory, capacity=memory, devices=4, nodes=nodes)
        recipe = resolve_recipe("demo", {"runtime.devices": 4, "runtime.device": "auto", **overrides})
        workload = Workload(recipe, SMALL, LARGE, DATA, room_of(target))
        return CostModel(workload, target).estimate("lightning", [phase for phase in PHASES if phase.name == "distill"])

    by_node, among_all = found(1 << 40), found(1 << 40, **{"runtime.replicas": 1})
    assert "2 groups of devices each hold the student" in by_node.memory_basis
    assert "groups of devices" not in among_all.memory_basis + found(1 << 40, nodes=1).memory_basis
    assert by_node.peak_memory_bytes > among_all.peak_memory_bytes == found(1 << 40, nodes=1).peak_memory_bytes
    assert found(1 << 20) == found(1 << 20, **{"runtime.replicas": 1})


def test_devices_of_a_cpu_share_the_memory_of_their_machine_alone():
    def peak(nodes: int) -> int:
        target = replace(CPU, devices=4, nodes=nodes)
        workload = Workload(resolve_recipe("demo", {"runtime.devices": 4}), SMALL, LARGE, DATA, room_of(target))
        return CostModel(workload, target).estimate("lightning", PHASES[:2]).peak_memory_bytes

    assert peak(2) == peak(1) / 2
