"""What a training will take, from its plan and a few measured steps: time, money, checkpoints, failures, and what more nodes would give.

Measured: the step and the checkpoint. Predicted by `scaling`: failures and other numbers of nodes. docs/scaling.md says what is assumed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.console import duration, size
from pipeline.planning.plan import Plan, advice_to_isolate
from pipeline.planning.scaling import (
    CPU_NETWORK,
    GPU_NETWORK,
    Network,
    Work,
    checkpoint_interval_s,
    efficiency,
    lost_share,
    mean_time_to_failure_s,
    step_s,
)
from pipeline.training.models import has_process

if TYPE_CHECKING:
    from pipeline.planning.probe import Probe

WORTH = 0.7  # of an added node's work: with less of it used, the money buys more elsewhere
MOST_NODES = 64
STEP_CALLS = 3  # network calls that cost what training does to an image: forwards once, backwards twice as much


@dataclass(frozen=True)
class AtNodes:
    """The prediction for one global batch on so many nodes; `efficiency` is the used share, against one node."""

    nodes: int
    workers: int
    images_per_s: float
    efficiency: float


@dataclass(frozen=True)
class Checkpoints:
    """What saving costs. `best_interval_s` is Young's; the shares of time lost hold saving, steps done again, and restarts."""

    stops_for_s: float
    interval_s: float
    count: int
    written_bytes: int
    kept_bytes: int
    failure_s: float  # expected time between failures
    lost: float
    best_interval_s: float
    lost_at_best: float


@dataclass(frozen=True)
class Forecast:
    """A training's speed, time and price. Times in seconds."""

    images_per_s: float
    step_s: float
    training_s: float
    scoring_s: float
    total_s: float  # with what failures and saving take
    cost: float
    currency: str
    checkpoints: Checkpoints | None
    nodes: int
    scaling: tuple[AtNodes, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return asdict(self)


def forecast(plan: Plan, probe: Probe, workers_per_node: int | None = None) -> Forecast:
    """Work out what follows from a measured step; `workers_per_node` is the cluster's, where it was looked at."""
    training, profile = plan.experiment.training, plan.profile
    seconds = training.steps * probe.step_s
    scoring = calls_s(scoring_calls(plan), plan, probe)
    saving = None if probe.checkpoint_s is None else _checkpoints(plan, probe.step_s, probe.checkpoint_s, seconds)
    total = seconds / (1 - min(saving.lost, 0.99) if saving else 1) + scoring
    network = _network(plan, workers_per_node)
    nodes = math.ceil(plan.num_workers / network.workers_per_node)
    rows = _scaling(plan, probe, network)
    return Forecast(
        images_per_s=training.batch_size / probe.step_s,
        step_s=probe.step_s,
        training_s=seconds,
        scoring_s=scoring,
        total_s=total,
        cost=profile.price.per_worker_hour * plan.num_workers * total / 3600,
        currency=profile.price.currency,
        checkpoints=saving,
        nodes=nodes,
        scaling=rows,
        warnings=tuple(
            filter(None, [_too_many_nodes(plan, nodes, rows), advice_to_isolate(profile, plan.num_workers, seconds)])
        ),
    )


def _checkpoints(plan: Plan, step: float, stops_for: float, training_s: float) -> Checkpoints:
    due, each = plan.experiment.checkpoint, plan.checkpoint_bytes or 0
    intervals = [due.every_steps * step] if due.every_steps else []
    intervals += [due.every_minutes * 60] if due.every_minutes else []
    interval = min([*intervals, training_s])
    failure = mean_time_to_failure_s(plan.num_workers)
    best = min(checkpoint_interval_s(stops_for, failure), training_s)
    count = max(1, math.ceil(training_s / interval))
    return Checkpoints(
        stops_for_s=stops_for,
        interval_s=interval,
        count=count,
        written_bytes=count * each,
        kept_bytes=min(count, due.keep) * each,
        failure_s=failure,
        lost=lost_share(stops_for, interval, failure),
        best_interval_s=best,
        lost_at_best=lost_share(stops_for, best, failure),
    )


def scoring_calls(plan: Plan) -> int:
    """Return the network calls for the scores: of images that are generated at each of the sampler's steps, for bits/dim of each row at T.

    0 where nothing is scored; what judges the images is left out.
    """
    experiment, asked = plan.experiment, plan.experiment.evaluation
    if not asked.enabled:
        return 0
    measured = (plan.num_rows or 0) if "bpd" in asked.metrics else 0
    generated = min(asked.num_images, plan.num_rows or asked.num_images) if set(asked.metrics) != {"bpd"} else 0
    if not has_process(experiment):
        return generated + measured
    T, sampling = experiment.diffusion.num_timesteps, experiment.sampling
    guided = 2 if sampling.guidance_scale != 1 else 1
    return generated * sampling.num_steps(T) * guided + measured * T


def calls_s(calls: int, plan: Plan, probe: Probe) -> float:
    """Return about how long network calls take that the workers share, each for one image and forwards only."""
    return calls * probe.image_s / STEP_CALLS / plan.num_workers


def _network(plan: Plan, workers_per_node: int | None) -> Network:
    """Return how the workers are joined: as seen, as the placement asks, or as assumed."""
    assumed = GPU_NETWORK if plan.profile.use_gpu else CPU_NETWORK
    if workers_per_node is None and plan.profile.kind == "local":
        workers_per_node = plan.num_workers
    elif workers_per_node is None and plan.profile.placement == "strict_spread":
        workers_per_node = 1
    return Network(workers_per_node or assumed.workers_per_node, assumed.within, assumed.between)


def _scaling(plan: Plan, probe: Probe, network: Network) -> tuple[AtNodes, ...]:
    batch = plan.experiment.training.batch_size
    work = Work(plan.num_parameters or 0, probe.image_s, probe.fixed_s)
    rows: list[AtNodes] = []
    nodes = 1
    while nodes <= MOST_NODES and (workers := nodes * network.workers_per_node) <= batch:
        step = step_s(work, batch / workers, workers, network)
        rows.append(AtNodes(nodes, workers, batch / step, efficiency(work, batch, workers, network)))
        nodes *= 2
    return tuple(rows)


def _too_many_nodes(plan: Plan, nodes: int, rows: tuple[AtNodes, ...]) -> str | None:
    """Return the warning that a training on several nodes deserves whose batch does not fill them."""
    if nodes == 1:
        return None
    here = max((row for row in rows if row.nodes <= nodes), key=lambda row: row.nodes, default=None)
    if here is not None and here.efficiency >= WORTH and plan.experiment.training.batch_size >= nodes:
        return None
    used = f"{here.efficiency:.0%} of each of {here.nodes} nodes" if here else "little of them"
    return (
        f"the scaling model says that a batch of {plan.experiment.training.batch_size} uses {used}: train on "
        f"{_most_useful(rows)}, and spend more nodes on sweeps and sampling, which share nothing (docs/scaling.md)"
    )


def _most_useful(rows: tuple[AtNodes, ...]) -> str:
    nodes = max((row.nodes for row in rows if row.efficiency >= WORTH), default=1)
    return f"{nodes} nodes" if nodes > 1 else "one node"


def describe(plan: Plan, probe: Probe, seen: Forecast) -> dict[str, str]:
    """Return the lines for people, by name."""
    part = f", timed with {probe.measured_batch} at once" if probe.measured_batch < probe.batch else ""
    images = f"{probe.batch} images a step and worker{part}" if plan.num_workers > 1 else f"{probe.batch} a step{part}"
    price = plan.profile.price
    lines = {
        "measured": f"{seen.images_per_s:,.3g} images/s, {_short(seen.step_s)} a step ({images}; {probe.device})",
        "time": f"{duration(seen.total_s)}"
        + (f", {duration(seen.scoring_s)} of it for the scores" if seen.scoring_s >= 1 else ""),
        "cost": f"{seen.cost:,.2f} {seen.currency} ({plan.num_workers} x {price.per_worker_hour:g} {seen.currency} an hour)"
        if price.per_worker_hour
        else "unknown: the profile's price.per_worker_hour is 0",
    }
    if (saving := seen.checkpoints) is not None:
        lines["checkpoints"] = (
            f"{saving.count:,} in all, one every {duration(saving.interval_s)}: {size(saving.written_bytes)} written, "
            f"{size(saving.kept_bytes)} kept; each stops training for {_short(saving.stops_for_s)}"
        )
        lines["lost time"] = (
            f"{saving.lost:.2%} to saving and failures, one in {duration(saving.failure_s)} (assumed); "
            f"{saving.lost_at_best:.2%} at one checkpoint every {duration(saving.best_interval_s)} (Young)"
        )
    lines["more nodes"] = _more_nodes(seen.scaling)
    return lines


def _more_nodes(rows: tuple[AtNodes, ...]) -> str:
    shown = ", ".join(
        f"{row.nodes} nodes {row.images_per_s / rows[0].images_per_s:.2g}x" for row in rows[1:4]
    )  # fmt: skip
    if not shown:
        return "the batch is too small to be shared by two"
    if rows[1].efficiency < WORTH:
        return f"will not help ({shown}, predicted): spend them on sweeps and sampling"
    return f"{shown} (predicted); worth it up to {_most_useful(rows)}"


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
