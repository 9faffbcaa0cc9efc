"""A distillation judged while it trains: fresh samples on held-out prompts, the best weights kept, an early stop.

Every `evaluate_steps` steps the student answers the same few prompts: the reverse KL to the teacher where that one is
here, and graded accuracy where the prompts have answers. Everything follows from the seed and the weights, so a resumed
training judges as it would have; what was judged after its checkpoint is judged again.

Of several ranks the first one judges, by a whole copy of the student that takes the trained weights before each time.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context
from opd_mcp.engine.evaluation.model_score import Measurement, score_model
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.identity.files import publish_file, write_atomic
from opd_mcp.schemas.recipes import DistillRecipe
from opd_mcp.schemas.reports import HeldOutEvaluation, HeldOutSummary

WEIGHTS_FILE, HISTORY_FILE = "best.safetensors", "held_out.json"


@dataclass
class HeldOut:
    """Judges one student at steps of its training; `folder` keeps what a resumed training needs.

    `student` is the model that is trained; of several ranks, a whole copy of it that has its weights.
    """

    settings: DistillRecipe
    student: LoadedModel
    eos_token_ids: tuple[int, ...]
    task: Measurement
    context: Context
    folder: Path | None
    total: int
    history: list[HeldOutEvaluation] = field(default_factory=list)
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _kept: int | None = None

    def begin(self, step: int) -> None:
        """Load what an earlier attempt judged up to this step."""
        file = self.folder / HISTORY_FILE if self.folder else None
        if file is not None and file.is_file():
            saved = json.loads(file.read_bytes())
            self.history = [HeldOutEvaluation.model_validate(row) for row in saved["history"] if row["step"] <= step]
            self._kept = saved["kept"]

    def is_due(self, step: int) -> bool:
        """Whether the student is judged after this step."""
        return step % (self.settings.evaluate_steps or self.total) == 0 or step == self.total

    def metrics(self, step: int) -> dict[str, float]:
        """What the student is judged by after this step, where that is due."""
        if not self.is_due(step) or any(entry.step == step for entry in self.history):
            return {}
        entry = self._judged(step)
        named = {"held_out_reverse_kl": entry.reverse_kl, "held_out_accuracy": entry.accuracy}
        return {name: value for name, value in named.items() if value is not None}

    def stops(self) -> bool:
        """Whether training has gone on for `patience` evaluations without a better one."""
        patience, best = self.settings.patience, self.best
        if patience is None or best is None:
            return False
        return sum(entry.step > best.step for entry in self.history) >= patience

    @property
    def best(self) -> HeldOutEvaluation | None:
        """The evaluation with the least reverse KL, else with the highest accuracy; the earliest of equal ones."""
        return min(self.history, key=lambda entry: (entry.rank(), entry.step), default=None)

    def finish(self, model: PreTrainedModel, step: int) -> HeldOutSummary | None:
        """Put the best weights into the model where they are to be kept, and say what was judged."""
        best = self.best
        if best is None:
            return None
        kept = step
        if self.settings.keep == "best" and best.step != step and self._kept == best.step:
            weights = load_file(self.folder / WEIGHTS_FILE) if self.folder else self._weights
            with torch.no_grad():
                for name, tensor in _trained(model).items():
                    tensor.copy_(weights[name])
            kept = best.step
        return HeldOutSummary(evaluations=self.history, best_step=best.step, kept_step=kept, last_step=step)

    def _judged(self, step: int) -> HeldOutEvaluation:
        was_training = self.student.model.training
        self.student.model.eval()
        with ExitStack() as stack:
            stack.enter_context(self.task.grader)
            score = score_model("student", self.student, self.eos_token_ids, self.task).score
        self.student.model.train(was_training)
        entry = HeldOutEvaluation(
            step=step,
            reverse_kl=score.reverse_kl.value if score.reverse_kl else None,
            accuracy=score.greedy_accuracy.value if score.greedy_accuracy else None,
        )
        self.history.append(entry)
        if self.best is entry:
            self._keep(step)
        self._save()
        return entry

    def _keep(self, step: int) -> None:
        if self.settings.keep == "best":
            weights = {name: part.detach().to("cpu", copy=True) for name, part in _trained(self.student.model).items()}
            if self.folder is None:
                self._weights = weights
            else:
                self.context.check_fence()
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                building = self.folder / f".{WEIGHTS_FILE}.partial"
                save_file({name: part.contiguous() for name, part in weights.items()}, building)
                publish_file(building, self.folder / WEIGHTS_FILE)
            self._kept = step

    def _save(self) -> None:
        if self.folder is not None:
            self.context.check_fence()
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            rows = [entry.to_dict() for entry in self.history]
            write_atomic(self.folder / HISTORY_FILE, json.dumps({"history": rows, "kept": self._kept}) + "\n")


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
