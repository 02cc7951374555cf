"""What a sweep publishes: the report in its folder and in MLflow, searchable names of trials, and the best model in the registry."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any, Literal

from pipeline.config.cluster_profile import Profile
from pipeline.console import Console
from pipeline.data.shards import Dataset
from pipeline.runs.record import PARENT_TAG, trial_of
from pipeline.storage.durable import write_json
from pipeline.storage.home import make_folder
from pipeline.storage.next_command import typeable
from pipeline.storage.runs import Run
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.report import write_report
from pipeline.sweeps.result import Result, statement, with_error
from pipeline.sweeps.text import describe_sweep
from pipeline.tracking.opened import checked_run
from pipeline.tracking.registry import SWEEP_TAG, alias_of, register
from pipeline.tracking.run import experiment_of_run
from pipeline.tracking.tracker import TrackedDataset, Tracker, TrackingSettings

PARENT_TIMEOUT_S = 15.0


class SweepTracking:
    """The sweep's own run in MLflow, under which its trials are nested."""

    def __init__(self, folder: SweepFolder, profile: Profile, dataset: Dataset) -> None:
        settings = TrackingSettings.of_profile(profile.home(), profile)
        self.settings = checked_run(settings, folder.folder.name, Console().say)
        self._folder, self._dataset = folder, dataset
        self.tracker = Tracker(folder.folder, self.settings)

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the sweep's run; None until the store has answered."""
        return self._folder.mlflow_run_id

    @property
    def for_trials(self) -> TrackingSettings:
        """Settings of the trials: they use the sweep's MLflow experiment, since MLflow nests runs within one experiment only."""
        settings = replace(self.settings, mlflow_run_id=None)
        name = None if self.mlflow_run_id is None else experiment_of_run(settings.uri, self.mlflow_run_id)
        return settings if name is None else replace(settings, experiment=name)

    def start(self) -> None:
        """Open the run, and wait a moment for its id, which trials name as their parent."""
        record, sweep, manifest = self._folder.record, self._folder.sweep, self._dataset.manifest
        space: dict[str, Any] = {
            f"space.{key}": json.dumps(axis.model_dump(mode="json", exclude_defaults=True))
            for key, axis in sweep.space.items()
        }
        self.tracker.start(
            f"sweep {record.id}" if record.name == "sweep" else f"sweep {record.name} {record.id}",
            tags={SWEEP_TAG: record.id, "kind": "sweep", "dataset": manifest.name, "code_version": record.code_version},
            params={
                **space,
                "search": sweep.search,
                "metric": sweep.metric,
                "seeds": sweep.seeds,
                "budget": sweep.budget.to_text(),
                "base": sweep.base,
            },
            description=describe_sweep(record, sweep, None),
            dataset=TrackedDataset(manifest.name, manifest.fingerprint, self._dataset.location),
        )
        self.tracker.flush(PARENT_TIMEOUT_S)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
        """Close the run; return whether the store has everything."""
        self.tracker.finish(status)
        return self.tracker.close()


def publish(folder: SweepFolder, result: Result, tracking: SweepTracking, console: Console) -> None:
    """Write the report, and show it in MLflow with the trials and the best model. An unreachable tracking store loses no result."""
    runs = {run.id: run for run in folder.trials().values()}
    report = make_folder(folder.report)
    write_json(report / "result.json", result.to_json())
    write_report(folder, result, runs, report)
    tracker = tracking.tracker
    for path in sorted(report.iterdir()):
        tracker.artifact(path, "report")
    _chart_of_progress(folder, result, tracker)
    tracker.describe(describe_sweep(folder.record, folder.sweep, result))
    best = result.best
    if best is not None:
        tracker.tags({"best": best.title, "statement": statement(result)})
    delivered = tracking.close("FINISHED")
    _tell_trials(folder, result, runs, tracking)
    if not delivered:
        console.say(
            f"tracking: {tracker.problem}; the report is in {report}, MLflow gets it with: {typeable(f'resume {folder.id}')}"
        )
        return
    _register(folder, result, runs, tracking, console)


def _chart_of_progress(folder: SweepFolder, result: Result, tracker: Tracker) -> None:
    """Record two lines in MLflow, by the number of trials done: the value of each trial, and the lowest mean of a point so far.

    The last value of the second line is the mean of the best point of the report.
    """
    compared = result.complete or result.ranked
    points = {e.key: point.title for point in compared for e in point.entries if e.value is not None}
    values = {e.key: e.value for point in result.ranked for e in point.entries if e.value is not None}
    so_far: dict[str, list[float]] = {}
    for count, key in enumerate(folder.ledger.entries(), 1):
        if key not in values:
            continue
        drawn = {f"trial_{result.metric_name}": values[key]}
        if key in points:
            so_far.setdefault(points[key], []).append(values[key])
        if so_far:
            drawn[f"best_{result.metric_name}"] = min(statistics.fmean(of_point) for of_point in so_far.values())
        tracker.metrics(count, drawn, "sweep")


def _tell_trials(folder: SweepFolder, result: Result, runs: dict[str, Run], tracking: SweepTracking) -> None:
    """Give each trial's run its rank, and the best one a name that a search finds: "cosine, T = 250, best FID, seed 0".

    The rank is a metric, since MLflow sorts tags as text.
    """
    metric = result.metric.upper()
    for rank, point in enumerate(result.points, 1):
        for entry in point.entries:
            run = runs.get(entry.run)
            trial = trial_of(run.record) if run is not None else None
            if run is None or trial is None:
                continue
            tags: dict[str, str] = {"trial_status": entry.status}
            if trial.parent is None and tracking.mlflow_run_id is not None:
                tags[PARENT_TAG] = tracking.mlflow_run_id
            is_best = point is result.best and entry is point.best_entry
            tags["mlflow.runName"] = f"{trial.title}, best {metric}, seed {trial.seed}" if is_best else trial.name
            tracker = Tracker(run.folder, tracking.settings)
            tracker.tags(tags)
            if point.mean is not None:
                tracker.metrics(entry.steps, {"rank": rank}, "sweep")
            tracker.close(timeout=10.0)


def _register(
    folder: SweepFolder, result: Result, runs: dict[str, Run], tracking: SweepTracking, console: Console
) -> None:
    """Register the best trial's model under an alias made from the metric's identity.

    The alias goes to the model with the best mean over seeds, as in the ranking: a single trial of many would win by luck.
    """
    best = result.best
    entry = best.best_entry if best is not None else None
    run = runs.get(entry.run) if entry is not None else None
    if best is None or best.mean is None or entry is None or run is None or run.mlflow_run_id is None:
        return
    name = f"ddpm-{folder.record.dataset['name']}"
    alias = alias_of(entry.identity)
    version = register(
        tracking.settings.uri,
        run.mlflow_run_id,
        name,
        alias,
        sweep=folder.id,
        value=best.mean,
        spoken=f"{best.title}: {entry.metric} {with_error(best)}, mean over {len(best.values)} seed{'s' * (len(best.values) > 1)}, by "
        f"which the alias is given; this model, of seed {entry.seed}: {entry.value:.4g}. From sweep {folder.id}.",
        about={
            "run": run.id,
            "point": best.title,
            "metric": entry.metric,
            "num_seeds": str(len(best.values)),
            "own_value": repr(entry.value),
        },
        identity=entry.identity,
    )
    if version is None:
        console.say(
            f"the best model is run {run.id}; it could not be registered in MLflow, try: {typeable(f'resume {folder.id}')}"
        )
    else:
        console.say(version)
