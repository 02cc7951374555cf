"""The run that `mlflow run` opened, named by MLFLOW_RUN_ID.

Training records in such a run. `sample` and `evaluate` record their results in the trained run, and copy them to the opened one, which
would be empty otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.console import Console
from pipeline.errors import UsageError
from pipeline.redaction import one_line, public_uri
from pipeline.storage.runs import Run
from pipeline.tracking.names import metric_name
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


def copy_to_opened(
    settings: TrackingSettings, of: Run, figures: Mapping[str, float], files: Sequence[Path], console: Console
) -> None:
    """Record figures, files and the id of the trained run in the run that `mlflow run` opened, if it did.

    A store that fails is a warning, not an error.
    """
    from mlflow import MlflowClient

    opened = settings.mlflow_run_id
    if opened is None:
        return
    try:
        client = MlflowClient(settings.uri)
        found = get_run(client, opened)
        owner = None if found is None else found.data.tags.get(RUN_ID_TAG)
        if found is None or owner not in (None, of.id):
            why = f"MLflow has no run {opened}" if found is None else f"run {opened} belongs to {owner}"
            console.say(f"warning: MLFLOW_RUN_ID: {why}; the results are recorded only in run {of.id}")
            return
        client.set_tag(opened, "ddpm_pipe.of_run", of.id)
        if of.mlflow_run_id:
            client.set_tag(opened, "ddpm_pipe.of_mlflow_run", of.mlflow_run_id)
        for name, value in figures.items():
            client.log_metric(opened, metric_name("score", name), value)
        for path in files:
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(opened, str(path))
    except Exception as error:
        console.say(f"warning: the results were not copied to the run that MLflow opened: {one_line(error)[:200]}")
