"""Scores of a run: generate, extract, compare, record. A training ends with it, and `ddpm-pipe evaluate` repeats it in other ways.

score_run(run, ScoreRequest(metrics=("kid",), num_images=500), profile, console)    # figures alone, recorded nowhere
evaluate_run(run, request, profile, settings, console)                              # the same, written and tracked
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.config.experiment import EvaluationConfig, Experiment
from pipeline.config.yaml_files import validate
from pipeline.console import Bar, Console
from pipeline.data.labels import BALANCED, NONE
from pipeline.errors import RunLockedError, UsageError
from pipeline.metrics.metric_identity import MetricIdentity
from pipeline.metrics.neighbours import find_neighbours
from pipeline.metrics.registry import METRICS, require_enough
from pipeline.metrics.scores import over_seeds
from pipeline.metrics.scoring import Scorer, score
from pipeline.runs.choose_scorer import choose_scorer, not_scorable, own_split
from pipeline.runs.evaluation import Evaluation, Scored, Sheet, record, write_evaluation
from pipeline.runs.interruption import kept_when_stopped
from pipeline.runs.measure import measure_bound
from pipeline.runs.runs_table import with_newest
from pipeline.runs.sample import LoadedRun, RequestPlan, SampleRequest
from pipeline.sampling.generated import SampleCache
from pipeline.sampling.generation import settled, usual_generation
from pipeline.storage.retention import BEST
from pipeline.storage.runs import Run
from pipeline.tracking.opened import copy_to_opened
from pipeline.tracking.text import describe
from pipeline.tracking.tracker import Tracker, TrackingSettings
from pipeline.training.device import arithmetic_of, workers_device
from pipeline.training.trained import Trained, experiment_of, profile_of

BOUND = "bpd"  # the metric that judges the model by real images, none being generated


@dataclass(frozen=True)
class ScoreRequest(SampleRequest):
    """How to generate and score; None is as the run's experiment says.

    Attributes:
        num_images: generated images for the sample metrics; for bits/dim a cap on the images measured, by default none.
        num_seeds: sets of images, from as many seeds; scores are means over them, with their deviation.
        split: of the run's source, whose images are compared with and measured; by default those that it was trained on.
        neighbours: whether to find the training images closest to generated ones.
    """

    num_images: int | None = None  # type: ignore[assignment]
    metrics: tuple[str, ...] | None = None
    extractor: str | None = None
    inception_weights: str | None = None
    num_seeds: int = 1
    split: str | None = None
    neighbours: bool = False

    def evaluation(self, experiment: Experiment) -> EvaluationConfig:
        """Return the evaluation settings, checked; UsageError where options do not go together."""
        asked = ("num_images", "metrics", "extractor", "inception_weights")
        given = {name: value for name in asked if (value := getattr(self, name)) is not None}
        settings = validate(EvaluationConfig, {**experiment.evaluation.model_dump(), **given}, "evaluation")
        if self.neighbours and not sample_metrics(settings):
            raise UsageError("--neighbours are of generated images; add one of their metrics, such as --metrics fid")
        return settings


@dataclass(frozen=True)
class EvaluationResult:
    """What a run was found to be, and the files that say so."""

    found: Evaluation
    written: list[Path]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"run": self.found.run, **self.found.to_json(), "written": [str(path) for path in self.written]}


def evaluate(context: Context, reference: str, request: ScoreRequest) -> EvaluationResult:
    """Score a run as asked, and record what was found."""
    run, _ = check_requests(context, reference, {"": request})
    settings = TrackingSettings.of_profile(context.home, profile_of(run, context.named))
    with kept_when_stopped():
        result = evaluate_run(run, request, context.profile, settings, context.console)
    copy_to_opened(settings, run, result.found.to_json()["values"], result.written, context.console)
    return result


def plan_evaluation(context: Context, reference: str, request: ScoreRequest) -> RequestPlan:
    """Check a request without generating or scoring anything."""
    run, experiment = check_requests(context, reference, {"": request})
    sampling, seed = request.settings(experiment)
    asked = request.evaluation(experiment)
    real = "the images trained on" if request.split is None else f"split {request.split!r}"
    count = "every image" if request.num_images is None else f"at most {request.num_images} images"
    return RequestPlan(
        run.id,
        {
            **sampling.model_dump(),
            "seeds": list(range(seed, seed + request.num_seeds)),
            "metrics": ", ".join(asked.metrics),
            "extractor": asked.extractor,
            "at most images": asked.num_images,
            **({"compared with": real} if sample_metrics(asked) else {}),
            **({"bits/dim of": f"{count} of {real}"} if BOUND in asked.metrics else {}),
        },
    )


def check_requests(context: Context, reference: str, requests: Mapping[str, ScoreRequest]) -> tuple[Run, Experiment]:
    """Return a run and its experiment, and print warnings after each request's name; UsageError if a request does not fit."""
    run = Run.find(context.home, reference, context.store, not_scorable)
    experiment = experiment_of(run)
    warnings = []
    for name, request in requests.items():
        found = request.warnings(experiment)
        if sample_metrics(request.evaluation(experiment)):
            warnings += [f"warning: {name}{warning}" for warning in found]
    for warning in warnings:
        context.console.say(warning)
    return run, experiment


def score_run(run: Run, request: ScoreRequest, profile: Profile, console: Console) -> Evaluation:
    """Evaluate a run as asked, and record nothing but the chunks that were computed."""
    loaded = LoadedRun.load(run, request, profile, console)
    asked = request.evaluation(loaded.trained.experiment)
    scorer = None
    if sample_metrics(asked):
        scorer = choose_scorer(run, asked, profile, console, download=True, split=request.split)
    return evaluate_model(loaded, scorer, request)


def evaluate_model(loaded: LoadedRun, scorer: Scorer | None, request: ScoreRequest) -> Evaluation:
    """Evaluate a loaded model; its samples only if there is a scorer."""
    run, experiment = loaded.run, loaded.trained.experiment
    scored, measured, neighbours = None, None, None
    if scorer is not None:
        cache = loaded.cache()
        scored = _score_samples(loaded, cache, scorer, request)
        if request.neighbours:
            rate = Bar(loaded.console, "closest training images", scorer.dataset.manifest.num_rows)
            sheet = find_neighbours(
                scored.preview,
                scorer.dataset,
                scorer.extractor,
                run.folder / "neighbours",
                computed_on=workers_device(loaded.profile),
                runner=cache.runner,
                progress=rate,
            )
            neighbours = Sheet(sheet, scorer.dataset)
    if BOUND in request.evaluation(experiment).metrics:
        _, seed = request.settings(experiment)
        measured = measure_bound(loaded, seed=seed, split=request.split, num_images=request.num_images)
    return Evaluation(run.id, loaded.trained.step, scored, measured, neighbours, arithmetic_of(loaded.profile))


def _score_samples(loaded: LoadedRun, cache: SampleCache, scorer: Scorer, request: ScoreRequest) -> Scored:
    trained = loaded.trained
    asked = request.evaluation(trained.experiment)
    metrics = sample_metrics(asked)
    num_real, num_images = len(scorer.reference.real.features), scorer.reference.num_images
    require_enough(metrics, asked, num_real=num_real, num_judged=num_images)  # before any image is generated
    _, first = request.settings(trained.experiment)
    each, previews = [], []
    for seed in range(first, first + request.num_seeds):
        generator = loaded.sampler(replace(request, seed=seed))
        found, preview = cache.features(generator, scorer.extractor, num_images)
        each.append(score(found, scorer, loaded.generation(generator), metrics=metrics, settings=asked))
        previews.append(preview)
    scores = over_seeds(each)
    first_of_all = next(iter(scores.identities.values()))
    usual = settled(trained.experiment.sampling, loaded.profile)
    return Scored(scores, previews[0], _label(first_of_all, trained, usual.precision))


def sample_metrics(asked: EvaluationConfig) -> list[str]:
    """Return those of the metrics asked for that score generated images."""
    return [name for name in asked.metrics if name in METRICS]


def evaluate_run(
    run: Run, request: ScoreRequest, profile: Profile, settings: TrackingSettings, console: Console
) -> EvaluationResult:
    """Evaluate a run as asked, write what was found, and track it."""
    found = score_run(run, request, profile, console)
    written = write_evaluation(found, run.folder / "evaluations")
    with tracked(run, settings, console, written[0].parent) as tracker:
        if tracker is not None:
            figures = record(tracker, found, written)
            state = run.state()
            # not of a model that was left behind, or chosen among many
            if request.checkpoint is None or (request.checkpoint != BEST and found.step >= state.step):
                run.update(summary=with_newest(state.summary, figures))
            tracker.describe(describe(run, run.state().summary, run.state().step))
    return EvaluationResult(found, written)


@contextmanager
def tracked(run: Run, settings: TrackingSettings, console: Console, folder: Path) -> Iterator[Tracker | None]:
    """Hold the run and give its tracker; None, with a word to the user, where the run is in training."""
    try:
        with run.lock():
            tracker = Tracker(run.folder, settings)
            yield tracker
            tracker.close()
    except RunLockedError:
        console.say(
            f"run {run.id} is in training, so the scores stand in {folder} alone; evaluate again later to track them"
        )
        yield None


def _label(identity: MetricIdentity, trained: Trained, mixed_is: str) -> str:
    """Return words for a figure's tracked name on how its images were made and judged; "" where as the run samples and is judged."""
    made, split = replace(identity.generation, num_seeds=1), own_split(trained.experiment)
    usual = usual_generation(trained.experiment, trained.class_names, mixed_is=mixed_is)
    if made == usual and identity.split == split:
        return ""
    label = f"{made.sampler}{made.steps}_eta{made.eta:g}_{made.weights}_seed{made.seed}"
    if made.spacing != "trailing":
        label += f"_{made.spacing}"
    if made.guidance_scale != 1:
        label += f"_guidance{made.guidance_scale:g}"
    if made.labels == NONE:
        label += "_labels_none"
    elif made.labels not in ("", BALANCED):
        label += "_class_" + _trackable(made.labels)
    if made.precision != usual.precision:
        label += f"_{made.precision}"
    if made.compile != usual.compile:
        label += "_compiled" if made.compile else "_not_compiled"
    if made.selection != usual.selection:
        label += "_best"
    if identity.split != split:
        label += "_against_" + re.sub(r"\W", "_", identity.split)
    return label


def _trackable(name: str) -> str:
    """Return a class's name as a part of a tracked name: of letters and digits alone, and two names never alike."""
    plain = re.sub(r"[^A-Za-z0-9]", "_", name)
    return plain if plain == name else f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"
