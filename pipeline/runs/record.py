"""Records of runs: of a training or an import, and which trial of a sweep a run is.

A trial is an ordinary run: `sample`, `evaluate` and `resume` take it, and it shows in MLflow under its sweep's run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from pipeline.storage.runs import Run, RunRecord
from pipeline.tracking.registry import SWEEP_TAG
from pipeline.worker.job import Allowance

if TYPE_CHECKING:
    from pipeline.config.cluster_profile import Profile
    from pipeline.config.experiment import Experiment
    from pipeline.data.shards import Dataset

PARENT_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class Trial:
    """Which trial of which sweep a run is.

    Attributes:
        sweep: the sweep's id.
        key: of the ledger: equal keys are the same trial of any sweep.
        point: the settings that the sweep chose, by their dotted names.
        title: the same in words, such as "cosine, T = 250".
        seed: number of the repetition, from 0.
        allowance: what the trial may spend.
        parent: MLflow's id of the sweep's run; None while the store had not given it.
    """

    sweep: str
    key: str
    point: dict[str, Any]
    title: str
    seed: int
    allowance: Allowance = field(default_factory=Allowance)
    parent: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the run's record."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Name of the trial's run in MLflow."""
        return f"{self.title}, seed {self.seed}"

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the trial's run: MLflow nests it under the sweep's by them."""
        return {SWEEP_TAG: self.sweep, "trial": self.title} | ({PARENT_TAG: self.parent} if self.parent else {})


_TRIAL = TypeAdapter(Trial)


def trial_of(record: RunRecord) -> Trial | None:
    """Return which trial a run is, or None for a run on its own."""
    if record.trial is None:
        return None
    return _TRIAL.validate_python(record.trial)


def allowance_of(run: Run) -> Allowance:
    """Return what a run may spend: all that its experiment says, unless it is a trial."""
    trial = trial_of(run.record)
    return Allowance() if trial is None else trial.allowance


def create_run(
    experiment: Experiment,
    dataset: Dataset | None,
    profile: Profile,
    command: Sequence[str],
    *,
    initial_weights: str | None = None,
    origin: dict[str, str] | None = None,
    imported_from: str = "",
) -> Run:
    """Make the run folder of an experiment; `dataset` is None for a model that is imported without images."""
    about = {"path": "", "fingerprint": "", "name": "none"}
    if dataset is not None:
        manifest = dataset.manifest
        about = {"path": dataset.location, "fingerprint": manifest.fingerprint, "name": manifest.name}
    return Run.create(
        profile.home(),
        name=experiment.name,
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(about["fingerprint"]),
        dataset=about,
        profile=profile.to_dict(),
        command=list(command),
        initial_weights=initial_weights,
        origin=origin,
        imported_from=imported_from,
    )


def origin_of(what: str, words: str, mlflow_run_id: str | None) -> dict[str, str]:
    """Return what a run's record says of the run or sweep it comes from; `words` go before its name."""
    return {"what": what, "words": words, "mlflow_run_id": mlflow_run_id or ""}
