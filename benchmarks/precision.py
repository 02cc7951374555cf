"""Does bf16 change what comes out? Pairs of the same seeds in fp32 and in bf16, for sampling and for training.

    ddpm-pipe train --preset digits
    python -m benchmarks.precision latest                              (DDIM of 50 steps and all ancestral steps)
    python -m benchmarks.precision RUN1 RUN2 --ways ddim --num-images 500
    python -m benchmarks.precision --train digits mnist                (losses of 300 steps)

Sampling: does bf16 in the network move FID and KID, for each way of sampling? A run that knows classes is also sampled with guidance 2.
What was computed is kept in the run's folder: stopped, the same command goes on. A way is shown to be safe where the mean difference with
its 95 % interval lies within a quarter of the standard deviation between seeds, or within 2 % of the value.

Training: are losses in bf16 nearer to those in fp32 with the same seed than two seeds are to each other? Compared are means of 20 steps.
`--data` names the images of the last preset, where they are not to be downloaded. docs/speed.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training import experiment_of, our_steps
from pipeline.config.cluster_profile import Profile, load_profile
from pipeline.console import Console
from pipeline.data.order import Order, default_num_streams
from pipeline.data.shards import Dataset
from pipeline.ingest.ingest import ensure_ingested
from pipeline.metrics.statistics import of_paired, t_quantile
from pipeline.runs.evaluate import ScoreRequest, score_run
from pipeline.storage.runs import Run
from pipeline.training import trained
from pipeline.training.batches import training_batches
from pipeline.training.device import training_compute

STEPS, PART = 300, 20  # of a training, and over how many of them losses are averaged
CHUNK = 250  # the largest that a small network gains by
WAYS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim", "steps": 50, "eta": 0.0},
    "guidance": {"sampler": "ddim", "steps": 50, "eta": 0.0, "guidance_scale": 2.0},
    "ancestral": {"sampler": "ancestral"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--train", nargs="+", metavar="PRESET", default=[])
    parser.add_argument("--data", help="source of the images of the last preset")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    rows = train_all(asked.train, asked.data, asked.seeds) if asked.train else score_all(asked)
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1))


def score_all(asked: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print("| run | images | FID or KID | fp32 | between seeds | bf16 - fp32 | 95 % | bound | shown |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in asked.runs:
        run = Run.find(load_profile(None).home(), name)
        for way in asked.ways:
            if way == "guidance" and not trained.experiment_of(run).model.class_conditional:
                continue
            for row in paired(run, way, asked.num_images, asked.seeds):
                rows.append(row)
                print(line(row), flush=True)
    return rows


def train_all(names: list[str], data: str | None, num_seeds: int) -> list[dict[str, Any]]:
    """Train each preset with several seeds in both precisions; print and return how far the losses are apart."""
    rows = []
    print("| preset | seeds | last loss | bf16 - fp32, same seed | between seeds | shown |")
    print("|---|---|---|---|---|---|")
    for name in names:
        chosen = experiment_of(name, 64)
        named = {"source": data} if data is not None and name == names[-1] else {}
        dataset = ensure_ingested(chosen.data.model_copy(update=named), load_profile(None).datasets())
        exact, cheap = (
            [trained_losses(name, precision, seed, dataset) for seed in range(1, num_seeds + 1)]
            for precision in ("fp32", "bf16")
        )
        rows.append(row_of_losses(name, exact, cheap))
        print(line_of_losses(rows[-1]), flush=True)
    return rows


def trained_losses(preset: str, precision: str, seed: int, dataset: Dataset, num_steps: int = STEPS) -> list[float]:
    """Return the mean loss of each step of a training of one worker."""
    chosen = experiment_of(preset, 64, (f"training.precision={precision}", f"seed={seed}"))
    shape, training = dataset.manifest.shape, chosen.training
    compute = training_compute(chosen, Profile(), 1, shape)
    compute.start()
    num_streams = training.num_streams or default_num_streams(training.batch_size)
    window = chosen.data.shuffle_window
    order = Order(dataset.manifest.row_groups, seed, num_streams, training.batch_size, window)
    batches = training_batches(dataset, order, range(num_streams), 0, seed)
    steps = our_steps(chosen, shape, compute, batches)
    return [float(result.losses.mean()) for result in islice(steps, num_steps)]


def row_of_losses(name: str, exact: list[list[float]], cheap: list[list[float]]) -> dict[str, Any]:
    """Return how far losses in bf16 are from those in fp32 of the same seed, and those of two seeds in fp32: [seed][step]."""
    smooth, other = ([of_parts(losses) for losses in each] for each in (exact, cheap))
    of_seeds = statistics.mean(distance(a, b) for a, b in combinations(smooth, 2))
    of_precisions = [distance(a, b) for a, b in zip(smooth, other, strict=True)]
    return {
        "name": name, "num_seeds": len(exact), "fp32": exact, "bf16": cheap, "last": statistics.mean(x[-1] for x in smooth),
        "apart": max(of_precisions), "between_seeds": of_seeds, "shown": max(of_precisions) < of_seeds,
    }  # fmt: skip


def of_parts(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[begin : begin + PART]) for begin in range(0, len(losses), PART)]


def distance(a: list[float], b: list[float]) -> float:
    return statistics.mean(abs(x - y) for x, y in zip(a, b, strict=True))


def line_of_losses(row: dict[str, Any]) -> str:
    figures = " | ".join(f"{row[key]:.3g}" for key in ("last", "apart", "between_seeds"))
    return f"| {row['name']} | {row['num_seeds']} | {figures} | {'yes' if row['shown'] else 'no'} |"


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
