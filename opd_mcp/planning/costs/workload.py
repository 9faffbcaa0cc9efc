"""How much work a phase is: floating-point operations, forward passes in sequence, memory and disk.

Lengths are upper bounds (every response uses all its new tokens), so the same settings give the same numbers in every
run and measured throughput carries over from one run to the next.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import ceil

from opd_mcp.schemas.memory import (
    JOINING_ROOM,
    JOINING_SHARE,
    NF4_BYTES,
    PREFILL_TOKENS,
    TILE_BYTES,
    USABLE_SHARE,
    AdapterSize,
    CheckpointingPolicy,
    Division,
    ModelShape,
    StepSize,
    micro_tokens,
    optimizer_bytes,
    saved_bytes,
    training_memory,
    weight_bytes,
)
from opd_mcp.schemas.recipes import DistillRecipe, Recipe, Sampling, SftRecipe
from opd_mcp.schemas.resolve import changed_recipe
from opd_mcp.schemas.runs import PhaseName

PROCESS_BYTES = 700 << 20
# Generation keeps a step's logits, their softmax and what sampling sorts.
LOGIT_COPIES = 4
ACTIVATIONS_PER_WIDTH = 34


@dataclass(frozen=True)
class Room:
    """The device that a plan is made for: its kind, and the bytes that are free on it before a process starts.

    Of the `devices` of a training, which are on `nodes` machines, these are the bytes of each GPU, or those of the CPU
    that all of a machine share.
    """

    device: str = "cpu"
    memory: int = 1 << 62
    devices: int = 1
    nodes: int = 1

    @property
    def processes(self) -> int:
        """The processes of a training that share these bytes."""
        return self.devices // self.nodes if self.device == "cpu" else 1


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
    Of a training, `replicas` are the groups of devices that each hold the student.
    """

    flops: float
    passes: float
    memory: int
    checkpointing: CheckpointingPolicy | None = None
    batch: int | None = None
    kv_bytes: int | None = None
    replicas: int = 1


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

    def _generation(
        self,
        model: ModelShape,
        rows: int,
        batch: int,
        sampling: Sampling,
        packed: int = 0,
        value_bytes: int | None = None,
    ) -> Work:
        """Keys and values have the dtype of the weights, of `value_bytes` each; None: the run's.

        On a GPU rows join a batch as others end, next to the longest one in work.
        """
        width = value_bytes or self._value_bytes
        batch, new_tokens = min(batch, max(rows, 1)), sampling.max_new_tokens
        length = self.data.prompt_tokens + new_tokens
        held, joins = length, rows > batch and self.room.device != "cpu"
        if joins:
            held += min(new_tokens, JOINING_ROOM) + JOINING_ROOM
        values = batch * model.cached_values(self.data.prompt_tokens, held)
        if joins:
            values += ceil(batch * JOINING_SHARE) * model.cached_values(
                self.data.prompt_tokens, self.data.prompt_tokens
            )
        kv = int(values * width)
        together = min(batch * self.data.prompt_tokens, PREFILL_TOKENS)
        passing = int(together * ACTIVATIONS_PER_WIDTH * model.hidden * width)
        stepping = LOGIT_COPIES * 4 * batch * model.vocab  # once the prompts are through
        memory = model.weights(width, packed) + kv + max(passing, stepping)
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
        sharing, judging = room.processes, self._judging(section, room)
        checkpointing, each = section.activation_checkpointing, max(room.memory - judging, 0) // sharing
        division = Division(self.recipe.runtime.replicas, room.nodes, each)
        step = replace(step, replicas=division.replicas(self.student, step, checkpointing))
        memory = training_memory(self.student, step, checkpointing, each)
        total = max(sharing * memory.total + judging, self._loading(self._packed(section)))
        passes = 3 * section.steps * ceil(tokens / section.micro_batch_tokens)
        # a frozen weight forms no gradient of its own
        operations = (
            6.0 * self.student.parameters if adapter is None else 4.0 * self.student.parameters + 6.0 * adapter.trained
        )
        flops = operations * section.steps * tokens
        return Work(flops, passes, total, memory.policy, replicas=step.replicas)

    def _copy(self, section: SftRecipe | DistillRecipe) -> int:
        """Bytes of a whole student that takes the weights of one that several devices train in parts."""
        adapter = self.adapter(section)
        return 4 * self.student.parameters if adapter is None else adapter.base_bytes * self.student.parameters

    def _judging(self, section: SftRecipe | DistillRecipe, room: Room) -> int:
        """Bytes by which the first of several devices judges: a copy of the student, and the teacher."""
        if not isinstance(section, DistillRecipe) or section.evaluate_steps is None or room.devices == 1:
            return 0
        # a live distillation has both on every device
        here = section.method == "live"
        return 0 if here else self._copy(section) + self.teacher.parameters * self._value_bytes

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
            replace(small.live(), room=replace(self.room, devices=1, nodes=1)).work("distill").memory,
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
        # the weights that are trained draw the rollouts, without autocast
        adapter = self.adapter(section)
        width = weight_bytes(section.optimizer.precision) if adapter is None else adapter.base_bytes
        rollouts = self._generation(self.student, rows, rollout.batch_size, rollout.sampling, packed, width)
        micro = min(section.micro_batch_tokens, rows * length)
        # The student trains next to the resident teacher and its own generation cache; its weights draw the rollouts.
        cached = rollouts.memory - self.student.weights(width, packed)
        second = 0 if self._shares_base(section) else teacher.parameters * self._value_bytes
        # On several devices each has a whole teacher, and a whole student that draws its share.
        drawing = self._copy(section) if room.devices > 1 else 0
        resident = room.processes * (second + self._forward_memory(teacher, micro) + cached + drawing)
        training = self._training(section, length, replace(room, memory=max(room.memory - resident, 0)))
        scoring_passes = ceil(rows * length / section.micro_batch_tokens)
        return Work(
            training.flops + section.steps * (rollouts.flops + 2.0 * teacher.parameters * rows * length),
            training.passes + section.steps * (rollouts.passes + scoring_passes),
            training.memory + resident,
            training.checkpointing,
            rollouts.batch,
            rollouts.kv_bytes,
        )

    @property
    def reported_models(self) -> int:
        """How many models a report measures, one after the other."""
        return self.data.models + len(self._reference_rows)

    @property
    def _reference_rows(self) -> frozenset[str]:
        """The report's rows besides those of the run's models: `base`, `teacher`."""
        return self.data.references & set(self.recipe.benchmark.references) if self.data.eval_prompts else frozenset()

    def _benchmark(self) -> Work:
        section, data, student = self.recipe.benchmark, self.data, self.student
        available = data.eval_prompts or min(section.kl_prompts, data.prompts)
        prompts = min(section.limit or available, available)
        rows = prompts * (1 + section.samples_per_prompt)
        answers = self._generation(student, rows, section.batch_size, section.sampling)
        kl = self._generation(student, min(section.kl_prompts, prompts), section.batch_size, section.sampling)
        scored = 1 + (self.teacher.parameters + student.parameters) / student.parameters
        models, flops, passes, memory = data.models + ("base" in self._reference_rows), 0.0, 0.0, 0
        if "teacher" in self._reference_rows:
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
