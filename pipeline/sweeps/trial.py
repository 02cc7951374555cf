"""One trial, in the process that Tune gives it: an ordinary run of ours, trained by Ray Train inside the sweep's Ray.

The trial holds no CPU itself: its workers hold them, and while it scores its model afterwards no other trial may take them, since Tune
runs no more trials at once than there is room for.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cluster.board import board_name
from pipeline.cluster.placement import give_back
from pipeline.console import Console
from pipeline.errors import InterruptedRunError
from pipeline.storage.runs import Run, RunStatus
from pipeline.sweeps.entry import calls_scored
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.models import allow_modules_in
from pipeline.training.trained import experiment_of, profile_of
from pipeline.workflows.evaluate import ScoreRequest, evaluate_run
from pipeline.workflows.training_run import carry_on

STOPPED_EARLY = "stopped early"


def run_trial(config: dict[str, Any], secrets: Mapping[str, str] | None = None) -> None:
    """Train and score one trial, telling Tune of each rung, and at the end how it went: what Tune calls.

    A fault is told, not raised: it is the trial's, and the sweep goes on. Only where this process is killed does Tune start the trial
    again, which then goes on from its newest checkpoint. `secrets` are the profile's forwarded variables, which no setting holds.
    """
    from ray import tune

    run = Run(Path(config["run"]))
    os.environ.update(secrets or {})
    os.environ["DDPM_PIPE_HOME"] = str(run.folder.parent.parent)
    allow_modules_in(config["code_folder"])
    give_back(run.id)  # of a former process of this trial that was killed
    told: set[float] = set()
    stop = ""

    def observe(seen: dict[str, Any]) -> None:
        nonlocal stop
        stop = seen.get("stop") or stop
        for judgement in seen.get("judgements", []):
            if judgement["rung"] not in told:
                told.add(judgement["rung"])
                tune.report({**judgement, "board": board_name(run.id, run.current_attempt())})

    try:
        if run.state().status is not RunStatus.FINISHED:
            carry_on(run, _silent(), observe)
        _score_at_other_calls(run, config["more_network_calls"])
        tune.report({"status": "finished"})
    except InterruptedRunError as error:
        if stop == STOPPED_EARLY:
            step = run.state().step
            run.update(status=RunStatus.KILLED, reason=f"{STOPPED_EARLY} at step {step}: others were better by then")
            tune.report({"status": "stopped"})
        else:
            tune.report({"status": "interrupted", "reason": str(error)})
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        run.log(f"the trial failed: {reason}")
        tune.report({"status": "failed", "reason": reason})


def _score_at_other_calls(run: Run, calls: list[int]) -> None:
    """Score the model at further numbers of network calls, those that are not scored yet."""
    experiment, profile = experiment_of(run), profile_of(run, None)
    done = calls_scored(run)
    settings = replace(TrackingSettings.of_profile(profile.home(), profile), mlflow_run_id=None)
    for steps in calls:
        if steps not in done and steps <= experiment.diffusion.num_timesteps:
            evaluate_run(run, ScoreRequest(steps=steps, metrics=("fid", "kid")), profile, settings, _silent())


def _silent() -> Console:
    return Console(io.StringIO())
