"""`sweep --dry-run`: the plan, one trial measured for some steps, and what all of them take in time, money and disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.console import duration
from pipeline.planning.forecast import calls_s, scoring_calls
from pipeline.planning.plan import Plan
from pipeline.runs.dry_run import DryRun, dry_run
from pipeline.runs.train import TrainRequest
from pipeline.sampling.generation import usual_generation
from pipeline.sweeps.config import Sweep
from pipeline.sweeps.plan import SweepPlan, SweepRequest, trial_profile
from pipeline.training.models import has_process

START_S = 15.0  # of a trial: its processes and their imports, on an idle machine


@dataclass(frozen=True)
class SweepForecast:
    """The most that a sweep takes; early stopping and smaller points take less. `trial` is the largest trial; times in seconds."""

    plan: SweepPlan
    trial: DryRun
    trial_s: float | None
    total_s: float | None
    cost: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return self.plan.to_dict() | {
            "trial_s": self.trial_s,
            "total_s": self.total_s,
            "cost": self.cost,
            "unmeasured": self.trial.unmeasured,
        }

    def to_text(self) -> str:
        """Return what `--dry-run` prints."""
        if self.trial_s is None or self.total_s is None:
            return f"{self.plan.to_text()}\ntime:       not measured: {self.trial.unmeasured}"
        forecast = self.trial.forecast
        cost = "" if not self.cost or forecast is None else f", {self.cost:.2f} {forecast.currency}"
        most = " at most" if self.plan.sweep.early_stopping is not None or self.plan.largest is not None else ""
        return (
            f"{self.plan.to_text()}\ntime:       {duration(self.total_s)}{most}{cost}: {duration(self.trial_s)} each, "
            f"{self.plan.max_concurrent} at once"
        )


def forecast_sweep(asked: SweepRequest, plan: SweepPlan, *, measure: bool) -> SweepForecast:
    """Measure the largest trial, unless `measure` is False, and work out what all trials take."""
    profile = trial_profile(asked.profile, plan.trial.num_workers, plan.max_concurrent)
    minutes = plan.sweep.budget.minutes
    found = dry_run(TrainRequest(plan.trial.experiment, profile), measure=measure)
    if found.forecast is None or found.probe is None:
        return SweepForecast(plan, found, None, None, None)
    scoring_s = calls_s(trial_calls(plan.sweep, found.plan), found.plan, found.probe)
    training_s = found.forecast.training_s if minutes is None else minutes * 60
    trial_s = START_S + training_s + scoring_s
    total_s = trial_s * -(-plan.num_trials // plan.max_concurrent)
    price = asked.profile.price
    cost = price.per_worker_hour * plan.trial.num_workers * trial_s * plan.num_trials / 3600
    return SweepForecast(plan, found, trial_s, total_s, cost)


def trial_calls(sweep: Sweep, trial: Plan) -> int:
    """Return the network calls to score a trial: at its end, at further numbers of calls, and for early stopping."""
    calls, usual = scoring_calls(trial), usual_generation(trial.experiment).nfe
    if has_process(trial.experiment) and sweep.metric != "bpd":
        calls += calls // usual * sum(sweep.more_network_calls)
    early = sweep.early_stopping
    return calls if early is None else calls + early.rungs * early.num_images * usual
