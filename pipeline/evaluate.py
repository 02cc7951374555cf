"""Scores of a run: generate, extract, compare, record. A training ends with it, and `ddpm-pipe evaluate` repeats it in other ways.

score_run(run, ScoreRequest(metrics=("kid",), num_images=500), profile, console)    # figures alone, recorded nowhere
evaluate_run(run, request, profile, settings, console)                              # the same, written and tracked
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import scoring
from pipeline.bound_report import Measured, write_measured
from pipeline.cluster_profile import Profile
from pipeline.config import EvaluationConfig, Experiment
from pipeline.console import Console
from pipeline.device import Compute
from pipeline.errors import RunLockedError, UsageError
from pipeline.generated import Workshop
from pipeline.image_set import Images
from pipeline.judge import Judge, find_judge
from pipeline.measure import measure_bound
from pipeline.pictures import save_grid
from pipeline.pool import runner_of
from pipeline.runs import Run
from pipeline.sample import SampleRequest, generator_for, load_trained, workshop_of
from pipeline.score_table import score_lines
from pipeline.scores import Scores, over_seeds
from pipeline.tracking import Tracker, TrackingSettings
from pipeline.tracking_text import describe
from pipeline.trained import Trained, experiment_of
from pipeline.yaml_files import validate

BOUND = "bpd"  # the metric that judges the model by real images, none being generated


@dataclass(frozen=True)
class ScoreRequest(SampleRequest):
    """How to generate and score; None is as the run's experiment says.

    Attributes:
        num_images: generated images for the sample metrics; for bits/dim a cap on the images measured, by default none.
        num_seeds: sets of images, from as many seeds; scores are means over them, with their deviation.
        split: of the run's source whose bits/dim are measured; its own images by default.
    """

    num_images: int | None = None  # type: ignore[assignment]
    metrics: tuple[str, ...] | None = None
    extractor: str | None = None
    inception_weights: str | None = None
    num_seeds: int = 1
    split: str | None = None

    def evaluation(self, experiment: Experiment) -> EvaluationConfig:
        """Return the evaluation settings, checked; UsageError where options do not go together."""
        asked = ("num_images", "metrics", "extractor", "inception_weights")
        given = {name: value for name in asked if (value := getattr(self, name)) is not None}
        settings = validate(EvaluationConfig, {**experiment.evaluation.model_dump(), **given}, "evaluation")
        if self.split is not None and BOUND not in settings.metrics:
            raise UsageError("--split goes with bits/dim; add --metrics bpd")
        return settings


@dataclass(frozen=True)
class Scored:
    """Scores of generated images, and the first of these."""

    scores: Scores
    preview: Images


@dataclass(frozen=True)
class Evaluation:
    """What a model was found to be: scores of its samples, bits/dim of real images, each where asked for."""

    step: int
    scored: Scored | None
    measured: Measured | None

    @property
    def lines(self) -> list[str]:
        """Tables for people."""
        lines = [] if self.scored is None else score_lines(self.scored.scores)
        if self.measured is not None:
            lines += ([""] if lines else []) + self.measured.lines()
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return all figures with their identities as plain data."""
        parts: list[dict[str, Any]] = []
        if self.measured is not None:
            parts.append(self.measured.to_json())
        if self.scored is not None:
            parts.append(self.scored.scores.to_json())
        joint: dict[str, Any] = {}
        for part in parts:
            merged = {name: {**joint.get(name, {}), **part[name]} for name in ("values", "identities", "spreads")}
            joint |= {**part, **merged}
        return joint


def score_run(run: Run, request: ScoreRequest, profile: Profile, console: Console) -> Evaluation:
    """Evaluate a run as asked, and record nothing but the chunks that were computed."""
    trained, compute = load_trained(run, request, profile)
    asked = request.evaluation(trained.experiment)
    judge = None
    if sample_metrics(asked):
        judge = find_judge(run, asked, compute.device, console, download=True, runner=runner_of(profile))
    return evaluate_model(run, trained, compute, judge, request, profile, console)


def evaluate_model(
    run: Run,
    trained: Trained,
    compute: Compute,
    judge: Judge | None,
    request: ScoreRequest,
    profile: Profile,
    console: Console,
) -> Evaluation:
    """Evaluate a model that is loaded; its samples only where there is a judge."""
    asked = request.evaluation(trained.experiment)
    scored, measured = None, None
    if judge is not None:
        scored = score_samples(workshop_of(run, trained, profile, console), trained, compute, judge, request)
    if BOUND in asked.metrics:
        _, seed = request.settings(trained.experiment)
        measured = measure_bound(
            run, trained, compute, profile, console, seed=seed, split=request.split, num_images=request.num_images
        )
    return Evaluation(trained.step, scored, measured)


def score_samples(
    workshop: Workshop, trained: Trained, compute: Compute, judge: Judge, request: ScoreRequest
) -> Scored:
    """Score the samples of a model that is loaded by a judge that is there."""
    metrics = sample_metrics(request.evaluation(trained.experiment))
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
    return Scored(over_seeds(each), previews[0])


def sample_metrics(asked: EvaluationConfig) -> list[str]:
    """Return those of the metrics asked for that judge generated images."""
    return [name for name in asked.metrics if name in scoring.METRICS]


def evaluate_run(
    run: Run, request: ScoreRequest, profile: Profile, settings: TrackingSettings, console: Console
) -> tuple[Evaluation, list[Path]]:
    """Evaluate a run as asked, and record what came out; return it and the paths of what was written."""
    found = score_run(run, request, profile, console)
    tracker = Tracker(run.folder, settings)
    written = write_evaluation(run, found)
    usual = found.scored is None or _as_the_run_samples(request, experiment_of(run))
    other = "" if usual or found.scored is None else _label(found.scored.scores)
    try:
        with run.lock():
            figures = record(tracker, found, written, other)
            run.update(summary={**run.state().summary, **figures})
            tracker.describe(describe(run.record, run.state().summary))
            tracker.close()
    except RunLockedError:
        console.say(
            f"run {run.id} is in training, so the scores stand in {written[0].parent} alone; evaluate again later to track them"
        )
    return found, written


def record(tracker: Tracker, found: Evaluation, written: list[Path], other: str = "") -> dict[str, float]:
    """Send figures to the tracking store, with the folders that hold them, and return the figures by their names.

    `other` names how the images were generated where that is not as the run's experiment says: such figures have a series of their own,
    since they cannot be compared with the run's.
    """
    figures: dict[str, float] = {}
    if found.scored is not None:
        scores = found.scored.scores
        sampled = scores.flat() | {f"confident_{k}": v for k, v in scores.confident.items()}
        figures |= {f"{name}/{other}" if other else name: value for name, value in sampled.items()}
    if found.measured is not None:
        figures |= found.measured.flat()
    tracker.metrics(found.step, figures, family="result")
    for folder in dict.fromkeys(path.parent for path in written):
        tracker.artifact(folder, f"evaluations/{folder.name}")
    return figures


def write_evaluation(run: Run, found: Evaluation) -> list[Path]:
    """Write what was found, each part into a folder of the run that is named by its identity; return the files."""
    root, written = run.folder / "evaluations", []
    if found.scored is not None:
        scores = found.scored.scores
        key, identity = next(iter(scores.identities.items()))
        name = f"{key}-{identity.generation.sampler}{identity.generation.steps}-{_digest(identity.to_json())}"
        written += scoring.write_scores(scores, root / name)
        save_grid(found.scored.preview, root / name / "grid.png")
        written.append(root / name / "grid.png")
    if found.measured is not None:
        identity_of_bound = found.measured.identity
        name = f"{identity_of_bound.key}-{_digest(identity_of_bound.to_json())}"
        written += write_measured(found.measured, root / name)
    return written


def _as_the_run_samples(request: ScoreRequest, experiment: Experiment) -> bool:
    sampling, seed = request.settings(experiment)
    return (sampling, seed, request.weights) == (*SampleRequest().settings(experiment), "ema")


def _label(scores: Scores) -> str:
    """Return words for a metric's name on how the scored images were generated."""
    generation = next(iter(scores.identities.values())).generation
    return f"{generation.sampler}{generation.steps}_eta{generation.eta:g}_{generation.weights}_seed{generation.seed}"


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
