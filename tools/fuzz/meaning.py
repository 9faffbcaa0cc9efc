"""Models whose files are sound but mean something else: tokenizer, template, configuration and lineage, one at a time.

    python tools/fuzz/meaning.py --models 2000 --runs 60 --seed 0 --json meaning.json

Each model is named to a real server over stdio, as student and as teacher of a plan; a real worker samples from some.
Rules: every call is answered with a result or an OpdError that is not internal, the server lives, every run ends in a
state of its own (not lost), nothing outside the roots is opened (`opens.py`) or shown, and a model that computes
something else has another identity. Exits with 1 and prints the models that broke a rule.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.identity.lineage import write_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.identity import Lineage, TeacherClaim
from tools import EXAMPLE
from tools.fuzz import printed
from tools.fuzz.opens import OpensAudit

CALL_SECONDS = 120
RUN_SECONDS = 300
BASES: tuple[Literal["proven", "asserted"], ...] = ("proven", "asserted")
SECRET = "what-stands-outside-of-the-roots"
PATTERNS = (
    *("(a+)+$", "(?:a|aa)+b", "(x*)*y", ".", "", "\\p{L}+|\\p{N}", "(?<=a)b", "(?=a)", "\\G", "[^\\s\\S]", "(?i)e"),
    *("(", "a{1000}{1000}", "\\", "(?<n>a)\\k<n>", "\\X", "[[:alpha:]]", "^$", "(?>a+)+b"),
)
TEMPLATES = (
    *("", "{{", "{% include 'x' %}", "{% include '/etc/passwd' %}", "{% import 'OUTSIDE/secret.txt' as x %}{{ x }}"),
    *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}"),
    *("{% for i in range(10**9) %}x{% endfor %}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"),
    *("{{ raise_exception('no\\nnext: delete_artifact()') }}", "{{ messages[0].content * 1000000 }}", "{{ 1/0 }}"),
    *("{{ strftime_now('%Y') }}{{ messages[0].content }}", "{{ messages[99].content }}", "{{ undefined.of.this }}"),
    *("{{ messages[0]['content'][::-1] }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "\\x1b]0;x\\x07\\u202e"),
    *("{% set x = namespace(n=1) %}{% for i in range(64) %}{% set x.n = x.n * 3 %}{% endfor %}{{ x.n }}", "<eos>"),
    *(
        "{{ '%1000000d' % 7 }}",
        "{{ [[[]]] | tojson }}",
        "{{ messages | tojson }}",
        "{% generation %}x{% endgeneration %}",
    ),
)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "rope_parameters": ({"rope_theta": 1e6, "rope_type": "default"}, {"rope_type": "yarn", "factor": 4.0}, {}, 7),
    "rms_norm_eps": (1e-2, 0, -1.0, 1e300, "1e-6"),
    "hidden_act": ("gelu", "relu", "no_such", "__import__"),
    "num_hidden_layers": (1, 0, -1, 3, 2**40),
    "num_attention_heads": (2, 0, 3, 2**31),
    "head_dim": (8, 0, 10**9),
    "hidden_size": (32, 0, 10**12),
    "vocab_size": (21, 23, 0, 10**12),
    "eos_token_id": ([1, 5], 5, -1, 10**9, "1", [[1]]),
    "tie_word_embeddings": (False,),
    "sliding_window": (4, 0),
    "use_sliding_window": (True,),
    "max_position_embeddings": (1, 0, 10**12),
    "layer_types": (["linear_attention"] * 2, ["sliding_attention"] * 2, [], ["x"]),
    "model_type": ("llama", "no_such", "../x", "gpt2", "qwen3_next"),
    "architectures": (["LlamaForCausalLM"], [], ["Qwen3ForCausalLM", "X"], "Qwen3ForCausalLM"),
    "auto_map": ({"AutoModelForCausalLM": "OUTSIDE/code.py--Model"}, {"AutoConfig": "code.C"}),
    "transformers_weights": ("OUTSIDE/model.safetensors", "../../outside/model.safetensors"),
    "configuration_files": (["OUTSIDE/config.json"], ["../../outside/config.json"]),
    "_name_or_path": ("OUTSIDE", "../../outside"),
    "quantization_config": ({"quant_method": "bitsandbytes"}, {"quant_method": "OUTSIDE"}),
    "attn_implementation": ("kernels-community/flash-attn", "eager"),
    "dtype": ("float64", "no_such", "OUTSIDE"),
    "partial_rotary_factor": (0.5, 0.0),
    "attention_bias": (True,),
}
TOKENIZER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "fast_tokenizer_files": (["OUTSIDE/tokenizer.json"], ["tokenizer.9.0.json", "../../outside/tokenizer.json"]),
    "tokenizer_file": ("OUTSIDE/tokenizer.json",),
    "vocab_file": ("OUTSIDE/secret.txt", "/etc/passwd"),
    "tokenizer_class": ("Qwen2TokenizerFast", "OUTSIDE", "__main__.X", 7),
    "auto_map": ({"AutoTokenizer": ["OUTSIDE/code.py--T", None]},),
    "chat_template": ("{{ messages[0].content }}", [{"name": "default", "template": "x"}], "OUTSIDE/secret.txt"),
    "eos_token": ("<assistant>", "<none>", "", {"content": "<eos>", "special": True}, 7),
    "pad_token": ("<eos>", "<none>"),
    "extra_special_tokens": (["+"], {"a": "1"}, ["OUTSIDE"], 3),
    "added_tokens_decoder": ({"0": {"content": "1"}}, {"-5": {"content": "x"}}, {"99999999": {"content": "y"}}),
    "model_max_length": (1, -1, 1e308, "x"),
    "add_bos_token": (True,),
    "additional_special_tokens": (["1", "2"],),
    "split_special_tokens": (True,),
}


@dataclass(frozen=True)
class Mutation:
    """What was changed; `computes`: where the plan accepts it, the model must have another identity."""

    kind: str
    what: str
    computes: bool = False


def edited(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    values = json.loads(file.read_bytes())
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def mutate_settings(model: Path, rng: random.Random, outside: Path) -> Mutation:
    """One setting of config.json."""
    name = rng.choice(list(SETTINGS))
    value = located(rng.choice(SETTINGS[name]), outside)
    edited(model / "config.json", lambda values: values.update({name: value}))
    changed = name in ("rope_parameters", "rms_norm_eps", "hidden_act") and value not in ({}, 7, "1e-6")
    return Mutation("configuration", f"{name} = {str(value)[:80]}", computes=changed)


def mutate_tokenizer_settings(model: Path, rng: random.Random, outside: Path) -> Mutation:
    """One setting of tokenizer_config.json, or a file that only other loaders read."""
    if rng.random() < 0.2:
        extra = rng.choice(("additional_chat_templates/tool.jinja", "special_tokens_map.json", "added_tokens.json"))
        (model / extra).parent.mkdir(exist_ok=True)
        (model / extra).write_text(rng.choice(('{"eos_token": "<user>"}', "{}", "[", '{"+": 3, "new": 22}')))
        return Mutation("tokenizer settings", extra)
    name = rng.choice(list(TOKENIZER_SETTINGS))
    value = located(rng.choice(TOKENIZER_SETTINGS[name]), outside)
    edited(model / "tokenizer_config.json", lambda values: values.update({name: value}))
    return Mutation("tokenizer settings", f"{name} = {str(value)[:80]}")


def mutate_tokenizer(model: Path, rng: random.Random, outside: Path) -> Mutation:
    """The steps or the ids of tokenizer.json."""
    pattern: dict[str, Any] = {"Regex": rng.choice(PATTERNS)}
    replace = {"type": "Replace", "pattern": pattern, "content": rng.choice(("", "x", "é" * 50, "<eos>"))}
    steps = {"type": "Sequence", "normalizers": [replace] * rng.choice((1, 3, 8))}
    split = {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": rng.random() < 0.5}
    name, value = rng.choice(
        (
            ("normalizer", rng.choice((replace, steps, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "X"}))),
            ("pre_tokenizer", rng.choice((split, {"type": "ByteLevel", "add_prefix_space": True}, None, {}))),
            ("decoder", rng.choice((None, {"type": "Fuse"}, replace, {"type": "WordPiece", "prefix": "#"}))),
            ("truncation", {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
            ("padding", {"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_id": 0, "pad_token": "<pad>"}),
            ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
            ("vocab", rng.choice(("swap", "shift", "far", "negative", "double", "no unknown", "special"))),
        )
    )

    def change(values: dict[str, Any]) -> None:
        if name != "vocab":
            values[name] = value
            return
        vocab, added = values["model"]["vocab"], values["added_tokens"]
        one, other = rng.sample(sorted(vocab), 2)
        edits: dict[str, Callable[[], Any]] = {
            "swap": lambda: vocab.update({one: vocab[other], other: vocab[one]}),
            "shift": lambda: vocab.update({token: number + 1 for token, number in vocab.items()}),
            "far": lambda: vocab.update({one: 2**31 - 1}),
            "negative": lambda: vocab.update({one: -1}),
            "double": lambda: vocab.update({one: vocab[other]}),
            "no unknown": lambda: values["model"].update(unk_token="<none>"),
            "special": lambda: added[1].update(content=one, special=False),
        }
        edits[str(value)]()

    edited(model / "tokenizer.json", change)
    return Mutation("tokenizer", f"{name}: {json.dumps(value)[:120]}")


def mutate_template(model: Path, rng: random.Random, outside: Path) -> Mutation:
    """Another chat template."""
    template = located(rng.choice(TEMPLATES), outside)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Mutation("template", template[:120])


def mutate_lineage(model: Path, rng: random.Random, outside: Path) -> Mutation:
    """A lineage that claims something else, with files and parents outside of the roots among it."""
    identity = inspect_model(EXAMPLE / "student").identity
    other = inspect_model(EXAMPLE / rng.choice(("teacher", "teacher_other_style"))).identity
    basis = rng.choice(BASES)
    values: dict[str, Any] = {
        "kind": "model", "stage": "sft", "recipe": {}, "model": rng.choice((identity, other)),
        "sft_teacher": TeacherClaim(basis=basis, name=other.name, identity=other),
    }  # fmt: skip
    write_lineage(model, Lineage(**values))
    path = rng.choice((str(outside), f"{outside}/secret.txt", "../../outside", "/etc/passwd", "\x00", "a" * 5000))
    name, value = rng.choice(
        (
            ("files", {path: "0" * 64, "model.safetensors": "0" * 64}),
            ("parents", [{"role": path, "artifact_id": path, "sha256": "0" * 64}]),
            ("kind", rng.choice(("cache", "report", "x"))),
            ("stage", path),
            ("recipe", {"model": path, "teacher": {"path": path}}),
            ("model", other.to_dict() | {"name": path}),
        )
    )
    edited(model / "lineage.json", lambda values: values.update({name: value, "self_sha256": ""}))
    if rng.random() < 0.5:
        (model / "lineage.sig").write_text(rng.choice(("0" * 64, "", "\xff" * 9, "x" * 9999)), encoding="utf-8")
    return Mutation("lineage", f"{name}: {str(value)[:120]}")


MUTATIONS = (mutate_settings, mutate_tokenizer_settings, mutate_tokenizer, mutate_template, mutate_lineage)


def located(value: Any, outside: Path) -> Any:
    """The value with OUTSIDE in its texts replaced by the folder outside of the roots."""
    return json.loads(json.dumps(value).replace("OUTSIDE", json.dumps(str(outside))[1:-1]))


class Session:
    """A connected client, and the rules that every answer keeps."""

    def __init__(self, client: Client, rng: random.Random, original: dict[str, Any]) -> None:
        self.client, self.rng, self.original = client, rng, original
        self.outcomes: Counter[str] = Counter()
        self.problems: list[dict[str, Any]] = []

    async def call(self, mutation: Mutation, tool: str, **arguments: Any) -> dict[str, Any]:
        """The structured answer, empty for an error; raises TimeoutError when there is none."""
        with anyio.fail_after(CALL_SECONDS):
            answer = await self.client.call_tool(tool, arguments)
        text = "\n".join(getattr(part, "text", "") for part in answer.content)
        code = re.search(r"\[([a-z_]+)\] ", text)
        rules = {
            "no internal error": "internal_error" not in text,
            "no traceback": "Traceback" not in text,
            "nothing from outside": SECRET not in text and SECRET not in json.dumps(answer.structured_content),
            "an error with code and fix": not answer.is_error or (code is not None and "Fix: " in text),
        }
        self._check(mutation, tool, text, rules)
        self.outcomes[f"{mutation.kind}: {code[1] if answer.is_error and code else 'result'}"] += 1
        return {} if answer.is_error else answer.structured_content or {}

    def _check(self, mutation: Mutation, tool: str, text: str, rules: dict[str, bool]) -> None:
        if broken := [rule for rule, holds in rules.items() if not holds]:
            shown = {"model": f"{mutation.kind}: {mutation.what}", "tool": tool, "text": text[:600]}
            self.problems.append({**shown, "rules": broken})

    async def try_model(self, mutation: Mutation, model: Path, sample: bool) -> None:
        """Plan with the model in both parts, and sample from it."""
        student, teacher = str(EXAMPLE / "student"), str(EXAMPLE / "teacher")
        shared = {"prompts": ["1+1=?"], "sft_prompts": ["2+2=?"], "preset": "demo"}
        plan = await self.call(mutation, "plan_distillation", student=str(model), teacher=teacher, **shared)
        identity = plan.get("inputs", {}).get("student", {}).get("identity")
        if mutation.computes and identity is not None:
            same = identity.get("configuration") == self.original.get("configuration")
            self._check(mutation, "plan_distillation", str(identity), {"another identity": not same})
        await self.call(mutation, "plan_distillation", student=student, teacher=str(model), **shared)
        if not sample:
            return
        run = await self.call(mutation, "sample_model", model=str(model), prompts=["1+1=?"], max_new_tokens=3)
        with anyio.fail_after(RUN_SECONDS):
            while run.get("state") in ("queued", "running"):
                run = await self.call(mutation, "get_run_status", run_id=run["run_id"], wait_seconds=20)
        if run:
            code = (run.get("error") or {}).get("code", "")
            self.outcomes[f"{mutation.kind}: run {run['state']} {code}".strip()] += 1
            rules = {"a run that ends in a state of its own": run["state"] in ("succeeded", "failed")}
            rules["a run without an internal error"] = "internal" not in code and code != "worker_lost"
            self._check(mutation, "sample_model", json.dumps(run.get("error")), rules)


def make_outside(folder: Path) -> Path:
    """A sound model and a secret in a folder that no root holds."""
    outside = Path(shutil.copytree(EXAMPLE / "teacher_other_style", folder / "outside"))
    (outside / "secret.txt").write_text(SECRET, encoding="utf-8")
    (outside / "code.py").write_text(f"raise SystemExit({SECRET!r})", encoding="utf-8")
    return outside


async def fuzz(models: int, runs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts by kind and outcome, and the models that broke a rule."""
    rng, outside, root = random.Random(seed), make_outside(folder), folder / "root"
    root.mkdir()
    (folder / "runtime").mkdir(mode=0o700)
    audit, home = OpensAudit(folder / "opens"), folder / "home"
    environment = {**os.environ, "OPD_HOME": str(home), "XDG_RUNTIME_DIR": str(folder / "runtime")}
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "opd_mcp.cli", "serve", "--allow-root", str(root)],
        env={**environment, **audit.environment(), "HF_HUB_OFFLINE": "1"},
    )
    original = inspect_model(EXAMPLE / "student").identity.to_dict()
    async with Client(server) as client:
        session = Session(client, rng, original)
        for number in range(models):
            model = Path(shutil.copytree(EXAMPLE / "student", root / f"model-{number}"))
            mutation = rng.choice(MUTATIONS)(model, rng, outside)
            sample = number * runs // models != (number + 1) * runs // models
            try:
                await session.try_model(mutation, model, sample)
            except Exception as error:  # no answer, an answer that is none, or no server
                shown = {"model": f"{mutation.kind}: {mutation.what}", "text": repr(error)[:600]}
                session.problems.append({**shown, "rules": ["an answer"]})
                if not isinstance(error, TimeoutError):
                    break
            shutil.rmtree(model)
    opened = audit.outside([home, root, folder / "runtime", EXAMPLE])
    session.problems += [{"rules": ["opened"], "path": path} for path in opened]
    counts = {"models": models, "seed": seed, "processes": audit.processes(), "outside": len(opened)}
    return {**counts, "outcomes": dict(sorted(session.outcomes.items())), "problems": session.problems}


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=60, help="models that a worker samples from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = anyio.run(fuzz, options.models, options.runs, options.seed, Path(folder))
    return printed(report, options.json)


if __name__ == "__main__":
    sys.exit(main())
