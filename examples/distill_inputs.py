"""The inputs of lightning_opd_distill.py: found, read, and seen to belong together before anything is computed."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.cli import workspace_root
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.encoding import encode_prompts
from opd_mcp.engine.data.targets import sft_targets
from opd_mcp.engine.models.loading import adopt_tokenizer
from opd_mcp.grading.extraction import compiled_pattern, extracted_answer
from opd_mcp.identity.consistency import require_consistent, sft_teacher
from opd_mcp.identity.data.reading import read_prompts, read_responses
from opd_mcp.identity.data.rows import PROMPT_COLUMNS, RESPONSE_COLUMNS, PromptRow, ResponseRow
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.signatures import MadeHere, below
from opd_mcp.identity.tokenizers import special_differences
from opd_mcp.planning.references import HUB_ID
from opd_mcp.schemas.errors import DataError, ResourceError
from opd_mcp.schemas.identity import TeacherClaim
from opd_mcp.schemas.recipes import SftRecipe
from opd_mcp.store.keys import workspace_key
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker.fetch import fetched_model

HELD_OUT_EVERY, MOST_HELD_OUT = 10, 500
# How answers are written, tried in this order on the teacher's own responses; None is the whole response.
NUMBER = r"(-?\d+(?:\.\d+)?)"
ANSWER_FORMS = (
    r"#\s*(\S+)",
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}",
    r"[Aa]nswer(?: is|:)\s*(\S+?)\.?(?:\s|$)",
    NUMBER,
    None,
)


@dataclass(frozen=True)
class Inputs:
    """What the stages are given: `claim` says whose the responses are, `tokenizer` is the one to adopt.

    `sft_rows` and `prompt_rows` are the rows that fit, `longest_response` is in tokens, `held_out` counts the eval
    prompts that have an answer (0: the eval prompts are training prompts, for the reverse KL only).
    """

    student: Path
    teacher: Path
    responses: Path
    prompts: Path
    eval_prompts: Path
    claim: TeacherClaim
    tokenizer: Path
    sft_rows: int
    prompt_rows: int
    held_out: int
    longest_response: int
    answer_pattern: str | None


def own_lineages(work: Path) -> MadeHere:
    """Whose lineages count as proven: those that this command writes below `work`, and those the workspace signed."""
    written = below(work)
    if not workspace_root().is_dir():
        return written
    key = workspace_key(Workspace(workspace_root())).key
    return lambda directory: written(directory) or key.signed(directory)


def checked_inputs(references: Namespace, work: Path, made_here: MadeHere) -> Inputs:
    """The inputs that the command line names, with prompt files in `work`; raises OpdError for what cannot be used."""
    student = model_directory(references.student_model_path)
    teacher = model_directory(references.teacher_model)
    responses = data_path(references.teacher_responses_dataset, RESPONSE_COLUMNS, work / "responses.parquet")
    prompts = data_path(references.unlabeled_prompts_dataset, PROMPT_COLUMNS, work / "unlabeled.parquet")
    inspect_model(student)
    identity = inspect_model(teacher).identity
    special_differences(teacher, student)
    claim = require_consistent(identity, sft_teacher(responses, identity, made_here=made_here)).sft_teacher
    assert claim is not None, "a teacher was declared"

    context, response_rows = Context(), read_responses(responses)
    own = responses / "tokenizer"
    tokenizer = own if own.is_dir() else teacher
    adopted = adopt_tokenizer(tokenizer, context.prompting)
    sequences = sft_targets(response_rows, adopted, SftRecipe(), context).sequences
    training, held_out = split(read_prompts(prompts), {row.prompt.text() for row in response_rows})
    write_prompts(work / "prompts.jsonl", training, answers=False)
    write_prompts(work / "eval.jsonl", held_out or training, answers=bool(held_out))
    return Inputs(
        student=student,
        teacher=teacher,
        responses=responses,
        prompts=work / "prompts.jsonl",
        eval_prompts=work / "eval.jsonl",
        claim=claim,
        tokenizer=tokenizer,
        sft_rows=len(sequences),
        prompt_rows=len(encode_prompts(training, adopted.tokenizer, context)),
        held_out=len(held_out),
        longest_response=int(sequences.response_lengths().max()),
        answer_pattern=answer_pattern(response_rows),
    )


def model_directory(reference: str) -> Path:
    """A model's directory, fetched from the Hub when the reference is an id and no directory is of that name."""
    path = Path(reference).expanduser().absolute()
    if path.exists() or HUB_ID.fullmatch(reference) is None:
        return path
    return fetched_model(Workspace(workspace_root()), reference)


def data_path(reference: str, columns: Sequence[str], download: Path) -> Path:
    """A data file's or directory's path; a Hub data set's known columns are written to `download`.

    Raises ResourceError `offline`, or DataError `unknown_format` for a data set that cannot be opened.
    """
    path = Path(reference).expanduser().absolute()
    if path.exists() or HUB_ID.fullmatch(reference) is None or path.suffix in (".jsonl", ".parquet"):
        return path
    import datasets  # heavy, and only the Hub needs it
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # its retries are no news: the last one raises
    try:
        found = datasets.load_dataset(reference, split="train")
    except (ConnectionError, TimeoutError) as error:
        raise ResourceError(
            "offline",
            "There is no such file here, and the Hub cannot be reached.",
            value=reference,
            fix="Give the path of a JSONL or Parquet file, or give the machine access to huggingface.co.",
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            "unknown_format",
            f"The Hub data set cannot be opened: {str(error).splitlines()[0]}",
            value=reference,
            fix="Check the id, or download the data and give the file's path.",
        ) from error
    found.select_columns([name for name in found.column_names if name in columns]).to_parquet(download)
    return download


def split(rows: list[PromptRow], seen: set[str]) -> tuple[list[PromptRow], list[PromptRow]]:
    """(training, held out): the held-out prompts have answers, and are neither trained on nor in `seen`."""
    candidates = [row for row in rows if row.answer is not None and row.text() not in seen]
    held_out = candidates[::HELD_OUT_EVERY][:MOST_HELD_OUT]
    texts = {row.text() for row in held_out}
    training = [row for row in rows if row.text() not in texts]
    return (training, held_out) if training else (rows, [])


def write_prompts(path: Path, rows: list[PromptRow], *, answers: bool) -> None:
    """Prompts as JSONL. Training prompts are written without answers: nothing there may look at them."""
    fields = ("id", "prompt", "messages", *(("answer",) if answers else ()))
    kept = [{name: value for name in fields if (value := getattr(row, name)) is not None} for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


def answer_pattern(rows: Sequence[ResponseRow]) -> str | None:
    """The form of ANSWER_FORMS that finds the known answers, or at least anything, in the most responses."""

    def found(row: ResponseRow, form: str | None) -> bool:
        extracted = extracted_answer(row.response or "", compiled_pattern(form))
        return extracted is not None if row.prompt.answer is None else extracted == row.prompt.answer.strip()

    return max(ANSWER_FORMS, key=lambda form: sum(found(row, form) for row in rows))
