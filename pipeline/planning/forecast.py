"""What a training will take, worked out from its plan and a few measured steps: time, money and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.planning.plan import BYTES_PER_PARAMETER, Plan, advice_to_isolate
from pipeline.sampling.generation import early_calls, usual_generation
from pipeline.training.models import build_objective
from pipeline.training.validation import STEP_CALLS

if TYPE_CHECKING:
    from pipeline.planning.probe import Probe

# Assumed between nodes: 400 Gb/s for each GPU, 10 Gb/s for machines without.
GPU_NETWORK_BYTES_PER_S, CPU_NETWORK_BYTES_PER_S = 50e9, 1.25e9


@dataclass(frozen=True)
class Checkpoints:
    stops_for_s: float
    interval_s: float
    count: int
    written_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class EarlyScores:
    """The scores while training: how many, the network calls of each (for one image, forwards only), and their share of the training's."""

    times: int
    calls: int
    share: float


def early_scores(plan: Plan) -> EarlyScores | None:
    """Return what `evaluation.every_steps` costs; None if nothing is scored while training."""
    training, asked = plan.experiment.training, plan.experiment.evaluation
    if asked.every_steps is None:
        return None
    times, calls = math.ceil(training.steps / asked.every_steps), early_calls(plan.experiment, asked.early_images)
    return EarlyScores(times, calls, times * calls / (training.steps * training.batch_size * STEP_CALLS))


@dataclass(frozen=True)
class Forecast:
    """A training's speed, time and price. Times in seconds."""

    images_per_s: float
    step_s: float
    training_s: float
    scoring_s: float
    total_s: float  # with what saving and validation take
    cost: float
    currency: str
    checkpoints: Checkpoints | None
    more_nodes_help: bool
    warnings: tuple[str, ...] = ()


def forecast(plan: Plan, probe: Probe) -> Forecast:
    """Work out what follows from measured steps."""
    training, profile = plan.experiment.training, plan.profile
    seconds = training.steps * probe.step_s
    scoring = calls_s(scoring_calls(plan), plan, probe)
    validation = 0.0 if plan.validation is None else calls_s(plan.validation.times * plan.validation.calls, plan, probe)
    saving = None if probe.checkpoint_s is None else _checkpoints(plan, probe.step_s, probe.checkpoint_s, seconds)
    total = seconds + validation + scoring + (saving.count * saving.stops_for_s if saving else 0.0)
    isolate = advice_to_isolate(profile, plan.num_workers, seconds)
    return Forecast(
        images_per_s=training.batch_size / probe.step_s,
        step_s=probe.step_s,
        training_s=seconds,
        scoring_s=scoring,
        total_s=total,
        cost=profile.price.per_worker_hour * plan.num_workers * total / 3600,
        currency=profile.price.currency,
        checkpoints=saving,
        more_nodes_help=_more_nodes_help(plan, probe),
        warnings=(isolate,) if isolate else (),
    )


def _checkpoints(plan: Plan, step: float, stops_for: float, training_s: float) -> Checkpoints:
    due, each = plan.experiment.checkpoint, plan.checkpoint_bytes or 0
    intervals = [due.every_steps * step] if due.every_steps else []
    intervals += [due.every_minutes * 60] if due.every_minutes else []
    scored = plan.experiment.evaluation.every_steps
    intervals += [scored * step] if due.keep_best and scored else []
    interval = min([*intervals, training_s])
    count = max(1, math.ceil(training_s / interval))
    return Checkpoints(
        stops_for_s=stops_for,
        interval_s=interval,
        count=count,
        written_bytes=count * each,
        kept_bytes=min(count, due.retention.most) * each,
    )


def _more_nodes_help(plan: Plan, probe: Probe) -> bool:
    """Whether twice the workers save more time per step than exchanging the gradients between nodes takes.

    A ring all-reduce sends each gradient twice. docs/scaling.md has the full model, compared with published measurements.
    """
    workers, batch = 2 * plan.num_workers, plan.experiment.training.batch_size
    if workers > batch:
        return False
    bytes_per_s = GPU_NETWORK_BYTES_PER_S if plan.profile.use_gpu else CPU_NETWORK_BYTES_PER_S
    exchange_s = 2 * (plan.num_parameters or 0) * BYTES_PER_PARAMETER / bytes_per_s
    return batch / workers * probe.image_s > exchange_s


def scoring_calls(plan: Plan) -> int:
    """Return the network calls for the scores: to generate the images, and to measure bits/dim of each row at all timesteps.

    0 if nothing is scored. The network that extracts features is left out.
    """
    experiment, asked, early = plan.experiment, plan.experiment.evaluation, early_scores(plan)
    calls = 0 if early is None else early.times * early.calls
    if not asked.enabled:
        return calls
    measured = (plan.num_rows or 0) if "bpd" in asked.metrics else 0
    generated = min(asked.num_images, plan.num_rows or asked.num_images) if set(asked.metrics) != {"bpd"} else 0
    return calls + generated * usual_generation(experiment).nfe + measured * build_objective(experiment).num_timesteps


def calls_s(calls: int, plan: Plan, probe: Probe) -> float:
    """Return about how long so many network calls take, each for one image and forwards only, shared by the workers."""
    return calls * probe.image_s / STEP_CALLS / plan.num_workers
