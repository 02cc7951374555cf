"""The list of runs that `ddpm-pipe runs` prints, from the run folders alone: no MLflow, no server."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config.experiment import experiment_from, with_overrides
from pipeline.errors import UsageError
from pipeline.storage.runs import Run

COLUMNS = ("id", "name", "dataset", "schedule", "T", "steps", "fid", "metric", "status", "created")


def runs_table(home: Path, storage: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each run, oldest first; those of an object store (a profile's `storage`) too.

    `steps` reads "done/total"; "done" for a trial that a clock ends and for an imported run, where it is None if the folder did not say.
    `fid` is the value of the newest FID and `metric` its full name, both None before the first evaluation; `created` is UTC. `step`,
    `total_steps`, `reason` (why it stands where it stands) and `mlflow_run_id` come along for programs.
    """
    return [_row(run) for run in Run.all(home, storage)]


def _row(run: Run) -> dict[str, Any]:
    record, state = run.record, run.state()
    settings = record.experiment
    # a clock ends some trainings, and what is imported was trained elsewhere: no setting says how many steps these make
    open_end = record.seconds_allowed is not None or bool(record.imported_from)
    total = None if open_end else _setting(settings, "training", "steps")
    if total is not None and state.overrides:
        with suppress(UsageError):  # they are damaged: the run is still listed
            total = with_overrides(experiment_from(settings), state.overrides).training.steps
    known = state.step > 0 or not record.imported_from
    metric = headline(state.summary)
    is_vae = _setting(settings, "model", "type") == "vae"
    return {
        "id": run.id,
        "name": record.name,
        "dataset": record.dataset.get("name") or Path(str(record.dataset.get("path", ""))).name,
        "schedule": None if is_vae else _setting(settings, "diffusion", "schedule"),
        "T": None if is_vae else _setting(settings, "diffusion", "num_timesteps"),
        "steps": (f"{state.step}" if open_end else f"{state.step}/{total}") if known else None,
        "step": state.step,
        "total_steps": total,
        "fid": None if metric is None else state.summary[metric],
        "metric": metric,
        "status": str(state.status),
        "reason": state.reason,
        "created": record.created[:16].replace("T", " "),
        "goodput": state.goodput.get("goodput"),
        "mlflow_run_id": run.mlflow_run_id,
    }


def headline(summary: dict[str, float]) -> str | None:
    """Return the name of the figure that stands for a run: its newest FID as it samples, not a yardstick's, and not a deviation.

    A name with a slash is of images that were made or judged in another way (`pipeline.runs.evaluation.Scored`).
    """
    names = [name for name in summary if name.startswith("fid_") and not name.startswith("fid_std_")]
    usual = [name for name in names if "/" not in name]
    return usual[-1] if usual else None


def with_newest(summary: dict[str, float], figures: dict[str, float]) -> dict[str, float]:
    """Return a summary with further figures, which come last, whether or not they were there."""
    return {name: value for name, value in summary.items() if name not in figures} | figures


def _setting(settings: dict[str, Any], section: str, key: str) -> Any:
    found = settings.get(section)
    return found.get(key) if isinstance(found, dict) else None
