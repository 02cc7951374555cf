"""The run that `mlflow run` opened for `sample` or `evaluate`: it gets what the command made, and names the trained run.

A training takes such a run as its own (`TrackingSettings.resolve`). What these commands find belongs to the trained run, and is recorded
there; without a copy here, whoever started them from MLflow would see an empty run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.runs import Run
from pipeline.tracking.run import get_run
from pipeline.tracking.tracker import TrackingSettings


@dataclass(frozen=True)
class Opened:
    """An MLflow run that is open, and the address of its store."""

    run_id: str
    uri: str

    @classmethod
    def of(cls, settings: TrackingSettings) -> Opened | None:
        """Return the run that settings were resolved with, if there is one."""
        return cls(settings.mlflow_run_id, settings.uri) if settings.mlflow_run_id else None

    def record(self, of: Run, figures: Mapping[str, float], files: Sequence[Path]) -> str | None:
        """Record figures and files, and of which trained run they are; return one line on why that failed, None if it did not."""
        from mlflow import MlflowClient

        try:
            client = MlflowClient(self.uri)
            if get_run(client, self.run_id) is None:
                return f"MLflow has no run {self.run_id} (MLFLOW_RUN_ID); the results stand in the trained run alone"
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
        except Exception as error:  # the store's trouble is not the command's
            return f"the run that MLflow opened was not completed: {' '.join(str(error).split())[:200]}"
        return None
