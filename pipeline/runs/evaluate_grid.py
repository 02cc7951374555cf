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
from pipeline.runs.choose_scorer import choose_scorer
from pipeline.runs.evaluate import ScoreRequest, check_requests, evaluate_model, sample_metrics, tracked
from pipeline.runs.evaluation import write_evaluation
from pipeline.runs.grid import TABLE_FILE, Grid, Point, parse_grid, setting_of, write_grid
from pipeline.runs.interruption import kept_when_stopped
from pipeline.runs.sample import LoadedRun, RequestPlan
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.trained import experiment_of, profile_of

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
    keys, points = parse_grid(text, request)
    run, _ = check_requests(context, reference, {f"{_name(point, keys)}: ": point for point in points})
    return run, keys, points


def _name(point: ScoreRequest, keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting_of(point, keys).items())


def _evaluate_points(
    run: Run,
    keys: Sequence[str],
    requests: Sequence[ScoreRequest],
    profile: Profile,
    settings: TrackingSettings,
    console: Console,
) -> tuple[Grid, list[Path]]:
    loaded, which = None, None
    scorer, points, yardsticks = None, [], {}
    for number, request in enumerate(requests, 1):
        console.say(f"point {number} of {len(requests)}: {_name(request, keys)}")
        if loaded is None or which != (request.checkpoint, request.weights):
            loaded, which = LoadedRun.load(run, request, profile, console), (request.checkpoint, request.weights)
        asked = request.evaluation(loaded.trained.experiment)
        if scorer is None and sample_metrics(asked):
            scorer = choose_scorer(run, asked, profile, console, download=True, split=request.split)
        found = evaluate_model(loaded, scorer, request)
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
