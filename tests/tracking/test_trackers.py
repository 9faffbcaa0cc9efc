"""The real trackers, on this machine alone: a resumed run is one run there, with each step once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_mcp.tracking.mirror import follow, read_position

STEPS = list(range(6))
NAMES = [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("trackio", "wandb", "tensorboard", "mlflow")]


@pytest.fixture
def mirrored(written_run, monkeypatch):
    """`mirrored(name)`: two attempts of a run, each sent by a mirror of its own; the folder of what is kept."""
    for variable in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)

    def send(name) -> Path:
        with written_run.attempt() as journal:
            journal.train(0, 3)
        assert follow(written_run.mirror(name), pause=lambda seconds: None).problem is None
        with written_run.attempt() as journal:
            journal.append("phase", {"phase": "distill", "event": "resumed", "step": 1})
            journal.train(2, STEPS[-1])
            journal.append("alert", {"code": "kl_rises", "message": "It rises."})
            journal.succeed()
        position = follow(written_run.mirror(name), pause=lambda seconds: None)
        assert (position.problem, position.complete) == (None, True)
        return written_run.workspace.tracking

    return send


@pytest.mark.parametrize("name", NAMES)
def test_two_attempts_are_one_run_with_each_step_once(written_run, mirrored, name):
    reading = {"trackio": of_trackio, "wandb": of_wandb, "tensorboard": of_tensorboard, "mlflow": of_mlflow}
    found = reading[name](mirrored(name), written_run.record.run_id)
    assert found["losses"] == [(step, 10.0 - step) for step in STEPS]
    assert "It rises." in found["text"]
    assert "better" in found["text"]
    assert "succeeded" in found["text"] or found["state"] == "FINISHED"
    assert "/secret/place" not in found["text"]
    assert not {"HOME", str(Path.home())} & set(found["text"].split())


@pytest.mark.needs("tensorboard")
def test_a_run_is_mirrored_by_a_process_that_ends_with_it(world, service, finished):
    (service.workspace.root / "settings.toml").write_text('tracking = ["tensorboard"]\n')
    run_id = finished(service, service.start_distillation(world.start_arguments()).run_id).run_id
    deadline = time.monotonic() + 60
    while not (position := read_position(service.workspace.tracking_of(run_id), "tensorboard")).complete:
        assert time.monotonic() < deadline, (service.workspace.tracking_of(run_id) / "tensorboard.log").read_text()
        time.sleep(0.05)
    assert position.problem is None
    assert position.reached["distill"] >= 2
    assert list((service.workspace.tracking / "tensorboard" / run_id).iterdir())
    service.delete_run(run_id)
    assert not (service.workspace.tracking / "tensorboard" / run_id).exists()
    assert not service.workspace.tracking_of(run_id).exists()


def of_trackio(tracking: Path, run_id: str) -> dict:
    """Read in a process of its own: trackio takes its folder once, when it is imported."""
    code = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("opd-mcp", sys.argv[1])
config = SQLiteStorage.get_run_config("opd-mcp", sys.argv[1])
alerts = SQLiteStorage.get_alerts("opd-mcp")
print(json.dumps([SQLiteStorage.get_runs("opd-mcp"), rows, config, alerts], default=str))
"""
    environment = os.environ | {"TRACKIO_DIR": str(tracking / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code, run_id], env=environment, capture_output=True, text=True, check=True
    )
    runs, rows, config, alerts = json.loads(done.stdout.splitlines()[-1])
    assert len(runs) == 1
    losses = [(row["step"], row["distill/loss"]) for row in rows if "distill/loss" in row]
    return {"losses": losses, "text": json.dumps([rows, config, alerts]), "state": ""}


def of_wandb(tracking: Path, run_id: str) -> dict:
    """Offline directories of one run id, as `wandb sync` would send them."""
    from wandb.proto.wandb_internal_pb2 import Record

    losses, text, ids = [], "", set()
    for file in sorted(tracking.rglob("run-*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            text += str(record)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "distill/loss" in items:
                losses.append((int(items["distill/step"]), float(items["distill/loss"])))
    assert ids == {run_id}
    return {"losses": losses, "text": text, "state": ""}


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format (blocks of 32 KiB) behind a header of seven bytes."""
    place, parts = 7, []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def of_tensorboard(tracking: Path, run_id: str) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracking / "tensorboard" / run_id)).Reload()
    texts = [
        event.tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"] for event in events.Tensors(tag)
    ]
    losses = [(event.step, event.value) for event in events.Scalars("distill/loss")]
    return {"losses": losses, "text": "\n".join(texts), "state": ""}


def of_mlflow(tracking: Path, run_id: str) -> dict:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tracking / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("opd-mcp").experiment_id])
    assert run.data.tags["opd_run_id"] == run_id
    history = client.get_metric_history(run.info.run_id, "distill/loss")
    losses = sorted((metric.step, metric.value) for metric in history)
    return {"losses": losses, "text": json.dumps([run.data.tags, run.data.params]), "state": run.info.status}
