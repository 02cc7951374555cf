"""A sweep worked out and checked before anything is spent: its points, how many trials run at once, and the disk space they need."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.session import require_resources
from pipeline.config.cluster_profile import Profile, Resources
from pipeline.config.experiment import Experiment
from pipeline.console import size
from pipeline.cpus import usable_cpus
from pipeline.errors import UsageError
from pipeline.gpus import usable_gpus
from pipeline.planning.capacity import fitting_counts
from pipeline.planning.forecast import scoring_calls
from pipeline.planning.plan import Plan, make_plan
from pipeline.sampling.generation import usual_generation
from pipeline.sweeps.config import Axis, Sweep, trial_experiment
from pipeline.sweeps.points import Checker, Point, check_all, grid, title
from pipeline.sweeps.search import TPE
from pipeline.training.models import build_diffusion, has_process
from pipeline.training.validation import STEP_CALLS

MOST_ENDS = 64  # points at the ends of ranges that are looked at for the largest
MOST_AT_ONCE = 4  # trials on one machine whose profile says nothing of CPUs: each takes several processes


@dataclass(frozen=True)
class SweepRequest:
    sweep: Sweep
    base: Experiment
    profile: Profile
    max_concurrent: int | None = None


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep. `trial` plans its largest point, `largest`, which is None if all points are alike.

    For a search that draws its points, `checked` is filled while they are drawn (see `drawing`).
    """

    sweep: Sweep
    checked: Checker
    trial: Plan
    num_trials: int
    max_concurrent: int
    largest: Point | None = None

    @property
    def disk_bytes(self) -> int | None:
        """Disk space of all trials: their checkpoints and the model that each logs."""
        one, keep = self.trial.checkpoint_bytes, self.trial.experiment.checkpoint.retention.most
        return None if one is None else self.num_trials * (one * keep + one // 2)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sweep": self.sweep.to_dict(),
            "points": self.checked.points,
            "refused": [{"point": item.point, "reason": item.reason} for item in self.checked.refused],
            "warnings": self.checked.warnings,
            "num_trials": self.num_trials,
            "max_concurrent": self.max_concurrent,
            "disk_bytes": self.disk_bytes,
            "largest": self.largest,
            "trial": self.trial.to_dict(),
        }

    def to_text(self) -> str:
        """Return what `--dry-run` prints."""
        sweep = self.sweep
        points = self.num_trials // sweep.seeds
        early, most = sweep.early_stopping, f"at most {self.trial.experiment.evaluation.num_images:,}"
        lines = {
            "base": sweep.base,
            "trials": f"{self.num_trials} at most: {points} points x {sweep.seeds} seeds, {self.max_concurrent} at once",
            "each": f"{sweep.budget.to_text()}, {self.trial.num_workers} workers ({self.trial.profile.name})",
            "ranked by": f"{sweep.metric} of {'all' if sweep.metric == 'bpd' else most} images",
            "early stop": "no"
            if early is None
            else f"ASHA on the KID of {early.num_images} images at {', '.join(f'{s:.0%}' for s in early.shares)} of the budget",
            "disk": "unknown until the data is here" if self.disk_bytes is None else size(self.disk_bytes),
        }
        if self.largest is not None:
            count = self.trial.num_parameters
            lines["largest"] = title(self.largest) + ("" if count is None else f", {count:,} parameters")
        text = [f"{name + ':':<12}{value}" for name, value in lines.items()]
        text += [f"point:      {title(point)}" for point in self.checked.points]
        text += [f"skipped:    {title(item.point)}: {item.reason}" for item in self.checked.refused]
        text += [f"warning:    {name}: {warning}" for name, warning in self.checked.warnings.items()]
        return "\n".join(text)


def make_sweep_plan(
    asked: SweepRequest,
    data: str,
    num_rows: int | None,
    shape: tuple[int, int, int] | None,
    num_classes: int | None = None,
) -> SweepPlan:
    """Check every point against profile and dataset; UsageError if none is left. Unknown facts of the dataset are None."""
    sweep, base = asked.sweep, asked.base
    counts = fitting_counts(base, asked.profile)
    num_workers = counts[0] if asked.profile.is_remote else counts[-1]  # trials beside each other share a machine best
    require_resources(asked.profile, num_workers)

    plans: list[Plan] = []  # of the points that are kept, in their order

    def test(experiment: Experiment) -> Sequence[str]:
        one = make_plan(
            experiment, asked.profile, num_workers, data=data, num_rows=num_rows, shape=shape, num_classes=num_classes
        )
        require_equal_calls(sweep, base, experiment)
        plans.append(one)
        return build_diffusion(experiment).schedule.warnings if has_process(experiment) else ()

    checked = Checker(sweep, base, test)
    if sweep.search == "tpe":
        points, num_points = _ends(sweep, Checker(sweep, base, test)), most_points(sweep)
        if not points:
            test(trial_experiment(sweep, base, {}, 0))
            points = [{}]
    else:
        check_all(sweep, base, checked)
        points, num_points = checked.points, len(checked.points)
        if not points:
            raise _all_refused(checked)
    work = [_work(sweep, one) for one in plans]
    trial = plans[work.index(max(work))]
    largest = points[work.index(max(work))] if len(set(work)) > 1 else None
    if sweep.search == "tpe":
        first = Checker(sweep, base, test)
        if drawing(sweep, base, first).draw() is None:
            raise _all_refused(first)
    num_trials = num_points * sweep.seeds
    at_once = max_concurrent(asked.profile, num_workers, num_trials, asked.max_concurrent)
    return SweepPlan(sweep, checked, trial, num_trials, at_once, largest)


def _all_refused(checked: Checker) -> UsageError:
    first = checked.refused[0]
    return UsageError(f"every point of the sweep is refused; the first, {title(first.point)}: {first.reason}")


def drawing(sweep: Sweep, base: Experiment, checker: Checker) -> TPE:
    """Return the search that draws a sweep's points, each checked by `checker`."""
    return TPE(sweep.space, most_points(sweep), base.seed, checker.refuses)


def most_points(sweep: Sweep) -> int:
    """Return how many points a search can try: at most those of its space, if all its values are listed."""
    assert sweep.num_points is not None
    if any(axis.values is None for axis in sweep.space.values()):
        return sweep.num_points
    return sum(1 for _ in itertools.islice(grid(sweep.space), sweep.num_points))


def _ends(sweep: Sweep, checker: Checker) -> list[Point]:
    """Return the points at the ends of the ranges that a search draws from, if they can be trained."""
    lists = {
        key: axis if axis.values is not None else Axis(grid=axis.bounds, when=axis.when)
        for key, axis in sweep.space.items()
    }
    for point in itertools.islice(grid(lists), MOST_ENDS):
        checker.refuses(point)
    return checker.points


def _work(sweep: Sweep, plan: Plan) -> int:
    """Return a number that grows with a trial's time: parameters times network calls of training (unless the clock ends it) and scores."""
    training = plan.experiment.training
    steps = training.steps if sweep.budget.minutes is None else 0
    return (plan.num_parameters or 0) * (STEP_CALLS * training.batch_size * steps + scoring_calls(plan))


def require_equal_calls(sweep: Sweep, base: Experiment, experiment: Experiment) -> None:
    """Refuse a point whose images cost another number of network calls than the base, unless the sweep varies sampling."""
    if sweep.metric == "bpd" or any(key.startswith("sampling.") for key in sweep.space):
        return
    calls, usual = (usual_generation(each).nfe for each in (experiment, base))
    if calls != usual:
        raise UsageError(
            f"its images would take {calls} network calls, those of the base {usual}: not comparable; give all of them as many with "
            "sampling.steps under 'overrides'"
        )


def max_concurrent(profile: Profile, num_workers: int, num_trials: int, asked: int | None) -> int:
    """Return how many trials run at once: as many as the machine has room for, at least one."""
    cpus, each = usable_cpus(), profile.resources_per_worker
    if profile.is_remote:
        room = num_trials  # the cluster says, once it is there
    elif profile.use_gpu:
        room = int(usable_gpus() / (profile.gpus_per_worker * num_workers))
    elif each.CPU is not None:
        room = int(cpus / (each.CPU * num_workers) + 1e-9)
    else:
        room = min(MOST_AT_ONCE, cpus // num_workers)
    return max(1, min(room, num_trials, asked or num_trials))


def trial_profile(profile: Profile, num_workers: int, at_once: int) -> Profile:
    """Return the profile of one trial: its workers run in the sweep's Ray, and get a share of the CPUs."""
    profile = profile.isolating()
    if not profile.is_remote:
        profile = profile.model_copy(update={"workers": num_workers})
    if profile.is_remote or profile.resources_per_worker.CPU is not None:
        return profile
    share = max(1, usable_cpus() // at_once) / num_workers
    resources = Resources(CPU=share, GPU=profile.gpus_per_worker)
    return profile.model_copy(update={"resources_per_worker": resources})
