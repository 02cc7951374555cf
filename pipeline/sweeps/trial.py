"""One trial, in the process that Tune gives it: an ordinary run, trained by Ray Train inside the sweep's Ray.

The trial reserves no CPU itself: its workers do. While it scores its model, no other trial can take their place, since Tune runs no more
trials at once than there is room for.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.control_actor import actor_name
from pipeline.cluster.placement import release
from pipeline.config.cluster_profile import Profile, use_variables
from pipeline.console import Console
from pipeline.errors import InterruptedRunError
from pipeline.import_path import allow_modules_in
from pipeline.runs.evaluate import ScoreRequest, evaluate_run
from pipeline.runs.train_run import train_trial
from pipeline.storage.durable import write_json
from pipeline.storage.folder import RunStatus
from pipeline.storage.runs import Run
from pipeline.sweeps.entry import JudgedBy, own_calls, scores_of
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.models import has_process
from pipeline.training.trained import experiment_of

STOPPED_EARLY = "stopped early"
VERDICT_FILE = "stopped_early.json"  # in the run folder of a trial that was asked to stop
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ForTrials:
    """What a sweep's driver sends to each of its trials.

    Attributes:
        metric, judged_by: what the sweep ranks by, and the extractor and reference that all trials share.
        more_network_calls: further numbers of network calls at which the model is scored.
        tracking: the store that the driver records in; only the driver knows that of `mlflow run`.
        code_folder: where the user's own modules are.
        secrets: the profile's forwarded variables, which must not be in any settings.
        profile: the resources of each trial now. A trial that an earlier driver began may have had another share of the CPUs.
    """

    metric: str
    judged_by: JudgedBy
    more_network_calls: tuple[int, ...]
    tracking: TrackingSettings
    code_folder: str
    secrets: Mapping[str, str]
    profile: Profile


def run_trial(config: dict[str, Any], setup: ForTrials) -> None:
    """Train and score one trial in a process of its own: what Tune calls.

    If this process is killed, Tune starts the trial again, and it resumes from its newest checkpoint. `setup` travels through Ray's object
    store, since Ray shows a trial's settings to everybody.
    """
    from ray import tune

    run = Run(Path(config["run"]))
    os.environ.update(setup.secrets)
    os.environ["DDPM_PIPE_HOME"] = str(run.home)
    # a cluster's processes stand elsewhere, and those of the training look where this one stands
    os.chdir(setup.code_folder)
    allow_modules_in(setup.code_folder)
    release(run.id)  # of a former process of this trial that was killed
    carry_out(run, setup, tune.report)


def stop_early(run: Run, rung: float) -> None:
    """Record that a trial is to stop early: the driver may be killed before the trial has saved."""
    write_json(run.folder / VERDICT_FILE, {"rung": rung})


def carry_out(run: Run, setup: ForTrials, report: Report) -> None:
    """Train and score one trial; report each rung, and at the end how it went.

    An error is reported, not raised: it ends the trial, and the sweep continues.
    """
    reported: set[float] = set()
    stop = ""

    def observe(seen: dict[str, Any]) -> None:
        nonlocal stop
        stop = seen.get("stop") or stop
        for judgement in seen.get("judgements", []):
            if judgement["rung"] not in reported:
                reported.add(judgement["rung"])
                report({**judgement, "control": actor_name(run.id, run.current_attempt())})

    try:
        if run.state().status is not RunStatus.FINISHED:
            if (run.folder / VERDICT_FILE).exists():  # of an earlier driver
                _stop(run, report)
                return
            train_trial(run, setup.profile, setup.tracking, _silent(), observe)
        _score(run, setup)
        report({"status": "finished"})
    except InterruptedRunError as error:
        if stop == STOPPED_EARLY:
            _stop(run, report)
        else:
            report({"status": "interrupted", "reason": str(error)})
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        run.log(f"the trial failed: {reason}")
        report({"status": "failed", "reason": reason})


def _stop(run: Run, report: Report) -> None:
    step = run.state().step
    run.update(status=RunStatus.KILLED, reason=f"{STOPPED_EARLY} at step {step}: others were better by then")
    report({"status": "stopped"})


def _score(run: Run, setup: ForTrials) -> None:
    """Score the model, if that is not done: by the sweep's metric, and at further numbers of network calls.

    Training scores its model itself, but ends without a score if that fails.
    """
    experiment, profile = experiment_of(run), setup.profile
    use_variables(profile)
    done = scores_of(run, setup.metric, setup.judged_by)
    if own_calls(run, setup.metric) not in done:
        evaluate_run(run, ScoreRequest(), profile, setup.tracking, _silent())
    each_step = 1 if experiment.sampling.guidance_scale == 1 else 2
    for calls in setup.more_network_calls if has_process(experiment) else ():
        steps = calls // each_step
        if (
            calls not in done
            and calls != own_calls(run, setup.metric)
            and calls % each_step == 0
            and steps <= experiment.diffusion.num_timesteps
        ):
            evaluate_run(run, ScoreRequest(steps=steps, metrics=("fid", "kid")), profile, setup.tracking, _silent())


def _silent() -> Console:
    return Console(io.StringIO())
