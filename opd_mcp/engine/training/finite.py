"""Steps whose loss or gradient is not finite: a few are skipped, then training ends with its last good weights."""

import json
from dataclasses import dataclass

import numpy as np

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.checkpoints import LoopState
from opd_mcp.schemas.errors import RunError

MAX_SKIPPED = 3
MAX_SAVED_ROWS = 256


@dataclass
class FiniteGuard:
    """Counts bad steps in a row; their rows are saved for a look, beside the checkpoints."""

    context: Context
    skipped: int = 0

    def is_good(self, step: int, metrics: dict[str, float], rows: Sequences) -> bool:
        """Whether the step may move the weights.

        Raises RunError `bad_number`, naming the values and the file of the rows, after three skipped steps in a row.
        """
        bad = {name: value for name, value in metrics.items() if not np.isfinite(value)}
        if not bad:
            self.skipped = 0
            return True
        saved = self._saved(step, rows)
        if self.skipped < MAX_SKIPPED:
            self.skipped += 1
            self.context.reporter.alert(
                "step_skipped",
                f"Step {step + 1} gave {_named(bad)}; it is skipped and the weights stay as they are{saved}.",
            )
            return False
        raise RunError(
            "bad_number",
            f"Steps {step - MAX_SKIPPED + 1} to {step + 1} gave numbers that are not finite; none of them changed the "
            f"weights, and the last good ones are in the newest checkpoint{saved}.",
            value=_named(bad),
            fix="Start again with a lower learning rate ('sft.optimizer.learning_rate' or "
            "'distill.optimizer.learning_rate'), or look at the rows of these steps.",
        )

    def last_good(self, state: LoopState) -> LoopState:
        """The state before the bad steps: weights and optimizer have not moved since."""
        return state.model_copy(update={"step": state.step - self.skipped})

    def _saved(self, step: int, rows: Sequences) -> str:
        """Where the step's rows are, as the end of a sentence; nothing where there is no place for them."""
        if self.context.checkpoints is None:
            return ""
        self.context.checkpoints.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self.context.checkpoints / f"bad-step-{step + 1:08d}.jsonl"
        lines = [json.dumps(_row(rows, row)) + "\n" for row in range(min(len(rows), MAX_SAVED_ROWS))]
        write_atomic(file, "".join(lines))
        return f"; its rows: {file}"


def _row(rows: Sequences, row: int) -> dict[str, object]:
    columns = {name: rows.column(name, row).astype(float) for name in rows.columns}
    return {
        "prompt_ids": rows.prompt(row).tolist(),
        "response_ids": rows.response(row).tolist(),
        "finite": bool(all(np.isfinite(values).all() for values in columns.values())),
        **{
            name: [value if np.isfinite(value) else str(value) for value in values.ravel().tolist()]
            for name, values in columns.items()
        },
    }


def _named(bad: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in bad.items())
