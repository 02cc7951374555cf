"""What is predicted x what is minimised x the schedule, on the embedded digits at equal training: FID and bits/dim of each.

    python benchmarks/modes.py run modes.jsonl                   trains what the file does not hold yet; about a minute a model
    python benchmarks/modes.py run modes.jsonl --jobs 8          the same, eight at once
    python benchmarks/modes.py table modes.jsonl                 prints the table of docs/modes.md

Every model has the same network, images, noise, learning rate and number of steps; only the cell's settings differ. One thread. FID is
taken with the digits' own classifier on as many DDIM(eta 1) images as the evaluation of a run would take; bits/dim is the whole bound over
all T steps, for the same 64 real images each time. docs/modes.md says what the figures bear.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm import bits_per_dim
from pipeline.config import presets
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import DataConfig, Experiment, load_experiment, with_overrides
from pipeline.data.images import to_float
from pipeline.data.order import Order, default_num_streams
from pipeline.data.shards import Dataset
from pipeline.ingest.ingest import ensure_ingested
from pipeline.metrics import scoring
from pipeline.sampling.generation import Denoiser
from pipeline.training.batches import training_batches
from pipeline.training.combinations import check_training
from pipeline.training.device import sampling_compute
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import build_diffusion, build_model, build_objective
from pipeline.training.randomness import image_generators

PREDICTIONS = ("eps", "x0", "v", "x_prev")  # of the last, which is ill-conditioned, one objective
SCHEDULES = ("linear", "cosine")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "simple": (),
    "vlb": ("training.objective=vlb", "training.timestep_sampling=loss_aware"),
    "hybrid, learned variance": ("training.objective=hybrid", "diffusion.variance=learned_range"),
    "min_snr": ("training.objective=min_snr",),
}
REPEATED = ("eps", "simple", "cosine")  # with further seeds, to see what luck does
SEEDS = (0, 1, 2)
BOUND_IMAGES = 64


@dataclass(frozen=True)
class Cell:
    """One model of the table."""

    prediction: str
    objective: str
    schedule: str
    seed: int

    def experiment(self, steps: int, num_timesteps: int) -> Experiment:
        """Return the digits preset with this cell's settings, in float32."""
        settings = (
            f"seed={self.seed}",
            f"diffusion.prediction={self.prediction}",
            f"diffusion.schedule={self.schedule}",
            f"diffusion.num_timesteps={num_timesteps}",
            f"training.steps={steps}",
            "training.precision=fp32",
            "training.ema_decay=0.99",
            "sampling.steps=20",
            *OBJECTIVES[self.objective],
        )
        return with_overrides(load_experiment(presets.find("experiments", "digits")), settings)


def cells() -> Iterator[Cell]:
    """Yield every cell once, further seeds last."""
    for objective, prediction, schedule in product(OBJECTIVES, PREDICTIONS, SCHEDULES):
        if prediction != "x_prev" or objective == "simple":
            yield Cell(prediction, objective, schedule, SEEDS[0])
    for seed in SEEDS[1:]:
        yield Cell(*REPEATED, seed)


def measure(experiment: Experiment, dataset: Dataset, cache: Path) -> dict[str, Any]:
    """Train one model and return its figures."""
    compute = sampling_compute(Profile(threads_per_worker=1))
    compute.start()
    diffusion = build_diffusion(experiment)
    model = compute.place(build_model(experiment, dataset.manifest.shape))
    train_state = TrainState.create(model, experiment.training, diffusion.num_timesteps, compute)
    size = experiment.training.batch_size
    streams = default_num_streams(size)
    order = Order(dataset.manifest.row_groups, experiment.seed, streams, size, experiment.data.shuffle_window)
    batches = training_batches(dataset, order, range(streams), 0, experiment.seed)
    begin = time.monotonic()
    for result in fit(
        train_state, model, build_objective(experiment), batches, experiment.training, compute, seed=experiment.seed
    ):
        if result.step == experiment.training.steps:
            break
    training_s = time.monotonic() - begin
    train_state.ema.copy_to(model)
    denoiser = Denoiser(diffusion, model, dataset.manifest.shape, experiment.sampling, 0, compute)
    extractor = scoring.choose_extractor(dataset, cache, kind="classifier")
    reference = scoring.prepare_reference(dataset, extractor, experiment.evaluation.num_images, cache)
    found = extractor(torch.cat(list(denoiser.generate(reference.num_images))).numpy())
    scorer = scoring.Scorer(dataset, extractor, reference)
    scores = scoring.score(found, scorer, denoiser.identity("ema"), metrics=("fid",))
    rows = np.linspace(0, len(dataset) - 1, BOUND_IMAGES).round().astype(np.int64)
    generators = [image_generators(0, range(row, row + 1), "likelihood")[0] for row in rows.tolist()]
    x0 = to_float(torch.from_numpy(dataset.read(rows)))
    bits = bits_per_dim(diffusion, model.eval(), x0, generator=generators).total
    return {
        "fid": float(next(iter(scores.values.values()))),
        "fid_real_half": scores.yardsticks["real_half"]["fid"],
        "fid_images": reference.num_images,
        "bits_per_dim": float(bits.mean()),
        "bits_per_dim_standard_error": float(bits.std() / len(bits) ** 0.5),
        "training_s": round(training_s, 1),
    }


def measured(cell: Cell, steps: int, num_timesteps: int, home: Path) -> dict[str, Any]:
    """Train and measure one cell, in a process of its own where there are several."""
    experiment = cell.experiment(steps, num_timesteps)
    check_training(experiment)
    figures = measure(experiment, ensure_ingested(DataConfig(), home), home / "features")
    return {"cell": asdict(cell), "steps": steps, "T": num_timesteps, **figures}


def run(path: Path, steps: int, num_timesteps: int, home: Path, at_most: int | None, jobs: int) -> None:
    """Measure every cell that the file does not hold yet, or so many of them, and add a line for each."""
    ensure_ingested(DataConfig(), home)
    done = [json.loads(line)["cell"] for line in path.read_text().splitlines()] if path.exists() else []
    missing = [cell for cell in cells() if asdict(cell) not in done]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as processes:
        futures = [processes.submit(measured, cell, steps, num_timesteps, home) for cell in missing[:at_most]]
        for future in as_completed(futures):
            line = json.dumps(future.result())
            with path.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


def table(path: Path) -> str:
    """Return Markdown: a row for each prediction and objective, FID and bits/dim for each schedule."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        cell = entry["cell"]
        found[cell["prediction"], cell["objective"], cell["schedule"]].append(entry)
    head = [f"{name}, {schedule}" for schedule in SCHEDULES for name in ("FID", "bits/dim")]
    lines = [f"| predicts | minimises | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    for prediction, objective in product(PREDICTIONS, OBJECTIVES):
        if not found[prediction, objective, SCHEDULES[0]]:
            continue
        figures = [text for schedule in SCHEDULES for text in _figures(found[prediction, objective, schedule])]
        lines.append(f"| `{prediction}` | {objective} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _figures(entries: list[dict[str, Any]]) -> list[str]:
    """Return FID and bits/dim of a cell, those of several seeds side by side."""
    return [", ".join(f"{e[name]:.{digits}f}" for e in entries) for name, digits in (("fid", 2), ("bits_per_dim", 3))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--num-timesteps", type=int, default=250)
    parser.add_argument("--at-most", type=int, help="Models to train before stopping; run again to go on.")
    parser.add_argument("--jobs", type=int, default=1, help="Models to train at once, a thread each.")
    parser.add_argument(
        "--home", type=Path, default=Path("datasets"), help="Where datasets and real features are kept."
    )
    args = parser.parse_args()
    if args.action == "run":
        run(args.file, args.steps, args.num_timesteps, args.home, args.at_most, args.jobs)
    else:
        print(table(args.file))


if __name__ == "__main__":
    main()
