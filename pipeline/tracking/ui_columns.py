"""Which columns MLflow's list of runs opens with: settings and scores that matter, before what it shows by itself.

MLflow keeps a view that is shared by its address in a tag of the experiment, as JSON; the address names the tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

VIEW = "ddpm-pipe"
TAG = f"mlflow.sharedViewState.{VIEW}"
PARAMETERS = ("diffusion.schedule", "diffusion.num_timesteps", "training.steps")
SCORE = re.compile(r"(fid|kid|bits_per_dim)_[A-Za-z0-9_]*")
PART = re.compile(r"_(std|prior|divergences|decoder)_")
MOST_SCORES = 4


def view_of(metrics: Iterable[str], sweeps: Iterable[str]) -> dict[str, Any]:
    """Return the view for an experiment whose runs have these metrics, final scores first among them; `sweeps` are shown open."""
    scores = [name for name in sorted(set(metrics)) if SCORE.fullmatch(name) and not PART.search(name)]
    scores.sort(key=lambda name: ("fid", "kid", "bit").index(name[:3]))
    columns = [f"params.`{name}`" for name in PARAMETERS] + [f"metrics.`{name}`" for name in scores[:MOST_SCORES]]
    return {"selectedColumns": [*columns, "metrics.`sweep_rank`"], "runsExpanded": dict.fromkeys(sweeps, True)}


def choose_columns(post: Callable[[str, dict[str, Any]], dict[str, Any]], experiment_id: str) -> str:
    """Keep the view in the experiment, by `post(path, body)` to its server, and return what its address ends with."""
    found = post("/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment_id], "max_results": 200})
    names = [metric["key"] for run in found.get("runs", []) for metric in run["data"].get("metrics", [])]
    tags = {run["info"]["run_id"]: run["data"].get("tags", []) for run in found.get("runs", [])}
    sweeps = [run_id for run_id, of_run in tags.items() if {"key": "kind", "value": "sweep"} in of_run]
    tag = {"experiment_id": experiment_id, "key": TAG, "value": json.dumps(view_of(names, sweeps))}
    post("/api/2.0/mlflow/experiments/set-experiment-tag", tag)
    return f"&viewStateShareKey={VIEW}"
