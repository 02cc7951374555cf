"""`train --dry-run`: the plan, a few measured steps where training would take place, and what follows from them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster import nodes
from pipeline.cluster.gather import gather
from pipeline.cluster.probe_workers import on_workers
from pipeline.cluster.session import Session
from pipeline.console import Console, size
from pipeline.data.shard_batches import MEMORY_BUDGET_BYTES
from pipeline.planning.capacity import fitting_counts
from pipeline.planning.footprint import WorkerMemory, memory_advice
from pipeline.planning.forecast import Forecast, early_scores, forecast
from pipeline.planning.memory import SAID
from pipeline.planning.plan import Plan
from pipeline.planning.probe import PROBE_S, Probe, probe_training
from pipeline.runs.train import TrainRequest, plan_training
from pipeline.signals import listening

if TYPE_CHECKING:
    from pipeline.training.team import Team

# for the workers' start and a first step, which takes many times the budget where torch has to choose kernels
PROBE_LIMIT_S = 180.0


@dataclass(frozen=True)
class DryRun:
    """What `train --dry-run` says. `probe` and `forecast` are None where nothing was measured; `unmeasured` says why."""

    plan: Plan
    probe: Probe | None
    forecast: Forecast | None
    unmeasured: str
    warnings: tuple[str, ...]
    memory: Memory | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        early = early_scores(self.plan)
        return self.plan.to_dict() | {
            "early_scores": None if early is None else asdict(early),
            "probe": None if self.probe is None else asdict(self.probe),
            "forecast": None if self.forecast is None else asdict(self.forecast),
            "unmeasured": self.unmeasured,
            "memory": None if self.memory is None else asdict(self.memory),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Memory:
    """What a worker takes at its peak, and what it may use; None where that is unknown here.

    Attributes:
        images: computed at once.
        estimated_bytes: by the sizes of what a step computes.
        measured_bytes: by the probe, with `measured_images` at once.
        free_bytes: of the worker's device.
    """

    images: int
    estimated_bytes: int | None
    measured_bytes: int | None
    measured_images: int
    free_bytes: int | None


def dry_run(asked: TrainRequest, *, measure: bool = True) -> DryRun:
    """Plan a training, and measure it if `measure`. Nothing stays behind."""
    plan = plan_training(asked)
    warnings = [*plan.warnings, *filter(None, [_large_window(plan), _busy() if measure and not plan.missing else None])]
    memory, advice = _memory(plan)
    warnings += advice
    if not measure:
        return DryRun(plan, None, None, "--no-probe was given", tuple(warnings), memory)
    if plan.missing:
        return DryRun(plan, None, None, "something is missing", tuple(warnings), memory)
    if plan.shape is None:
        return DryRun(plan, None, None, "the images' shape is unknown until the data is here", tuple(warnings), memory)
    try:
        now, probe = _probe(plan, plan.shape)
    except (RuntimeError, MemoryError) as error:
        if not SAID.search(f"{type(error).__name__}: {error}"):
            raise
        advice = advice or [memory_advice(plan)]
        return DryRun(plan, None, None, "memory ran out", tuple(dict.fromkeys([*warnings, *advice])), memory)
    if memory is not None:
        at_once = min(probe.measured_batch, memory.images)
        memory = replace(memory, measured_bytes=probe.peak_bytes, measured_images=at_once)
    if now.num_workers < plan.num_workers:
        warnings.append(
            f"the cluster has room for {now.num_workers} workers at the moment: measured and reckoned with them, not with "
            f"{plan.num_workers}"
        )
    seen = forecast(now, probe)
    return DryRun(now, probe, seen, "", (*warnings, *seen.warnings), memory)


def _memory(plan: Plan) -> tuple[Memory | None, list[str]]:
    """Return what a worker takes, and what lowers it if that is more than is free."""
    worker = WorkerMemory.of(plan)
    if worker is None:
        return None, []
    found = worker.footprint()
    peak = None if found is None else found.peak_bytes
    advice = [worker.advice()] if peak is not None and worker.is_short(peak) else []
    return Memory(worker.images, peak, None, 0, worker.free_bytes), advice


def _probe(plan: Plan, shape: tuple[int, int, int]) -> tuple[Plan, Probe]:
    """Measure in this process where one worker of this machine would train, else with the workers that a training would begin with.

    Returns the plan with their number, and what was measured.
    """
    profile, folder = plan.profile, plan.profile.home()
    if plan.num_workers == 1 and not profile.is_remote:
        return plan, probe_training(plan.experiment, shape, profile, 1, folder=folder)
    counts = fitting_counts(plan.experiment, profile)
    with Session(profile, plan.num_workers) as session, nodes.wanted() as want:
        session.ensure()
        with listening() as signals:
            count = gather(counts, profile, Console(), signals, (), want, "the same command")
        now = replace(plan, num_workers=count)
        found: Probe = on_workers(measure_in_worker, (now, shape, folder), profile, count, PROBE_LIMIT_S)
        return now, found


def measure_in_worker(team: Team, plan: Plan, shape: tuple[int, int, int], folder: Path) -> Probe:
    """Time the steps of one worker."""
    return probe_training(
        plan.experiment, shape, plan.profile, plan.num_workers, team=team, budget_s=PROBE_S, folder=folder
    )


def _busy() -> str | None:
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cpus:
        return None
    return f"this machine is busy (load {load:.1f} on {cpus} CPUs): it will be faster than measured when it is not"


def _large_window(plan: Plan) -> str | None:
    """Return a warning where the rows that a worker shuffles together would fill its memory."""
    if plan.num_rows is None or plan.shape is None:
        return None
    channels, height, width = plan.shape
    image, window = channels * height * width, plan.experiment.data.shuffle_window
    if plan.num_rows * image <= MEMORY_BUDGET_BYTES:
        return None
    held = min(window, plan.num_rows // plan.num_streams) * plan.num_streams // plan.num_workers * image
    if held <= 2 * MEMORY_BUDGET_BYTES:
        return None
    streams = plan.num_streams // plan.num_workers
    fitting = 1 << max(0, (MEMORY_BUDGET_BYTES // streams // image).bit_length() - 1)
    return (
        f"data.shuffle_window {window:,} makes each worker hold up to {size(held)} of images, those that its {streams} streams "
        f"shuffle (PNGs take less); for {size(MEMORY_BUDGET_BYTES)} use -s data.shuffle_window={fitting}"
    )
