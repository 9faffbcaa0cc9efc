"""How much work a phase is: floating-point operations, forward passes in sequence, memory and disk.

Lengths are upper bounds (every response uses all its new tokens), so the same settings give the same numbers in every
run and measured throughput carries over from one run to the next.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.schemas.memory import (
    TILE_BYTES,
    CheckpointingPolicy,
    ModelShape,
    micro_tokens,
    optimizer_bytes,
    saved_bytes,
    training_memory,
    weight_bytes,
)
from opd_mcp.schemas.recipes import DistillRecipe, Recipe, SftRecipe
from opd_mcp.schemas.runs import PhaseName, RunInputs

PROCESS_BYTES = 700 << 20
# Generation keeps a step's logits, their softmax and what sampling sorts.
LOGIT_COPIES = 4
ACTIVATIONS_PER_WIDTH = 34


def model_shape(facts: ModelFacts) -> ModelShape:
    """The shape of an inspected model."""
    return ModelShape.of(facts.parameters, facts.vocab_size, facts.setting)


@dataclass(frozen=True)
class Room:
    """The device that a plan is made for: its kind, and the bytes that are free on it before a process starts."""

    device: str = "cpu"
    memory: int = 1 << 62


@dataclass(frozen=True)
class DataSize:
    """Rows and mean tokens of the prompts that the phases read."""

    prompts: int
    prompt_tokens: float
    sft_prompts: int = 0
    eval_prompts: int = 0
    models: int = 2


@dataclass(frozen=True)
class Work:
    """One phase: operations, forward passes one after the other, peak memory in bytes, and training's checkpointing."""

    flops: float
    passes: float
    memory: int
    checkpointing: CheckpointingPolicy | None = None


def phase_work(
    name: PhaseName,
    recipe: Recipe,
    student: ModelShape,
    teacher: ModelShape,
    data: DataSize,
    method: str,
    room: Room | None = None,
) -> Work:
    """The work of one phase, on a device with `room` (a CPU with memory enough by default); a fetch counts as none."""
    room = room or Room()
    works = {
        "generate_responses": lambda: _answering(recipe, teacher, data),
        "sft": lambda: _tuning(recipe, student, data, room),
        "rollout": lambda: _rolling_out(recipe, student, data),
        "score": lambda: _scoring(recipe, student, teacher, data, room),
        "distill": lambda: _distilling(recipe, student, teacher, data, method, room),
        "benchmark": lambda: _benchmarking(recipe, student, teacher, data),
        "sample": lambda: _generation(recipe, student, data.prompts, 8, data, recipe.sample.sampling.max_new_tokens),
    }
    return works[name]() if name in works else Work(0.0, 0.0, 0)


def data_size(inputs: RunInputs) -> DataSize:
    """Rows and lengths of a run's inputs; a length that nobody measured counts as one token."""
    prompts, sft_prompts, evaluation = inputs.prompts, inputs.sft_prompts or inputs.prompts, inputs.eval_prompts
    return DataSize(
        prompts=(prompts.rows if prompts else None) or 0,
        prompt_tokens=(prompts.mean_prompt_tokens if prompts else None) or 1.0,
        sft_prompts=(sft_prompts.rows if sft_prompts else None) or 0,
        eval_prompts=(evaluation.rows if evaluation else None) or 0,
        models=1 + len(inputs.baselines) if inputs.model else 2,
    )


def expected_flops(name: PhaseName, recipe: Recipe, inputs: RunInputs) -> float:
    """The operations of a phase of a run whose models are here; 0.0 for a run without models."""
    from_path = [inputs.student or inputs.model or inputs.teacher, inputs.teacher or inputs.student or inputs.model]
    student, teacher = (inspect_model(Path(model.path)) if model and model.path else None for model in from_path)
    if student is None or teacher is None:
        return 0.0
    sizes = model_shape(student), model_shape(teacher)
    return phase_work(name, recipe, *sizes, data_size(inputs), recipe.distill.method).flops


def phase_disk(name: PhaseName, recipe: Recipe, student: ModelShape, data: DataSize) -> int:
    """Bytes that the phase's artifact takes, before compression."""
    match name:
        case "generate_responses":
            rows = min(recipe.responses.limit or data.sft_prompts, data.sft_prompts)
            return int(rows * (data.prompt_tokens + recipe.responses.sampling.max_new_tokens) * 8)
        case "sft" | "distill":
            section = recipe.sft if name == "sft" else recipe.distill
            return saved_bytes(section.optimizer.precision) * student.parameters + (16 << 20)
        case "rollout" | "score":
            rows = recipe.rollout.count or data.prompts
            # Ids and the student's log-probs; then the teacher's, with its top k.
            token = 8 if name == "rollout" else 12 + 8 * recipe.score.topk
            return int(rows * (4 * data.prompt_tokens + token * recipe.rollout.sampling.max_new_tokens))
        case _:
            return 1 << 20


def expected_disk(name: PhaseName, recipe: Recipe, inputs: RunInputs) -> int:
    """The bytes that a phase of a run whose models are here writes; 0 for a run without models."""
    known = inputs.student or inputs.model or inputs.teacher
    if known is None or known.path is None:
        return 0
    student = model_shape(inspect_model(Path(known.path)))
    return phase_disk(name, recipe, student, data_size(inputs)) + checkpoint_disk(name, recipe, student)


def checkpoint_disk(name: PhaseName, recipe: Recipe, student: ModelShape) -> int:
    """Bytes that a training phase's checkpoints take while it runs: the two that are kept, and the one being written.

    Weights and optimizer state. They are removed when the phase has ended.
    """
    if name not in ("sft", "distill"):
        return 0
    precision = (recipe.sft if name == "sft" else recipe.distill).optimizer.precision
    return 3 * (weight_bytes(precision) * student.parameters + optimizer_bytes(precision, student))


def _answering(recipe: Recipe, teacher: ModelShape, data: DataSize) -> Work:
    rows = min(recipe.responses.limit or data.sft_prompts, data.sft_prompts)
    new_tokens = recipe.responses.sampling.max_new_tokens
    return _generation(recipe, teacher, rows, recipe.responses.batch_size, data, new_tokens)


def _tuning(recipe: Recipe, student: ModelShape, data: DataSize, room: Room) -> Work:
    length = min(data.prompt_tokens + recipe.responses.sampling.max_new_tokens, recipe.sft.max_length)
    return _training(recipe, student, recipe.sft, length, room)


def _rolling_out(recipe: Recipe, student: ModelShape, data: DataSize) -> Work:
    rows, new_tokens = recipe.rollout.count or data.prompts, recipe.rollout.sampling.max_new_tokens
    return _generation(recipe, student, rows, recipe.rollout.batch_size, data, new_tokens)


def _generation(recipe: Recipe, model: ModelShape, rows: int, batch: int, data: DataSize, new_tokens: int) -> Work:
    batch = min(batch, max(rows, 1))
    length = data.prompt_tokens + new_tokens
    values = _value_bytes(recipe)
    keys_and_values = 2 * batch * length * model.layers * model.kv_width * values
    memory = model.parameters * values + keys_and_values + LOGIT_COPIES * 4 * batch * model.vocab
    return Work(2.0 * model.parameters * rows * length, ceil(rows / batch) * new_tokens, int(memory))


def _forward_memory(recipe: Recipe, model: ModelShape, tokens: float, room: Room) -> int:
    activations = ACTIVATIONS_PER_WIDTH * model.hidden * _value_bytes(recipe)
    logits = min(tokens * 4 * model.vocab, TILE_BYTES[room.device])
    return int(tokens * activations + 2 * logits)


def _training(recipe: Recipe, model: ModelShape, section: SftRecipe | DistillRecipe, length: float, room: Room) -> Work:
    tokens = section.batch_size * length
    memory = training_memory(
        model,
        precision=section.optimizer.precision,
        checkpointing=section.activation_checkpointing,
        tokens=micro_tokens(section.micro_batch_tokens, ceil(length), ceil(tokens)),
        dtype=recipe.runtime.dtype,
        device=room.device,
        room=room.memory,
    )
    passes = 3 * section.steps * ceil(tokens / section.micro_batch_tokens)
    return Work(6.0 * model.parameters * section.steps * tokens, passes, memory.total, memory.policy)


def _scoring(recipe: Recipe, student: ModelShape, teacher: ModelShape, data: DataSize, room: Room) -> Work:
    rows = recipe.rollout.count or data.prompts
    tokens = rows * (data.prompt_tokens + recipe.rollout.sampling.max_new_tokens)
    micro = min(recipe.score.micro_batch_tokens, tokens)
    models = (student.parameters + teacher.parameters) * _value_bytes(recipe)
    memory = models + _forward_memory(recipe, teacher, micro, room)
    passes = 2 * ceil(tokens / recipe.score.micro_batch_tokens)
    return Work(2.0 * (teacher.parameters + student.parameters) * tokens, passes, memory)


def _distilling(
    recipe: Recipe, student: ModelShape, teacher: ModelShape, data: DataSize, method: str, room: Room
) -> Work:
    section = recipe.distill
    length = data.prompt_tokens + recipe.rollout.sampling.max_new_tokens
    if method == "lightning":
        return _training(recipe, student, section, length, room)
    rows = section.batch_size
    rollouts = _generation(recipe, student, rows, rows, data, recipe.rollout.sampling.max_new_tokens)
    micro = min(section.micro_batch_tokens, rows * length)
    teacher_memory = teacher.parameters * _value_bytes(recipe) + _forward_memory(recipe, teacher, micro, room)
    beside = teacher_memory + rollouts.memory
    training = _training(recipe, student, section, length, Room(room.device, max(room.memory - beside, 0)))
    scoring_passes = ceil(rows * length / section.micro_batch_tokens)
    return Work(
        training.flops + section.steps * (rollouts.flops + 2.0 * teacher.parameters * rows * length),
        training.passes + section.steps * (rollouts.passes + scoring_passes),
        # The student trains beside the resident teacher and its own generation cache.
        training.memory + beside,
        training.checkpointing,
    )


def _benchmarking(recipe: Recipe, student: ModelShape, teacher: ModelShape, data: DataSize) -> Work:
    section = recipe.benchmark
    available = data.eval_prompts or min(section.kl_prompts, data.prompts)
    prompts = min(section.limit or available, available)
    new_tokens = section.sampling.max_new_tokens
    answers = _generation(
        recipe, student, prompts * (1 + section.samples_per_prompt), section.batch_size, data, new_tokens
    )
    kl = _generation(recipe, student, min(section.kl_prompts, prompts), section.batch_size, data, new_tokens)
    scored = 1 + (teacher.parameters + student.parameters) / student.parameters
    return Work(
        data.models * (answers.flops + kl.flops * scored),
        data.models * (answers.passes + kl.passes),
        answers.memory + teacher.parameters * _value_bytes(recipe),
    )


def _value_bytes(recipe: Recipe) -> int:
    return 2 if recipe.runtime.dtype == "bfloat16" else 4
