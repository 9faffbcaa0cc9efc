"""Adapters in a plan: the base of one that a caller names (by its path, by its Hub id, or by its identity where it has
moved), and the layers that one to be trained is asked for.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.identity.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterFiles,
    base_missing,
    is_adapter,
    linear_layers,
    read_adapter,
)
from opd_mcp.identity.files import read_json_object
from opd_mcp.identity.lineage import read_lineage, write_lineage
from opd_mcp.identity.models import ModelCache, ModelFacts, weights_hash
from opd_mcp.identity.tokenizers import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ArgumentError, OpdError, nearest
from opd_mcp.schemas.identity import Lineage, Parent
from opd_mcp.schemas.recipes import DistillRecipe, SftRecipe
from opd_mcp.store.artifacts import Artifact
from opd_mcp.store.store import Store

GENERATION_CONFIG = "generation_config.json"
EXPERT_SETTINGS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class AdapterBases:
    """Finds bases in one workspace; `named` gives the directory that an adapter's own words mean, or raises."""

    store: Store
    models: ModelCache
    named: Callable[[str], Path | None]

    def loadable(self, directory: Path) -> Artifact | None:
        """None for an adapter that can be loaded as it lies: its base where it says, its tokenizer next to it.

        Else an artifact with the same adapter, the path of the base that was found, and the base's tokenizer. Raises
        PathError `base_missing`, and as `read_adapter` and `named` do.
        """
        adapter = read_adapter(directory)
        base = self._base(adapter)
        if str(base) == adapter.base and (directory / TOKENIZER_FILE).is_file():
            return None
        return self._completed(adapter, base)

    def _base(self, adapter: AdapterFiles) -> Path:
        refused: OpdError = base_missing(adapter)
        try:
            base = self.named(adapter.base)
        except OpdError as error:
            base, refused = None, error
        if base is not None and self._is_base(adapter, base):
            return base
        for candidate in self._candidates() if adapter.base_identity else ():
            if self._is_base(adapter, candidate):
                return candidate
        raise refused

    def _is_base(self, adapter: AdapterFiles, directory: Path) -> bool:
        """Whether a directory holds the base; an adapter from elsewhere does not say what its base is."""
        identity = adapter.base_identity
        if is_adapter(directory):
            return False
        with suppress(OpdError):
            return identity is None or self.models.inspect_model(directory).identity.same_model(identity)
        return False

    def _candidates(self) -> Iterator[Path]:
        yield from (artifact.path for artifact in self.store.artifacts.list("model"))
        yield from sorted(self.store.workspace.hub.glob("models--*/snapshots/fetched"))

    def _completed(self, adapter: AdapterFiles, base: Path) -> Artifact:
        facts = self.models.inspect_model(base)
        has_tokenizer = (adapter.path / TOKENIZER_FILE).is_file()
        parts = [weights_hash(adapter.path), adapter.scale, facts.identity.to_dict(), str(base), has_tokenizer]
        key = content_hash(parts)
        artifact_id = f"model-adapter-{key[:12]}"
        if (found := self.store.artifacts.find_made("model", artifact_id, key)) is not None:
            return found
        building = self.store.artifacts.new_building_directory("model")
        shutil.copyfile(adapter.path / ADAPTER_WEIGHTS, building / ADAPTER_WEIGHTS)
        config = read_json_object(adapter.path / ADAPTER_CONFIG) | {"base_model_name_or_path": str(base)}
        (building / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        source = adapter.path if has_tokenizer else base
        for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
            if (source / name).is_file():
                shutil.copyfile(source / name, building / name)
        if not (building / GENERATION_CONFIG).exists():
            eos = json.dumps({"eos_token_id": list(facts.eos_token_ids)})
            (building / GENERATION_CONFIG).write_text(eos, encoding="utf-8")
        write_lineage(building, self._lineage(adapter.path, base, building))
        return self.store.artifacts.publish("model", building, artifact_id=artifact_id, key=key)

    def _lineage(self, adapter: Path, base: Path, building: Path) -> Lineage:
        """What the adapter's own lineage proved here, else only what it was put together from."""
        identity = self.models.inspect_model(building).identity
        own = read_lineage(adapter) if self.store.artifacts.made_here(adapter) else None
        if own is not None and own.model is not None and own.model.same_model(identity):
            return own.model_copy(update={"files": {}, "model": identity})
        parents = [Parent(role="base", identity=self.models.inspect_model(base).identity)]
        return Lineage(kind="model", stage="adapter", recipe={}, model=identity, parents=parents)


def target_problems(
    sections: Mapping[str, SftRecipe | DistillRecipe], student: ModelFacts | None
) -> Iterator[ArgumentError]:
    """An ArgumentError `invalid_argument` for each section whose adapter names layers that the student's files lack.

    Experts may have other names when they are loaded, so of a model that has some only the loaded layers can tell.
    """
    asked = {name: section.adapter.targets for name, section in sections.items() if section.adapter is not None}
    if student is None or not any(asked.values()) or any(student.setting(name) for name in EXPERT_SETTINGS):
        return
    known = sorted(linear_layers(student.weights_path))
    for section, targets in asked.items():
        missing = sorted(set(targets or ()) - set(known))
        if missing:
            yield ArgumentError(
                "invalid_argument",
                f"No linear layer of the student's decoder is called {', '.join(missing)}.",
                value=f"{section}.adapter.targets={targets}",
                nearest=[close for name in missing for close in nearest(name, known)],
                fix=f"Name some of {known} in '{section}.adapter.targets', or leave it out for all of them.",
            )


def require_targets(sections: Mapping[str, SftRecipe | DistillRecipe], student: ModelFacts | None) -> None:
    """Raise the first of `target_problems`."""
    for error in target_problems(sections, student):
        raise error
