"""The workload of a run: the formulas with its recipe and inputs, by files here or by sizes that the Hub tells."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.planning.costs.workload import DataSize, Room, Workload
from opd_mcp.schemas.memory import ModelShape
from opd_mcp.schemas.recipes import ExportFormat, Recipe
from opd_mcp.schemas.runs import ModelInput, PhaseName, RunInputs


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
