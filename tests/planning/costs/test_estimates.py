"""Costs: more work costs more, and what was measured here counts before what is assumed."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd_mcp.devices.hardware import Target
from opd_mcp.identity.models import inspect_model
from opd_mcp.planning.costs.admission import resource_findings
from opd_mcp.planning.costs.estimates import (
    ASSUMED_START_SECONDS,
    COST_FILE,
    PROCESS_START,
    ArtifactCosts,
    CostModel,
    PhaseCost,
    measured_costs,
    recipe_for_device,
    work_name,
)
from opd_mcp.planning.costs.run_workload import model_shape, workload_of
from opd_mcp.planning.costs.workload import DRAWN, PROCESS_BYTES, DataSize, Room, Workload, with_fitting_batches
from opd_mcp.schemas.memory import JOINING_ROOM, WINDOW_ROOM, ModelShape, micro_tokens
from opd_mcp.schemas.plans import MethodEstimate
from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import DataInput, ModelInput, RunInputs, RunPhase

SMALL = ModelShape(10**6, layers=2, hidden=64, query_width=64, kv_width=64, intermediate=128, vocab=1000)
LARGE = ModelShape(10**7, layers=4, hidden=256, query_width=256, kv_width=256, intermediate=512, vocab=1000)
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
DATA = DataSize(prompts=1000, prompt_tokens=10.0, sft_prompts=500, eval_prompts=100)
CPU = Target("cpu", "1 CPU thread", 8 << 30)
PHASES = [RunPhase(name=name, key=name) for name in ("rollout", "score", "distill", "benchmark")]


def estimator(measured=(), **overrides):
    recipe = resolve_recipe("demo", {key.replace("__", "."): value for key, value in overrides.items()})
    return cost_on(recipe, CPU, measured)


def cost_on(recipe, target, measured=()):
    return CostModel(Workload(recipe, SMALL, LARGE, DATA, Room("cpu", target.memory - PROCESS_BYTES)), target, measured)


def measurement(name: str, flops: float, seconds: float, device: str = "cpu") -> PhaseCost:
    return PhaseCost(work=name, device=device, expected_flops=flops, cost=StageCost(stage="x", seconds=seconds))


@pytest.mark.parametrize("phase", ["generate_responses", "sft", "rollout", "score", "distill", "benchmark"])
def test_a_larger_model_is_more_work_and_memory(phase):
    recipe = resolve_recipe("demo", {})
    small, large = (Workload(recipe, shape, shape, DATA).work(phase) for shape in (SMALL, LARGE))
    assert large.flops > small.flops > 0
    assert large.memory > small.memory > 0


def test_each_row_of_a_report_costs_its_own_model():
    def benchmark(rows, **data):
        recipe = resolve_recipe("demo", {"benchmark.references": rows, "benchmark.kl_prompts": 1})
        return Workload(recipe, SMALL, LARGE, replace(DATA, **data)).work("benchmark")

    here = {"references": frozenset({"teacher", "base"})}
    plain, base, both = (benchmark(rows, **here).flops for rows in ([], ["base"], ["teacher", "base"]))
    assert base == pytest.approx(1.5 * plain)
    assert both - base == pytest.approx(5 * plain, rel=0.1), "ten times the size of one of the two students"
    assert benchmark(["teacher", "base"]).flops == plain, "the run has neither"
    assert benchmark(["teacher"], **here, eval_prompts=0).flops == benchmark([], **here, eval_prompts=0).flops


def test_training_flops_are_six_a_parameter_and_token():
    costs = estimator(distill__steps=10, distill__batch_size=4, rollout__sampling__max_new_tokens=90)
    assert costs.workload.work("distill").flops == 6 * SMALL.parameters * 10 * 4 * 100


def test_live_pays_for_generation_and_the_teacher_at_every_step():
    lightning = estimator().workload.work("distill")
    live = estimator(distill__method="live").workload.work("distill")
    assert live.flops > lightning.flops
    assert live.passes > 5 * lightning.passes
    assert live.memory > lightning.memory


def test_what_was_measured_here_replaces_what_is_assumed():
    work = estimator().workload.work("distill")
    measured = [measurement("distill:lightning", work.flops / 2, 50.0), measurement("distill:live", work.flops, 1.0)]
    phase = estimator(measured).estimate("lightning", PHASES).phases[3]
    assert (phase.seconds, phase.basis.split(";")[0]) == (100.0, "measured in 1 earlier run(s) on cpu")
    for useless in (
        measurement("distill:lightning", work.flops, 1.0, device="cuda"),
        measurement("distill:lightning", work.flops * 1000, 1.0),
    ):
        assert "assumed" in estimator([useless]).estimate("lightning", PHASES).phases[3].basis


def test_a_student_that_is_its_own_teacher_draws_and_scores_with_one_start():
    def basis(**changes) -> dict[str, str]:
        costs = estimator(sft__skip=True, rollout__engine="vllm", **changes)
        return {phase.phase: phase.basis for phase in costs.estimate("lightning", PHASES).phases}

    shared, apart = basis(score__engine="vllm"), basis(score__engine="sglang")
    assert "engine's start" in shared["rollout"]
    assert shared["score"].startswith("on vllm")
    assert "start" not in shared["score"]
    assert "engine's start" in apart["score"]


def test_a_report_starts_its_engine_for_each_model_that_it_measures():
    def basis(rows: list[str], **data) -> str:
        recipe = resolve_recipe("demo", {"benchmark.engine": "vllm", "benchmark.references": rows})
        workload = Workload(recipe, SMALL, LARGE, replace(DATA, **data), Room("cpu", CPU.memory))
        phases = CostModel(workload, CPU, ()).estimate("lightning", PHASES).phases
        return next(phase.basis for phase in phases if phase.phase == "benchmark")

    here = {"references": frozenset({"teacher", "base"})}
    assert f"each of its engine's {DATA.models} starts" in basis([])
    assert f"each of its engine's {DATA.models + 2} starts" in basis(["teacher", "base"], **here)
    assert f"each of its engine's {DATA.models} starts" in basis(["teacher"]), "the run has none"


def test_a_second_plan_takes_an_engine_s_speed_and_its_start_from_the_run_before():
    """The start does not grow with the rows."""

    def rollout(count: int, measured=()):
        costs = estimator(measured, rollout__count=count, rollout__engine="vllm", score__engine="vllm")
        phases = {phase.phase: phase for phase in costs.estimate("lightning", PHASES).phases}
        return phases["rollout"], phases["score"]

    first, score = rollout(1000)
    assert "180 s for its engine's start" in first.basis
    cost = StageCost(stage="rollout", seconds=100.0)
    ran = PhaseCost(
        work="rollout@vllm", device="cpu", expected_flops=first.flops, cost=cost, engine_starts=[40.0, 20.0]
    )
    again, other = rollout(1000, [ran])
    assert again.basis.startswith("on vllm, measured in 1 earlier run(s) on cpu, and 30 s for its engine's start")
    assert (first.start_seconds, again.start_seconds) == (180.0, 30.0)
    assert again.seconds == pytest.approx(70.0), "40 s of drawing and a start, one of which was a restart"
    assert rollout(4000, [ran])[0].seconds == pytest.approx(190.0)
    assert other.seconds == pytest.approx(score.seconds - 150.0), "its own speed is not known, the start is"
    elsewhere = ran.model_copy(update={"device": "cuda"})
    assert rollout(1000, [elsewhere])[0].seconds == first.seconds


def test_the_start_of_the_process_is_an_item_of_its_own():
    """Assumed until earlier runs have measured it; it is part of the sum."""
    assumed = estimator().estimate("lightning", PHASES)
    assert (assumed.phases[0].phase, assumed.phases[0].seconds) == (PROCESS_START, ASSUMED_START_SECONDS)
    assert assumed.phases[0].basis.startswith("assumed: 8 s")
    known = [measurement(PROCESS_START, 0.0, seconds) for seconds in (3.0, 90.0, 4.0)]
    measured = estimator(known).estimate("lightning", PHASES)
    assert measured.phases[0].seconds == 4.0
    assert measured.phases[0].basis.startswith("measured in 3 earlier run(s)")
    assert measured.seconds == pytest.approx(assumed.seconds - ASSUMED_START_SECONDS + 4.0)


def test_measurements_come_from_the_artifacts_and_damaged_ones_are_passed_over(tmp_path):
    for name, text in (("a", ArtifactCosts(phases=[measurement("sft", 1.0, 1.0)]).to_json()), ("b", "{")):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / COST_FILE).write_text(text)
    assert [cost.work for cost in measured_costs(tmp_path)] == ["sft"]


def test_satisfied_phases_cost_nothing():
    done = [phase.model_copy(update={"satisfied_by": "x"}) for phase in PHASES]
    estimate = estimator().estimate("lightning", done)
    assert (estimate.seconds, estimate.flops, estimate.disk_bytes, estimate.phases) == (0, 0, 0, [])


def test_findings_compare_with_what_is_free():
    estimate = MethodEstimate(
        method="live",
        flops=1,
        seconds=1,
        peak_memory_bytes=3 << 30,
        disk_bytes=5 << 30,
        memory_basis="",
        disk_basis="",
        phases=[],
    )
    assert resource_findings(estimate, CPU, 6 << 30) == []
    tight = resource_findings(estimate, Target("cpu", "1 CPU thread", 1 << 30), 4 << 30)
    assert [finding.code for finding in tight] == ["not_enough_memory", "not_enough_disk"]
    assert "3 GiB" in tight[0].message


def test_only_distillation_differs_by_method():
    assert (work_name("sft", "live"), work_name("distill", "live")) == ("sft", "distill:live")


# 8-bit moments: 2.03125 bytes a parameter, 8 in the embedding, which is 64,000 of the million parameters here.
@pytest.mark.parametrize(
    ("precision", "saved"),
    [
        ("split_master", 24 + 4),
        ("bf16_stochastic", 18 + 2),
        pytest.param("fp32_master_8bit", 3 * (4 + 0.064 * 8 + 1.90125) + 4, marks=pytest.mark.needs("torchao")),
    ],
)
def test_narrow_weights_need_less_memory_and_less_disk(precision, saved):
    narrow = {"distill__optimizer__precision": precision}
    phases = [phase for phase in PHASES if phase.name == "distill"]
    estimate, wide = estimator(**narrow).estimate("lightning", phases), estimator().estimate("lightning", phases)
    assert estimate.peak_memory_bytes < wide.peak_memory_bytes
    assert estimate.disk_bytes == saved * SMALL.parameters + (16 << 20)


def test_a_device_that_is_too_small_for_all_activations_gets_checkpointing_and_the_plan_says_so():
    recipe = resolve_recipe("demo", {"distill.micro_batch_tokens": 8192})
    phases = [phase for phase in PHASES if phase.name == "distill"]
    roomy = cost_on(recipe, CPU).estimate("lightning", phases)
    assert "activation checkpointing" not in roomy.memory_basis
    target = Target("cpu", "1 CPU thread", roomy.peak_memory_bytes - (1 << 20))
    tight = cost_on(recipe, target).estimate("lightning", phases)
    assert tight.peak_memory_bytes < roomy.peak_memory_bytes
    assert "activation checkpointing" in tight.memory_basis


def test_the_plan_counts_a_training_as_the_engine_does():
    """The example's student: its shape from its files here, from the loaded model there."""
    import torch

    from opd_mcp.engine.models.loading import load_model
    from opd_mcp.engine.runtime import Runtime
    from opd_mcp.engine.training.activations import step_memory

    recipe = resolve_recipe("demo", {})
    shape = model_shape(inspect_model(EXAMPLE / "student"))
    work = Workload(recipe, shape, shape, DATA).work("distill")
    runtime = Runtime(torch.device("cpu"), torch.float32, seed=0)
    model = load_model(EXAMPLE / "student", runtime, for_training=True).model
    section, length = recipe.distill, int(DATA.prompt_tokens) + recipe.rollout.sampling.max_new_tokens
    tokens = micro_tokens(section.micro_batch_tokens, length, section.batch_size * length)
    ours = step_memory(
        model, section.optimizer.precision, section.activation_checkpointing, tokens=tokens, runtime=runtime
    )
    assert (work.memory, work.checkpointing) == (ours.total, ours.policy)


def test_the_plan_counts_a_training_with_an_adapter_as_the_engine_does():
    import torch

    from opd_mcp.engine.models.loading import load_model
    from opd_mcp.engine.runtime import Runtime
    from opd_mcp.engine.training.activations import step_memory

    recipe = resolve_recipe("demo", {"distill.adapter.rank": 8})
    shape = model_shape(inspect_model(EXAMPLE / "student"))
    work = Workload(recipe, shape, shape, DATA, stored_bytes=4).work("distill")
    runtime = Runtime(torch.device("cpu"), torch.float32, seed=0)
    model = load_model(EXAMPLE / "student", runtime, for_training=True, adapter=recipe.distill.adapter).model
    tokens = micro_tokens(recipe.distill.micro_batch_tokens, 74, recipe.distill.batch_size * 74)
    ours = step_memory(model, "fp32_master", "auto", tokens=tokens, runtime=runtime)
    assert (work.memory, work.checkpointing) == (ours.total, ours.policy)
    full = Workload(resolve_recipe("demo", {}), shape, shape, DATA).work("distill")
    assert work.memory < full.memory
    assert 0.6 < work.flops / full.flops < 0.9


EIGHT = ModelShape(8_190_735_360, 36, 4096, query_width=4096, kv_width=1024, intermediate=12288, vocab=151936)


def test_8b_fits_a_card_with_an_adapter_on_a_bf16_base_and_not_whole():
    """16,384 tokens: weights 16.4 GB, adapter with moments 1.4 GB, the rest activations and one tile of logits."""
    small = {"runtime.dtype": "bfloat16", "distill.batch_size": 8, "rollout.sampling.max_new_tokens": 4096}
    roomy = Room("cuda", 72 * 10**9)

    def memory(**changes: object) -> int:
        recipe = resolve_recipe("quick", small | changes)
        return Workload(recipe, EIGHT, EIGHT, DATA, roomy).work("distill").memory

    assert memory() > 131e9
    assert memory(**{"distill.adapter": {}}) < 72e9
    full = {"distill.activation_checkpointing": "full"}
    assert 25e9 < memory(**{"distill.adapter": {}}, **full) < 40e9
    assert EIGHT.adapter_parameters(32) == 36 * 32 * (2 * 8192 + 2 * 5120 + 3 * 16384)
    merged = {"sft.adapter.save": "merged", "distill.adapter": {}} | full
    assert memory(**merged) > 4 * EIGHT.parameters, "a student that was merged in float32 stays so"


ONE_SEVEN = ModelShape(1_720_574_976, 28, 2048, query_width=2048, kv_width=1024, intermediate=6144, vocab=151936)
CARD = Room("cuda", 80 * 10**9 - PROCESS_BYTES)


@pytest.mark.parametrize(("shape", "batch"), [(ONE_SEVEN, 128), (EIGHT, 64)])
def test_rollouts_are_drawn_in_the_largest_batch_that_the_card_holds(shape, batch):
    """The preset's 256 rows of 4096 tokens would need 123 GB of keys and values for 1.7B."""
    workload = Workload(resolve_recipe("paper", {}), shape, EIGHT, DATA, CARD)
    whole = workload.work("rollout")
    tokens = 256 * (4106 + 2 * JOINING_ROOM) + 256 // 8 * 10
    assert (whole.batch, whole.kv_bytes) == (256, 2 * tokens * shape.layers * 1024 * 2)
    chosen = with_fitting_batches(workload, ["rollout"], ())
    assert chosen == workload.recipe.model_copy(
        update={"rollout": workload.recipe.rollout.model_copy(update={"batch_size": batch})}
    ), "and nothing else changes"
    now, twice = (replace(workload, recipe=chosen).work("rollout"), whole)
    assert now.memory <= 0.9 * CARD.memory < twice.memory
    assert now.batch == batch


def test_every_phase_that_generates_gets_its_own_batch():
    workload = Workload(resolve_recipe("paper", {}), ONE_SEVEN, EIGHT, replace(DATA, sft_prompts=10**4), CARD)
    chosen = with_fitting_batches(workload, DRAWN, ())
    assert chosen.responses.batch_size == 16, "16,384 tokens of the teacher"
    assert chosen.rollout.batch_size == 128
    assert chosen.benchmark.batch_size == 8, "32,768 tokens, next to the teacher"
    for phase in DRAWN:
        assert replace(workload, recipe=chosen).work(phase).memory <= 0.9 * CARD.memory


def test_layers_with_a_window_hold_no_more_than_the_window_and_a_segment():
    """Shapes of Gemma 3 1B: of 26 layers 22 see 512 tokens. All layers at full length would halve the batch twice."""
    full = ModelShape(999_885_952, 26, 1152, query_width=1024, kv_width=256, intermediate=6912, vocab=262_144)
    shape = replace(full, window=512, windowed=22)
    changes = {"rollout.sampling.max_new_tokens": 16384, "rollout.batch_size": 1024}
    workload = Workload(resolve_recipe("paper", changes), shape, EIGHT, replace(DATA, prompts=10**4), CARD)
    length = DATA.prompt_tokens + 16384 + 2 * JOINING_ROOM
    work = workload.work("rollout")
    joining = 1024 // 8 * 26 * DATA.prompt_tokens
    assert work.kv_bytes == 2 * (1024 * (4 * length + 22 * (512 + WINDOW_ROOM)) + joining) * 256 * 2
    alone = replace(workload, recipe=resolve_recipe("paper", changes | {"rollout.count": 1024})).work("rollout")
    assert alone.kv_bytes == 2 * 1024 * (4 * (length - 2 * JOINING_ROOM) + 22 * (512 + WINDOW_ROOM)) * 256 * 2
    assert shape.cached_values(20_000, 20_100) == 2 * 256 * (4 * 20_100 + 22 * 20_000), "a prompt is kept whole"
    assert shape.cached_values(10, 50) == full.cached_values(10, 50)
    batches = [
        with_fitting_batches(replace(workload, student=model), ["rollout"], ()).rollout.batch_size
        for model in (full, shape)
    ]
    assert batches == [128, 512]


def test_live_draws_with_the_weights_that_it_trains():
    """Float32 masters have keys and values of float32, whatever the training's products are computed in."""

    def live(precision: str) -> int:
        changes = {"distill.method": "live", "distill.optimizer.precision": precision, "runtime.dtype": "bfloat16"}
        kv = Workload(resolve_recipe("paper", changes), ONE_SEVEN, EIGHT, DATA, CARD).work("distill").kv_bytes
        assert kv is not None
        return kv

    assert live("fp32_master") == 2 * live("split_master")


def test_a_batch_that_was_named_stays_and_so_does_one_that_a_single_row_would_not_make_fit():
    recipe = resolve_recipe("paper", {"rollout.batch_size": 200})
    workload = Workload(recipe, EIGHT, EIGHT, DATA, CARD)
    assert with_fitting_batches(workload, ["rollout"], {"rollout.batch_size": 200}) == recipe
    assert with_fitting_batches(workload, ["rollout"], ()).rollout.batch_size == 50
    assert with_fitting_batches(replace(workload, room=Room("cuda", 10**9)), ["rollout"], ()) == recipe


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:1/v1"])
def test_the_whole_memory_decides_and_a_teacher_on_a_server_takes_none_of_it(url):
    recipe = resolve_recipe("demo", {"rollout.count": 4096})
    student = ModelInput(reference="student", path=str(EXAMPLE / "student"))
    teacher = ModelInput(reference="teacher", path=None if url else str(EXAMPLE / "teacher"), url=url)
    prompts = DataInput(reference="p", path=str(EXAMPLE / "opd.jsonl"), rows=10, mean_prompt_tokens=6.0)
    inputs = RunInputs(student=student, teacher=teacher, prompts=prompts)

    def batch(target: Target, named: tuple[str, ...] = ()) -> int:
        return recipe_for_device(recipe, inputs, target, ["rollout"], named, inspect_model).rollout.batch_size

    small = PROCESS_BYTES + (80 << 20)
    assert batch(Target("cpu", "x", 1 << 20, capacity=small)) == batch(Target("cpu", "x", small)) == 512
    assert batch(Target("cpu", "x", 1 << 20, capacity=1 << 40)) == 1024
    assert batch(Target("cpu", "x", small), ("rollout.batch_size",)) == 1024


def test_the_plan_says_the_batch_and_its_keys_and_values():
    phases = {phase.phase: phase for phase in estimator().estimate("lightning", PHASES).phases}
    assert phases["rollout"].batch_size == 1024
    assert phases["rollout"].kv_cache_bytes == 2 * 1024 * 74 * SMALL.layers * SMALL.kv_width * 4
    assert phases["score"].batch_size is None
    assert phases["score"].memory_bytes < phases["rollout"].memory_bytes


def test_live_counts_the_student_s_weights_once():
    recipe = resolve_recipe("demo", {"distill.method": "live"})
    live = Workload(recipe, LARGE, SMALL, DATA).work("distill")
    apart = Workload(resolve_recipe("demo", {}), LARGE, SMALL, DATA).work("distill")
    teacher = SMALL.parameters * 4
    assert live.batch == recipe.distill.batch_size
    assert live.memory - apart.memory - teacher - live.kv_bytes < LARGE.parameters * 4


def test_a_live_teacher_that_is_the_student_s_base_is_counted_once():
    """Not for another dtype, and not where the SFT before it changes the weights."""

    def live(shared: bool, **changes: object) -> int:
        recipe = resolve_recipe("demo", {"distill.method": "live", "distill.adapter": {}} | changes)
        return Workload(recipe, LARGE, LARGE, DATA, stored_bytes=4, teacher_is_base=shared).work("distill").memory

    assert live(False) - live(True) == 4 * LARGE.parameters
    narrow = {"distill.adapter.base_dtype": "bfloat16"}
    assert live(False, **narrow) == live(True, **narrow)
    full = {"distill.adapter": None}
    assert live(False, **full) == live(True, **full)


def test_whether_the_teacher_is_the_base_follows_from_identities_and_from_the_sft():
    teacher = ModelInput(reference="teacher", path=str(EXAMPLE / "teacher"))
    student = ModelInput(reference="student", path=str(EXAMPLE / "student"))
    prompts = DataInput(reference="p", path=str(EXAMPLE / "opd.jsonl"), rows=10)

    def shared(own: ModelInput = teacher, *, sft: bool = False, **changes: object) -> bool:
        recipe = resolve_recipe("demo", {"distill.method": "live", "distill.adapter": {}} | changes)
        inputs = RunInputs(student=own, teacher=teacher, prompts=prompts, sft_prompts=prompts if sft else None)
        return workload_of(recipe, inputs).teacher_is_base

    assert shared()
    assert not shared(student)
    assert not shared(**{"distill.adapter": None})
    assert not shared(sft=True), "its SFT trains all weights"
    assert not shared(sft=True, **{"sft.adapter": {}}), "merged: other weights than the teacher's"
    assert shared(sft=True, **{"sft.adapter": {"save": "adapter"}})


def test_8b_on_a_base_in_4_bits_needs_a_third_less_and_so_do_its_rollouts():
    """16,384 tokens: 3.9 GB of 4-bit layers, 2.5 GB of embedding and head in bf16, the adapter and activations."""
    small = {"runtime.dtype": "bfloat16", "distill.batch_size": 8, "rollout.sampling.max_new_tokens": 4096}
    roomy = Room("cuda", 72 * 10**9)

    def memory(phase: str, adapter: dict[str, object] | None, **changes: object) -> int:
        full = {"distill.activation_checkpointing": "full", "rollout.batch_size": 8}
        recipe = resolve_recipe("quick", small | full | {"distill.adapter": adapter} | changes)
        return Workload(recipe, EIGHT, EIGHT, DATA, roomy).work(phase).memory

    linear = EIGHT.linear_values()
    assert linear == 36 * 4096 * (2 * (4096 + 1024) + 3 * 12288)
    assert EIGHT.weights(2) == 2 * EIGHT.parameters
    dequantised = 2 * 4096 * 12288 + 12 * (1 << 24)  # one layer in bf16, and a piece of it while it is widened
    assert EIGHT.weights(2, linear) == 2 * (EIGHT.parameters - linear) + linear * 9 // 16 + dequantised
    nf4 = {"quantization": "nf4"}
    saved = 2 * linear - linear * 9 // 16 - dequantised
    assert memory("distill", {}) - memory("distill", nf4) == saved
    assert 18e9 < memory("distill", nf4) < 26e9
    assert memory("rollout", None) - memory("rollout", nf4) == saved
    assert memory("rollout", None, **{"sft.adapter": nf4}) == memory("rollout", nf4), "the SFT's adapter says so"
    assert replace(EIGHT, experts=True).linear_values() == 36 * 4096 * 2 * (4096 + 1024)


def test_the_plan_counts_a_training_on_a_base_in_4_bits_as_the_engine_does():
    """On the CPU the files' weights are there while they are quantised, which may be more than a small step takes."""
    import torch

    from opd_mcp.engine.models.loading import load_model
    from opd_mcp.engine.runtime import Runtime
    from opd_mcp.engine.training.activations import step_memory

    recipe = resolve_recipe("demo", {"distill.adapter": {"rank": 8, "quantization": "nf4"}})
    shape = model_shape(inspect_model(EXAMPLE / "student"))
    work = Workload(recipe, shape, shape, DATA, stored_bytes=4).work("distill")
    runtime = Runtime(torch.device("cpu"), torch.float32, seed=0)
    model = load_model(EXAMPLE / "student", runtime, for_training=True, adapter=recipe.distill.adapter).model
    tokens = micro_tokens(recipe.distill.micro_batch_tokens, 74, recipe.distill.batch_size * 74)
    ours = step_memory(model, "fp32_master", "auto", tokens=tokens, runtime=runtime)
    assert (work.memory, work.checkpointing) == (ours.total, ours.policy)


def test_scoring_holds_the_teacher_alone():
    recipe = resolve_recipe("demo", {})
    one, other = (Workload(recipe, student, LARGE, DATA).work("score").memory for student in (SMALL, LARGE))
    assert one == other


def test_an_adapter_is_small_on_the_disk_as_are_its_checkpoints():
    shape = ModelShape(10**8, layers=4, hidden=512, query_width=512, kv_width=512, intermediate=2048, vocab=1000)

    def sizes(**changes: object) -> tuple[int, int]:
        workload = Workload(resolve_recipe("demo", changes), shape, shape, DATA)
        return workload.disk("distill"), workload.checkpoint_disk("distill")

    full, alone = sizes(), sizes(**{"distill.adapter.save": "adapter"})
    merged, both = (sizes(**{"distill.adapter.save": ways}) for ways in ("merged", "both"))
    trained = shape.adapter_parameters(32)
    assert alone[1] == merged[1] == 3 * 12 * trained < full[1]
    assert alone[0] < full[0] == merged[0] < both[0] == merged[0] + 4 * trained


def test_the_largest_checkpoints_are_part_of_the_disk_and_are_named():
    estimate = estimator().estimate("lightning", PHASES)
    without = estimator().estimate("lightning", [phase for phase in PHASES if phase.name != "distill"])
    assert estimate.disk_bytes - without.disk_bytes == (36 + 4) * SMALL.parameters + (16 << 20)
    assert "34.3 MiB for a training phase's checkpoints" in estimate.disk_basis
