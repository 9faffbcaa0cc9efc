"""Who is who: the identities of models and data, and the lineage that travels with every artifact."""

from typing import Any, Literal

from pydantic import Field

from opd_mcp.schemas.base import Record, Schema, unchanged

Quantization = Literal["nf4"]
BaseForm = Literal["as_saved", "plain", "nf4"]
"""How a model's weights, or its base's, are held: as its directory says, or regardless of that."""
ArtifactKind = Literal["prompts", "responses", "model", "cache", "report"]


class TeacherContext(Schema):
    """What a teacher sees that its student does not, by sha256 in hex."""

    system: str | None = Field(None, description="of the system prompt that it alone sees")
    rows: str | None = Field(None, description="of the prompts' own messages for it; absent where no prompt has any")


class ModelIdentity(Schema):
    """Separate hashes of what makes two models the same; each is sha256 in hex.

    `weights` covers tensor names, dtypes, shapes and sampled bytes, whatever the files are called or how they
    are sharded, so a Hub model and its local copy are one identity. `weights_full` covers every byte and is
    computed by the worker only. Records of earlier versions have no `configuration` and no `encoding`: what is absent
    on either side is not compared, so such a record still means every model of its weights, whatever its settings.
    """

    name: str
    weights: str
    configuration: str | None = Field(
        None, description="the settings that decide what the weights compute, in a normal form"
    )
    tokenizer: str = Field(description="the id → token map")
    encoding: str | None = Field(None, description="how text becomes ids, besides that map")
    chat_template: str | None = None
    special_tokens: str = Field(description="EOS ids and the special tokens' names")
    quantization: Quantization | None = Field(
        None, description="the model is the one whose linear layers have been quantised and dequantised; in `weights`"
    )
    weights_full: str | None = None
    remote: Literal["served", "named"] | None = Field(
        None, description="a teacher on a server: `served` gives its hashes itself, `named` has only a declared name"
    )
    probe: list[float] | None = Field(None, description="a remote teacher's log-probs of the probe sequence")
    context: TeacherContext | None = Field(
        None, description="what the model sees, as a teacher, before the student's prompts; absent: nothing more"
    )
    members: dict[str, "ModelIdentity"] | None = Field(
        None, description="of several teachers each, by the domain of its prompts; the other hashes are over them all"
    )

    def same_model(self, other: "ModelIdentity") -> bool:
        """Whether both compute the same log-probs of the same ids: weights and configuration."""
        return not self.differences(other) & {"weights", "configuration"}

    def differences(self, other: "ModelIdentity") -> set[str]:
        """The names of the hashes that differ, `weights_full` left out; what only one side knows is not compared."""
        known = {name for name in ("configuration", "encoding") if getattr(self, name) and getattr(other, name)}
        compared = {"weights", "tokenizer", "chat_template", "special_tokens"} | known
        return {name for name in compared if getattr(self, name) != getattr(other, name)}

    def same_context(self, other: "ModelIdentity") -> bool:
        """Whether both, as teachers, see the same system prompt, and both or neither have messages of prompts' own.

        Those messages belong to prompts, and SFT and distillation have different ones.
        """
        mine, theirs = self.context or TeacherContext(), other.context or TeacherContext()
        return mine.system == theirs.system and (mine.rows is None) == (theirs.rows is None)

    def label(self) -> str:
        """Readable and unambiguous: the name, twelve digits of the weights' hash, six of the configuration's.

        A teacher's context has six digits as well.
        """
        context = f"+context-{self.context.content_hash()[:6]}" if self.context else ""
        if self.members:
            return ", ".join(f"{domain}: {member.label()}" for domain, member in self.members.items()) + context
        configuration = f"+{self.configuration[:6]}" if self.configuration else ""
        quantization = f"+{self.quantization}" if self.quantization else ""
        return f"{self.name}@{self.weights[:12]}{configuration}{quantization}{context}"


class RemoteTeacher(Schema):
    """A teacher behind a URL. Its key is in the caller's environment, never in a record."""

    name: str = Field(description="the model's name on the server, and its declared identity")
    url: str


class TeacherClaim(Schema):
    """Which teacher's responses a student or data set comes from, and how that is known."""

    basis: Literal["proven", "asserted", "by_construction"] = Field(
        description="by_construction: the student is the teacher itself, which an SFT would teach nothing"
    )
    name: str
    identity: ModelIdentity | None = Field(None, description="absent when only a name was declared")

    def label(self) -> str:
        """The teacher's label, as precise as the claim allows."""
        return self.identity.label() if self.identity else f"{self.name} (by name only)"


class Parent(Schema):
    """One input of an artifact."""

    role: str
    identity: ModelIdentity | None = None
    sha256: str | None = Field(None, description="content hash of a data input")
    artifact_id: str | None = None


class AdapterOrigin(Schema):
    """The adapter of a training: what it was trained on, where it began, and how the student was saved."""

    base: ModelIdentity = Field(description="the frozen weights, those of an adapter's own base")
    rank: int
    scale: float = Field(description="the factor of the product BA")
    start: Literal["zero", "continued"] = Field(
        description="zero: π_ref is the student as it was given; continued: its own adapter was trained on"
    )
    saved: Literal["adapter", "merged", "both"]
    quantization: Quantization | None = Field(
        None,
        description="the base's linear layers were quantised: π_ref, what was trained and a merged student have the "
        "dequantised weights, not the original ones",
    )
    kernel: str | None = Field(None, description="what dequantised in the training, with its version")


class EngineFacts(Schema):
    """The engine that generated or scored rows; absent in a record: this program's own."""

    name: str = Field(description="vllm, sglang, or opd-mcp for `serve-teacher`")
    version: str | None = Field(None, description="as the server says; absent where it does not")
    dtype: str | None = Field(None, description="what it computes in, where that is known")
    managed: bool = Field(False, description="whether the worker started it on the model's own files")

    def label(self) -> str:
        """Readable: name, version, dtype, as far as they are known."""
        return " ".join(part for part in (self.name, self.version, self.dtype) if part)


class Lineage(Record):
    """`lineage.json`: where an artifact's content comes from; it stays true when the directory is copied."""

    upgrades = (unchanged,)  # 2: sealed
    kind: ArtifactKind
    stage: str
    recipe: dict[str, Any] = Field(description="the resolved section that made it, with runtime and prompting")
    model: ModelIdentity | None = Field(None, description="the model in this directory, when there is one")
    sft_teacher: TeacherClaim | None = Field(
        None, description="whose responses the model was fine-tuned on, or the responses are"
    )
    distilled_from: ModelIdentity | None = Field(None, description="the teacher of the distillation, if any")
    adapter: AdapterOrigin | None = Field(None, description="absent where all weights were trained")
    teacher_mismatch_allowed: bool = False
    special_tokens_differ: str | None = Field(
        None, description="special tokens that the teacher's tokenizer and the student's own have at other ids"
    )
    parents: list[Parent] = Field(default_factory=list)
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of each data file")
    versions: dict[str, str] = Field(default_factory=dict)
    engines: dict[str, EngineFacts] | None = Field(
        None, description="by stage, what generated or scored the rows where that was not this program's own engine"
    )
    rendered_at: str | None = Field(
        None, description="the moment in UTC that prompts were written with, where the chat template asks for the time"
    )
