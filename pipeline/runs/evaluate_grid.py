"""A grid of sampler settings over one run: each point evaluated and kept, then one table and one picture, tracked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.cluster_profile import Profile
from pipeline.console import Console
from pipeline.runs.choose_scorer import choose_scorer
from pipeline.runs.evaluate import ScoreRequest, evaluate_model, sample_metrics, tracked
from pipeline.runs.evaluation import write_evaluation
from pipeline.runs.grid import TABLE_FILE, Grid, Point, write_grid
from pipeline.runs.sample import load_trained
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.device import Compute
from pipeline.training.trained import Trained

MLFLOW_TABLES_TAG = "mlflow.loggedArtifacts"  # by which MLflow's pages and `load_table` know tables among the artifacts


def evaluate_grid(
    run: Run,
    keys: Sequence[str],
    requests: Sequence[ScoreRequest],
    profile: Profile,
    settings: TrackingSettings,
    console: Console,
) -> tuple[Grid, list[Path]]:
    """Evaluate a run at every point (`pipeline.runs.grid.parse_grid`), and record table and picture; return them and their paths."""
    models: dict[tuple[int | None, str], tuple[Trained, Compute]] = {}
    scorer, points, yardsticks = None, [], {}
    for number, request in enumerate(requests, 1):
        console.say(f"point {number} of {len(requests)}: {', '.join(f'{key} {getattr(request, key)}' for key in keys)}")
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
