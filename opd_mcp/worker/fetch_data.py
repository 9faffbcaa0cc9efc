"""Data for a run: a Hub data set is saved as Parquet in the workspace, and named columns become our own fields."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd_mcp.identity.data.reading import read_prompts, read_responses, responses_sha256
from opd_mcp.identity.data.rows import PromptRow, ResponseRow
from opd_mcp.identity.data.scan import scan_prompts
from opd_mcp.identity.files import publish_directory, write_atomic
from opd_mcp.planning.hub_models import HUB_DATA_ID, hub_data_directory
from opd_mcp.planning.phases import data_sets
from opd_mcp.schemas.errors import DataError, IntegrityError, PathError, ResourceError
from opd_mcp.schemas.runs import DataInput, RunInputs
from opd_mcp.store.workspace import Workspace, new_id

DATA_FILE = "data.parquet"
MAPPED_FOLDER = "data"


def fetched_data(workspace: Workspace, reference: str, check_fence: Callable[[], None] = lambda: None) -> Path:
    """The local directory of a Hub data set's split, downloaded unless it is already there.

    `check_fence` is called before the download becomes visible, and raises if it must not.
    Raises ResourceError `offline`, PathError `not_found`, or DataError `unknown_format` that names the splits.
    """
    final = hub_data_directory(workspace, reference)
    if final.is_dir():
        return final
    parts = HUB_DATA_ID.fullmatch(reference)
    assert parts is not None, "only Hub ids are fetched"
    building = final.parent / f".{new_id('building')}"
    building.mkdir(parents=True, mode=0o700)
    try:
        save_split(parts["name"], parts["configuration"], parts["split"], building)
        publish_directory(building, final, check_fence)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def save_split(source: str, configuration: str | None, split: str | None, directory: Path) -> None:
    """Save one split of a data set, a Hub id or a local folder, as Parquet in `directory`; raises as `fetched_data`."""
    # Imported here: the package is heavy, and most runs never fetch.
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    cache = directory / ".cache"
    try:
        found = datasets.load_dataset(source, configuration, cache_dir=str(cache))
    except DatasetNotFoundError as error:
        raise PathError(
            "not_found",
            "The Hub has no such public data set.",
            value=source,
            fix="Check the id, or download the data set yourself and give its absolute path.",
        ) from error
    except (ConnectionError, TimeoutError, OfflineModeIsEnabled) as error:
        raise ResourceError(
            "offline",
            f"The data set could not be fetched from the Hub ({type(error).__name__}).",
            value=source,
            fix="Give the machine access to huggingface.co, or copy the data set below an allowed root and give its "
            "absolute path.",
        ) from error
    except (OSError, ValueError) as error:  # an unknown configuration, or files of no known format
        raise DataError(
            "unknown_format",
            f"The Hub data set cannot be opened: {str(error).splitlines()[0][:300]}",
            value=source,
            fix="Name its configuration and split: org/name:configuration@split.",
        ) from error
    name = split or (next(iter(found)) if len(found) == 1 else None)
    if name not in found:
        label = f"{source}:{configuration}" if configuration else source
        raise DataError(
            "unknown_format",
            f"The data set has {len(found)} splits: {', '.join(map(str, found))}.",
            value=split or source,
            nearest=[f"{label}@{known}" for known in list(found)[:3]],
            fix=f"Name one of them, e.g. {label}@{next(iter(found), 'train')}.",
        )
    found[name].to_parquet(str(directory / DATA_FILE))
    del found
    shutil.rmtree(cache, ignore_errors=True)


def with_present_data(workspace: Workspace, run: Path, inputs: RunInputs, check_fence: Callable[[], None]) -> RunInputs:
    """The inputs with Hub data fetched, and data with named columns written in our own fields below the run.

    Raises IntegrityError `input_changed` for data that is not what it was at the start, and what `fetched_data` raises.
    """
    present = {}
    for role, data in data_sets(inputs).items():
        path = Path(data.path) if data.path else fetched_data(workspace, str(data.hub_id), check_fence)
        _require_same(role, data, path)
        if data.columns:
            path = _mapped(role, path, data.columns, run, check_fence)
        present[role] = data.model_copy(update={"path": str(path)})
    return inputs.model_copy(update=present)


def _require_same(role: str, data: DataInput, path: Path) -> None:
    """Artifacts are keyed by what the data was, so a file that changed while the run was queued must stop it."""
    if data.sha256 is None:
        return
    is_prompts = role != "responses"
    found = scan_prompts(path, data.columns).sha256 if is_prompts else responses_sha256(path, data.columns)
    if found != data.sha256:
        raise IntegrityError(
            "input_changed",
            "The data is not what it was when the run was started.",
            value=data.path,
            fix="Start again, with the data that is meant.",
        )


def _mapped(role: str, path: Path, columns: Mapping[str, str], run: Path, check_fence: Callable[[], None]) -> Path:
    """A file of the run with the data in our own fields, so that no stage needs to know the columns."""
    if role == "responses":
        rows = [_response_fields(row) for row in read_responses(path, columns)]
    else:
        rows = [_prompt_fields(row) for row in read_prompts(path, columns)]
    file = run / MAPPED_FOLDER / f"{role}.jsonl"
    check_fence()
    file.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def _prompt_fields(row: PromptRow) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": row.id, "prompt": row.prompt, "messages": row.messages, "answer": row.answer}
    fields |= {"teacher_messages": row.teacher_messages, "teacher_domain": row.teacher_domain}
    return {name: value for name, value in fields.items() if value is not None}


def _response_fields(row: ResponseRow) -> dict[str, Any]:
    fields: dict[str, Any] = {"finish_reason": "length" if row.truncated else None}
    if row.chat is not None:
        fields |= {"messages": row.chat, "tools": row.tools}
    else:
        fields |= {"response": row.response, "response_ids": row.response_ids, "prompt_ids": row.prompt_ids}
    return {**_prompt_fields(row.prompt), **{name: value for name, value in fields.items() if value is not None}}
