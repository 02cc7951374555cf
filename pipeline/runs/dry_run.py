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
from pipeline.planning.forecast import Forecast, early_scores, forecast
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

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        early = early_scores(self.plan)
        return self.plan.to_dict() | {
            "early_scores": None if early is None else asdict(early),
            "probe": None if self.probe is None else asdict(self.probe),
            "forecast": None if self.forecast is None else asdict(self.forecast),
            "unmeasured": self.unmeasured,
            "warnings": list(self.warnings),
        }


def dry_run(asked: TrainRequest, *, measure: bool = True) -> DryRun:
    """Plan a training, and measure it if `measure`. Nothing stays behind."""
    plan = plan_training(asked)
    warnings = [*plan.warnings, *filter(None, [_large_window(plan), _busy() if measure and not plan.missing else None])]
    if not measure:
        return DryRun(plan, None, None, "--no-probe was given", tuple(warnings))
    if plan.missing:
        return DryRun(plan, None, None, "something is missing", tuple(warnings))
    if plan.shape is None:
        return DryRun(plan, None, None, "the images' shape is unknown until the data is here", tuple(warnings))
    now, probe = _probe(plan, plan.shape)
    if now.num_workers < plan.num_workers:
        warnings.append(
            f"the cluster has room for {now.num_workers} workers at the moment: measured and reckoned with them, not with "
            f"{plan.num_workers}"
        )
    seen = forecast(now, probe)
    return DryRun(now, probe, seen, "", (*warnings, *seen.warnings))


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
