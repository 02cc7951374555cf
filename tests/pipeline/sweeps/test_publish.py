"""What a sweep shows in MLflow, on a real store: the lines of its progress."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from pipeline.config.cluster_profile import Profile
from pipeline.sweeps.commands import _result
from pipeline.sweeps.config import plain_base, sweep_from
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.publish import _chart_of_progress
from pipeline.tracking.tracker import Tracker, TrackingSettings
from tests.kit.tracking import history
from tests.pipeline.sweeps.swept_entries import entry

SCHEDULES = ["linear", "cosine", "sigmoid"]


def test_the_lines_of_progress_are_of_what_is_ranked_alone(home: Path, migrated_database: Path) -> None:
    shutil.copy(migrated_database, home / "mlflow.db")
    sweep = sweep_from({"base": "digits", "space": {"diffusion.schedule": SCHEDULES}, "budget": {"steps": 9}})
    base = plain_base(sweep)
    dataset = {"path": "", "fingerprint": "images", "name": "digits"}
    folder = SweepFolder.create(home, sweep, base, base, dataset, Profile().to_dict(), ["ddpm-pipe", "sweep"])

    def enter(seed: int, schedule: str, value: float | None, scorer: str = "new") -> None:
        found = entry({"diffusion.schedule": schedule}, seed, value, identity={"metric": "fid", "extractor": scorer})
        folder.ledger.append(replace(found, key=f"{found.key}-{scorer}", metric=f"fid_{scorer}"))

    enter(0, "linear", None)  # the first to end: it failed
    enter(0, "cosine", 0.1, "old")  # judged otherwise: as a minimum it would hide all that follows
    enter(0, "cosine", 3.0)
    enter(0, "sigmoid", 2.0)
    enter(1, "linear", 4.0)
    enter(1, "sigmoid", 3.5)
    enter(1, "cosine", 2.1)

    settings = replace(TrackingSettings.resolve(home), batch_interval_s=0.01)
    tracker = Tracker(folder.folder, settings)
    tracker.start("sweep", {}, {}, "")
    result = _result(folder)
    _chart_of_progress(folder, result, tracker)
    assert tracker.close()
    run_id = folder.mlflow_run_id
    assert history(settings, run_id, "sweep/trial_fid_new") == [(3, 3.0), (4, 2.0), (5, 4.0), (6, 3.5), (7, 2.1)]
    means = [(3, 3.0), (4, 2.0), (5, 2.0), (6, 2.75), (7, 2.55)]  # of sigmoid's lucky seed, of both, then of cosine
    assert history(settings, run_id, "sweep/best_fid_new") == means
    assert result.best is not None
    assert result.best.mean == means[-1][1]  # the point that text and table name
    assert history(settings, run_id, "sweep/trial_fid_old") == history(settings, run_id, "sweep/best_fid_old") == []
