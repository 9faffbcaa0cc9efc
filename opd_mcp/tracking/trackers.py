"""The trackers: how a run is opened or resumed there, told metrics and events, and ended. Each needs its own extra.

Any of their calls may fail with whatever the tracker's package raises; the mirror then opens the run again later.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opd_mcp.schemas.runs import TrackerName, TrackingSettings
from opd_mcp.tracking.feed import Event, Metrics, TrackedRun

MLFLOW_TEXT = 500
MLFLOW_BATCH = 1000
MLFLOW_PARAMS = 100


class Tracker(Protocol):
    """One run at one tracker."""

    def open(self, run: TrackedRun, tracked_id: str | None) -> str:
        """Begin the run there, or resume the one of this id; its id there."""
        ...

    def send(self, told: Sequence[Metrics | Event]) -> None:
        """Hand over metrics and events, in order; returns once the tracker has them, or keeps them on disk."""
        ...

    def close(self, state: str, figures: dict[str, float | str]) -> None:
        """End the run there with its state and figures."""
        ...


def tracker_of(name: TrackerName, settings: TrackingSettings) -> Tracker:
    """The tracker of a name."""
    kinds: dict[TrackerName, type[Trackio | Wandb | TensorBoard | Mlflow]] = {
        "trackio": Trackio,
        "wandb": Wandb,
        "tensorboard": TensorBoard,
        "mlflow": Mlflow,
    }
    return kinds[name](settings)


def metric_names(item: Metrics) -> dict[str, float]:
    """A step's values by `phase/metric`, as trackers group them."""
    return {f"{item.phase}/{name}": value for name, value in item.values.items()}


@dataclass
class Trackio:
    """https://github.com/gradio-app/trackio: a local database, or a Space of the Hub."""

    settings: TrackingSettings
    _run: Any = None

    def open(self, run: TrackedRun, tracked_id: str | None) -> str:
        os.environ.setdefault("TRACKIO_DIR", str(run.folder / "trackio"))
        import trackio

        space = None if self.settings.offline else self.settings.trackio_space
        # trackio finds a run again by its name, so the name is the id
        self._run = trackio.init(
            project=self.settings.project,
            name=run.run_id,
            group=run.tags[0],
            config={**run.config, "name": run.name, "tags": run.tags, "notes": run.notes},
            space_id=space,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return run.run_id

    def send(self, told: Sequence[Metrics | Event]) -> None:
        import trackio

        for item in told:
            if isinstance(item, Metrics):
                self._run.log(metric_names(item), step=item.step)
            else:
                self._run.alert(item.title, item.text, level=trackio.AlertLevel(item.level))

    def close(self, state: str, figures: dict[str, float | str]) -> None:
        self._run.log({f"final/{name}": value for name, value in (figures | {"state": state}).items()})
        self._run.finish()


@dataclass
class Wandb:
    """https://docs.wandb.ai: its server, or offline directories that `wandb sync` sends later."""

    settings: TrackingSettings
    _run: Any = None

    def open(self, run: TrackedRun, tracked_id: str | None) -> str:
        import wandb

        folder = run.folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        own = wandb.Settings(
            console="off", save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True, silent=True
        )
        self._run = wandb.init(
            project=self.settings.project,
            id=run.run_id,
            name=run.name,
            tags=[tag[:64] for tag in run.tags],
            notes=run.notes,
            config=run.config,
            dir=folder,
            mode="offline" if self.settings.offline else None,
            resume="allow",
            settings=own,
        )
        return run.run_id

    def send(self, told: Sequence[Metrics | Event]) -> None:
        for item in told:
            if isinstance(item, Metrics):
                # each phase counts its own steps, and W&B's own counter must not fall
                self._run.define_metric(f"{item.phase}/*", step_metric=f"{item.phase}/step")
                self._run.log({**metric_names(item), f"{item.phase}/step": item.step})
            else:
                self._run.alert(item.title, item.text, level=item.level.upper())

    def close(self, state: str, figures: dict[str, float | str]) -> None:
        self._run.summary.update({**figures, "state": state})
        self._run.finish(exit_code=int(state != "succeeded"))


@dataclass
class TensorBoard:
    """https://www.tensorflow.org/tensorboard: event files, written by its own package without TensorFlow or torch."""

    settings: TrackingSettings
    _writer: Any = None

    def open(self, run: TrackedRun, tracked_id: str | None) -> str:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / "tensorboard" / run.run_id
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._writer = EventFileWriter(str(folder))
        if tracked_id is None:
            settings = "\n".join(f"    {key} = {value}" for key, value in run.config.items())
            self._text("run", f"**{run.name}**\n\n{run.notes or ''}\n\n{settings}", run.created)
        return run.run_id

    def send(self, told: Sequence[Metrics | Event]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        for item in told:
            if isinstance(item, Metrics):
                values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metric_names(item).items()]
                summary = Summary(value=values)
                self._writer.add_event(Record(wall_time=item.time, step=item.step, summary=summary))
            else:
                self._text(f"alerts/{item.title}", item.text, item.time)
        self._writer.flush()

    def close(self, state: str, figures: dict[str, float | str]) -> None:
        import time

        lines = "\n".join(f"    {name} = {value}" for name, value in (figures | {"state": state}).items())
        self._text("result", lines, time.time())
        self._writer.close()

    def _text(self, tag: str, text: str, seconds: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        summary = Summary(value=[Summary.Value(tag=tag, metadata=kind, tensor=tensor)])
        self._writer.add_event(Record(wall_time=seconds, step=0, summary=summary))


@dataclass
class Mlflow:
    """https://mlflow.org: its server, or a database in the workspace."""

    settings: TrackingSettings
    _client: Any = None
    _id: str = ""

    def open(self, run: TrackedRun, tracked_id: str | None) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(self._uri(run.folder))
        if tracked_id is not None:
            self._id = tracked_id
            self._client.update_run(tracked_id, status="RUNNING")
            return tracked_id
        experiment = self._client.get_experiment_by_name(self.settings.project)
        found = experiment.experiment_id if experiment else self._client.create_experiment(self.settings.project)
        # A crash between creating a run and noting its id must not make a second one.
        mine = self._client.search_runs([found], f"tags.opd_run_id = '{run.run_id}'", max_results=1)
        if mine:
            self._id = mine[0].info.run_id
            return self._id
        tags = {"opd_run_id": run.run_id, **({"mlflow.note.content": run.notes} if run.notes else {})}
        tags |= dict.fromkeys(run.tags, "true")
        created = self._client.create_run(found, int(run.created * 1000), tags=tags, run_name=run.name)
        self._id = created.info.run_id
        params = [Param(_mlflow_name(key), str(value)[:MLFLOW_TEXT]) for key, value in run.config.items()]
        for first in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MLFLOW_PARAMS])
        return self._id

    def send(self, told: Sequence[Metrics | Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_mlflow_name(name), value, int(item.time * 1000), item.step)
            for item in told
            if isinstance(item, Metrics)
            for name, value in metric_names(item).items()
        ]
        for first in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + MLFLOW_BATCH])
        for item in told:
            if isinstance(item, Event):
                self._client.set_tag(self._id, f"alert.{item.title}", item.text)

    def close(self, state: str, figures: dict[str, float | str]) -> None:
        for name, value in figures.items():
            if isinstance(value, str):
                self._client.set_tag(self._id, name, value)
            else:
                self._client.log_metric(self._id, _mlflow_name(f"final/{name}"), value)
        ended = {"succeeded": "FINISHED", "cancelled": "KILLED"}.get(state, "FAILED")
        self._client.set_terminated(self._id, ended)

    def _uri(self, folder: Path) -> str:
        given = self.settings.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return f"sqlite:///{folder / 'mlflow.db'}" if self.settings.offline or not given else given


def _mlflow_name(name: str) -> str:
    """A name of the characters that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]
