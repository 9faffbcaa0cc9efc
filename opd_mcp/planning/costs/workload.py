"""How much work a phase is: floating-point operations, forward passes in sequence, memory and disk.

Lengths are upper bounds (every response uses all its new tokens), so the same settings give the same numbers in every
run and measured throughput carries over from one run to the next.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.schemas.memory import (
    NF4_BYTES,
    PREFILL_TOKENS,
    TILE_BYTES,
    USABLE_SHARE,
    AdapterSize,
    CheckpointingPolicy,
    ModelShape,
    StepSize,
    micro_tokens,
    optimizer_bytes,
    saved_bytes,
    training_memory,
    weight_bytes,
)
from opd_mcp.schemas.recipes import DistillRecipe, ExportFormat, Recipe, Sampling, SftRecipe
from opd_mcp.schemas.resolve import changed_recipe
from opd_mcp.schemas.runs import ModelInput, PhaseName, RunInputs

PROCESS_BYTES = 700 << 20
# Generation keeps a step's logits, their softmax and what sampling sorts.
LOGIT_COPIES = 4
ACTIVATIONS_PER_WIDTH = 34


def model_shape(facts: ModelFacts) -> ModelShape:
    """The shape of an inspected model."""
    return ModelShape.of(facts.parameters, facts.vocab_size, facts.setting)


@dataclass(frozen=True)
class KnownModel:
    """What estimates need of a model: its shape and its bytes, and the facts of its files where it is here."""

    shape: ModelShape
    weight_bytes: int
    facts: ModelFacts | None = None
    download_bytes: int = 0


def known_model(model: ModelInput, inspect: Callable[[Path], ModelFacts] = inspect_model) -> KnownModel | None:
    """A model by its files, or by what the Hub says of it; None where neither is known."""
    if model.path is not None:
        facts = inspect(Path(model.path))
        return KnownModel(model_shape(facts), facts.weight_bytes, facts)
    sizes = model.hub_sizes
    if sizes is None:
        return None
    shape = ModelShape.of(sizes.parameters, sizes.settings.get("vocab_size", 1), sizes.settings.get)
    return KnownModel(shape, sizes.weight_bytes, download_bytes=sizes.download_bytes)


@dataclass(frozen=True)
class Room:
    """The device that a plan is made for: its kind, and the bytes that are free on it before a process starts.

    Of the `devices` of a training these are the bytes of each GPU, or those of the CPU that all share.
    """

    device: str = "cpu"
    memory: int = 1 << 62
    devices: int = 1


@dataclass(frozen=True)
class DataSize:
    """Rows and mean tokens of the prompts that the phases read."""

    prompts: int
    prompt_tokens: float
    sft_prompts: int = 0
    eval_prompts: int = 0
    models: int = 2
    references: frozenset[str] = frozenset()
    """The rows of a report that the run has the models for, besides `models`."""


@dataclass(frozen=True)
class Work:
    """One phase: operations, forward passes in sequence, peak memory in bytes, and training's checkpointing.

    Of a phase that generates, `batch` is the number of rows drawn at a time, and `kv_bytes` are their keys and values.
    """

    flops: float
    passes: float
    memory: int
    checkpointing: CheckpointingPolicy | None = None
    batch: int | None = None
    kv_bytes: int | None = None


@dataclass(frozen=True)
class Workload:
    """The work of a run's phases: its recipe, its two models, its data, and the device they meet."""

    recipe: Recipe
    student: ModelShape
    teacher: ModelShape
    data: DataSize
    room: Room = Room()
    stored_bytes: float = 2.0
    """Bytes per weight of the student's files."""
    converted_bytes: int = 0
    """Bytes that an export holds in memory while it converts or merges; 0 where it copies files."""
    teacher_is_base: bool = False
    """Whether a distillation's adapter is trained on the teacher's own weights."""
    quantized: bool = False
    """Whether the student, as it was given, is an adapter on a base in 4 bits."""
    download_bytes: int = 0
    """Bytes of the Hub models that are still to be fetched."""

    def work(self, name: PhaseName) -> Work:
        """The work of one phase; a fetch counts as none."""
        works = {
            "generate_responses": self._responses,
            "sft": self._sft,
            "rollout": self._rollout,
            "score": self._scoring,
            "distill": self._distillation,
            "benchmark": self._benchmark,
            "sample": self._sample,
            "export": self._export,
            "assess": self._assess,
        }
        return works[name]() if name in works else Work(0.0, 0.0, 0)

    def disk(self, name: PhaseName) -> int:
        """Bytes that the phase's artifact takes, before compression."""
        recipe, data = self.recipe, self.data
        match name:
            case "fetch":
                return self.download_bytes
            case "generate_responses":
                return int(self._answers * (data.prompt_tokens + recipe.responses.sampling.max_new_tokens) * 8)
            case "sft" | "distill":
                between = (recipe.distill.rounds - 1) * self._left_between() if name == "distill" else 0
                return self._saved(recipe.sft if name == "sft" else recipe.distill) + (16 << 20) + between
            case "rollout" | "score":
                # Ids and the student's log-probs; then the teacher's, with its top k.
                token = 8 if name == "rollout" else 12 + 8 * recipe.score.topk
                new_tokens = recipe.rollout.sampling.max_new_tokens
                return int(self._rollouts * (4 * data.prompt_tokens + token * new_tokens))
            case _:
                return 1 << 20

    def checkpoint_disk(self, name: PhaseName) -> int:
        """Bytes of a training phase's checkpoints, weights and optimizer state: two that are kept, one being written.

        They are removed when the phase has ended.
        """
        if name not in ("sft", "distill"):
            return 0
        section = self.recipe.sft if name == "sft" else self.recipe.distill
        precision, adapter = section.optimizer.precision, self.adapter(section)
        if adapter is not None:
            return 3 * (4 + 8) * adapter.trained
        return 3 * (weight_bytes(precision) * self.student.parameters + optimizer_bytes(precision, self.student))

    def adapter(self, section: SftRecipe | DistillRecipe) -> AdapterSize | None:
        """The adapter that a training phase makes; None where it trains all weights."""
        recipe = section.adapter
        if recipe is None:
            return None
        narrow = recipe.base_dtype == "bfloat16" or (
            recipe.base_dtype == "auto" and self._value_bytes == 2 and not self._is_float32(section)
        )
        trained = self.student.adapter_parameters(recipe.rank, recipe.targets)
        before = self.recipe.sft.adapter if section is self.recipe.distill and not recipe.continue_adapter else None
        earlier = self.student.adapter_parameters(before.rank, before.targets) if before else 0
        ranks = recipe.rank * (len(recipe.targets) if recipe.targets else 7)
        return AdapterSize(trained, ranks, 2 if narrow else 4, earlier, self._packed(section))

    def _packed(self, section: SftRecipe | DistillRecipe) -> int:
        """Values of the student that are held in 4 bits while this section trains it."""
        before = self.recipe.sft.adapter if section is self.recipe.distill else None
        kept = before is not None and before.saved_as(self.recipe.runtime.dtype) == "adapter"
        packed = self.quantized or (kept and before is not None and before.quantization is not None)
        if section.adapter is not None and section.adapter.quantization is not None:
            packed = True
        return self.student.linear_values() if packed else 0

    def _shares_base(self, section: DistillRecipe) -> bool:
        """Whether a live teacher is the student's own base with the adapters off, in the same dtype."""
        adapter = self.adapter(section)
        if adapter is None or adapter.packed:
            return False
        return self.teacher_is_base and adapter.base_bytes == self._value_bytes

    def _is_float32(self, section: SftRecipe | DistillRecipe) -> bool:
        """Whether a training begins with a student that is stored in float32: as it was given, or merged by the SFT."""
        before = self.recipe.sft.adapter if section is self.recipe.distill else None
        merged = before is not None and before.saved_as(self.recipe.runtime.dtype) != "adapter"
        return merged or self.stored_bytes >= 4

    def _loading(self, packed: int) -> int:
        """Bytes while a model is quantised: on the CPU its files' weights are there next to the 4-bit ones."""
        if not packed or self.room.device != "cpu":
            return 0
        return int(self.stored_bytes * self.student.parameters + NF4_BYTES * packed)

    def _saved(self, section: SftRecipe | DistillRecipe) -> int:
        """Bytes of a trained student."""
        adapter = self.adapter(section)
        if adapter is None or section.adapter is None:
            return saved_bytes(section.optimizer.precision) * self.student.parameters
        ways = section.adapter.saved_as(self.recipe.runtime.dtype)
        alone = 4 * (adapter.trained + adapter.earlier) if ways != "merged" else 0
        return alone + (4 * self.student.parameters if ways != "adapter" else 0)

    def _left_between(self) -> int:
        """Bytes that a round leaves to the next: its student in float32, or its adapter, and the optimizer's state."""
        section, adapter = self.recipe.distill, self.adapter(self.recipe.distill)
        if adapter is not None:
            return 12 * adapter.trained
        return 4 * self.student.parameters + optimizer_bytes(section.optimizer.precision, self.student)

    @property
    def _rollouts(self) -> int:
        """Of all rounds together; those of a round that ends once they are stale are all that a round may draw."""
        each, distill = self.recipe.rollout.count or self.data.prompts, self.recipe.distill
        return sum(min(each, distill.rows_of_round(number) or each) for number in range(1, distill.rounds + 1))

    @property
    def _value_bytes(self) -> int:
        return 2 if self.recipe.runtime.dtype == "bfloat16" else 4

    def _generation(self, model: ModelShape, rows: int, batch: int, sampling: Sampling, packed: int = 0) -> Work:
        batch, new_tokens = min(batch, max(rows, 1)), sampling.max_new_tokens
        length = self.data.prompt_tokens + new_tokens
        kv = int(2 * batch * length * model.layers * model.kv_width * self._value_bytes)
        together = min(batch * self.data.prompt_tokens, PREFILL_TOKENS)
        passing = int(together * ACTIVATIONS_PER_WIDTH * model.hidden * self._value_bytes)
        stepping = LOGIT_COPIES * 4 * batch * model.vocab  # once the prompts are through
        memory = model.weights(self._value_bytes, packed) + kv + max(passing, stepping)
        flops, passes = 2.0 * model.parameters * rows * length, ceil(rows / batch) * new_tokens
        return Work(flops, passes, memory, batch=batch, kv_bytes=kv)

    def _forward_memory(self, model: ModelShape, tokens: float) -> int:
        activations = ACTIVATIONS_PER_WIDTH * model.hidden * self._value_bytes
        logits = min(tokens * 4 * model.vocab, TILE_BYTES[self.room.device])
        return int(tokens * activations + 2 * logits)

    def _training(self, section: SftRecipe | DistillRecipe, length: float, room: Room) -> Work:
        tokens = section.batch_size * length
        micro = micro_tokens(section.micro_batch_tokens, ceil(length), ceil(tokens))
        adapter = self.adapter(section)
        step = StepSize(
            section.optimizer.precision,
            micro,
            self.recipe.runtime.dtype,
            room.device,
            adapter=adapter,
            ranks=room.devices,
            vocabulary=self.recipe.runtime.vocabulary,
        )
        sharing = room.devices if room.device == "cpu" else 1
        memory = training_memory(self.student, step, section.activation_checkpointing, room.memory // sharing)
        total = max(sharing * memory.total, self._loading(self._packed(section)))
        passes = 3 * section.steps * ceil(tokens / section.micro_batch_tokens)
        # a frozen weight forms no gradient of its own
        each = (
            6.0 * self.student.parameters if adapter is None else 4.0 * self.student.parameters + 6.0 * adapter.trained
        )
        flops = each * section.steps * tokens
        return Work(flops, passes, total, memory.policy)

    @property
    def _answers(self) -> int:
        """Responses that the teacher draws."""
        section = self.recipe.responses
        return min(section.limit or self.data.sft_prompts, self.data.sft_prompts) * section.samples

    def _responses(self) -> Work:
        section = self.recipe.responses
        return self._generation(self.teacher, self._answers, section.batch_size, section.sampling)

    def _sft(self) -> Work:
        new_tokens = self.recipe.responses.sampling.max_new_tokens
        length = min(self.data.prompt_tokens + new_tokens, self.recipe.sft.max_length)
        return self._training(self.recipe.sft, length, self.room)

    def _rollout(self) -> Work:
        section = self.recipe.rollout
        packed = self._packed(self.recipe.distill)
        work = self._generation(self.student, self._rollouts, section.batch_size, section.sampling, packed)
        return replace(work, memory=max(work.memory, self._loading(packed)))

    def _sample(self) -> Work:
        return self._generation(self.student, self.data.prompts, 8, self.recipe.sample.sampling)

    def of_assessment(self, rows: int | None = None) -> "Workload":
        """The work that an assessment measures: few rows and steps of this one's recipe."""
        recipe = self.recipe
        rows = rows or recipe.assess.rows or (32 if self.room.device == "cpu" else recipe.rollout.batch_size)
        rows = min(rows, max(self.data.prompts, 1))
        sft = {"steps": recipe.assess.sft_steps, "batch_size": min(rows, recipe.sft.batch_size)}
        distill = {"steps": recipe.assess.steps, "batch_size": min(rows, recipe.distill.batch_size), "rounds": 1}
        small = recipe.model_copy(
            update={
                "responses": recipe.responses.model_copy(update={"limit": None}),
                "rollout": recipe.rollout.model_copy(update={"count": None}),
                "sft": recipe.sft.model_copy(update=sft),
                "distill": recipe.distill.model_copy(update={**distill, "method": "lightning"}),
            }
        )
        return replace(self, recipe=small, data=replace(self.data, prompts=rows, sft_prompts=rows))

    def live(self) -> "Workload":
        """The same, distilled live."""
        distill = self.recipe.distill.model_copy(update={"method": "live", "rounds": 1})
        return replace(self, recipe=self.recipe.model_copy(update={"distill": distill}))

    def _assess(self) -> Work:
        small = self.of_assessment()
        times: dict[PhaseName, int] = {"generate_responses": 1, "rollout": 2, "score": 2, "sft": 1, "distill": 1}
        works = [(small.work(name), count) for name, count in times.items()]
        return Work(
            sum(work.flops * count for work, count in works),
            sum(work.passes * count for work, count in works),
            small.live().work("distill").memory,
        )

    def _export(self) -> Work:
        return Work(0.0, 1.0, self.converted_bytes)

    def _scoring(self) -> Work:
        budget, parameters = self.recipe.score.micro_batch_tokens, self.student.parameters + self.teacher.parameters
        tokens = self._rollouts * (self.data.prompt_tokens + self.recipe.rollout.sampling.max_new_tokens)
        # the student's log-probs were kept when it drew the rollouts: only the teacher is loaded
        memory = self.teacher.parameters * self._value_bytes + self._forward_memory(self.teacher, min(budget, tokens))
        return Work(2.0 * parameters * tokens, 2 * ceil(tokens / budget), memory)

    def _distillation(self) -> Work:
        section, teacher = self.recipe.distill, self.teacher
        drawn = self.recipe.rollout.sampling.max_new_tokens
        if section.horizon is not None and section.horizon_growth_steps is None:
            drawn = ceil(section.horizon * drawn) if section.horizon < 1 else min(drawn, int(section.horizon))
        length = self.data.prompt_tokens + drawn
        if section.method == "lightning":
            return self._training(section, length, self.room)
        rows, room = section.batch_size, self.room
        rollout, packed = self.recipe.rollout, self._packed(section)
        rollouts = self._generation(self.student, rows, rollout.batch_size, rollout.sampling, packed)
        micro = min(section.micro_batch_tokens, rows * length)
        # The student trains next to the resident teacher and its own generation cache; its weights draw the rollouts.
        cached = rollouts.memory - self.student.weights(self._value_bytes, packed)
        second = 0 if self._shares_base(section) else teacher.parameters * self._value_bytes
        resident = second + self._forward_memory(teacher, micro) + cached
        training = self._training(section, length, Room(room.device, max(room.memory - resident, 0)))
        scoring_passes = ceil(rows * length / section.micro_batch_tokens)
        return Work(
            training.flops + section.steps * (rollouts.flops + 2.0 * teacher.parameters * rows * length),
            training.passes + section.steps * (rollouts.passes + scoring_passes),
            training.memory + resident,
            training.checkpointing,
            rollouts.batch,
            rollouts.kv_bytes,
        )

    def _benchmark(self) -> Work:
        section, data, student = self.recipe.benchmark, self.data, self.student
        available = data.eval_prompts or min(section.kl_prompts, data.prompts)
        prompts = min(section.limit or available, available)
        rows = prompts * (1 + section.samples_per_prompt)
        answers = self._generation(student, rows, section.batch_size, section.sampling)
        kl = self._generation(student, min(section.kl_prompts, prompts), section.batch_size, section.sampling)
        scored = 1 + (self.teacher.parameters + student.parameters) / student.parameters
        rows_besides = data.references & set(section.references) if data.eval_prompts else set()
        models, flops, passes, memory = data.models + ("base" in rows_besides), 0.0, 0.0, 0
        if "teacher" in rows_besides:
            own = self._generation(self.teacher, rows, section.batch_size, section.sampling)
            flops, passes, memory = own.flops, own.passes, own.memory
        return Work(
            models * (answers.flops + kl.flops * scored) + flops,
            models * (answers.passes + kl.passes) + passes,
            max(answers.memory + self.teacher.parameters * self._value_bytes, memory),
            batch=answers.batch,
            kv_bytes=answers.kv_bytes,
        )


DRAWN: dict[PhaseName, str] = {"generate_responses": "responses", "rollout": "rollout", "benchmark": "benchmark"}
"""The phases whose batch is chosen from memory, with their sections."""


def with_fitting_batches(workload: Workload, phases: Iterable[PhaseName], named: Collection[str]) -> Recipe:
    """The workload's recipe, each of these phases drawing the largest batch that its room holds.

    That is the recipe's batch, halved as often as needed; one whose key was `named` stays, as does one that would not
    fit with a single row. The choice follows from the room alone, so the same device gives the same keys.
    """
    for phase in phases:
        key = f"{DRAWN[phase]}.batch_size"
        batch = getattr(workload.recipe, DRAWN[phase]).batch_size
        halved = (changed_recipe(workload.recipe, {key: batch >> times}) for times in range(batch.bit_length()))
        fitting = (recipe for recipe in halved if _fits(replace(workload, recipe=recipe), phase))
        if key not in named and (recipe := next(fitting, None)) is not None:
            workload = replace(workload, recipe=recipe)
    return workload.recipe


def _fits(workload: Workload, phase: PhaseName) -> bool:
    return workload.work(phase).memory <= USABLE_SHARE * workload.room.memory


def workload_of(
    recipe: Recipe,
    inputs: RunInputs,
    room: Room | None = None,
    inspect: Callable[[Path], ModelFacts] = inspect_model,
) -> Workload | None:
    """The workload of a run; None while its data are still to be fetched, or a model of which the Hub told no sizes.

    A run with one model counts it as both. `inspect` may be a cache's; without `room`, memory is no limit.
    """
    first, second = inputs.student or inputs.model, inputs.teacher
    student, teacher = first or second, second or first
    if student is None or teacher is None:
        return None
    if any(data is not None and data.path is None for data in (inputs.prompts, inputs.sft_prompts, inputs.responses)):
        return None
    mine, scorer = known_model(student, inspect), known_model(teacher, inspect)
    if mine is None or scorer is None:
        return None
    facts, same = mine.facts, student.hub_id is not None and student.hub_id == teacher.hub_id
    if facts is not None and scorer.facts is not None and trains_on_given_base(recipe, inputs):
        same = inspect(facts.weights_path).identity.same_model(scorer.facts.identity)
    fetched = {student.reference: mine, teacher.reference: scorer}
    fetched |= {model.reference: known for model in inputs.baselines if (known := known_model(model, inspect))}
    return Workload(
        recipe,
        mine.shape,
        scorer.shape,
        data_size(inputs),
        room or Room(),
        mine.weight_bytes / max(mine.shape.parameters, 1),
        converted_bytes(facts, inputs.export.format) if inputs.export and facts else 0,
        quantized=facts is not None and facts.identity.quantization is not None,
        teacher_is_base=same and trains_on_given_base(recipe, inputs),
        download_bytes=sum(known.download_bytes for known in fetched.values()),
    )


def trains_on_given_base(recipe: Recipe, inputs: RunInputs) -> bool:
    """Whether a distillation's adapter is trained on weights that were given, not on those that an SFT has changed."""
    before = recipe.sft.adapter if inputs.sft_prompts is not None else None
    kept = before is not None and before.saved_as(recipe.runtime.dtype) == "adapter"
    return recipe.distill.adapter is not None and (inputs.sft_prompts is None or kept)


def data_size(inputs: RunInputs) -> DataSize:
    """Rows and lengths of a run's inputs; an unmeasured length counts as one token."""
    prompts, sft_prompts = inputs.prompts, inputs.sft_prompts or inputs.prompts
    evaluation = inputs.eval_prompts or (prompts if inputs.model else None)
    had = {"teacher": inputs.teacher is not None, "base": inputs.sft_prompts is not None}
    return DataSize(
        prompts=(prompts.rows if prompts else None) or 0,
        prompt_tokens=(prompts.mean_prompt_tokens if prompts else None) or 1.0,
        sft_prompts=(sft_prompts.rows if sft_prompts else None) or 0,
        eval_prompts=(evaluation.rows if evaluation else None) or 0,
        models=1 + len(inputs.baselines) if inputs.model else 2,
        references=frozenset(name for name, here in had.items() if here),
    )


def converted_bytes(facts: ModelFacts, form: ExportFormat) -> int:
    """What an export in this form holds of a model: merging is done in float32, with the result next to it."""
    if form == "adapter" or (form in ("input", "gguf") and facts.adapter is None):
        return 0
    return facts.parameters * (8 if facts.adapter is not None or form == "float32" else 4)


def exported_bytes(inputs: RunInputs) -> int:
    """The bytes of an export at its destination, at most; 0 while its model is not here."""
    model, target = inputs.model, inputs.export
    if model is None or model.path is None or target is None:
        return 0
    facts = inspect_model(Path(model.path))
    merged = facts.adapter is not None and target.format in ("input", "gguf")
    own = 4 * facts.parameters if merged else facts.weight_bytes
    widths = {"float32": 4 * facts.parameters, "bfloat16": 2 * facts.parameters, "gguf": 2 * own}
    return widths.get(target.format, own) + (16 << 20)


def expected_disk(name: PhaseName, recipe: Recipe, inputs: RunInputs) -> int:
    """The bytes that a phase of a run writes; 0 for a run with a model of which nothing is known yet."""
    model = inputs.student or inputs.model or inputs.teacher
    known = known_model(model) if model else None
    if known is None:
        return 0
    workload = Workload(recipe, known.shape, known.shape, data_size(inputs), download_bytes=known.download_bytes)
    return workload.disk(name) + workload.checkpoint_disk(name)
