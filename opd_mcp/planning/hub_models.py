"""The Hub: its ids, where fetched models and data sets are kept, and the sizes of a model before its download.

The sizes follow from its configuration and its list of files: two small requests per model, answered within seconds or
not at all. A plan goes on without estimates where the Hub cannot be asked. The weights are fetched by the run
(`worker/fetch.py`), which then checks them.
"""

import re
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_mcp.devices.environment import HubAccess
from opd_mcp.identity.adapters import ADAPTER_CONFIG
from opd_mcp.identity.configuration import require_own_files
from opd_mcp.identity.files import MAX_CONFIG_BYTES, parsed_object
from opd_mcp.identity.models import config_setting
from opd_mcp.identity.safetensors import DTYPE_BYTES, INDEX_FILE
from opd_mcp.schemas.errors import IntegrityError, PathError
from opd_mcp.schemas.memory import SHAPE_SETTINGS
from opd_mcp.schemas.runs import HubSizes
from opd_mcp.store.workspace import Workspace

if TYPE_CHECKING:
    import httpx2

# The Hub's own rules: `--` and `..` are in no name, so that two ids never share a directory and none leaves its place.
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
HUB_ID = re.compile(rf"(?!.*(?:--|\.\.)){_HUB_NAME}/{_HUB_NAME}")
# A data set may name its configuration and its split: `openai/gsm8k:main@train`.
_HUB_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
HUB_DATA_ID = re.compile(rf"(?P<name>{HUB_ID.pattern})(?::(?P<configuration>{_HUB_PART}))?(?:@(?P<split>{_HUB_PART}))?")
# the card and the licence are read for the card of an export
FETCHED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*", "NOTICE*")
MAX_LISTING_BYTES = 8 << 20
REQUEST_SECONDS = 5.0
KNOWN_SECONDS, UNKNOWN_SECONDS = 600.0, 60.0
TORCH_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class _UnusableAnswerError(Exception):
    """Why an answer of the Hub says nothing of a model's size."""


@dataclass
class HubModels:
    """The sizes of the Hub's models, asked once in ten minutes, and after a failure once a minute."""

    access: HubAccess | None = None
    _known: dict[str, tuple[float, HubSizes | str]] = field(default_factory=dict)

    def sizes(self, hub_id: str) -> HubSizes | str:
        """The sizes of a model, or why they are not known.

        Raises PathError `not_found` for a model that the Hub does not have or does not release, and `unsafe_config`.
        """
        if self.access is None:
            return "fetching from the Hub is switched off"
        until, known = self._known.get(hub_id, (0.0, ""))
        if time.monotonic() >= until:
            known = _asked(self.access, hub_id)
            lasts = KNOWN_SECONDS if isinstance(known, HubSizes) else UNKNOWN_SECONDS
            self._known[hub_id] = time.monotonic() + lasts, known
        return known


def _asked(access: HubAccess, hub_id: str) -> HubSizes | str:
    import httpx2

    headers = {"Authorization": f"Bearer {access.token}"} if access.token else {}
    try:
        with httpx2.Client(timeout=REQUEST_SECONDS, headers=headers, follow_redirects=True, max_redirects=3) as client:
            listing = _fetched(client, f"{access.endpoint}/api/models/{hub_id}?blobs=true", hub_id, MAX_LISTING_BYTES)
            files = _files(listing)
            if ADAPTER_CONFIG in files:
                return "it is an adapter, whose base is not known yet"
            config = _fetched(client, f"{access.endpoint}/{hub_id}/resolve/main/config.json", hub_id, MAX_CONFIG_BYTES)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        return f"the Hub did not answer ({type(error).__name__})"
    except _UnusableAnswerError as error:
        return str(error)
    require_own_files(config, Path(hub_id))
    weights = _weight_bytes(files)
    parameters = _parameters(listing, config, weights)
    if not parameters or not weights:
        return "the Hub names no safetensors weights of it"
    settings = {name: config_setting(config, name) for name in SHAPE_SETTINGS}
    return HubSizes(
        parameters=parameters,
        weight_bytes=weights,
        download_bytes=sum(size for name, size in files.items() if any(fnmatchcase(name, p) for p in FETCHED_FILES)),
        settings={name: value for name, value in settings.items() if value is not None},
    )


def _fetched(client: "httpx2.Client", url: str, hub_id: str, limit: int) -> dict[str, Any]:
    """The JSON object at a URL of the Hub, of at most `limit` bytes."""
    content = b""
    with client.stream("GET", url) as answer:
        if answer.status_code in (401, 403, 404):
            raise PathError(
                "not_found",
                "The Hub has no such model, or does not release its config.json here.",
                value=hub_id,
                fix="Check the id; for a private or gated model set HF_TOKEN in the server's environment; or download "
                "the model yourself and give its absolute path.",
            )
        if answer.status_code != 200:
            raise _UnusableAnswerError(f"the Hub answered with status {answer.status_code}")
        for part in answer.iter_bytes():
            content += part
            if len(content) > limit:
                raise _UnusableAnswerError(f"the Hub's answer has more than {limit} bytes")
    try:
        return parsed_object(content, Path(hub_id))
    except IntegrityError as error:
        raise _UnusableAnswerError("the Hub's answer is no JSON object") from error


def _files(listing: dict[str, Any]) -> dict[str, int]:
    """The sizes of a repository's files in bytes, by their names."""
    siblings = listing.get("siblings")
    entries = [entry for entry in siblings if isinstance(entry, dict)] if isinstance(siblings, list) else []
    named = {str(entry.get("rfilename")): entry.get("size") for entry in entries}
    return {name: size for name, size in named.items() if type(size) is int and 0 <= size < 1 << 60}


def _weight_bytes(files: dict[str, int]) -> int:
    """Bytes of the weights that are loaded: of the single file, of the index's shards, or of all there are."""
    top = {name: size for name, size in files.items() if name.endswith(".safetensors") and "/" not in name}
    if "model.safetensors" in top:
        return top["model.safetensors"]
    shards = [size for name, size in top.items() if fnmatchcase(name, "model-*-of-*.safetensors")]
    return sum(shards) if INDEX_FILE in files and shards else sum(top.values())


def _parameters(listing: dict[str, Any], config: dict[str, Any], weight_bytes: int) -> int:
    """The values of a model: as the Hub counted them in its safetensors files, else by the dtype of its config."""
    counted = listing.get("safetensors")
    by_dtype = counted.get("parameters") if isinstance(counted, dict) else None
    if isinstance(by_dtype, dict):
        counts = {name: count for name, count in by_dtype.items() if name in DTYPE_BYTES and _is_count(count)}
        counted_bytes = sum(DTYPE_BYTES[name] * count for name, count in counts.items())
        # a count that is not of these files, such as of two formats next to each other, would mislead
        if weight_bytes / 2 <= counted_bytes <= 2 * weight_bytes:
            return sum(counts.values())
    dtype = config.get("dtype") or config.get("torch_dtype")
    return weight_bytes // TORCH_BYTES.get(str(dtype), 2)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 50


def hub_data_directory(workspace: Workspace, reference: str) -> Path:
    """Where a Hub data set is kept once it is fetched."""
    parts = HUB_DATA_ID.fullmatch(reference)
    assert parts is not None, "a Hub id with its configuration and split"
    name, configuration, split = (str(parts[part] or "") for part in ("name", "configuration", "split"))
    folder = f"datasets--{name.replace('/', '--')}"
    return workspace.hub / folder / f"configuration-{configuration}" / f"split-{split}" / "fetched"


def hub_directory(workspace: Workspace, hub_id: str) -> Path:
    """Where a Hub model is kept once it is fetched, named so that its identity keeps the Hub's name."""
    return workspace.hub / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "fetched"
