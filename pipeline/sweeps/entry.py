"""How a trial ended, read from its run folder, as a line of the ledger.

A trial is a run like any other: it may have been scored in other ways, or at another step. Only scores of the final model count, sampled as
its experiment says, by the extractor and reference of the sweep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.data.labels import ClassNames
from pipeline.metrics.metric_identity import Generation, recorded_split
from pipeline.runs.record import trial_of
from pipeline.sampling.generation import usual_generation
from pipeline.storage.folder import RunStatus
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.sweeps.ledger import LedgerEntry, Status
from pipeline.training.trained import experiment_of

RECORDED_AS = {"bpd": "bits_per_dim"}  # the name in an identity, if it is not the user's

JudgedBy = Mapping[str, Any]
"""Fields of a sample metric's identity that are the same for all trials of a sweep: extractor, its hash, number of images."""


def entry_of(
    run: Run, metric: str, judged_by: JudgedBy, status: Status, rungs: Mapping[float, float], reason: str = ""
) -> LedgerEntry:
    """Return the entry of a trial that ended, with its value of `metric` if it finished and has one.

    A trial that finished without a value counts as failed.
    """
    trial, state = trial_of(run.record), run.state()
    assert trial is not None
    entry = LedgerEntry(
        key=trial.key,
        point=trial.point,
        title=trial.title,
        seed=trial.seed,
        run=run.id,
        status=status,
        rungs=dict(rungs),
        steps=state.step,
        training_s=float(RunCheckpoints(run).newest_state().get("elapsed_s", 0.0)),
        reason=reason or (state.reason if state.status is not RunStatus.FINISHED else ""),
    )
    if status != "finished":
        return entry
    found = scores_of(run, metric, judged_by)
    if own_calls(run, metric) not in found:
        return replace(entry, status="failed", reason=f"it has no {metric}; see {run.log_path}")
    name, scores = found[own_calls(run, metric)]
    value = scores["values"][name]
    if not math.isfinite(value):
        return replace(entry, status="failed", metric=name, reason=f"its {name} is {value}, not a finite number")
    spread = scores.get("spreads", {}).get(name, {"value": None, "over": ""})
    curve = {calls: of["values"][key] for calls, (key, of) in sorted(found.items()) if calls}
    return replace(
        entry,
        value=value,
        metric=name,
        identity=scores["identities"][name],
        std=spread["value"],
        std_over=spread["over"],
        curve={calls: value for calls, value in curve.items() if math.isfinite(value)},
    )


def own_calls(run: Run, metric: str) -> int:
    """Return the network calls of each image that a trial is ranked by; 0 for bits/dim, which generate none."""
    return 0 if metric == "bpd" else _usual(run).nfe


def scores_of(run: Run, metric: str, judged_by: JudgedBy) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return the values that count for the trial, by network calls of each image (see `own_calls`): its name, and the file's content."""
    recorded, step = RECORDED_AS.get(metric, metric), run.state().step
    experiment, usual = experiment_of(run), _usual(run)
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for path in sorted((run.folder / "evaluations").glob("*/scores.json")):
        scores = json.loads(path.read_text())
        if scores["model"]["step"] != step:
            continue
        for name, identity in scores["identities"].items():
            if identity["metric"] != recorded:
                continue
            calls = 0
            if "generation" in identity:
                generation = Generation(**identity["generation"])
                calls = generation.nfe
                if experiment.sampling.precision == "mixed":
                    usual = replace(usual, precision=generation.precision)
                own_images = identity["dataset"] == run.record.dataset["fingerprint"]
                counts = own_images and _but_steps(generation) == _but_steps(usual)
                counts = counts and judged_by.items() <= identity.items()
            else:
                counts = _of_all_images(identity, experiment)
            if counts:
                found.setdefault(calls, (name, scores))
    return found


def _usual(run: Run) -> Generation:
    return usual_generation(experiment_of(run), ClassNames.from_state(RunCheckpoints(run).newest_state()))


def _but_steps(generation: Generation) -> Generation:
    return replace(generation, steps=0, spacing=generation.spacing.partition("_of_")[0])


def _of_all_images(identity: Mapping[str, Any], experiment: Experiment) -> bool:
    """Whether a bound is that of the newest averaged weights over all images of the training data."""
    asked = ("ema", recorded_split(experiment.data.split), experiment.seed, identity["of_images"])
    found = tuple(identity[name] for name in ("weights", "split", "seed", "num_images"))
    return found == asked and "selection" not in identity
