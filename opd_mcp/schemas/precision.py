"""Which precision of the weights is refused before any work: one that loses updates, or whose library is missing."""

import math
from importlib.util import find_spec

from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.memory import keeps_float32
from opd_mcp.schemas.recipes import OptimizerRecipe

LEAST_BF16_RATE = 1e-4
# Weights of language models spread about this much; noisy gradients let Adam move them by half its learning rate.
USUAL_SPREAD, USUAL_MOVE = 0.02, 0.5
# Below this, a bf16 moment is rounded back to where it was.
LEAST_BF16_CHANGE = 2.0**-8


def lost_share(learning_rate: float, spread: float = USUAL_SPREAD) -> float:
    """About what share of updates rounding to the nearest bf16 undoes, of normal weights that spread by `spread`.

    A weight in [2^e, 2^(e+1)) keeps its value unless it moves by 2^(e−8), half the distance to its neighbour.
    """
    least = 2.0 ** (math.floor(math.log2(USUAL_MOVE * learning_rate) + 8) + 1)
    return 1.0 - math.erf(least / (spread * math.sqrt(2.0)))


def require_kept_updates(recipe: OptimizerRecipe, section: str) -> None:
    """Raise ArgumentError `lossy_precision` for settings under which bf16 would round training away.

    `section` names the recipe's part, for the message.
    """
    if recipe.precision == "bf16" and recipe.learning_rate < LEAST_BF16_RATE:
        raise ArgumentError(
            "lossy_precision",
            f"Rounding to bf16 would undo about {lost_share(recipe.learning_rate):.0%} of the updates at learning rate "
            f"{recipe.learning_rate:g}: they are smaller than half the distance between two bf16 weights.",
            value=f"{section}.precision='bf16'",
            fix=f"Set '{section}.precision' to 'bf16_stochastic', 'split_master' or 'fp32_master', or the learning "
            f"rate to {LEAST_BF16_RATE:g} or more.",
        )
    if not keeps_float32(recipe.precision) and 1.0 - max(recipe.betas) < LEAST_BF16_CHANGE:
        raise ArgumentError(
            "lossy_precision",
            f"With bf16 moments a beta above {1.0 - LEAST_BF16_CHANGE:.4f} makes them stand still: a step changes them "
            "by less than half the distance between two bf16 numbers.",
            value=f"{section}.betas={recipe.betas}",
            fix=f"Lower '{section}.betas', or set '{section}.precision' to 'fp32_master'.",
        )


def require_package(recipe: OptimizerRecipe, section: str) -> None:
    """Raise ResourceError `missing_package` where the precision needs torchao and it is not installed."""
    if recipe.precision == "fp32_master_8bit" and find_spec("torchao") is None:
        raise ResourceError(
            "missing_package",
            "8-bit moments need torchao, which is not installed here.",
            value=f"{section}.precision='fp32_master_8bit'",
            fix="Install the extra: pip install 'opd-mcp[int8]'; or set "
            f"'{section}.precision' to 'split_master', which needs no package.",
        )
