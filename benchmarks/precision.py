"""Does bf16 in the sampling network move FID and KID? Paired: the same seeds of noise in fp32 and in bf16, for each way of sampling.

    ddpm-pipe train --preset digits
    python benchmarks/precision.py latest                              (DDIM of 50 steps and all ancestral steps)
    python benchmarks/precision.py RUN1 RUN2 --ways ddim --num-images 500

A run that knows classes is also sampled with guidance 2. What was computed is kept in the run's folder: stopped, the same command goes on.
A way is shown to be safe where the mean difference with its 95 % interval lies within a quarter of the standard deviation between seeds, or
within 2 % of the value. docs/speed.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.cluster_profile import load_profile
from pipeline.console import Console
from pipeline.metrics.statistics import of_paired, t_quantile
from pipeline.runs.evaluate import ScoreRequest, score_run
from pipeline.storage.runs import Run
from pipeline.training.trained import experiment_of

CHUNK = 250  # the largest that a small network gains by
WAYS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim", "steps": 50, "eta": 0.0},
    "guidance": {"sampler": "ddim", "steps": 50, "eta": 0.0, "guidance_scale": 2.0},
    "ancestral": {"sampler": "ancestral"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    rows = []
    print("| run | images | FID or KID | fp32 | between seeds | bf16 - fp32 | 95 % | bound | shown |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in asked.runs:
        run = Run.find(load_profile(None).home(), name)
        for way in asked.ways:
            if way == "guidance" and not experiment_of(run).model.class_conditional:
                continue
            for row in paired(run, way, asked.num_images, asked.seeds):
                rows.append(row)
                print(line(row), flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1))


def paired(run: Run, way: str, num_images: int, num_seeds: int) -> list[dict[str, Any]]:
    """Return a row for each metric: values in fp32, and the paired differences."""
    values: dict[str, dict[str, list[float]]] = {}
    for seed in range(1, num_seeds + 1):
        for precision in ("fp32", "bf16"):
            request = ScoreRequest(
                num_images=num_images,
                metrics=("fid", "kid"),
                seed=seed,
                batch_size=CHUNK,
                precision=precision,
                **WAYS[way],
            )
            found = score_run(run, request, load_profile(None), Console()).scored
            assert found is not None
            for metric, value in found.scores.values.items():
                values.setdefault(metric, {}).setdefault(precision, []).append(value)
    return [
        row_of(f"{run.record.name} {way}", num_images, metric, of["fp32"], of["bf16"])
        for metric, of in values.items()
        if metric.startswith(("fid_", "kid_")) and "std" not in metric
    ]


def row_of(name: str, num_images: int, metric: str, exact: list[float], cheap: list[float]) -> dict[str, Any]:
    """Return what is known of one metric from values of the same seeds in both precisions."""
    apart = np.subtract(cheap, exact)
    error, freedom = of_paired(apart)
    value, between = statistics.mean(exact), statistics.stdev(exact)
    mean, half = float(apart.mean()), t_quantile(freedom) * error
    bound = max(between / 4, 0.02 * abs(value))
    shown = abs(mean) + half < bound
    return {
        "name": name, "num_images": num_images, "metric": metric, "fp32": exact, "bf16": cheap, "value": value,
        "between_seeds": between, "difference": mean, "half_interval": half, "bound": bound, "shown": shown,
        "mean_within": abs(mean) < bound,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    figures = [f"{row[key]:.3g}" for key in ("value", "between_seeds", "difference", "half_interval", "bound")]
    figures[3] = f"± {figures[3]}"
    verdict = "yes" if row["shown"] else "the mean" if row["mean_within"] else "no"
    return (
        f"| {row['name']} | {row['num_images']} | {row['metric'].split('_')[0]} | {' | '.join(figures)} | {verdict} |"
    )


if __name__ == "__main__":
    main()
