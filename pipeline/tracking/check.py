"""Check a tracking store: create a run, write to it, read it back and delete it."""

from __future__ import annotations

import time

from pipeline.tracking.run import make_experiment, prepare_store
from pipeline.tracking.tracker import TrackingSettings
from pipeline.tracking.writer import prepare_environment

FILE = "doctor.txt"


def check_store(settings: TrackingSettings) -> float:
    """Create a run with a metric and a file, read both back and delete it; return the seconds taken.

    Raises what MLflow raises. The server keeps a deleted run until `mlflow gc`.
    """
    from mlflow import MlflowClient

    prepare_environment()
    begin = time.perf_counter()
    with prepare_store(settings.uri):
        client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)
        experiment = make_experiment(client, settings.artifacts, settings.experiment)
    run = client.create_run(experiment, tags={"ddpm_pipe.doctor": "true"}, run_name="doctor").info.run_id
    try:
        client.log_metric(run, "doctor", 1.0, synchronous=True)
        if client.get_run(run).data.metrics.get("doctor") != 1.0:
            raise ValueError("the metric that was written is not the one that is read back")
        client.log_text(run, "written by ddpm-pipe doctor\n", FILE)
        if [file.path for file in client.list_artifacts(run)] != [FILE]:
            raise ValueError("the file that was written is not there")
        return time.perf_counter() - begin
    finally:
        client.delete_run(run)
