"""What a trial's run folder says of how it ended, as a line of the ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pipeline.settings.config import Experiment
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.runs import Run, RunStatus
from pipeline.sweeps.ledger import Entry, Status
from pipeline.sweeps.record import trial_of
from pipeline.training.models import has_process
from pipeline.training.trained import experiment_of

RECORDED_AS = {"bpd": "bits_per_dim"}  # the name in an identity, where it is not the one the user gives


def entry_of(run: Run, metric: str, status: Status, rungs: Mapping[float, float], reason: str = "") -> Entry:
    """Return the entry of a trial that ended, with its value of `metric` where it is finished and has one.

    One that finished without the value failed: its scores say why.
    """
    trial, state, experiment = trial_of(run.record), run.state(), experiment_of(run)
    assert trial is not None
    entry = Entry(
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
    found = list(_values(run, RECORDED_AS.get(metric, metric)))
    own = [(name, scores) for name, scores in found if _as_asked(scores["identities"][name], experiment)]
    if not own:
        return replace(entry, status="failed", reason=f"it has no {metric}; see {run.log_path}")
    name, scores = own[0]
    spread = scores.get("spreads", {}).get(name)
    curve = {
        calls: scores["values"][name]
        for name, scores in found
        if (calls := _calls(scores["identities"][name])) is not None
    }
    return replace(
        entry,
        value=scores["values"][name],
        metric=name,
        identity=scores["identities"][name],
        std=None if spread is None else spread["value"],
        std_over="" if spread is None else spread["over"],
        curve=dict(sorted(curve.items())),
    )


def _training_s(run: Run) -> float:
    """Return the time spent training up to the newest checkpoint."""
    committed = checkpoints.committed(run.checkpoints)
    return float(committed[0].state()["elapsed_s"]) if committed else 0.0


def calls_scored(run: Run) -> set[int]:
    """Return the numbers of network calls at which a run is scored."""
    found = {_calls(scores["identities"][name]) for name, scores in _values(run, None)}
    return {calls for calls in found if calls is not None}


def _values(run: Run, metric: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each recorded value of a metric (None: of the first of each set of scores), with its scores."""
    for path in sorted((run.folder / "evaluations").glob("*/scores.json")):
        scores = json.loads(path.read_text())
        for name, identity in scores["identities"].items():
            if metric is None or identity["metric"] == metric:
                yield name, scores
                break


def _calls(identity: Mapping[str, Any]) -> int | None:
    """Return the network calls behind a value; None of bits/dim, which needs no generated images."""
    generation = identity.get("generation")
    return None if generation is None else int(generation["steps"])


def _as_asked(identity: Mapping[str, Any], experiment: Experiment) -> bool:
    """Whether a value is of images made as the experiment itself samples, or of no generated images at all."""
    generation, sampling = identity.get("generation"), experiment.sampling
    if generation is None:
        return True
    made = (
        (sampling.sampler, sampling.num_steps(experiment.diffusion.num_timesteps))
        if has_process(experiment)
        else ("vae", 1)
    )
    return (generation["sampler"], generation["steps"], generation["seed"]) == (*made, experiment.seed)
