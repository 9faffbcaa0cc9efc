"""The model card of an export: what the model is, how it was made, its figures with intervals, its limits, its use.

Names, licences and other texts that files or callers chose are escaped: they can neither end a table nor add markup.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.schemas.identity import Lineage
from opd_mcp.schemas.reports import BenchmarkReport, Estimate95
from opd_mcp.schemas.runs import DataOrigin, ModelOrigin
from opd_mcp.schemas.texts import escaped

PAPER = "arXiv 2604.13010"
MAX_CARD_BYTES = 1 << 20
CHARACTERS = 600
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
LICENCE_FIELDS = ("license", "license_name", "license_link")
_ACTIVE = re.compile(r"[\\`*_\[\]<>|~#$:&!]")
_FIELD = re.compile(r"(license(?:_name|_link)?):[ \t]*(\S[^\n]{0,200})")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Card:
    """What a card is written from: `source` is the stage that made the model, `dtype` that of the exported weights;
    `gguf` is the name of the file where they are in that format.
    """

    name: str
    source: str | None
    lineage: Lineage
    dtype: str
    report: BenchmarkReport | None
    models: Sequence[ModelOrigin]
    data: Sequence[DataOrigin]
    chat: bool
    adapter_rank: int | None
    gguf: str | None = None


def model_card(card: Card) -> str:
    """The README.md of an exported model: YAML front matter, then Markdown."""
    licences = {origin.name: licence_of(origin) for origin in card.models}
    lines = [
        *_front_matter(card, licences),
        f"# {markdown(card.name)}",
        "",
        _summary(card),
        "",
        *_use(card),
        "## Results",
        "",
        *_results(card.report),
        "## How it was made",
        "",
        *_making(card),
        "## Limits",
        "",
        *(f"- {limit}" for limit in _limits(card)),
        "",
        "## Licences",
        "",
        *_licence_lines(licences),
        "## How to cite",
        "",
        "Cite the method as Lightning OPD, [arXiv 2604.13010](https://arxiv.org/abs/2604.13010), and the teacher and "
        "the student as their own cards ask.",
        "",
        f"Written by opd-mcp {markdown(card.lineage.versions.get('opd-mcp', ''))}; `lineage.json` holds the hashes of "
        "everything that is named here.",
    ]
    return "\n".join(lines) + "\n"


def markdown(text: object) -> str:
    """A text on one line that Markdown shows as it is."""
    return _ACTIVE.sub(lambda found: "\\" + found[0], escaped(str(text))[:CHARACTERS])


def licence_of(origin: ModelOrigin) -> dict[str, str]:
    """The licence fields of a model's own card, and the name of its licence file; empty where neither is here."""
    if origin.path is None:
        return {}
    folder, found = Path(origin.path), {}
    card = folder / "README.md"
    if card.is_file():
        with card.open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode(errors="replace")
        front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        for line in front[1].splitlines() if front else ():
            field = _FIELD.match(line)
            if field is not None:
                found[field[1]] = field[2].strip().strip("\"'")
    names = [name for name in LICENCE_FILES if (folder / name).is_file()]
    return found | ({"file": names[0]} if names else {})


def _front_matter(card: Card, licences: dict[str, dict[str, str]]) -> Iterator[str]:
    """YAML whose values are JSON strings, which YAML reads as they are."""
    bases = [origin.name for origin in card.models if origin.role == "student" and _HUB_ID.fullmatch(origin.name)]
    tags = ["opd-mcp", "distillation", *(["on-policy-distillation", "lightning-opd"] if _is_distilled(card) else [])]
    found = {json.dumps(fields.get("license", "")) for fields in licences.values()}
    yield "---"
    yield f"library_name: {'gguf' if card.gguf else 'peft' if card.adapter_rank else 'transformers'}"
    yield "pipeline_tag: text-generation"
    if bases:
        yield f"base_model: {json.dumps(bases[:1])}"
        yield f"base_model_relation: {'adapter' if card.adapter_rank else 'finetune'}"
    if len(found) == 1 and found != {'""'}:  # all that it was made of has the same licence
        fields = next(iter(licences.values()))
        yield from (f"{name}: {json.dumps(fields[name])}" for name in LICENCE_FIELDS if name in fields)
    yield f"tags: {json.dumps(tags)}"
    yield "---"
    yield ""


def _is_distilled(card: Card) -> bool:
    return card.lineage.distilled_from is not None


def _summary(card: Card) -> str:
    teacher = card.lineage.distilled_from or (card.lineage.sft_teacher and card.lineage.sft_teacher.identity)
    what = "A LoRA adapter" if card.adapter_rank else f"A causal language model ({card.dtype})"
    if teacher is None:
        return f"{what}, exported by opd-mcp; nothing here says how it was trained."
    students = [origin.name for origin in card.models if origin.role == "student"]
    who = f"made from {markdown(students[-1])}, " if students else ""
    if _is_distilled(card):
        recipe = card.lineage.recipe.get("distill", {})
        live = isinstance(recipe, dict) and recipe.get("method") == "live"
        how = "on-policy distillation" if live else f"Lightning OPD, offline on-policy distillation ({PAPER})"
        return f"{what}, {who}distilled from {markdown(teacher.name)} with {how}."
    return f"{what}, {who}fine-tuned on responses of {markdown(teacher.name)}."


def _use(card: Card) -> Iterator[str]:
    """The commands that run it, to be called in its directory."""
    yield "## Use"
    yield ""
    yield "In this directory:"
    yield ""
    if card.gguf:
        file = shlex.quote(escaped(card.gguf))
        yield from ("```bash", f"llama-cli -m {file}", f"llama-server -m {file}", f"vllm serve {file}", "```", "")
        yield from ("These commands follow the programs' documentation; opd-mcp has not run them.", "")
        return
    yield from ("```python", *_transformers(card), "```", "")
    # The folder's name is the caller's choice, and these lines are copied into shells.
    rank, name = card.adapter_rank, shlex.quote(escaped(card.name))
    if rank:
        yield from ("```bash", f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {name}=.")
        yield f"python -m sglang.launch_server --model-path BASE --lora-paths {name}=."
    else:
        yield from ("```bash", f"vllm serve . --served-model-name {name}")
        yield f"python -m sglang.launch_server --model-path . --served-model-name {name}"
    yield "```"
    yield ""
    yield "The tests of opd-mcp run the first block; the servers' commands follow their documentation."
    yield ""


def _quantization(card: Card) -> str | None:
    """What the base of an adapter was quantised to."""
    return card.lineage.adapter.quantization if card.adapter_rank and card.lineage.adapter else None


def _transformers(card: Card) -> Iterator[str]:
    if card.adapter_rank:
        yield "from peft import PeftModel"
    four_bits = _quantization(card) is not None
    yield f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if four_bits else ''}"
    yield ""
    yield 'tokenizer = AutoTokenizer.from_pretrained(".")'
    if card.adapter_rank:
        held = ""
        if four_bits:
            yield 'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'
            held = ", quantization_config=nf4"
        named = "  # base_model_name_or_path of adapter_config.json"
        yield f'base = AutoModelForCausalLM.from_pretrained("BASE"{held}){named}'
        yield 'model = PeftModel.from_pretrained(base, ".")'
    else:
        yield 'model = AutoModelForCausalLM.from_pretrained(".")'
    if card.chat:
        yield 'chat = [{"role": "user", "content": "1+1=?"}]'
        yield "inputs = tokenizer.apply_chat_template("
        yield '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield ")"
    else:
        yield 'inputs = tokenizer("1+1=?", return_tensors="pt")'
    yield "output = model.generate(**inputs, max_new_tokens=64)"
    yield 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))'


def _results(report: BenchmarkReport | None) -> Iterator[str]:
    if report is None:
        yield from ("Not measured in the workspace that exported it.", "")
        return
    if report.verdict is not None:
        yield from (f"**{report.verdict.judgement.replace('_', ' ')}**: {markdown(report.verdict.sentence)}", "")
    on = f"of the suite {markdown(report.suite)}" if report.suite else "that its maker chose"
    yield (
        f"{report.prompts} prompts ({report.prompts_with_answer} with an answer) {on}, sha256 "
        f"{report.prompts_sha256[:12]}, seed {report.seed}. Values with 95 % intervals; the exported model comes first."
    )
    yield ""
    yield "| model | greedy accuracy | sampled accuracy | reverse KL, nats per token | mean tokens |"
    yield "|---|---|---|---|---|"
    for score in report.models:
        figures = (score.greedy_accuracy, score.sampled_accuracy, score.reverse_kl)
        length = "–" if score.mean_response_tokens is None else f"{score.mean_response_tokens:.1f}"
        yield f"| {markdown(score.name)} | {' | '.join(map(_interval, figures))} | {length} |"
    yield ""
    for pair in report.comparisons:
        difference = _interval(pair.accuracy_difference, signed=True)
        yield f"- accuracy of {markdown(pair.candidate)} minus {markdown(pair.baseline)}, paired: {difference}"
    for gap in report.gap_closed:
        share = _interval(gap.share) if gap.share else f"not measured ({markdown(gap.not_measured)})"
        yield f"- share of the gap from {markdown(gap.baseline)} to {markdown(gap.teacher)} that is closed: {share}"
    for score in report.models:
        for name, metric in (score.task_metrics or {}).items():
            low = "" if metric.low is None else f" [{metric.low:.3f}, {metric.high:.3f}]"
            yield f"- {markdown(name)} of {markdown(score.name)}: {metric.value:.3f}{low} (n = {metric.samples})"
    yield ""


def _interval(estimate: Estimate95 | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}] (n = {estimate.samples})"


def _making(card: Card) -> Iterator[str]:
    lineage = card.lineage
    yield "| | |"
    yield "|---|---|"
    if lineage.distilled_from is not None:
        yield f"| teacher | {markdown(lineage.distilled_from.label())} |"
    if lineage.sft_teacher is not None:
        yield f"| SFT responses of | {markdown(lineage.sft_teacher.label())} ({lineage.sft_teacher.basis}) |"
    for origin in card.models:
        if origin.role == "student":
            yield f"| student before training | {markdown(origin.name)} |"
    for data in card.data:
        size = "" if data.rows is None else f", {data.rows} rows"
        digest = "" if data.sha256 is None else f", sha256 {markdown(data.sha256[:12])}"
        yield f"| {markdown(data.role)} | {markdown(data.name)}{size}{digest} |"
    if lineage.adapter is not None:
        base = f", on a base in 4 bits ({lineage.adapter.quantization})" if lineage.adapter.quantization else ""
        yield f"| adapter | LoRA, rank {lineage.adapter.rank}, saved as {lineage.adapter.saved}{base} |"
    yield f"| last training stage | {markdown(card.source or 'unknown')} |"
    form = "GGUF" if card.gguf else "safetensors"
    yield f"| weights | {'LoRA adapter, ' if card.adapter_rank else ''}{card.dtype}, {form} |"
    yield ""
    settings = {name: part for name, part in lineage.recipe.items() if name != "export"}
    if settings:
        yield from ("Settings of that stage:", "", "```json", json.dumps(settings, indent=2), "```", "")


def _limits(card: Card) -> Iterator[str]:
    lineage, report = card.lineage, card.report
    yield "It was trained to imitate its teacher on the prompts named above; its faults and biases come with that."
    yield "Nothing here measures safety, other languages or other tasks than the ones above."
    if report is None:
        yield "There are no figures: measure it before you rely on it."
    elif report.teacher_basis == "asserted":
        yield "Which teacher its SFT responses are from is the word of its maker, not proven."
    if lineage.teacher_mismatch_allowed or (report and report.teacher_mismatch_allowed):
        yield "**The teacher of its SFT and that of its distillation differ; this was allowed explicitly.**"
    exported = next((parent.identity for parent in lineage.parents if parent.role == "exported"), None)
    if exported and lineage.model and exported.weights != lineage.model.weights and report is not None:
        yield f"The figures were measured before the weights were converted to this form ({card.dtype})."
    if card.adapter_rank and lineage.model and lineage.model.quantization:
        yield (
            f"It was trained on its base quantised to {markdown(lineage.model.quantization)}; on the base as published "
            'it computes something else. Merged (`format` "input") it is exact.'
        )
    if lineage.special_tokens_differ:
        yield f"Special tokens of teacher and student differ: {markdown(lineage.special_tokens_differ)}."
    codes = sorted({alert.code for alert in report.alerts}) if report else []
    if codes:
        yield f"Alerts of the run that measured it: {', '.join(map(markdown, codes))}."


def _licence_lines(licences: dict[str, dict[str, str]]) -> Iterator[str]:
    if not licences:
        yield from ("What it was made of is not known here, so neither is its licence.", "")
        return
    for name, fields in licences.items():
        said = ", ".join(f"{field} {markdown(value)}" for field, value in fields.items())
        yield f"- {markdown(name)}: {said or 'its card and licence are not here; look them up'}"
    yield ""
    yield "A distilled student may be bound by the terms of its teacher, of its first weights and of its data."
    yield ""
