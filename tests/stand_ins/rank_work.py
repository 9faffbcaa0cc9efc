"""One rank of a test: `python rank_work.py CASES.json RANK` does what the cases say and leaves `answer-RANK.json`.

Without arguments it is a rank of a real worker's team, whose facts on stdin have the case.
"""

import ctypes
import gc
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_mcp.engine.context import Context, RankPlace, SilentReporter
from opd_mcp.engine.data.batches import StepData, stored_batches
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE, Sampled, TopkReverseKl, distill_objective
from opd_mcp.engine.models.attention import packs, use_packed_attention
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.models.lora import add_adapter
from opd_mcp.engine.runtime import Runtime, loading_runtime, return_large_blocks
from opd_mcp.engine.training.activations import checkpointed_activations
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.optim import build_optimizer
from opd_mcp.engine.training.rank_step import accumulate_on_ranks
from opd_mcp.engine.training.ranks import joined
from opd_mcp.engine.training.sharding import ShardedModel, local, sharded
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients, sft_metrics
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.memory import TILE_BYTES
from opd_mcp.schemas.recipes import (
    AdapterRecipe,
    CheckpointRecipe,
    DistillRecipe,
    Estimator,
    OptimizerRecipe,
    RuntimeRecipe,
)
from opd_mcp.worker.teams.rank_process import Channel, ChannelReporter, is_group_failure, line_of
from opd_mcp.worker.teams.ranks import DONE, FAILED, described

VOCAB = 103  # no multiple of the ranks
SIZES = {
    "even": ((5, 20), (9, 3), (4, 33), (7, 0), (3, 12), (8, 1), (2, 40)),
    "odd": ((5, 20), (9, 3), (4, 33), (7, 0), (3, 12), (2, 40)),
    "one": ((5, 20), (7, 0)),
}
ESTIMATORS = get_args(Estimator)
OBJECTIVES = {"sft": SFT_OBJECTIVE, "sampled": Sampled(1.0), "topk": TopkReverseKl(4, 10.0)}
OBJECTIVES |= {f"of {name}": distill_objective(DistillRecipe(estimator=name, topk=4)) for name in ESTIMATORS}


def model_of(*, tied: bool, dtype: torch.dtype = torch.float64, adapter: bool = False, **sizes: int):
    """A tiny model; with `capped` its head has a bias, and its logits a soft cap."""
    capped = sizes.pop("capped", 0)
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
    }
    config = Qwen3Config(**(settings | sizes), tie_word_embeddings=tied, initializer_range=0.3)
    model = Qwen3ForCausalLM(config).to(dtype).train()
    if adapter:
        add_adapter(model, AdapterRecipe(rank=2), seed=1)
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(2))
    if capped:
        model.config.final_logit_softcapping = float(capped)
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.config.vocab_size, dtype=dtype))
    assert use_packed_attention(model)
    return model


def rows_of(sizes: tuple[tuple[int, int], ...]) -> Sequences:
    rng, k = np.random.default_rng(0), 4
    prompts = [rng.integers(0, VOCAB, prompt).tolist() for prompt, _ in sizes]
    responses = [rng.integers(0, VOCAB, response).tolist() for _, response in sizes]
    n = sum(response for _, response in sizes)
    columns = {
        "teacher_logprobs": -rng.exponential(size=n).astype(np.float32) * 3,
        "topk_ids": np.stack([rng.permutation(VOCAB)[:k] for _ in range(n)]).astype(np.int32),
        "topk_logprobs": np.log(rng.dirichlet(np.ones(k + 1), n)[:, :k]).astype(np.float32),
    }
    return build_sequences(prompts, responses, columns=columns)


def whole_gradients(parts: ShardedModel) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in parts.trained().items():
        assert weight.grad is not None, name
        found[name] = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
    return found


def by_mean(parts: ShardedModel) -> None:
    """The mutation: layers' gradients are means over the ranks."""
    for module in parts.model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(False)
            module.set_gradient_divide_factor(float(parts.ranks.size))


def gradients(case: dict[str, Any], place: RankPlace) -> dict[str, float]:
    """By case, the worst relative difference of loss, log-probs and gradients from one process's."""
    device, answer = torch.device("cpu"), {}
    runtime = Runtime(device, getattr(torch, case.get("dtype", "float32")), 0)
    ranks, data = joined(place, device).replicated(case.get("replicas", 1)), rows_of(SIZES[case["data"]])
    step = StepData(data, np.arange(len(data)))
    reweigh = (lambda tokens: 1 + tokens.logprobs.detach().abs()) if case.get("reweigh") else None
    TILE_BYTES["cpu"] = case.get("tile_bytes", 1 << 26)
    settings_of_model = {name: case[name] for name in ("adapter", "capped") if name in case}
    for tied, normalize, budget, name in case["cases"]:
        settings = StepSettings(normalize, budget, runtime)
        kind = torch.float64 if runtime.dtype is torch.float32 else torch.float32
        reference = model_of(tied=tied, dtype=kind, **settings_of_model)
        want = accumulate_gradients(reference, step, OBJECTIVES[name], settings, reweigh=reweigh)
        parts = sharded(model_of(tied=tied, dtype=kind, **settings_of_model), ranks, runtime)
        parts = replace(parts, divides_steps=bool(case.get("divided")))
        if case.get("break") == "mean":
            by_mean(parts)
        with checkpointed_activations(parts.model, case.get("policy", "none")):
            got = accumulate_on_ranks(parts, step, OBJECTIVES[name], settings, reweigh=reweigh)
        found = whole_gradients(parts)
        expected = {name: weight.grad for name, weight in reference.named_parameters() if weight.grad is not None}
        assert found.keys() == expected.keys()
        worst = abs(got.loss - want.loss) / abs(want.loss)
        for key, gradient in expected.items():
            worst = max(worst, ((found[key] - gradient).abs().max() / gradient.abs().max()).item())
        difference = (got.logprobs.sort().values - want.logprobs.sort().values).abs().max().item()
        assert (got.tokens, sum(got.lengths)) == (want.tokens, sum(want.lengths))
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e-3)
        worst = max(worst, abs(parts.clipped_norm(1e-3) / float(norm) - 1))
        clipped = whole_gradients(parts)
        for key, weight in expected.items():
            worst = max(worst, ((clipped[key] - weight).abs().max() / weight.abs().max()).item())
        answer[f"{tied}/{normalize}/{budget}/{name}"] = max(worst, difference)
    return answer


def memory(case: dict[str, Any], place: RankPlace) -> int:
    """Bytes that a training adds at most to this process in its steps: weights, gradients, moments and what a step
    needs; `alone`: without ranks.
    """
    return_large_blocks()
    data, device = rows_of(((16, 48),) * 8), torch.device("cpu")
    runtime = Runtime(device, torch.float32, 0)
    ranks = joined(place, device)
    before = statistic("VmRSS")
    model = model_of(tied=False, dtype=torch.float32, **case["sizes"])
    step, settings = StepData(data, np.arange(len(data))), StepSettings("sample", 128, runtime)
    parts = None if case.get("alone") else sharded(model, ranks, runtime)
    parts = parts and replace(parts, divides_steps=bool(case.get("divided")))
    weights = model.parameters() if parts is None else parts.trained().values()
    optimizer = build_optimizer(model, OptimizerRecipe(), seed=0, weights=weights)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):  # the first one has no moments
        if parts is None:
            accumulate_gradients(model, step, SFT_OBJECTIVE, settings)
        else:
            accumulate_on_ranks(parts, step, SFT_OBJECTIVE, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return statistic("VmHWM") - before


def loading(case: dict[str, Any], place: RankPlace) -> dict[str, float]:
    """The most memory of its own that a rank held while it loaded and divided the model in `path`, in bytes, the
    model's bytes in float32, and whether all of its rows are those of the model that one process loads.
    """
    device, path = torch.device("cpu"), Path(case["path"])
    return_large_blocks()
    runtime = Runtime(device, torch.float32, 0)
    context, ranks = Context(ranks=place), joined(place, device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, most, ended = statistic("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            most[0] = max(most[0], statistic("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load_model(path, loading_runtime(runtime, context), for_training=True)
    parts = sharded(loaded.model, ranks, runtime)
    ended.set()
    watcher.join()
    whole = dict(load_model(path, runtime, for_training=True).model.named_parameters())
    same = [parts.weights().keys() == whole.keys()]
    for name, weight in parts.weights().items():
        gathered = weight.full_tensor() if isinstance(weight, DTensor) else weight
        same.append(gathered.dtype is torch.float32 and torch.equal(gathered, whole[name]))
    size = sum(weight.numel() * 4 for weight in whole.values())
    return {"most": most[0] - before, "whole": size, "same": all(same), "packs": packs(loaded.model)}


def statistic(name: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


class Recorder(SilentReporter):
    """Keeps what is reported, and acts before a step."""

    def __init__(self, before: Callable[[int], bool]) -> None:
        self.before, self.step, self.alerts, self.resumed_at = before, 0, [], None
        self.losses: dict[int, float] = {}

    def metric(self, step: int, values: Any) -> None:
        self.step = step
        self.losses[step] = values["loss"]

    def alert(self, code: str, message: str) -> None:
        self.alerts.append(code)

    def resumed(self, step: int) -> None:
        self.step = self.resumed_at = step

    def should_stop(self) -> bool:
        return self.before(self.step)


def training(case: dict[str, Any], place: RankPlace, channel: Channel | None = None) -> dict[str, Any]:
    """Train with checkpoints, and write the whole state at the end to `state.safetensors`; 0 steps: only restore."""

    def before(step: int) -> bool:
        if case.get("kill") == [place.rank, step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if case.get("renamed"):  # so that the same step is saved once more
            dist.barrier()  # no rank is still restoring from it: in a training the first step sees to that
            if place.rank == 0:
                saved = Path(case["folder"]) / f"step-{step:08d}"
                saved.rename(saved.with_name(f"before-{len(list(saved.parent.iterdir()))}"))
        return step == case.get("stop")

    model = model_of(tied=case.get("tied", True), dtype=torch.float32, adapter=case.get("adapter", False))
    data, reporter = rows_of(tuple((5, 20 + i % 7) for i in range(24))), Recorder(before)
    settings = LoopSettings(case["steps"], OptimizerRecipe(learning_rate=1e-2), "token", 60, case.get("policy", "none"))
    steps = stored_batches(data, steps=case["steps"], batch_size=6, seed=3, scope="test")
    task = TrainingTask(settings, steps, SFT_OBJECTIVE, sft_metrics, "base" if case.get("adapter") else None)
    context = Context(
        reporter=reporter if channel is None or place.rank else ChannelReporter(channel),
        check_fence=(lambda: None) if channel is None or place.rank else (lambda: channel.ask("check_fence")),
        checkpoints=Path(case["folder"]),
        runtime=RuntimeRecipe(vocabulary=case.get("vocabulary", "auto"), replicas=case.get("replicas", "auto")),
        checkpoint=CheckpointRecipe(steps=case.get("every", 2)),
        ranks=replace(place, nodes=case.get("nodes", 1)) if case.get("ranked", True) else None,
    )
    torch.manual_seed(7)
    runtime = Runtime(torch.device("cpu"), getattr(torch, case.get("dtype", "float32")), 0)
    held: list[str] = []
    make_whole = ShardedModel.make_whole

    def note_and_make_whole(parts: ShardedModel) -> None:
        held.append(digest(parts))
        make_whole(parts)

    ShardedModel.make_whole = note_and_make_whole
    try:
        summary = train(model, task, runtime, context)
        stopped, vocabulary, replicas = None, summary.vocabulary, summary.replicas
    except RunError as error:
        stopped, vocabulary, replicas = error.code, None, None
    finally:
        ShardedModel.make_whole = make_whole
    if not stopped and place.rank == 0:
        tensors = {name: weight.detach().clone().contiguous() for name, weight in model.named_parameters()}
        save_file(tensors, Path(case["output"]))
    told = {"losses": reporter.losses, "alerts": reporter.alerts, "resumed": reporter.resumed_at, "stopped": stopped}
    return {**told, "vocabulary": vocabulary, "replicas": replicas, "held": held}


def digest(parts: ShardedModel) -> str:
    """The hash of what this rank holds of the weights."""
    found = hashlib.sha256()
    for weight in parts.weights().values():
        found.update(local(weight).detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def main(case_file: Path, rank: int) -> None:
    torch.set_num_threads(1)
    given = json.loads(case_file.read_bytes())
    place = RankPlace(rank, given["size"], case_file.parent, 60.0)
    done = {"gradients": gradients, "training": training, "memory": memory, "loading": loading}
    answers = [done[case["what"]](case, place) for case in given["cases"]]
    (case_file.parent / f"answer-{rank}.json").write_text(json.dumps(answers))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def in_team() -> None:
    """Train as a rank of a worker's team."""
    facts = json.loads(sys.stdin.buffer.read())
    torch.set_num_threads(1)
    channel = Channel(line_of(facts))
    place = RankPlace(**{**facts["place"], "folder": Path(facts["place"]["folder"])})
    status = 1
    try:
        training(facts["case"], place, channel)
        if place.rank == 0:
            channel.tell(DONE, json.dumps(facts["summary"]))
        status = 0
    except BaseException as error:
        channel.tell(FAILED, described(error, group=is_group_failure(error)))
    os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        in_team()
