"""Scores of a run: generate, extract, compare, record. A training ends with it, and `ddpm-pipe evaluate` repeats it in other ways."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline import scoring
from pipeline.cluster_profile import Profile
from pipeline.console import Console, Rate, duration
from pipeline.device import Compute
from pipeline.errors import DataError, RefusedError, RunLockedError
from pipeline.features import FeatureExtractor
from pipeline.generation import Denoiser
from pipeline.home import datasets_dir
from pipeline.image_set import Progress
from pipeline.pictures import save_grid
from pipeline.runs import Run
from pipeline.sample import SampleRequest, draw_strip, load, with_progress
from pipeline.scoring import Reference, Scores
from pipeline.shards import Dataset
from pipeline.tracking import Tracker, TrackingSettings
from pipeline.tracking_text import describe
from pipeline.trained import Trained

GRID_IMAGES = 100
YARDSTICK_NAMES = {"real_half": "real half against real half", "uniform_noise": "uniform noise"}


@dataclass(frozen=True)
class ScoreRequest(SampleRequest):
    """How to generate and score; None is as the run's experiment says."""

    num_images: int | None = None  # type: ignore[assignment]
    extractor: str | None = None
    inception_weights: str | None = None


@dataclass(frozen=True)
class Judge:
    """What images of a dataset are judged by."""

    dataset: Dataset
    extractor: FeatureExtractor
    reference: Reference


@dataclass(frozen=True)
class Outcome:
    """What came of a run: where its pictures are, and its scores, or why there are none."""

    run_id: str
    name: str
    step: int
    training_s: float
    pictures: dict[str, Path]
    scores: Scores | None = None
    skipped: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return {
            "run": self.run_id,
            "name": self.name,
            "step": self.step,
            "training_s": round(self.training_s, 3),
            "pictures": {name: str(path) for name, path in self.pictures.items()},
            "scores": None if self.scores is None else self.scores.to_json(),
            "skipped": self.skipped,
        }

    def to_text(self) -> str:
        """Return the summary: scores beside their yardsticks, pictures, and what to type next."""
        lines = [f"run {self.run_id}  {self.name}  {self.step} steps, trained for {duration(self.training_s)}", ""]
        lines += score_lines(self.scores) if self.scores is not None else [self.skipped]
        lines += ["", *(f"{name + ':':<9}{path}" for name, path in self.pictures.items()), *self.notes]
        lines += [
            "",
            "next:",
            "  ddpm-pipe ui                              browse this run in MLflow's pages",
            f"  ddpm-pipe sample {self.run_id} -n 16          more images",
            f"  ddpm-pipe evaluate {self.run_id} --steps 100  another sampler setting, scored",
            f"  ddpm-pipe resume {self.run_id} -s training.steps={2 * self.step}",
        ]
        return "\n".join(lines)


def score_lines(scores: Scores) -> list[str]:
    """Return a table of scores beside what real images and noise get by the same code."""
    keys = [key for key in scores.values if not key.startswith("kid_std")]
    width = max(len(name) for name in YARDSTICK_NAMES.values()) + 2
    columns = [max(len(key), 9) + 2 for key in keys]
    lines = [" " * width + "".join(key.rjust(w) for key, w in zip(keys, columns, strict=True))]
    metrics = [scores.identities[key].metric for key in keys]
    rows = {"generated": [scores.values[key] for key in keys]}
    rows |= {YARDSTICK_NAMES[name]: [values[m] for m in metrics] for name, values in scores.yardsticks.items()}
    for name, values in rows.items():
        lines.append(name.ljust(width) + "".join(f"{v:.4g}".rjust(w) for v, w in zip(values, columns, strict=True)))
    if scores.confident:
        share, real = scores.confident["generated"], scores.confident["real_half"]
        rarest = min(scores.class_shares, key=lambda name: scores.class_shares[name])
        lines += [
            "",
            f"{share:.1%} of the generated images get a classifier confidence above 0.9 (real images: {real:.1%}); "
            f"the rarest class, {rarest!r}, is {scores.class_shares[rarest]:.1%} of them",
        ]
    return lines


def conclude(run: Run, profile: Profile, settings: TrackingSettings, console: Console) -> Outcome:
    """End a training: score its averaged weights, draw pictures, log the model, and close the tracked run."""
    trained, denoiser = load(run, SampleRequest(), profile)
    judge, skipped = _judge_or_reason(run, trained, denoiser.compute, console)
    count = GRID_IMAGES if judge is None else judge.reference.num_images
    images = with_progress(denoiser, count, console)
    scores = None if judge is None else _score(judge, images, trained, denoiser)
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    pictures = {"samples": folder / "samples.png", "strip": folder / "denoising.png"}
    save_grid(images[:GRID_IMAGES], pictures["samples"])
    draw_strip(denoiser, pictures["strip"])
    tracker = Tracker(run.folder, settings)
    summary = {}
    if scores is not None:
        summary = _record_scores(tracker, _write_scores(run, scores, images), scores, trained.step, "")
    run.update(summary={**run.state().summary, **summary})
    for path in pictures.values():
        tracker.artifact(path, "pictures")
    tracker.model(trained.save(run.folder / "model"), trained.step)
    tracker.metrics(trained.step, {"training_s": trained.training_s}, family="result")
    tracker.describe(describe(run.record, summary))
    tracker.finish("FINISHED")
    delivered = tracker.close()
    notes = [] if delivered else [f"tracking: {tracker.problem}; deliver it later with: ddpm-pipe sync {run.id}"]
    return Outcome(run.id, run.record.name, trained.step, trained.training_s, pictures, scores, skipped, notes)


def evaluate_run(
    run: Run, request: ScoreRequest, profile: Profile, settings: TrackingSettings, console: Console
) -> tuple[Scores, dict[str, Path]]:
    """Score a run as asked, and record the scores; return them and the paths of what was written."""
    trained, denoiser = load(run, request, profile)
    judge = find_judge(run, trained, denoiser.compute, console, request, download=True)
    images = with_progress(denoiser, judge.reference.num_images, console)
    scores = _score(judge, images, trained, denoiser)
    tracker = Tracker(run.folder, settings)
    paths = _write_scores(run, scores, images)
    other = "" if _as_the_run_samples(request, trained) else _label(scores)
    try:
        with run.lock():
            figures = _record_scores(tracker, paths, scores, trained.step, other)
            run.update(summary={**run.state().summary, **figures})
            tracker.describe(describe(run.record, run.state().summary))
            tracker.close()
    except RunLockedError:
        console.say(
            f"run {run.id} is in training, so the scores stand in {paths['scores']} alone; evaluate again later to track them"
        )
    return scores, paths


def find_judge(
    run: Run, trained: Trained, compute: Compute, console: Console, request: ScoreRequest, *, download: bool
) -> Judge:
    """Return extractor and reference for a run's dataset; DataError or RefusedError says why there is none."""
    asked = trained.experiment.evaluation
    dataset = Dataset.open(run.record.dataset["path"])
    home = run.folder.parent.parent
    cache = datasets_dir(home) / "features"
    progress = _progress(console)
    extractor = scoring.choose_extractor(
        dataset,
        cache,
        kind=request.extractor or asked.extractor,
        inception_weights=request.inception_weights or asked.inception_weights,
        download=download,
        device=compute.device,
        progress=progress,
    )
    count = request.num_images or asked.num_images
    return Judge(dataset, extractor, scoring.prepare_reference(dataset, extractor, count, cache, progress=progress))


def _judge_or_reason(run: Run, trained: Trained, compute: Compute, console: Console) -> tuple[Judge | None, str]:
    """Return what judges the end of a training, or one line on why nothing does and how to add it."""
    if not trained.experiment.evaluation.enabled:
        return None, f"not scored (evaluation.enabled is false); score it with: ddpm-pipe evaluate {run.id}"
    try:
        return find_judge(run, trained, compute, console, ScoreRequest(), download=False), ""
    except (DataError, RefusedError) as error:
        asked = trained.experiment.evaluation.extractor
        return None, (
            f"the evaluation with extractor {asked!r} was skipped: {error}; add it with: "
            f"ddpm-pipe evaluate {run.id} --extractor inception --inception-weights PATH"
        )


def _score(judge: Judge, images: Tensor, trained: Trained, denoiser: Denoiser) -> Scores:
    generation = denoiser.identity(trained.weights)
    return scoring.score(images.numpy(), judge.dataset, judge.extractor, judge.reference, generation)


def _record_scores(tracker: Tracker, paths: dict[str, Path], scores: Scores, step: int, other: str) -> dict[str, float]:
    """Send scores to the tracking store, as artifacts too, and return the figures by their names.

    `other` names how the images were generated where that is not as the run's experiment says: such figures have a series of their own,
    since they cannot be compared with the run's.
    """
    figures = scores.flat() | {f"confident_{k}": v for k, v in scores.confident.items()}
    named = {f"{name}/{other}" if other else name: value for name, value in figures.items()}
    tracker.metrics(step, named, family="result")
    tracker.artifact(paths["scores"], f"evaluations/{paths['scores'].name}")
    return named


def _as_the_run_samples(request: ScoreRequest, trained: Trained) -> bool:
    sampling, seed = request.settings(trained.experiment)
    return (sampling, seed, request.weights) == (*SampleRequest().settings(trained.experiment), "ema")


def _label(scores: Scores) -> str:
    """Return words for a metric's name on how the scored images were generated."""
    generation = next(iter(scores.identities.values())).generation
    return f"{generation.sampler}{generation.steps}_eta{generation.eta:g}_{generation.weights}_seed{generation.seed}"


def _write_scores(run: Run, scores: Scores, images: Tensor) -> dict[str, Path]:
    """Write scores and grid into a folder of the run that is named by their identity."""
    key, identity = next(iter(scores.identities.items()))
    digest = hashlib.sha256(json.dumps(identity.to_json(), sort_keys=True).encode()).hexdigest()[:8]
    folder = run.folder / "evaluations" / f"{key}-{identity.generation.sampler}{identity.generation.steps}-{digest}"
    scoring.write_scores(scores, folder)
    save_grid(images[:GRID_IMAGES], folder / "grid.png")
    return {"scores": folder, "grid": folder / "grid.png"}


def _progress(console: Console) -> Progress:
    """Return a callback that shows a progress line for each thing that is done."""
    rates: dict[str, Rate] = {}

    def show(what: str, done: int, total: int) -> None:
        rates.setdefault(what, Rate(console, what, total))(done)

    return show
