"""Deliver the events of a spool to an MLflow store, each exactly once even after crashes.

A second delivery changes nothing: the MLflow run is looked up by our run id before one is created; MLflow stores a metric with equal step,
time and value once; a step that training repeats after a resume is skipped, because the store is asked for the last step of that metric; a
picture is skipped if one with its key and step exists; everything else replaces itself.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.redaction import one_line, redact
from pipeline.tracking.names import is_repeated
from pipeline.tracking.run import RUN_ID_TAG, NoRunError, find_or_make, get_run, prepare_store
from pipeline.tracking.spool import Event
from pipeline.tracking.writer import FILE_KINDS, MAX_METRICS_PER_CALL

if TYPE_CHECKING:
    from mlflow.entities import Metric

    from pipeline.tracking.tracker import TrackingSettings

MAX_PARAMS_PER_CALL = 100
MAX_DIGEST_LENGTH = 36
CURRENT = "current."
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
FILE_TIMEOUT_S = 300
REDACTED_SUFFIXES = {".json", ".yaml", ".yml", ".txt", ".md", ".log", ".csv", ".html"}
REDACTED_MAX_BYTES = 4 << 20


class RejectedError(Exception):
    """The store refused an event for good; a retry cannot help."""


class DeferredError(Exception):
    """A file could not be stored now; other events can be delivered."""


class Delivery:
    """A connection to one MLflow store for one run. Every method may raise what MLflow raises."""

    def __init__(self, settings: TrackingSettings, run_dir: Path) -> None:
        from mlflow import MlflowClient

        self._run_dir = run_dir
        self._artifacts = settings.artifacts
        with prepare_store(settings.uri):
            self.client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)
        self.run_id = ""
        self.experiment_id = ""

    def attach(self, known: str | None, start: Event | None, our_id: str) -> None:
        """Use the run's entry in the store, created now if needed (see `find_or_make`).

        Clears what is known of the store, which another process may have changed.
        """
        self._last_steps: dict[str, int] = {}
        self._images: set[str] | None = None
        run = find_or_make(self.client, self._artifacts, known, start, our_id)
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id

    def deliver(self, events: Sequence[Event]) -> None:
        """Put events into the store: one of any kind, or several of kind `metrics` (see `next_group`).

        Raises RejectedError if a retry cannot help, DeferredError if a file cannot be stored although the tracking server answers
        (the artifact store may be on another machine), and otherwise what MLflow raises.
        """
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        kind = events[0]["kind"]
        try:
            with _patience(FILE_TIMEOUT_S if kind in FILE_KINDS else None):
                if kind == "metrics":
                    self._deliver_metrics(events)
                else:
                    getattr(self, f"_deliver_{kind}")(events[0])
        except RejectedError:
            raise
        except Exception as error:
            self._require_run()
            if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                raise RejectedError(one_line(error)) from error
            if kind in FILE_KINDS:
                raise DeferredError(one_line(error)) from error
            if isinstance(error, MlflowException | RequestException | SQLAlchemyError | OSError):
                raise
            raise RejectedError(one_line(error)) from error

    def _require_run(self) -> None:
        run = get_run(self.client, self.run_id)
        if run is None or run.info.lifecycle_stage == "deleted":
            raise NoRunError(f"MLflow run {self.run_id} was deleted")

    def _deliver_metrics(self, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        last = dict[str, int]()
        metrics: list[Metric] = []
        for event in events:
            step = event["step"]
            for key, value in event["values"].items():
                if not is_repeated(key):
                    if any(_same(metric, key, step, value) for metric in [*metrics, *self._history(key)]):
                        continue
                elif step <= last.get(key, self._last_step(key)):
                    continue
                else:
                    last[key] = step
                metrics.append(Metric(key, value, event["time"], step))
        for first in range(0, len(metrics), MAX_METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + MAX_METRICS_PER_CALL], synchronous=True)
        self._last_steps.update(last)

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps:
            self._last_steps[key] = max((metric.step for metric in self._history(key)), default=-1)
        return self._last_steps[key]

    def _history(self, key: str) -> list[Metric]:
        return list(self.client.get_metric_history(self.run_id, key))

    def _deliver_start(self, event: Event) -> None:
        run = self.client.get_run(self.run_id)
        self.client.update_run(self.run_id, None if event.get("restored") else "RUNNING", event["run_name"])
        self._log_params({n: v for n, v in event["params"].items() if n not in run.data.params})
        tags = {
            **event["tags"],
            **_current(event["params"], run.data.params, run.data.tags),
            RUN_ID_TAG: event["our_id"],
            "mlflow.note.content": event["description"],
        }
        self._set_tags(tags)
        if event["dataset"]:
            self._log_dataset(event["dataset"])

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(name, value) for name, value in params.items()]
        for first in range(0, len(new), MAX_PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=new[first : first + MAX_PARAMS_PER_CALL], synchronous=True)

    def _log_dataset(self, dataset: dict[str, str]) -> None:
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.data.sources import LocalArtifactDatasetSource
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = LocalArtifactDatasetSource(dataset["source"])
        meta = MetaDataset(source, name=dataset["name"], digest=dataset["fingerprint"][:MAX_DIGEST_LENGTH])
        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.run_id, [DatasetInput(Dataset.from_dictionary(meta.to_dict()), tags)])

    def _set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(name, value) for name, value in tags.items()]
        self.client.log_batch(self.run_id, tags=entities, synchronous=True)

    def _deliver_tags(self, event: Event) -> None:
        self._set_tags(event["tags"])

    def _deliver_image(self, event: Event) -> None:
        from PIL import Image

        if self._images is None:
            self._images = {item.path for item in self.client.list_artifacts(self.run_id, "images")}
        # MLflow's naming: key with ~ for /, step, time; the small picture for the slider is stored last
        prefix = f"images/{event['key'].replace('/', '~')}+step+{event['step']}+"
        if any(path.startswith(prefix) and "+compressed" in path for path in self._images):
            return
        try:
            picture = Image.open(self._local(event["path"]))
        except OSError as error:
            raise RejectedError(one_line(error)) from error
        with picture:
            self.client.log_image(
                self.run_id, picture, key=event["key"], step=event["step"], timestamp=event["time"], synchronous=True
            )
        self._images.add(f"{prefix}+compressed")

    def _deliver_artifact(self, event: Event) -> None:
        path, folder = self._local(event["path"]), event["folder"]
        if path.is_file():
            self._store_file(path, folder)
            return
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            self._store_file(file, (Path(folder) / file.parent.relative_to(path)).as_posix())

    def _store_file(self, path: Path, folder: str) -> None:
        """Store one file as an artifact; secrets in text files are redacted."""
        target = None if folder in {"", "."} else folder
        if path.suffix not in REDACTED_SUFFIXES or path.stat().st_size > REDACTED_MAX_BYTES:
            self.client.log_artifact(self.run_id, str(path), target)
            return
        with tempfile.TemporaryDirectory() as clean:
            copy = Path(clean) / path.name
            copy.write_text(redact(path.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
            self.client.log_artifact(self.run_id, str(copy), target)

    def _deliver_model(self, event: Event) -> None:
        from pipeline.tracking.model import log_model

        log_model(self.client, self.run_id, self.experiment_id, self._local(event["folder"]), event["step"])

    def _deliver_finish(self, event: Event) -> None:
        self.client.set_terminated(self.run_id, event["status"], event["time"])

    def _local(self, path: str) -> Path:
        """Return the file of an event. Paths inside the run folder are relative, so that the folder can be moved."""
        found = self._run_dir / path
        if not found.exists():
            raise RejectedError(f"{found}: no longer exists")
        return found


def _current(params: dict[str, str], at_start: dict[str, str], tags: dict[str, str]) -> dict[str, str]:
    """Return tags for settings that differ from MLflow's parameters, which cannot change: `current.<name>`."""
    return {
        f"{CURRENT}{name}": value
        for name, value in params.items()
        if at_start.get(name, value) != value or f"{CURRENT}{name}" in tags
    }


def _same(metric: Metric, key: str, step: int, value: float) -> bool:
    equal = metric.value == value or (math.isnan(metric.value) and math.isnan(value))
    return equal and metric.key == key and metric.step == step


@contextmanager
def _patience(timeout_s: int | None) -> Iterator[None]:
    """Raise the timeout for large files; MLflow reads the variable at each call, and only this thread calls it."""
    before = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")
    if timeout_s is None or before is None:
        yield
        return
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(timeout_s, int(before)))
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before
