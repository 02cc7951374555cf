"""Scores of a run: generate, extract, compare, record. A training ends with it, and `ddpm-pipe evaluate` repeats it in other ways.

score_run(run, ScoreRequest(metrics=("kid",), num_images=500), profile, console)    # scores alone, recorded nowhere
evaluate_run(run, request, profile, settings, console)                              # the same, written and tracked
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import scoring
from pipeline.cluster_profile import Profile
from pipeline.config import EvaluationConfig, Experiment
from pipeline.console import Console
from pipeline.device import Compute
from pipeline.errors import RunLockedError
from pipeline.generated import Workshop
from pipeline.image_set import Images
from pipeline.judge import Judge, find_judge
from pipeline.pictures import save_grid
from pipeline.pool import runner_of
from pipeline.runs import Run
from pipeline.sample import SampleRequest, generator_for, load_trained, workshop_of
from pipeline.scores import Scores, over_seeds
from pipeline.tracking import Tracker, TrackingSettings
from pipeline.tracking_text import describe
from pipeline.trained import Trained
from pipeline.yaml_files import validate


@dataclass(frozen=True)
class ScoreRequest(SampleRequest):
    """How to generate and score; None is as the run's experiment says.

    Attributes:
        num_seeds: sets of images, from as many seeds; scores are means over them, with their deviation.
    """

    num_images: int | None = None  # type: ignore[assignment]
    metrics: tuple[str, ...] | None = None
    extractor: str | None = None
    inception_weights: str | None = None
    num_seeds: int = 1

    def evaluation(self, experiment: Experiment) -> EvaluationConfig:
        """Return the evaluation settings, checked."""
        asked = ("num_images", "metrics", "extractor", "inception_weights")
        given = {name: value for name in asked if (value := getattr(self, name)) is not None}
        return validate(EvaluationConfig, {**experiment.evaluation.model_dump(), **given}, "evaluation")


@dataclass(frozen=True)
class Scored:
    """Scores of generated images, and the first of these."""

    scores: Scores
    preview: Images
    trained: Trained


def score_run(run: Run, request: ScoreRequest, profile: Profile, console: Console) -> Scored:
    """Score a run as asked, and record nothing but the features of what was generated."""
    trained, compute = load_trained(run, request, profile)
    judge = find_judge(
        run, request.evaluation(trained.experiment), compute.device, console, download=True, runner=runner_of(profile)
    )
    return score_model(workshop_of(run, trained, profile, console), trained, compute, judge, request)


def score_model(workshop: Workshop, trained: Trained, compute: Compute, judge: Judge, request: ScoreRequest) -> Scored:
    """Score a model that is loaded by a judge that is there."""
    evaluation = request.evaluation(trained.experiment)
    metrics = [name for name in evaluation.metrics if name in scoring.METRICS]
    _, first = request.settings(trained.experiment)
    each, previews = [], []
    for seed in range(first, first + request.num_seeds):
        generator = generator_for(trained, replace(request, seed=seed), compute)
        made = workshop.features(generator, judge.extractor, judge.reference.num_images)
        identity = generator.identity(trained.weights)
        each.append(
            scoring.score(made.found, judge.dataset, judge.extractor, judge.reference, identity, metrics=metrics)
        )
        previews.append(made.preview)
    return Scored(over_seeds(each), previews[0], trained)


def evaluate_run(
    run: Run, request: ScoreRequest, profile: Profile, settings: TrackingSettings, console: Console
) -> tuple[Scores, dict[str, Path]]:
    """Score a run as asked, and record the scores; return them and the paths of what was written."""
    scored = score_run(run, request, profile, console)
    tracker = Tracker(run.folder, settings)
    paths = write_scored(run, scored)
    other = "" if _as_the_run_samples(request, scored.trained) else _label(scored.scores)
    try:
        with run.lock():
            figures = record_scores(tracker, paths, scored.scores, scored.trained.step, other)
            run.update(summary={**run.state().summary, **figures})
            tracker.describe(describe(run.record, run.state().summary))
            tracker.close()
    except RunLockedError:
        console.say(
            f"run {run.id} is in training, so the scores stand in {paths['scores']} alone; evaluate again later to track them"
        )
    return scored.scores, paths


def record_scores(
    tracker: Tracker, paths: dict[str, Path], scores: Scores, step: int, other: str = ""
) -> dict[str, float]:
    """Send scores to the tracking store, as artifacts too, and return the figures by their names.

    `other` names how the images were generated where that is not as the run's experiment says: such figures have a series of their own,
    since they cannot be compared with the run's.
    """
    figures = scores.flat() | {f"confident_{k}": v for k, v in scores.confident.items()}
    named = {f"{name}/{other}" if other else name: value for name, value in figures.items()}
    tracker.metrics(step, named, family="result")
    tracker.artifact(paths["scores"], f"evaluations/{paths['scores'].name}")
    return named


def write_scored(run: Run, scored: Scored) -> dict[str, Path]:
    """Write scores and a grid into a folder of the run that is named by their identity."""
    scores = scored.scores
    key, identity = next(iter(scores.identities.items()))
    name = f"{key}-{identity.generation.sampler}{identity.generation.steps}-{_digest(identity.to_json())}"
    folder = run.folder / "evaluations" / name
    scoring.write_scores(scores, folder)
    save_grid(scored.preview, folder / "grid.png")
    return {"scores": folder, "grid": folder / "grid.png"}


def _as_the_run_samples(request: ScoreRequest, trained: Trained) -> bool:
    sampling, seed = request.settings(trained.experiment)
    return (sampling, seed, request.weights) == (*SampleRequest().settings(trained.experiment), "ema")


def _label(scores: Scores) -> str:
    """Return words for a metric's name on how the scored images were generated."""
    generation = next(iter(scores.identities.values())).generation
    return f"{generation.sampler}{generation.steps}_eta{generation.eta:g}_{generation.weights}_seed{generation.seed}"


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
