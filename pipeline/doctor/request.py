"""From the doctor's command line to what is examined."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.config import presets
from pipeline.config.cluster_profile import Profile, forwarded
from pipeline.config.experiment import DEFAULT_PRESET, load_experiment
from pipeline.data.manifest import Manifest
from pipeline.doctor.examination import Examination
from pipeline.doctor.limited_checks import in_thread
from pipeline.errors import DataError, UsageError
from pipeline.ingest.ingest import IngestOptions, availability
from pipeline.storage.home import datasets_dir
from pipeline.storage.remote import is_remote
from pipeline.training.models import build_model, num_parameters

T = TypeVar("T")
LOOK_S = 5.0  # a library may have to be read first
NUM_CLASSES = 10  # of a class-conditional network whose dataset is not looked at
USUAL_SHAPE = (3, 32, 32)  # of images that are not known before they are ingested


def examination_of(profile: Profile, data: str | None, preset: str | None) -> Examination:
    """Read experiment and dataset; UsageError where they are wrong. A damaged dataset is a finding, not an error."""
    begun = time.monotonic()
    experiment = load_experiment(presets.find("experiments", preset or DEFAULT_PRESET))
    datasets = datasets_dir(profile.home())
    shape = _look(lambda: availability(experiment.data.source, IngestOptions(), datasets).shape)
    if data is not None and not is_remote(data):
        folder = Path(data).absolute()
        if _look(lambda: os.path.isdir(folder)) is False:
            raise UsageError(
                f"--data: got {data}, which is no folder; give one that `ddpm-pipe ingest SOURCE DEST` wrote, or its s3:// address"
            )
        data = str(folder)
        with contextlib.suppress(DataError):  # which the check itself will tell
            shape = (_look(lambda: Manifest.load(folder).shape) if preset else None) or shape
    shape = shape or USUAL_SHAPE
    classes = NUM_CLASSES if experiment.model.class_conditional else None
    model = build_model(experiment, shape, device="meta", num_classes=classes)
    return Examination(profile, experiment, shape, num_parameters(model), data, forwarded(profile), begun=begun)


def _look(look: Callable[[], T]) -> T | None:
    """Return what a look at a storage shows; None where it hangs, which a check will tell."""
    return in_thread(look, "doctor-look")(LOOK_S)
