"""Loading causal language models and tokenizers: safetensors only, no remote code, files on disk only."""

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.encoding import chat_of, limited_rendering
from opd_mcp.engine.losses.logit_tiles import kernel_problem
from opd_mcp.engine.models.attention import padding_warning, use_packed_attention
from opd_mcp.engine.models.compiled import compile_layers
from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.kv_cache import decoding_problem
from opd_mcp.engine.models.lora import add_adapter, load_adapter, merge, quantise, require_continuable
from opd_mcp.engine.runtime import Runtime
from opd_mcp.identity.chat.tokenizer import unusable_tokenizer
from opd_mcp.identity.encoding import require_own_tokenizer, special_tokens
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.models import ModelFacts, inspect_model, require_decodable, undecodable
from opd_mcp.identity.safetensors import read_tensors
from opd_mcp.identity.tokenizers import TOKENIZER_FILE, chat_template, token_map
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.recipes import AdapterRecipe, PromptingRecipe, base_form

# its bars would fill a worker's log; a stage reports its progress through its Reporter
disable_progress_bar()

GENERATION_CONFIG = "generation_config.json"
# what a model computes with besides its weights and tokenizer, which have hashes of their own
MODEL_FILES = ("config.json", GENERATION_CONFIG)
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    # the same tokenizer in older forms, which e.g. llama.cpp's converter reads
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tekken.json",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, the facts of its directory, and why its layers are not compiled on a GPU, if they are not."""

    model: PreTrainedModel
    facts: ModelFacts
    path: Path
    plain_layers: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """V of the head, padding included."""
        return int(self.model.get_output_embeddings().weight.shape[0])


def load_model(
    place: Path | ModelFacts,
    runtime: Runtime,
    *,
    for_training: bool = False,
    generates: bool = False,
    compiled: bool = True,
    adapter: AdapterRecipe | None = None,
) -> LoadedModel:
    """The model in a directory: fp32 master weights for training, the runtime's dtype otherwise.

    On CUDA a large model's layers are `compiled`, which takes some ten seconds. With `adapter` an adapter is trained
    on the frozen model. An adapter's directory is loaded with its base: kept apart from it where that is frozen,
    merged in float32 where all weights are trained. Its linear layers are held as the directory's facts say, where
    these are given, or as the adapter's recipe says. A model that ranks divide is mapped from its files where that can
    be: each rank then widens its own rows.

    Raises PathError `not_a_model` or `unsafe_weights` (from the inspection), `unsupported_model` for a configuration
    that transformers cannot build or, where it `generates`, a class that this engine does not decode rightly with a
    cache, or `unsupported_head` for a class whose logits are not its head applied to its decoder's last hidden state.
    """
    facts = place if isinstance(place, ModelFacts) else inspect_model(place, form=base_form(adapter))
    path = facts.path
    packed = facts.identity.quantization is not None
    whole = not runtime.divides or packed or facts.adapter is not None or adapter is not None
    mapped = None if whole else mapped_dtype(facts.weights_path)
    if generates:
        require_decodable(facts)
    trains_all = for_training and adapter is None
    dtype = (mapped or torch.float32) if trains_all else runtime.dtype
    if adapter is not None:
        if adapter.continue_adapter:
            require_continuable(facts.adapter, adapter, path)
        dtype = frozen_dtype(adapter, facts.weights_path, runtime)
    # what is quantised are the stored values, whatever a run computes in: all of its stages then have the same weights
    read_as = stored_dtype(facts.weights_path) if packed else dtype
    if runtime.device.type == "cuda":
        gc.collect()  # compiled layers hold one another, so an earlier model may still be there
    try:
        model = AutoModelForCausalLM.from_pretrained(
            facts.weights_path,
            dtype=read_as,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # of any kind, for a configuration or sizes that cannot be
        if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise PathError(
            "unsupported_model",
            f"transformers cannot build this model ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}).",
            value=path,
            fix="Look at model_type, architectures, hidden_act and the sizes in its config.json; give a causal "
            "language model of an architecture that the installed transformers has.",
        ) from error
    if packed:
        quantise(model, runtime.device)
        cast(model, dtype)
    model = model.to(runtime.device)
    if facts.adapter is not None:
        load_adapter(model, facts.adapter, trained=adapter is not None and adapter.continue_adapter)
    if adapter is not None and not adapter.continue_adapter:
        add_adapter(model, adapter, runtime.seed)
    if trains_all and facts.adapter is not None:
        merge(model)
    model.train(for_training)
    with nullcontext() if mapped is None else widened_as_used(model):
        computed_in = model.dtype if mapped is None else torch.float32
        _require_plain_head(model, path, computed_in)
        use_packed_attention(model, computed_in)
    if generates and (wrong := decoding_problem(model)) is not None:
        raise undecodable(facts, wrong)
    problem = compile_layers(model, autocast=for_training and runtime.trains_in_autocast) if compiled else None
    return LoadedModel(model, facts, path, problem)


def frozen_dtype(recipe: AdapterRecipe, weights: Path, runtime: Runtime) -> torch.dtype:
    """What the frozen weights in this directory are kept in.

    float32 ones stay so by default: a student that was merged in float32 would lose most of what it learnt in bf16.
    """
    if recipe.base_dtype != "auto":
        return getattr(torch, recipe.base_dtype)
    return torch.float32 if stored_dtype(weights) is torch.float32 else runtime.dtype


@torch.no_grad()
def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the floating-point weights this dtype in place, but for those that their class always keeps in float32."""
    always, saved = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()), set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wide = not always.isdisjoint(name.split("."))
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if wide else dtype)


@contextmanager
def widened_as_used(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a module that runs has its own weights in float32, whatever the model holds them in."""
    held: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, given: object) -> None:
        for weight in module.parameters(recurse=False):
            held[weight] = weight.data
            weight.data = weight.data.float()

    def give_back(module: nn.Module, given: object, output: object) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = held.pop(weight)

    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(give_back) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, data in held.items():  # of modules that failed
            weight.data = data


def mapped_dtype(weights: Path) -> torch.dtype | None:
    """What all weights in a directory are stored in, if the files can be mapped: nothing is then read before its use.

    transformers copies what it converts.
    """
    found = {tensor.dtype for tensor in read_tensors(weights)}
    return STORED_DTYPES.get(found.pop()) if len(found) == 1 else None


def stored_dtype(weights: Path) -> torch.dtype:
    """The dtype of most of the weights in a directory; bfloat16 for those that are narrower than 16 bits."""
    values: dict[str, int] = {}
    for tensor in read_tensors(weights):
        values[tensor.dtype] = values.get(tensor.dtype, 0) + tensor.elements
    return STORED_DTYPES.get(max(values, key=values.__getitem__), torch.bfloat16)


@torch.no_grad()
def _require_plain_head(model: PreTrainedModel, path: Path, computed_in: torch.dtype) -> None:
    ids = torch.arange(1, 5, device=model.device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    model.train(was_training)
    tolerance = 1e-3 if computed_in is torch.float32 else 0.1
    if not torch.allclose(head_logits(model, hidden), expected, atol=tolerance, rtol=tolerance):
        raise PathError(
            "unsupported_head",
            f"{type(model).__name__} changes its logits after the head in a way this engine does not know.",
            value=path,
            fix="Use a model class whose logits are its head applied to its last hidden state.",
        )


def model_warnings(context: Context, *models: LoadedModel | None) -> list[str]:
    """What makes these models slower than they could be, one sentence each, which are alerts as well.

    `padded_rows`: a class that does not pack; on a GPU `plain_head`: the head's kernel does not run, and
    `plain_layers`: the decoder layers are not compiled.
    """
    found: dict[str, str] = {}
    for model in models:
        if model is None:
            continue
        if (padding := padding_warning(model.model)) is not None:
            found[padding] = "padded_rows"
        device = model.model.device
        if device.type == "cuda" and (problem := kernel_problem(device)) is not None:
            found[f"The head runs in plain torch, without its kernel: {problem}."] = "plain_head"
        if model.plain_layers is not None:
            found[f"The decoder layers run in plain torch, more slowly: {model.plain_layers}."] = "plain_layers"
    for warning, code in found.items():
        context.reporter.alert(code, warning)
    return list(found)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, built of what its identity hashes: tokenizer.json, special tokens, one chat template.

    No class, template or file that another file names is followed. Raises PathError `not_a_model` or `unsafe_config`,
    IntegrityError `damaged_file`.
    """
    require_own_tokenizer(path)
    special = special_tokens(path, token_map(path))
    try:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path / TOKENIZER_FILE),
            chat_template=chat_template(path),
            model_specific_special_tokens=special.names,
            extra_special_tokens=list(special.extra),
            clean_up_tokenization_spaces=special.clean_up_spaces,
            split_special_tokens=special.split,
        )
    except Exception as error:  # tokenizers raises nothing more precise
        raise unusable_tokenizer(path, error) from error


def copy_tokenizer(source: Path, output: Path) -> None:
    """Copy the tokenizer's files, the chat template among them, to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        (output / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, output / name)


@dataclass(frozen=True)
class AdoptedTokenizer:
    """The tokenizer and template that a run uses for teacher and student alike, and where a response ends.

    Any of `eos_token_ids` ends a response that is drawn; `end_of_turn`, one of them, ends a response that is taught.
    Ids below `tokens` are in use.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    end_of_turn: int
    tokens: int
    path: Path

    def save(self, output: Path) -> None:
        """Write tokenizer files and stop ids to `output`, from where `adopt_tokenizer` reads them again."""
        copy_tokenizer(self.path, output)
        write_atomic(output / GENERATION_CONFIG, json.dumps({"eos_token_id": list(self.eos_token_ids)}))


def adopt_tokenizer(path: Path, prompting: PromptingRecipe) -> AdoptedTokenizer:
    """The tokenizer at `path` with the ids that end a response, as `ChatTokenizer.stop_ids` says; raises as it does."""
    tokenizer, tokens = load_tokenizer(path), token_map(path)
    with limited_rendering(1):
        stops, taught = chat_of(tokenizer, prompting).stop_ids(path)
    return AdoptedTokenizer(tokenizer, stops, taught, max(tokens) + 1, path)
