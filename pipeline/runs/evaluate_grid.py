"""A grid of sampler settings over one run: each point evaluated and kept, then one table and one picture, tracked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.console import Console
from pipeline.runs.choose_scorer import choose_scorer, not_scorable
from pipeline.runs.evaluate import ScoreRequest, evaluate_model, sample_metrics, tracked
from pipeline.runs.evaluation import write_evaluation
from pipeline.runs.grid import TABLE_FILE, Grid, Point, parse_grid, write_grid
from pipeline.runs.interruption import kept_when_stopped
from pipeline.runs.sample import RequestPlan, load_trained
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.device import Compute
from pipeline.training.trained import Trained, experiment_of, profile_of

MLFLOW_TABLES_TAG = "mlflow.loggedArtifacts"  # by which MLflow's pages and `load_table` know tables among the artifacts


@dataclass(frozen=True)
class GridResult:
    """The scores at every point, and the files that hold them."""

    run: str
    grid: Grid
    written: list[Path]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        written = [str(path) for path in self.written]
        return {"run": self.run, "rows": self.grid.rows(), "yardsticks": self.grid.yardsticks, "written": written}


def evaluate_grid(context: Context, reference: str, request: ScoreRequest, text: str) -> GridResult:
    """Score a run at every point of a grid (`pipeline.runs.grid.parse_grid`), and record table and picture."""
    run, keys, points = _check(context, reference, request, text)
    settings = TrackingSettings.of_profile(context.home, profile_of(run, context.named))
    with kept_when_stopped():
        grid, written = _evaluate_points(run, keys, points, context.profile, settings, context.console)
    return GridResult(run.id, grid, written)


def plan_grid(context: Context, reference: str, request: ScoreRequest, text: str) -> RequestPlan:
    """Check every point without computing anything."""
    run, keys, points = _check(context, reference, request, text)
    asked = request.evaluation(experiment_of(run))
    names = [_name(point, keys) for point in points]
    return RequestPlan(
        run.id, {"metrics": ", ".join(asked.metrics), "at most images": asked.num_images, "points": names}
    )


def _check(
    context: Context, reference: str, request: ScoreRequest, text: str
) -> tuple[Run, list[str], list[ScoreRequest]]:
    """Return run, keys and points, with warnings; UsageError where one point does not fit."""
    run = Run.find(context.home, reference, context.store, not_scorable)
    experiment = experiment_of(run)
    keys, points = parse_grid(text, request)
    for point in points:
        point.settings(experiment)
        point.evaluation(experiment)
    if sample_metrics(request.evaluation(experiment)):
        for point in points:
            for warning in point.warnings(experiment):
                context.console.say(f"warning: {_name(point, keys)}: {warning}")
    return run, keys, points


def _name(point: ScoreRequest, keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {getattr(point, key)}" for key in keys)


def _evaluate_points(
    run: Run,
    keys: Sequence[str],
    requests: Sequence[ScoreRequest],
    profile: Profile,
    settings: TrackingSettings,
    console: Console,
) -> tuple[Grid, list[Path]]:
    models: dict[tuple[int | None, str], tuple[Trained, Compute]] = {}
    scorer, points, yardsticks = None, [], {}
    for number, request in enumerate(requests, 1):
        console.say(f"point {number} of {len(requests)}: {_name(request, keys)}")
        which = request.checkpoint, request.weights
        if which not in models:
            models = {which: load_trained(run, request, profile)}  # one at a time in memory
        trained, compute = models[which]
        asked = request.evaluation(trained.experiment)
        if scorer is None and sample_metrics(asked):
            scorer = choose_scorer(run, asked, profile, console, download=True, split=request.split)
        found = evaluate_model(run, trained, compute, scorer, request, profile, console)
        write_evaluation(found, run.folder / "evaluations")
        points.append(Point.of(request, keys, found))
        if found.scored is not None:
            yardsticks = found.scored.scores.yardsticks
    grid = Grid(list(keys), points, yardsticks)
    folder = run.folder / "evaluations" / f"grid-{_digest(keys, requests, found.step)}"
    written = write_grid(grid, folder)
    with tracked(run, settings, console, folder) as tracker:
        if tracker is not None:
            tracker.artifact(folder, f"evaluations/{folder.name}")
            tables = sorted(path.parent.name for path in folder.parent.glob(f"grid-*/{TABLE_FILE}"))
            named = [{"path": f"evaluations/{name}/{TABLE_FILE}", "type": "table"} for name in tables]
            tracker.tags({MLFLOW_TABLES_TAG: json.dumps(named)})
    return grid, written


def _digest(keys: Sequence[str], requests: Sequence[ScoreRequest], step: int) -> str:
    text = repr((list(keys), list(requests), step))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
