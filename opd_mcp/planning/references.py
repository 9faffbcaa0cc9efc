"""From what a caller writes to resolved inputs: paths below the roots, artifacts, run results, Hub ids, tasks."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from opd_mcp.identity.adapters import is_adapter, read_adapter
from opd_mcp.identity.consistency import asserted_claim, sft_teacher, teacher_context, vouched
from opd_mcp.identity.data.reading import ResponsesHeader, read_responses_header
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.data.scan import PromptScan, scan_of_rows, scan_prompts
from opd_mcp.identity.data.sources import COMPRESSED, SUFFIXES, is_glob, matching_files
from opd_mcp.identity.files import file_sha256
from opd_mcp.identity.lineage import LINEAGE_FILE, MANIFEST_FILE, read_manifest
from opd_mcp.identity.models import ModelCache, ModelFacts
from opd_mcp.identity.remote import require_allowed_host
from opd_mcp.planning.adapter_bases import AdapterBases
from opd_mcp.planning.hub_models import HUB_DATA_ID, HUB_ID, HubModels, hub_data_directory, hub_directory
from opd_mcp.planning.phases import PUBLISHED
from opd_mcp.planning.prompts.task_prompts import is_task, task_prompts, write_task_prompts
from opd_mcp.planning.prompts.text_work import TextWork
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import ArgumentError, DataError, OpdError, PathError, UnknownIdError, nearest
from opd_mcp.schemas.identity import ArtifactKind, TeacherClaim, TeacherContext
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.recipes import PromptingRecipe
from opd_mcp.schemas.runs import DataInput, HubSizes, ModelInput, RunInputs
from opd_mcp.store.artifacts import Artifact
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.runs import RECORD_FILE, run_ids
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace, is_id

FILE_SUFFIXES = (*SUFFIXES, *COMPRESSED, ".safetensors", ".toml", ".txt")
PROMPTS_FILE = "prompts.jsonl"
DATA_ARGUMENTS = ("prompts", "sft_prompts", "eval_prompts", "responses")


@dataclass(frozen=True)
class ResolvedModel:
    """A model with the facts of its files; a Hub model that is not here yet has none.

    `unsized` says why even the sizes of such a model are not known.
    """

    input: ModelInput
    facts: ModelFacts | None = None
    unsized: str | None = None

    def as_teacher(self, context: TeacherContext | None) -> "ResolvedModel":
        """The model as a teacher that sees more than its student."""
        known = self.input.identity
        if known is None or context is None:
            return self
        identity = known.model_copy(update={"context": context})
        return replace(self, input=self.input.model_copy(update={"identity": identity}))


@dataclass(frozen=True)
class ResolvedPrompts:
    """Prompts with what one pass over them found; nothing for a Hub data set that is not here yet."""

    input: DataInput
    scan: PromptScan = field(default_factory=lambda: scan_of_rows([]))

    def context(self, prompting: PromptingRecipe) -> TeacherContext | None:
        """What a teacher of these prompts sees that its student does not."""
        return teacher_context(prompting.teacher_system, self.scan.teacher_turns)


@dataclass(frozen=True)
class ResolvedResponses:
    """Responses with what a look at them found; nothing for a Hub data set that is not here yet."""

    input: DataInput
    header: ResponsesHeader | None = None


@dataclass(frozen=True)
class ResolvedCache:
    """A teacher cache with its manifest."""

    input: DataInput
    manifest: CacheManifest


@dataclass(frozen=True)
class _Place:
    path: Path
    artifact_id: str | None = None
    hub_id: str | None = None


@dataclass(frozen=True)
class References:
    """Resolves references within one workspace and its allowed roots."""

    store: Store
    roots: AllowedRoots
    models: ModelCache
    teacher_hosts: tuple[str, ...] = ()
    texts: TextWork = field(default_factory=TextWork)
    hub: HubModels = field(default_factory=HubModels)

    @property
    def workspace(self) -> Workspace:
        """The workspace of artifacts and runs."""
        return self.store.workspace

    def model(self, reference: str) -> ResolvedModel:
        """The model that a reference means, inspected when it is here; of a Hub model that is not, its sizes.

        Raises PathError, UnknownIdError, DataError or IntegrityError.
        """
        reference = self._id_of_named(reference)
        hub_id = self._hub_id(reference)
        if hub_id is not None:
            local = hub_directory(self.workspace, hub_id)
            if not local.is_dir():
                return self._absent_model(reference, hub_id)
            place = _Place(local)
        else:
            place = self._place(reference, "model")
        if is_adapter(place.path):
            completed = AdapterBases(self.store, self.models, self._named_base).loadable(place.path)
            place = place if completed is None else _Place(completed.path, completed.artifact_id)
        facts = self.models.inspect_model(place.path)
        resolved = ModelInput(
            reference=reference,
            path=str(place.path),
            hub_id=hub_id,
            identity=facts.identity,
            artifact_id=place.artifact_id,
            sft_teacher=self._lineage_claim(place.path),
            parameters=facts.parameters,
        )
        return ResolvedModel(resolved, facts)

    def _absent_model(self, reference: str, hub_id: str) -> ResolvedModel:
        absent = ModelInput(reference=reference, hub_id=hub_id)
        sizes = self.hub.sizes(hub_id)
        if not isinstance(sizes, HubSizes):
            return ResolvedModel(absent, unsized=sizes)
        return ResolvedModel(absent.model_copy(update={"parameters": sizes.parameters, "hub_sizes": sizes}))

    def _named_base(self, name: str) -> Path | None:
        """The directory of the base that an adapter names, below the allowed roots or fetched from the Hub."""
        if Path(name).is_absolute():
            return self.roots.resolve(name)
        local = hub_directory(self.workspace, name) if HUB_ID.fullmatch(name) else None
        return local if local is not None and local.is_dir() else None

    def sft_student(
        self, reference: str, declared_teacher: str | None, context: TeacherContext | None = None
    ) -> ResolvedModel:
        """As `model`, with `declared_teacher` as its SFT teacher, seeing the context, where no lineage names one."""
        student = self.model(reference)
        if student.input.sft_teacher is not None or declared_teacher is None:
            return student
        claim = self.claim(declared_teacher, context)
        return replace(student, input=student.input.model_copy(update={"sft_teacher": claim}))

    def remote_teacher(self, reference: str, url: str) -> ResolvedModel:
        """A teacher that a server at `url` scores for; its files are used where the reference means some that are here.

        Raises ArgumentError `invalid_argument` for an unusable URL, `teacher_host_not_allowed`, and as
        `model` for a path.
        """
        require_allowed_host(url, self.teacher_hosts)
        if not self._is_here(reference):
            return ResolvedModel(ModelInput(reference=reference, url=url))
        local = self.model(reference)
        return ResolvedModel(local.input.model_copy(update={"url": url}), local.facts)

    def path_of_claim(self, student: ModelInput, teacher: ModelInput) -> str | None:
        """Where the student's SFT teacher is, if that is known: the teacher itself, or what made the student.

        A place that only a lineage or an earlier run names is looked at below the allowed roots alone.
        """
        claim = student.sft_teacher
        if claim is None or claim.identity is None:
            return None
        made_by = self.inputs_of_artifact(student.artifact_id) if student.artifact_id else None
        responses = made_by.responses.artifact_id if made_by and made_by.responses else None
        answered = self.inputs_of_artifact(responses) if responses else None
        candidates = [teacher, *(inputs.teacher for inputs in (made_by, answered) if inputs and inputs.teacher)]
        if claim.name.startswith("/"):
            candidates.append(ModelInput(reference=claim.name, path=claim.name))
        for model in candidates:
            path = self.allowed(model.path)
            if path is None:
                continue
            with suppress(OpdError):  # what cannot be used is not the teacher
                if is_adapter(path):
                    self._named_base(read_adapter(path).base)
                if self.models.inspect_model(path).identity.same_model(claim.identity):
                    return model.path
        return None

    def allowed(self, path: str | None) -> Path | None:
        """The real path, where there is something below the allowed roots; None, whatever is there, elsewhere."""
        with suppress(PathError):
            return None if path is None else self.roots.resolve(path)
        return None

    def prompts(
        self, value: str | Sequence[str], columns: Mapping[str, str] | None = None, *, long_bytes: int = 1 << 62
    ) -> ResolvedPrompts:
        """Prompts by reference; a task's rows and an inline list become artifacts.

        Raises DataError and PathError, and for a task ArgumentError and ResourceError `missing_package`.

        `columns` are the fields by part; texts of more than `long_bytes` bytes are counted and sampled in the scan.
        """
        if not isinstance(value, str):
            return self._inline_prompts(value, long_bytes)
        value = self._id_of_named(value)
        place, absent = (
            (self._task_place(value), None) if is_task(value) else self._data_place(value, "prompts", columns)
        )
        if absent is not None:
            return ResolvedPrompts(absent)
        mapped = None if place.artifact_id else columns
        scan = scan_prompts(place.path, mapped, long_bytes=long_bytes)
        resolved = DataInput(
            reference=value,
            path=str(place.path),
            hub_id=place.hub_id,
            artifact_id=place.artifact_id,
            sha256=scan.sha256,
            rows=scan.rows,
            rows_with_answer=scan.rows_with_answer,
            columns=dict(mapped) if mapped else None,
            understood=scan.understood,
        )
        return ResolvedPrompts(resolved, scan)

    def responses(
        self, reference: str, declared_teacher: str | None, columns: Mapping[str, str] | None = None
    ) -> ResolvedResponses:
        """Responses by reference, with whose they are: proven by lineage, else as declared."""
        declared, reference = self.claim(declared_teacher), self._id_of_named(reference)
        place, absent = self._data_place(reference, "responses", columns)
        if absent is not None:
            return ResolvedResponses(absent.model_copy(update={"sft_teacher": declared}))
        mapped = None if place.artifact_id else columns
        header = read_responses_header(place.path, mapped)
        claim = self._lineage_claim(place.path) or declared
        resolved = DataInput(
            reference=reference,
            path=str(place.path),
            artifact_id=place.artifact_id,
            hub_id=place.hub_id,
            sha256=header.sha256,
            rows=header.rows,
            sft_teacher=claim,
            columns=dict(mapped) if mapped else None,
            understood=header.understood,
        )
        return ResolvedResponses(resolved, header)

    def cache(self, reference: str) -> ResolvedCache:
        """A teacher cache by artifact id, run or path; raises PathError `not_a_cache` for anything else."""
        reference = self._id_of_named(reference)
        if self._hub_id(reference) is not None:
            raise PathError(
                "relative_path",
                "A teacher cache is given by absolute path, artifact id or run id.",
                value=reference,
                nearest=[str(root) for root in self.roots.roots][:3],
                fix="Give the absolute path of the cache's directory.",
            )
        place = self._place(reference, "cache")
        manifest = read_manifest(place.path, reference)
        resolved = DataInput(
            reference=reference,
            path=str(place.path),
            artifact_id=place.artifact_id,
            sha256=file_sha256(place.path / MANIFEST_FILE),
            rows=manifest.rows,
            sft_teacher=vouched(manifest.sft_teacher, made_here=self.store.artifacts.made_here(place.path)),
        )
        return ResolvedCache(resolved, manifest)

    def claim(self, declared: str | None, context: TeacherContext | None = None) -> TeacherClaim | None:
        """What `declared_teacher` asserts: a model, when the text resolves to one here, else a mere name."""
        if declared is None:
            return None
        if not self._is_here(declared):
            return asserted_claim(declared)
        facts = self.model(declared).facts
        return asserted_claim(facts.identity if facts else declared, context)

    def declared_teacher(self, declared: str | None) -> ResolvedModel | None:
        """The model that `declared_teacher` means, where its files are here; None for a mere name."""
        if declared is None:
            return None
        hub_id = None if self._is_here(declared) else self._hub_id(declared)
        fetched = hub_id is not None and hub_directory(self.workspace, hub_id).is_dir()
        return self.model(declared) if fetched or self._is_here(declared) else None

    def inputs_of_artifact(self, artifact_id: str) -> RunInputs | None:
        """The inputs of the run that made an artifact; None when that run is not in this workspace."""
        artifact = self.store.artifacts.find(artifact_id)
        run_id = artifact.record.run_id if artifact else None
        return self.store.record(run_id).request.inputs if run_id and self._is_run(run_id) else None

    def _lineage_claim(self, path: Path) -> TeacherClaim | None:
        lineage = path.parent / LINEAGE_FILE
        if path.is_file() and lineage.is_symlink():  # a directory's links were followed when it was resolved
            self.roots.resolve(lineage)
        return sft_teacher(path, made_here=self.store.artifacts.made_here, inspect=self.models.inspect_model)

    def _is_here(self, reference: str) -> bool:
        """Whether a text means a path, an artifact or a run rather than a mere name."""
        return bool(
            reference.startswith("/")
            or self.store.artifacts.find(reference)
            or self._run_products(reference) is not None
        )

    def _id_of_named(self, reference: str) -> str:
        """The id of the run whose name a reference is, since names may change their runs; else the reference."""
        if reference.startswith("/") or is_task(reference):
            return reference
        if self.store.artifacts.find(reference) is not None or self._is_run(reference):
            return reference
        return self.store.run_named(reference) or reference

    def _is_run(self, run_id: str) -> bool:
        return is_id(run_id) and (self.workspace.run(run_id) / RECORD_FILE).is_file()

    def _run_products(self, run_id: str) -> dict[str, str] | None:
        """The artifact ids that a run made, by kind, the last of a kind; None when there is no such run."""
        if not self._is_run(run_id):
            return None
        made = self.store.view(run_id).artifacts
        return {PUBLISHED[phase].kind: artifact_id for phase, artifact_id in made.items() if phase in PUBLISHED}

    def _data_place(
        self, reference: str, kind: ArtifactKind, columns: Mapping[str, str] | None
    ) -> tuple[_Place, DataInput | None]:
        """Where prompts or responses are, and for a Hub data set that is not here yet the input that stands for it."""
        hub = HUB_DATA_ID.fullmatch(reference)
        if hub is None or self._hub_id(hub["name"]) is None:
            return self._place(reference, kind), None
        local = hub_data_directory(self.workspace, reference)
        if local.is_dir():
            return _Place(local, hub_id=reference), None
        absent = DataInput(reference=reference, hub_id=reference, columns=dict(columns) if columns else None)
        return _Place(local, hub_id=reference), absent

    def _pattern(self, reference: str) -> Path:
        """A pattern whose every match is below an allowed root; raises PathError."""
        parts = Path(reference).parts
        first = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?["))
        pattern = Path(self.roots.resolve(str(Path(*parts[:first]))), *parts[first:])
        for match in matching_files(pattern):
            self.roots.resolve(str(match))
        return pattern

    def _place(self, reference: str, kind: ArtifactKind) -> _Place:
        if reference.startswith("/") and is_glob(reference):
            return _Place(self._pattern(reference))
        if reference.startswith("/"):
            path = self.roots.resolve(reference)
            return _Place(path, self._artifact_of(path))
        artifact = self.store.artifacts.find(reference)
        if artifact is not None:
            if artifact.kind != kind:
                raise ArgumentError(
                    "invalid_argument",
                    f"Artifact {reference} is a {artifact.kind} artifact, and {kind} is needed here.",
                    value=reference,
                    nearest=[other.artifact_id for other in self.store.artifacts.list(kind=kind)][:3],
                    fix=f"Give a reference to {kind}.",
                )
            return _Place(artifact.path, artifact.artifact_id)
        products = self._run_products(reference)
        if products is not None:
            return self._product_place(reference, products, kind)
        if "/" in reference or reference.startswith((".", "~")) or reference.endswith(FILE_SUFFIXES):
            return _Place(self.roots.resolve(reference))
        raise self._unknown(reference, kind)

    def _product_place(self, run_id: str, products: dict[str, str], kind: ArtifactKind) -> _Place:
        artifact = self.store.artifacts.find(products[kind]) if kind in products else None
        if artifact is None:
            raise UnknownIdError(
                "unknown_artifact",
                f"Run {run_id} has made no {kind}" + (f", but: {', '.join(products)}." if products else " yet."),
                value=run_id,
                fix="Wait until the run has succeeded.",
                call=next_call("get_run_status", run_id=run_id, wait_seconds=25),
            )
        return _Place(artifact.path, artifact.artifact_id)

    def _artifact_of(self, path: Path) -> str | None:
        for parent in (path, *path.parents):
            if parent.parent.parent == self.workspace.artifacts:
                found = self.store.artifacts.find(parent.name)
                return found.artifact_id if found else None
        return None

    def _unknown(self, reference: str, kind: ArtifactKind) -> UnknownIdError:
        known = [artifact.artifact_id for artifact in self.store.artifacts.list(kind=kind)] + run_ids(self.workspace)
        known += [row.name for row in self.store.index.runs() if row.name]
        return UnknownIdError(
            "unknown_artifact",
            "This is neither an absolute path, nor an artifact or run of this workspace, nor a Hub id.",
            value=reference,
            nearest=nearest(reference, known),
            fix="Give an absolute path below an allowed root, an artifact id, a run's id or name, or a Hub id "
            "(org/name, of data org/name:configuration@split), for prompts also reasoning_gym:TASK; the set-up lists "
            "the roots.",
            call=next_call("inspect_setup"),
        )

    def _hub_id(self, reference: str) -> str | None:
        if HUB_ID.fullmatch(reference) is None or reference.endswith(FILE_SUFFIXES) or self._exists_here(reference):
            return None
        return reference

    def _exists_here(self, reference: str) -> bool:
        # A relative path looks like a Hub id; where the caller, or a root, has such a file, a path was meant.
        return any((folder / reference).exists() for folder in (Path.cwd(), *self.roots.roots))

    def _inline_prompts(self, prompts: Sequence[str], long_bytes: int) -> ResolvedPrompts:
        rows = [PromptRow(id=str(index), prompt=prompt) for index, prompt in enumerate(prompts)]
        fix = "Give at least one prompt, none of them empty."
        if not rows:
            raise DataError("empty_data", "The inline list holds no prompts.", fix=fix)
        for index, prompt in enumerate(prompts):
            if not prompt.strip():
                raise DataError("missing_field", f"Inline prompt {index} is empty.", value=index, fix=fix)
        scan = scan_of_rows(rows, long_bytes=long_bytes)
        sha256 = scan.sha256
        lines = [json.dumps({"id": row.id, "prompt": row.prompt}, ensure_ascii=False) + "\n" for row in rows]
        artifact = self._kept_prompts(sha256, lambda file: file.write_text("".join(lines), encoding="utf-8"))
        resolved = DataInput(
            reference="inline",
            path=str(artifact.path),
            artifact_id=artifact.artifact_id,
            sha256=sha256,
            rows=len(rows),
            rows_with_answer=0,
        )
        return ResolvedPrompts(resolved, scan)

    def _task_place(self, reference: str) -> _Place:
        task = task_prompts(reference)
        artifact = self._kept_prompts(task.key(), lambda file: write_task_prompts(task, file))
        return _Place(artifact.path, artifact.artifact_id)

    def _kept_prompts(self, key: str, write: Callable[[Path], object]) -> Artifact:
        """The prompts artifact with this key, written to a file unless it is there."""
        artifact = self.store.artifacts.find_by_key("prompts", key)
        if artifact is not None:
            return artifact
        building = self.store.artifacts.new_building_directory("prompts")
        try:
            write(building / PROMPTS_FILE)
            return self.store.artifacts.publish("prompts", building, artifact_id=f"prompts-{key[:12]}", key=key)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def columns_of(columns: Mapping[str, str] | None, argument: str) -> dict[str, str] | None:
    """What `columns` says of one argument's data: the keys such as `eval_prompts.prompt`, else those without a prefix.

    Raises ArgumentError `invalid_argument` for the prefix of no argument.
    """
    if not columns:
        return None
    for key in columns:
        prefix = key.rpartition(".")[0]
        if prefix and prefix not in DATA_ARGUMENTS:
            raise ArgumentError(
                "invalid_argument",
                f"columns names no argument with data: {prefix[:100]!r}.",
                value=key,
                nearest=nearest(prefix, DATA_ARGUMENTS),
                fix="Give e.g. {'prompt': 'question'}, or {'eval_prompts.prompt': 'problem'} for one argument alone.",
            )
    own = {key.rpartition(".")[2]: path for key, path in columns.items() if key.rpartition(".")[0] == argument}
    return own or {key: path for key, path in columns.items() if "." not in key} or None
