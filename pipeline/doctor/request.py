"""From the doctor's command line to what is examined."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.data.manifest import Manifest
from pipeline.doctor.examination import Examination
from pipeline.errors import DataError, UsageError
from pipeline.ingest.ingest import IngestOptions, availability
from pipeline.settings import presets
from pipeline.settings.cluster_profile import forwarded, load_profile
from pipeline.settings.config import DEFAULT_PRESET, load_experiment
from pipeline.storage.home import datasets_dir
from pipeline.storage.remote import is_remote
from pipeline.training.models import build_model, num_parameters

NUM_CLASSES = 10  # of a class-conditional network whose dataset is not looked at
USUAL_SHAPE = (3, 32, 32)  # of images that are not known before they are ingested


def examination_of(cluster: str | None, data: str | None, preset: str | None) -> Examination:
    """Read profile, experiment and dataset; UsageError where they are wrong. A damaged dataset is a finding, not an error."""
    profile = load_profile(cluster)
    experiment = load_experiment(presets.find("experiments", preset or DEFAULT_PRESET))
    shape = availability(experiment.data.source, IngestOptions(), datasets_dir(profile.home())).shape
    if data is not None and not is_remote(data):
        if not Path(data).is_dir():
            raise UsageError(
                f"--data: got {data}, which is no folder; give one that `ddpm-pipe ingest SOURCE DEST` wrote, or its s3:// address"
            )
        data = str(Path(data).absolute())
        with contextlib.suppress(DataError):  # which the check itself will tell
            shape = Manifest.load(Path(data)).shape if preset else shape
    shape = shape or USUAL_SHAPE
    classes = NUM_CLASSES if experiment.model.class_conditional else None
    model = build_model(experiment, shape, device="meta", num_classes=classes)
    return Examination(profile, experiment, shape, num_parameters(model), data, forwarded(profile))
