"""A training that is interrupted and goes on ends as one that was not, to the bit."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.data.batches import stored_batches
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE
from opd_mcp.engine.models.lora import adapters, add_adapter
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.checkpoints import KEPT, MODEL_FILE, OPTIMIZER_FILE, RECORD_FILE, saved_checkpoints
from opd_mcp.engine.training.loop import LoopSettings, Stretch, TrainingTask, train
from opd_mcp.engine.training.step import sft_metrics
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.recipes import AdapterRecipe, CheckpointRecipe, OptimizerRecipe
from opd_mcp.schemas.reports import CheckpointRecord, TrainingSummary

VOCAB, STEPS = 13, 8
SETTINGS = LoopSettings(STEPS, OptimizerRecipe(learning_rate=1e-2, schedule="cosine", warmup_steps=2), "token", 30)


class Recorder(SilentReporter):
    """Keeps the metric series as a journal's reader would, and asks to stop before a step."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.stop_before = stop_before
        self.series: dict[int, tuple[float, float]] = {}
        self.alerts: list[str] = []
        self.messages: list[str] = []
        self.resumed_at: int | None = None

    def metric(self, step: int, values) -> None:
        self.series[step] = (values["loss"], values["gradient_norm"])

    def alert(self, code: str, message: str) -> None:
        self.alerts.append(code)
        self.messages.append(message)

    def resumed(self, step: int) -> None:
        self.resumed_at = step

    def should_stop(self) -> bool:
        return self.stop_before is not None and len(self.series) >= self.stop_before


@pytest.fixture
def rows() -> Sequences:
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(2, VOCAB, size=n).tolist() for n in rng.integers(2, 9, 20)] for _ in range(2))
    return build_sequences(prompts, responses)


@pytest.fixture
def trained(tiny_model: Callable[..., PreTrainedModel], runtime: Runtime, rows: Sequences):
    """`trained(reporter, folder)`: model and summary; dropout makes torch's own random state matter."""

    def run(
        reporter: SilentReporter,
        folder: Path | None,
        settings: LoopSettings = SETTINGS,
        every: int = 2,
        check_fence: Callable[[], None] = lambda: None,
        frozen: tuple[AdapterRecipe, str] | None = None,
        **more: Any,
    ) -> tuple[PreTrainedModel, TrainingSummary]:
        stretch: Stretch | None = more.pop("stretch", None)
        begun: dict[str, torch.Tensor] | None = more.pop("begun", None)
        dropout = 0.0 if stretch else 0.1  # of its random stream a stretch of its own knows nothing
        model = tiny_model(VOCAB, seed=0, dtype=torch.float32, attention_dropout=dropout, **more).train()
        if begun is not None:
            model.load_state_dict(begun)
        if frozen is not None:
            add_adapter(model, frozen[0], seed=1)
        torch.manual_seed(7)
        context = Context(
            reporter=reporter,
            checkpoints=folder,
            checkpoint=CheckpointRecipe(steps=every),
            check_fence=check_fence,
        )
        steps = stored_batches(rows, steps=settings.steps, batch_size=6, seed=3, scope="test")
        return model, train(
            model,
            TrainingTask(settings, steps, SFT_OBJECTIVE, sft_metrics, frozen[1] if frozen else None, stretch=stretch),
            runtime,
            context,
        )

    return run


def weights(model: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_stop_before_any_step_changes_nothing(trained, tmp_path: Path, stop: int) -> None:
    whole, again = Recorder(), Recorder()
    expected, full = trained(whole, None)
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=stop), tmp_path)
    resumed, summary = trained(again, tmp_path)
    assert again.resumed_at == stop
    assert same(resumed, expected)
    assert again.series == {step: values for step, values in whole.series.items() if step > stop}
    assert {k: v for k, v in summary.final.items() if k in ("loss", "gradient_norm", "learning_rate")} == {
        k: v for k, v in full.final.items() if k in ("loss", "gradient_norm", "learning_rate")
    }
    assert summary.trained_tokens == full.trained_tokens
    assert summary.throughput.model_flops == full.throughput.model_flops


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_an_adapter_goes_on_to_the_bit_from_checkpoints_that_hold_it_alone(trained, tmp_path: Path, stop: int) -> None:
    settings, frozen = replace(SETTINGS, steps=STEPS + 1), (AdapterRecipe(rank=2), "base")
    whole, again = Recorder(), Recorder()
    expected, full = trained(whole, None, settings, frozen=frozen)
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=stop), tmp_path, settings, frozen=frozen)
    held = load_file(saved_checkpoints(tmp_path)[-1] / MODEL_FILE)
    assert held.keys() == {f"{name}.lora_{side}" for name in adapters(expected) for side in "AB"}
    resumed, summary = trained(again, tmp_path, settings, frozen=frozen)
    assert again.resumed_at == stop
    assert same(resumed, expected)
    assert again.series == {step: values for step, values in whole.series.items() if step > stop}
    assert summary.trained_parameters == full.trained_parameters == sum(tensor.numel() for tensor in held.values())
    assert not torch.equal(next(iter(adapters(resumed).values())).lora_B, torch.zeros(8, 2))


def test_a_checkpoint_of_an_adapter_on_other_weights_is_not_used(trained, tmp_path: Path) -> None:
    """The weights are not in the checkpoint, so what they were is."""
    adapter, again = AdapterRecipe(rank=2), Recorder()
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=4), tmp_path, frozen=(adapter, "base"))
    trained(again, tmp_path, frozen=(adapter, "another"))
    assert again.resumed_at is None
    assert "checkpoint_damaged" in again.alerts


@pytest.mark.parametrize("precision", ["split_master", "bf16_stochastic", "bf16"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_every_precision_and_policy_goes_on_to_the_bit(trained, tmp_path: Path, precision: str, policy: str) -> None:
    optimizer = SETTINGS.optimizer.model_copy(update={"precision": precision})
    settings = replace(SETTINGS, optimizer=optimizer, activation_checkpointing=policy)
    expected, full = trained(Recorder(), None, settings)
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=5), tmp_path, settings)
    again = Recorder()
    resumed, summary = trained(again, tmp_path, settings)
    assert again.resumed_at == 5
    assert same(resumed, expected)
    assert (summary.precision, summary.activation_checkpointing) == (precision, policy)
    assert summary.final["loss"] == full.final["loss"]
    master = torch.float32 if precision == "split_master" else torch.bfloat16
    assert {weight.dtype for weight in weights(resumed)} == {master}


@pytest.mark.needs("torchao")
@pytest.mark.parametrize("policy", ["none", "full"])
def test_8_bit_moments_go_on_to_the_bit(trained, tmp_path: Path, policy: str) -> None:
    """In a model whose matrices are large enough for blocks; the file holds codes and scales as plain tensors."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    optimizer = SETTINGS.optimizer.model_copy(update={"precision": "fp32_master_8bit"})
    settings = replace(SETTINGS, optimizer=optimizer, activation_checkpointing=policy)
    whole, again = Recorder(), Recorder()
    expected, _ = trained(whole, None, settings, **sizes)
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=5), tmp_path, settings, **sizes)
    saved = load_file(saved_checkpoints(tmp_path)[-1] / OPTIMIZER_FILE)
    assert {saved[name].dtype for name in saved if name.endswith("exp_avg_sq.codes")} == {torch.uint8}
    resumed, summary = trained(again, tmp_path, settings, **sizes)
    assert again.resumed_at == 5
    assert same(resumed, expected)
    assert again.series == {step: values for step, values in whole.series.items() if step > 5}
    assert summary.precision == "fp32_master_8bit"
    assert {weight.dtype for weight in weights(resumed)} == {torch.float32}


def test_what_a_kill_leaves_is_the_last_checkpoint(trained, tmp_path: Path) -> None:
    class Killed(Recorder):
        def metric(self, step: int, values) -> None:
            if step == 6:
                raise KeyboardInterrupt  # nothing is saved on the way out
            super().metric(step, values)

    with pytest.raises(KeyboardInterrupt):
        trained(Killed(), tmp_path)
    again = Recorder()
    resumed, _ = trained(again, tmp_path)
    assert again.resumed_at == 4
    assert same(resumed, trained(Recorder(), None)[0])


def test_the_last_two_are_kept(trained, tmp_path: Path) -> None:
    trained(Recorder(), tmp_path, every=1)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["step-00000006", "step-00000007"]
    assert len(saved_checkpoints(tmp_path)) == KEPT
    assert not list(tmp_path.glob(".building-*"))


@pytest.mark.parametrize("file", [MODEL_FILE, OPTIMIZER_FILE, RECORD_FILE])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trained, tmp_path: Path, file: str, how: str) -> None:
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=5), tmp_path)
    newest = saved_checkpoints(tmp_path)[-1]
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flipped": bytes(content), "cut": bytes(content[: len(content) // 2]), "missing": b""}[how]
    (newest / file).write_bytes(damaged)
    if how == "missing":
        (newest / file).unlink()
    again = Recorder()
    resumed, _ = trained(again, tmp_path)
    assert again.resumed_at == 4
    assert again.alerts == ["checkpoint_damaged"]
    assert newest.name in again.messages[0]
    assert file in again.messages[0]
    assert same(resumed, trained(Recorder(), None)[0])


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(trained, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=3), tmp_path)
    again = Recorder()
    trained(again, tmp_path, replace(SETTINGS, micro_batch_tokens=60))
    assert again.resumed_at is None
    assert set(again.alerts) == {"checkpoint_damaged"}


def test_another_thread_count_is_said(trained, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=3), tmp_path)
    for path in saved_checkpoints(tmp_path):
        record = CheckpointRecord.from_json((path / RECORD_FILE).read_bytes())
        (path / RECORD_FILE).write_text(record.model_copy(update={"threads": 2}).sealed().to_json())
    again = Recorder()
    trained(again, tmp_path)
    assert again.alerts == ["resumed_elsewhere"]
    assert "threads" in again.messages[0]


def test_without_a_place_nothing_is_saved_and_by_time_a_short_training_saves_nothing(trained, tmp_path: Path) -> None:
    trained(Recorder(), None)
    trained(Recorder(), tmp_path, every=None)
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_ends_the_training_and_leaves_the_checkpoint_before(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_mcp.engine.training import checkpoints

    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=2), tmp_path)

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            trained(Recorder(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert same(trained(Recorder(), tmp_path)[0], trained(Recorder(), None)[0])


class Right:
    """The right to write, until somebody else begins a checkpoint of his own in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.others = folder / ".building-of-the-next"

    def lose(self) -> None:
        self.others.mkdir(exist_ok=True)

    def require(self) -> None:
        if self.others.exists():
            raise RunError("attempt_superseded", "Somebody else has taken over.", fix="Follow that one.")

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.parametrize("gone", [False, True], ids=["as it was", "removed by the next"])
def test_who_loses_the_right_while_a_checkpoint_is_written_publishes_nothing(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, gone: bool
) -> None:
    from opd_mcp.engine.training import checkpoints

    right, write = Right(tmp_path), checkpoints.write_atomic

    def taken_over(path: Path, content: str) -> None:
        write(path, content)
        if len(saved_checkpoints(tmp_path)) == step // 2 - 1:
            right.lose()
            if gone:
                shutil.rmtree(path.parent)

    monkeypatch.setattr(checkpoints, "write_atomic", taken_over)
    with pytest.raises(RunError, match="attempt_superseded"):
        trained(Recorder(), tmp_path, check_fence=right.require)
    assert right.names() == [right.others.name, *(f"step-{n:08d}" for n in range(2, step, 2))]


def test_who_loses_the_right_after_a_checkpoint_was_published_removes_none(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_mcp.engine.training import checkpoints

    right, publish = Right(tmp_path), checkpoints.publish_directory

    def taken_over(building: Path, final: Path, check_fence: Callable[[], None]) -> None:
        publish(building, final, check_fence)
        if final.name == "step-00000006":
            right.lose()

    monkeypatch.setattr(checkpoints, "publish_directory", taken_over)
    with pytest.raises(RunError, match="attempt_superseded"):
        trained(Recorder(), tmp_path, check_fence=right.require)
    assert right.names() == [right.others.name, "step-00000002", "step-00000004", "step-00000006"]


def test_who_has_no_right_takes_nothing_away_when_training_begins(trained, tmp_path: Path) -> None:
    right = Right(tmp_path)
    right.lose()
    with pytest.raises(RunError, match="attempt_superseded"):
        trained(Recorder(), tmp_path, check_fence=right.require)
    assert right.names() == [right.others.name]


@pytest.mark.parametrize("precision", ["fp32_master", "split_master"])
def test_a_training_in_stretches_is_that_in_one_to_the_bit(trained, tmp_path: Path, precision: str) -> None:
    settings = replace(SETTINGS, optimizer=SETTINGS.optimizer.model_copy(update={"precision": precision}))
    whole, together = Recorder(), Recorder()
    expected, _ = trained(whole, None, settings, stretch=Stretch(0, STEPS))
    first, done = trained(together, None, settings, stretch=Stretch(0, 3, leaves=tmp_path / "left" / "moments"))
    begun = {name: weight.detach().clone() for name, weight in first.state_dict().items()}
    going_on = Stretch(3, STEPS, begins_with=tmp_path / "left" / "moments")
    last, rest = trained(together, None, settings, stretch=going_on, begun=begun)
    assert same(expected, last)
    assert whole.series == together.series
    assert (done.steps, rest.steps) == (3, STEPS - 3)
    other, _ = trained(Recorder(), None, settings, stretch=Stretch(3, STEPS), begun=begun)
    assert not same(expected, other), "the optimizer's state counts"


def test_a_stretch_that_its_metrics_end_does_so_again_after_an_interruption(trained, tmp_path: Path) -> None:
    def ended(recent: list[dict[str, float]]) -> bool:
        return len(recent) == 3 and recent[-1]["loss"] < recent[0]["loss"]

    stretch, whole, again = Stretch(0, STEPS, ended=ended, watched=3), Recorder(), Recorder()
    expected, summary = trained(whole, None, stretch=stretch)
    assert 3 <= summary.steps < STEPS
    with pytest.raises(RunError, match="run_cancelled"):
        trained(Recorder(stop_before=2), tmp_path, every=1, stretch=stretch)
    resumed, rest = trained(again, tmp_path, every=1, stretch=stretch)
    assert (again.resumed_at, rest.steps) == (2, summary.steps)
    assert same(expected, resumed)
