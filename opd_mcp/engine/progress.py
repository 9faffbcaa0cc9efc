"""How far a stage is and what it took, told the same way by all of them."""

import time
from collections.abc import Callable

import torch

from opd_mcp.engine.context import Context
from opd_mcp.engine.losses.kernels import kernel_problem
from opd_mcp.engine.models.attention import padding_warning
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.runtime import hardware_name
from opd_mcp.engine.training.loop import require_going
from opd_mcp.schemas.reports import StageCost


def counter(context: Context, total: int, unit: str, before: int = 0) -> Callable[[int], None]:
    """A listener for a batch's end: reports `before` + done of `total`; raises RunError `run_cancelled` when asked."""

    def on_batch(done: int) -> None:
        context.reporter.progress(before + done, total, unit)
        require_going(context)

    return on_batch


def model_warnings(context: Context, *models: LoadedModel | None) -> list[str]:
    """What makes these models slower than they could be, a sentence each, told as alerts as well.

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


def stage_cost(stage: str, started: float, tokens: int, device: torch.device, *, earlier: float = 0.0) -> StageCost:
    """The cost of a stage that ends now; `earlier` are the seconds of interrupted calls whose work was kept."""
    seconds = time.perf_counter() - started + earlier
    return StageCost(
        stage=stage, seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds, device=hardware_name(device)
    )
