"""The mirror: each step once, through outages, deaths and resumed attempts; and what runs know of it: nothing."""

import json
import subprocess
import sys

import pytest

from opd_mcp.devices.environment import tracker_environment, worker_environment
from opd_mcp.schemas.errors import ArgumentError, RunError
from opd_mcp.schemas.runs import TrackingSettings
from opd_mcp.store.workspace import read_settings
from opd_mcp.tracking.feed import Event, Metrics
from opd_mcp.tracking.mirror import FIRST_PAUSE, LONGEST_PAUSE, POLL_SECONDS, follow, read_position

STEPS = 5


class Listener:
    """A tracker in this process that answers, or does not."""

    def __init__(self) -> None:
        self.opened, self.told, self.closed, self.away = [], [], [], False

    def open(self, run, tracked_id):
        self._answer()
        self.opened.append(tracked_id)
        return "its-id"

    def send(self, told):
        self._answer()
        self.told += told

    def close(self, state, figures):
        self._answer()
        self.closed.append((state, figures))

    def _answer(self) -> None:
        if self.away:
            raise ConnectionError("https://me:hunter22@tracker.example is away")

    @property
    def steps(self) -> list[int]:
        return [item.step for item in self.told if isinstance(item, Metrics)]


@pytest.fixture
def listener() -> Listener:
    return Listener()


def test_metrics_alerts_and_the_end_arrive_once_and_in_order(written_run, listener):
    with written_run.attempt() as journal:
        mirror = written_run.mirror("trackio", open_tracker=lambda: listener)
        journal.train(0, 2)
        assert mirror.look() == POLL_SECONDS
        journal.append("alert", {"code": "kl_rises", "message": "It rises."})
        journal.train(3, STEPS)
        assert mirror.look() == POLL_SECONDS
        journal.succeed()
    assert mirror.look() is None
    assert listener.steps == list(range(STEPS + 1))
    assert listener.told[0].values == {"loss": 10.0}  # what is not finite is left out
    assert [item.title for item in listener.told if isinstance(item, Event)] == ["kl_rises"]
    figures = {"verdict.judgement": "better", "verdict.sentence": "Better by 3 points.", "student.greedy_accuracy": 0.5}
    assert listener.closed == [("succeeded", figures)]
    assert read_position(mirror.folder, "trackio").complete


def test_a_tracker_that_is_away_gets_everything_when_it_is_back(written_run, listener):
    with written_run.attempt() as journal:
        mirror = written_run.mirror("wandb", open_tracker=lambda: listener)
        journal.train(0, 1)
        mirror.look()
        listener.away = True
        journal.train(2, 3)
        pauses = [mirror.look() for _ in range(1100)]
        assert pauses[:2] == [FIRST_PAUSE, 2 * FIRST_PAUSE]
        assert pauses[-1] == LONGEST_PAUSE
        problem = read_position(mirror.folder, "wandb").problem
        assert "is away" in problem
        assert "hunter22" not in problem
        listener.away = False
        journal.train(4, STEPS)
        while mirror.look() != POLL_SECONDS:
            pass
        mirror.look()
        journal.succeed()
    assert mirror.look() is None
    assert listener.steps == list(range(STEPS + 1))
    assert listener.opened == [None, "its-id"]  # resumed, not begun anew
    assert read_position(mirror.folder, "wandb").problem is None


def test_a_tracker_that_never_comes_back_is_given_up_some_hours_after_the_run(written_run, listener):
    listener.away, now = True, [0.0]
    with written_run.attempt() as journal:
        mirror = written_run.mirror("wandb", open_tracker=lambda: listener, clock=lambda: now[0])
        journal.succeed()
        assert mirror.look() is not None
    assert mirror.look() is not None
    now[0] = 3601.0
    assert mirror.look() is None
    assert not read_position(mirror.folder, "wandb").complete


def test_a_mirror_that_dies_is_followed_by_one_that_goes_on_where_it_was(written_run, listener):
    with written_run.attempt() as journal:
        journal.train(0, 2)
        written_run.mirror("mlflow", open_tracker=lambda: listener).look()
        journal.train(3, STEPS)
        journal.succeed()
    assert follow(written_run.mirror("mlflow", open_tracker=lambda: listener), pause=lambda seconds: None).complete
    assert listener.steps == list(range(STEPS + 1))
    assert listener.opened == [None, "its-id"]


def test_a_resumed_run_goes_on_in_the_same_tracked_run_without_the_steps_that_are_there(written_run, listener):
    with written_run.attempt() as journal:
        journal.train(0, 3)
        first = written_run.mirror("trackio", open_tracker=lambda: listener)
        first.look()
    assert first.look() is None  # its worker is gone
    with written_run.attempt() as journal:
        journal.append("phase", {"phase": "distill", "event": "resumed", "step": 1})
        journal.train(2, STEPS)
        journal.succeed()
    old = written_run.mirror("trackio", open_tracker=lambda: listener, attempt=1)
    assert old.look() is None  # a newer attempt has begun: that one's mirror sends it
    follow(written_run.mirror("trackio", open_tracker=lambda: listener), pause=lambda seconds: None)
    assert listener.steps == list(range(STEPS + 1))
    assert listener.opened == [None, "its-id"]
    assert [state for state, _ in listener.closed] == ["lost", "succeeded"]


def test_one_process_at_a_time_sends_a_run(written_run, listener):
    with written_run.attempt() as journal:
        journal.succeed()
    mirror = written_run.mirror("trackio", open_tracker=lambda: listener)
    hold = (
        "import fcntl, sys; held = open(sys.argv[1], 'w'); fcntl.flock(held, 2); print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(mirror.folder / "trackio.lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(RunError, match="Another process sends"):
        follow(mirror, wait=False)
    other.communicate()
    assert follow(mirror, wait=False).complete


def test_nothing_of_paths_prompts_or_responses_is_told(written_run):
    told = json.dumps(written_run.mirror("trackio").run.config)
    assert "/secret/place" not in told
    assert '"student": "small"' in told
    assert '"distill.steps": 150' in told


def test_a_tracker_is_named_in_the_settings_alone_or_in_a_table(written_run):
    file = written_run.workspace.root / "settings.toml"
    file.write_text('tracking = ["trackio", "wandb"]\n')
    assert read_settings(written_run.workspace).tracking == TrackingSettings(trackers=["trackio", "wandb"])
    file.write_text('[tracking]\ntrackers = ["mlflow"]\noffline = true\n')
    assert read_settings(written_run.workspace).tracking.offline
    file.write_text('[tracking]\ntracker = ["mlflow"]\n')
    with pytest.raises(ArgumentError, match="holds a setting") as caught:
        read_settings(written_run.workspace)
    assert caught.value.nearest[0] == "tracking.trackers"


def test_each_tracker_has_its_own_secrets_and_the_worker_has_none_of_them():
    environment = {"WANDB_API_KEY": "w", "MLFLOW_TRACKING_TOKEN": "m", "HF_TOKEN": "h", "OPD_TEACHER_KEY": "t"}
    environment |= {"WANDB_MODE": "offline", "PATH": "/bin"}
    assert not {"WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "WANDB_MODE"} & set(worker_environment(environment))
    found = {name: tracker_environment(environment, name) for name in ("trackio", "wandb", "tensorboard", "mlflow")}
    secrets = {name: {key for key in values if key.endswith(("KEY", "TOKEN"))} for name, values in found.items()}
    assert secrets == {
        "trackio": {"HF_TOKEN"},
        "wandb": {"WANDB_API_KEY"},
        "tensorboard": set(),
        "mlflow": {"MLFLOW_TRACKING_TOKEN"},
    }
    assert found["wandb"]["WANDB_MODE"] == "offline"


def test_a_tracker_changes_no_key_and_one_that_is_not_installed_stops_no_run(world, service, finished):
    before = service.plan(world.plan_arguments())
    (service.workspace.root / "settings.toml").write_text('tracking = ["wandb"]\n')
    assert service.plan(world.plan_arguments()).phases == before.phases
    status = finished(service, service.start_distillation(world.start_arguments()).run_id)
    assert status.state == "succeeded"
