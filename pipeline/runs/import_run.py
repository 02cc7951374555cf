"""A run made from a folder of weights: what was trained elsewhere is sampled, scored and fine-tuned as what was trained here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.config.experiment import DataConfig, Experiment
from pipeline.console import Console
from pipeline.data.labels import model_labels
from pipeline.data.shards import Dataset
from pipeline.errors import CheckpointError, DataError, UsageError
from pipeline.exchange.diffusers_folder import ForeignModel, is_pipeline, read_pipeline
from pipeline.exchange.saved_folder import is_saved, read_saved
from pipeline.ingest.ingest import ensure_ingested
from pipeline.ingest.resolve import absolute_source
from pipeline.metrics.bound import rows_to_measure
from pipeline.runs.record import create_run
from pipeline.runs.tracked import start_tracking
from pipeline.storage.folder import RunStatus
from pipeline.storage.retention import Retention
from pipeline.storage.run_checkpoints import Saver
from pipeline.storage.runs import Run, normalise_name
from pipeline.tracking.tracker import Tracker, TrackingSettings
from pipeline.training.models import has_process
from pipeline.training.trained import Trained


@dataclass(frozen=True)
class ImportResult:
    """The run that was made of a folder, and the name of its images."""

    run: Run
    foreign: ForeignModel
    experiment: Experiment
    dataset: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        channels, height, width = self.foreign.shape
        return {
            "run": self.run.id,
            "name": self.run.record.name,
            "found": self.foreign.about,
            "images": f"{channels}x{height}x{width}",
            "parameters": sum(tensor.numel() for tensor in self.foreign.model.values()),
            **_process(self.experiment),
            "data": "none: it can be sampled, not scored" if self.dataset is None else self.dataset,
        }


def import_folder(context: Context, folder: Path, data: str | None, name: str | None) -> ImportResult:
    """Make a finished run of the model in a folder. Its checkpoint is of step 0; its status has the steps that the folder reports.

    `data` is what it is scored against and fine-tuned on; without it the run can be sampled alone. CheckpointError where the folder is
    damaged or holds what this package does not have, DataError where the images are of another shape than the model's, UsageError where a
    model of classes does not know theirs.
    """
    foreign = read_folder(folder, normalise_name(name or folder.resolve().name))
    experiment = _named(foreign.experiment, name, data)
    profile = context.profile
    dataset = None if data is None else _dataset(data, foreign, profile, context.console)
    run = create_run(experiment, dataset, profile, context.command, imported_from=str(folder.absolute()))
    with run.lock():
        _save(run, experiment, foreign, dataset)
        _track(run, experiment, dataset, profile)
        run.update(status=RunStatus.FINISHED, step=foreign.step or 0, reason=f"imported from {folder.name}")
    return ImportResult(run, foreign, experiment, None if dataset is None else dataset.manifest.name)


def _process(experiment: Experiment) -> dict[str, str]:
    """Return what there is to say of the diffusion process; nothing of a model that has none."""
    diffusion = experiment.diffusion
    if not has_process(experiment):
        return {}
    return {
        "schedule": f"{diffusion.schedule}, T = {diffusion.num_timesteps}",
        "prediction": diffusion.prediction,
        "variance": diffusion.variance,
    }


def read_folder(folder: Path, name: str) -> ForeignModel:
    """Read a folder in diffusers' layout or in our own; CheckpointError with the reason where it is not taken."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give one in the layout of diffusers or of ddpm-pipe export")
    try:
        if is_saved(folder):
            return read_saved(folder)
        if is_pipeline(folder):
            return read_pipeline(folder, name)
    except (ValueError, UsageError) as error:  # the settings come from the folder, not from the user
        raise CheckpointError(f"{folder}: not taken: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    raise CheckpointError(f"{folder}: holds no model: expected unet/config.json, config.json or experiment.json in it")


def _named(experiment: Experiment, name: str | None, data: str | None) -> Experiment:
    """Return the experiment under the name asked for; of its data it says what was given here."""
    averages = {"ema_decay": experiment.training.ema_decays[0], "ema_widths": (), "ema_snapshot_every_steps": None}
    changes: dict[str, Any] = {
        "data": DataConfig(source=data or "none"),  # what was said of other images does not hold of these
        "training": experiment.training.model_copy(update=averages),  # one average came along
        # a place that the folder's maker names is not opened here
        "evaluation": experiment.evaluation.model_copy(update={"inception_weights": None}),
    }
    if name is not None:
        changes["name"] = normalise_name(name)
    return experiment.model_copy(update=changes)


def _dataset(data: str, foreign: ForeignModel, profile: Profile, console: Console) -> Dataset:
    source = absolute_source(data)
    dataset = ensure_ingested(DataConfig(source=source), profile.datasets(), console.say, cache=profile.cache)
    if tuple(dataset.manifest.shape) != foreign.shape:
        got, wanted = ("x".join(map(str, shape)) for shape in (dataset.manifest.shape, foreign.shape))
        mode = {1: " --mode L", 3: " --mode RGB"}.get(foreign.shape[0], "")
        raise DataError(
            f"{data}: images of {got}, but the model makes {wanted}; make a dataset of that shape with: "
            f"ddpm-pipe ingest {data} DEST --image-size {foreign.shape[1]}x{foreign.shape[2]}{mode}"
        )
    if foreign.class_names:
        model_labels(dataset, rows_to_measure(dataset, None), foreign.class_names)
    return dataset


def _save(run: Run, experiment: Experiment, foreign: ForeignModel, dataset: Dataset | None) -> None:
    """Write the weights as the checkpoint of step 0; the optimizer knows nothing yet."""
    fingerprint = "" if dataset is None else dataset.manifest.fingerprint
    state = {
        "step": 0,
        "config_hash": experiment.hash(fingerprint),
        "dataset_fingerprint": fingerprint,
        "shape": list(foreign.shape),
        **foreign.class_names.to_state(),
        "elapsed_s": 0.0,
    }
    tensors = {"model": foreign.model, "ema": foreign.ema, "optimizer": {}}
    Saver(run, run.next_attempt(), Retention(newest=1)).save(0, tensors, state, wait=True)


def _track(run: Run, experiment: Experiment, dataset: Dataset | None, profile: Profile) -> None:
    """Record the run where the others are, with its model."""
    tracker = Tracker(run.folder, TrackingSettings.of_profile(profile.home(), profile))
    start_tracking(tracker, run, experiment, dataset, {"imported_from": run.record.imported_from}, {})
    tracker.model(Trained.from_run(run).save(run.folder / "model"), 0)
    tracker.finish("FINISHED")
    tracker.close()
