"""The run that `mlflow run` opened, named by MLFLOW_RUN_ID.

Training records in such a run. `sample` and `evaluate` record their results in the trained run, and copy them to the opened one, which
would be empty otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.console import Console
from pipeline.errors import UsageError
from pipeline.redaction import public_uri
from pipeline.storage.runs import Run
from pipeline.tracking.run import RUN_ID_TAG, get_run, prepare_store
from pipeline.tracking.tracker import TrackingSettings
from pipeline.tracking.writer import prepare_environment


def checked_run(settings: TrackingSettings, ours: str | None, say: Callable[[str], None]) -> TrackingSettings:
    """Check MLflow's environment variables before training starts; return the settings to use.

    The run in MLFLOW_RUN_ID is used if it is new or belongs to `ours`. If the store has no such run, print a warning and record in a new
    one. If the store does not answer, the run is looked up when it does.

    Raises:
        UsageError: the run belongs to another training or sweep.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    named = settings.mlflow_run_id
    if named is None:
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            say(
                f"warning: MLFLOW_EXPERIMENT_ID is not used; recording in experiment {settings.experiment!r}; "
                "MLFLOW_EXPERIMENT_NAME chooses another"
            )
        return settings
    prepare_environment()
    try:
        with prepare_store(settings.uri):
            found = get_run(MlflowClient(settings.uri, settings.uri), named)
    except MlflowException:
        return settings
    if found is None:
        say(f"warning: MLFLOW_RUN_ID: {public_uri(settings.uri)} has no run {named}; recording in a new one")
        return replace(settings, mlflow_run_id=None)
    owner = found.data.tags.get(RUN_ID_TAG)
    if owner not in (None, ours):
        raise UsageError(
            f"MLFLOW_RUN_ID: run {named} belongs to {owner}, expected one that `mlflow run` has just opened. Unset "
            "MLFLOW_RUN_ID to record in a new run"
        )
    return settings


@dataclass(frozen=True)
class Opened:
    """The id of an open MLflow run, and the address of its store."""

    run_id: str
    uri: str

    @classmethod
    def of(cls, settings: TrackingSettings) -> Opened | None:
        """Return the run in MLFLOW_RUN_ID, if there is one."""
        return cls(settings.mlflow_run_id, settings.uri) if settings.mlflow_run_id else None

    @staticmethod
    def copy(
        opened: Opened | None, of: Run, figures: Mapping[str, float], files: Sequence[Path], console: Console
    ) -> None:
        """Record in the run that `mlflow run` opened, if it did; a store that fails is a warning."""
        trouble = None if opened is None else opened.record(of, figures, files)
        if trouble is not None:
            console.say(f"warning: {trouble}")

    def record(self, of: Run, figures: Mapping[str, float], files: Sequence[Path]) -> str | None:
        """Record figures, files and the id of the trained run; return a line with the reason if that failed, else None."""
        from mlflow import MlflowClient

        try:
            client = MlflowClient(self.uri)
            found = get_run(client, self.run_id)
            if found is None:
                return (
                    f"MLflow has no run {self.run_id} (MLFLOW_RUN_ID); the results are recorded only in the trained run"
                )
            owner = found.data.tags.get(RUN_ID_TAG)
            if owner not in (None, of.id):
                return (
                    f"MLFLOW_RUN_ID: run {self.run_id} belongs to {owner}; the results are recorded only in run {of.id}"
                )
            tags = {"ddpm_pipe.of_run": of.id} | (
                {"ddpm_pipe.of_mlflow_run": of.mlflow_run_id} if of.mlflow_run_id else {}
            )
            for tag, text in tags.items():
                client.set_tag(self.run_id, tag, text)
            for name, value in figures.items():
                client.log_metric(self.run_id, name, value)
            for path in files:
                log = client.log_artifacts if path.is_dir() else client.log_artifact
                log(self.run_id, str(path))
        except Exception as error:  # a failing store must not fail the command
            return f"the results were not copied to the run that MLflow opened: {' '.join(str(error).split())[:200]}"
        return None
