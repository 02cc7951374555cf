"""How a trial ended, read from its run folder, as a line of the ledger.

A trial is a run like any other: it may have been scored in other ways, or at another step. Only scores of the final model count, sampled as
its experiment says, by the extractor and reference of the sweep.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
        training_s=_training_s(run),
        reason=reason or (state.reason if state.status is not RunStatus.FINISHED else ""),
    )
    if status != "finished":
        return entry
    found = list(_comparable(run, metric, judged_by))
    own = [(name, scores) for name, scores, calls in found if calls in (None, _usual(run).nfe)]
    if not own:
        return replace(entry, status="failed", reason=f"it has no {metric}; see {run.log_path}")
    name, scores = own[0]
    spread = scores.get("spreads", {}).get(name)
    curve = {calls: scores["values"][name] for name, scores, calls in found if calls is not None}
    return replace(
        entry,
        value=scores["values"][name],
        metric=name,
        identity=scores["identities"][name],
        std=None if spread is None else spread["value"],
        std_over="" if spread is None else spread["over"],
        curve=dict(sorted(curve.items())),
    )


def has_value(run: Run, metric: str, judged_by: JudgedBy) -> bool:
    """Whether a trial has been scored by the sweep's metric."""
    usual = _usual(run).nfe
    return any(calls in (None, usual) for _, _, calls in _comparable(run, metric, judged_by))


def calls_scored(run: Run, metric: str, judged_by: JudgedBy) -> set[int]:
    """Return the numbers of network calls at which a trial's images are scored."""
    return {calls for _, _, calls in _comparable(run, metric, judged_by) if calls is not None}


def _training_s(run: Run) -> float:
    return float(RunCheckpoints(run).newest_state().get("elapsed_s", 0.0))


def _usual(run: Run) -> Generation:
    return usual_generation(experiment_of(run), ClassNames.from_state(RunCheckpoints(run).newest_state()))


def _comparable(run: Run, metric: str, judged_by: JudgedBy) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """Yield name, scores and network calls of each value that counts for the trial; None for calls if it has no generated images."""
    recorded, step = RECORDED_AS.get(metric, metric), run.state().step
    experiment, usual = experiment_of(run), _usual(run)
    for path in sorted((run.folder / "evaluations").glob("*/scores.json")):
        scores = json.loads(path.read_text())
        if scores["model"]["step"] != step:
            continue
        for name, identity in scores["identities"].items():
            if identity["metric"] != recorded:
                continue
            if "generation" not in identity:
                if _of_all_images(identity, experiment):
                    yield name, scores, None
                continue
            generation = Generation(**identity["generation"])
            if experiment.sampling.precision == "mixed":
                usual = replace(usual, precision=generation.precision)
            own_images = identity["dataset"] == run.record.dataset["fingerprint"]
            if own_images and _but_steps(generation) == _but_steps(usual) and judged_by.items() <= identity.items():
                yield name, scores, generation.nfe


def _but_steps(generation: Generation) -> Generation:
    return replace(generation, steps=0, spacing=generation.spacing.partition("_of_")[0])


def _of_all_images(identity: Mapping[str, Any], experiment: Experiment) -> bool:
    """Whether a bound is that of the averaged weights over all images of the training data."""
    asked = ("ema", recorded_split(experiment.data.split), experiment.seed, identity["of_images"])
    return tuple(identity[name] for name in ("weights", "split", "seed", "num_images")) == asked
