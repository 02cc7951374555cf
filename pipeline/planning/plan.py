"""What a training will be, worked out and checked before anything is written: worker count, streams, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.console import duration, plural
from pipeline.data.order import default_num_streams, streams_of_worker
from pipeline.errors import UsageError
from pipeline.gpus import usable_gpus
from pipeline.planning.capacity import fitting_counts, whole_gpus
from pipeline.training.combinations import check_training
from pipeline.training.device import require_permission, training_compute
from pipeline.training.models import Shape, build_model, num_parameters
from pipeline.training.validation import ValidationPlan, plan_validation

BYTES_PER_PARAMETER = 4  # float32
LONG_S = 3600.0  # from which on a training had better survive the death of its process


@dataclass(frozen=True)
class Plan:
    """A checked training. Facts about the images are None until the images are here."""

    experiment: Experiment
    profile: Profile
    num_workers: int
    num_streams: int
    data: str  # one line on where the images are
    num_rows: int | None
    shape: Shape | None
    num_parameters: int | None
    warnings: tuple[str, ...] = ()  # what may disappoint
    missing: tuple[str, ...] = ()  # without which it cannot start here
    fingerprint: str | None = None  # of the dataset
    no_validation: str = ""  # why there are no images to validate with, though the experiment names some

    @property
    def validation(self) -> ValidationPlan | None:
        """How the training validates; None if it does not."""
        return None if self.no_validation else plan_validation(self.experiment)

    @property
    def place(self) -> str:
        """Where the workers run, in words."""
        if self.profile.trains_here(self.num_workers):
            return f"in this process, on {'a GPU' if self.profile.use_gpu else 'the CPU'}"
        where = f"the cluster of profile {self.profile.name!r}" if self.profile.is_remote else "this machine"
        on = f" with {plural(self.profile.gpus_per_worker, 'GPU')} each" if self.profile.use_gpu else ""
        return f"in {plural(self.num_workers, 'Ray worker')}{on} on {where}"

    def with_images(self, data: str, num_rows: int | None, shape: Shape | None, num_classes: int | None = None) -> Plan:
        """Return the plan for these images; UsageError where batch or network do not fit them."""
        experiment = self.experiment
        if num_rows is not None and experiment.training.batch_size > num_rows:
            raise UsageError(
                f"training.batch_size: got {experiment.training.batch_size}, more than the dataset's {num_rows} images; "
                f"use -s training.batch_size={_power_of_two_up_to(num_rows)}"
            )
        parameters = None
        if shape is not None and not (experiment.model.class_conditional and num_classes is None):
            parameters = num_parameters(build_model(experiment, shape, device="meta", num_classes=num_classes))
        return replace(self, data=data, num_rows=num_rows, shape=shape, num_parameters=parameters)

    @property
    def checkpoint_bytes(self) -> int | None:
        """Size of one checkpoint: the weights, Adam's two moments, and the averages."""
        training = self.experiment.training
        copies = 3 + len(training.ema_decays) + len(training.ema_widths)
        return None if self.num_parameters is None else self.num_parameters * BYTES_PER_PARAMETER * copies

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps in which the model sees as many images as the dataset has."""
        return None if self.num_rows is None else self.num_rows / self.experiment.training.batch_size

    def to_dict(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment.to_dict(),
            "profile": self.profile.to_dict(),
            "num_workers": self.num_workers,
            "num_streams": self.num_streams,
            "place": self.place,
            "data": self.data,
            "num_rows": self.num_rows,
            "shape": self.shape,
            "num_parameters": self.num_parameters,
            "steps_per_epoch": self.steps_per_epoch,
            "checkpoint_bytes": self.checkpoint_bytes,
            "config_hash": None if self.fingerprint is None else self.experiment.hash(self.fingerprint),
            "validation": None if self.validation is None else asdict(self.validation),
            "no_validation": self.no_validation,
            "warnings": list(self.warnings),
            "missing": list(self.missing),
        }


def make_plan(
    experiment: Experiment,
    profile: Profile,
    num_workers: int,
    *,
    data: str = "",
    num_rows: int | None = None,
    shape: Shape | None = None,
    num_classes: int | None = None,
    missing: Sequence[str] = (),
) -> Plan:
    """Check an experiment against a profile and a dataset; UsageError names the first thing that does not fit.

    If something is missing, this machine is not the one that will train, and its abilities are not checked.

    Unknown facts of the dataset are None; `num_classes` matters to class-conditional models only.
    """
    streams = experiment.training.num_streams or default_num_streams(experiment.training.batch_size)
    streams_of_worker(0, num_workers, streams)  # refuses a number that does not divide the streams
    warnings = check_training(experiment)
    if not profile.is_remote and not missing:
        training_compute(experiment, profile, num_workers, shape)
        if profile.use_gpu and (idle := usable_gpus() - whole_gpus(num_workers, profile.gpus_per_worker)) > 0:
            warnings = (
                *warnings,
                f"{plural(idle, 'GPU')} of this machine will be idle; --cluster gpu uses all of them",
            )
    else:  # what the cluster's machines can do is theirs to say
        require_permission(experiment, profile)
    plan = Plan(experiment, profile, num_workers, streams, data, None, None, None, warnings, tuple(missing))
    return plan.with_images(data, num_rows, shape, num_classes)


def advice_to_isolate(profile: Profile, num_workers: int, training_s: float) -> str | None:
    """Return one line of advice if a training in the command's process takes long; else None."""
    if training_s <= LONG_S or not profile.trains_here(num_workers):
        return None
    return (
        f"training will take about {duration(training_s)} in this process, and ends if it is killed; with --isolated the worker is a "
        "process of its own, started again if it dies"
    )


def choose_workers(experiment: Experiment, profile: Profile) -> int:
    """Return the profile's worker count; for an elastic one the largest that `fitting_counts` allows (UsageError if none)."""
    return fitting_counts(experiment, profile)[0]


def _power_of_two_up_to(limit: int) -> int:
    return 1 << (max(limit, 1).bit_length() - 1)
