"""The cluster profile: where an experiment runs. It never changes a result, only its place, speed and price."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline import presets
from pipeline.config import Precision
from pipeline.yaml_files import Section, read_yaml_mapping, validate

DEFAULT_PROFILE = "local"
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class Workers(Section):
    """Least and most workers of elastic training: each attempt takes as many as the cluster holds."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Resources(Section):
    """What one worker gets. `CPU: null` shares this machine's CPUs equally among the workers (kind `local` only)."""

    CPU: Annotated[float, Field(gt=0)] | None = None
    GPU: NonNegative = 0


class MLflowConfig(Section):
    """Where runs are recorded. Without a URI: MLFLOW_TRACKING_URI, else the SQLite store of the home folder."""

    tracking_uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "ddpm"
    strict: bool = False


class Retries(Section):
    """How often a run is started again after a failure that is not the experiment's fault."""

    max_attempts: PositiveInt = 3


class Timeouts(Section):
    """Seconds. `collective_s`: a worker that hangs longer than this inside an all-reduce fails the attempt."""

    collective_s: Seconds = 600.0
    stop_s: Seconds = 30.0


class Profile(Section):
    """Where a run takes place."""

    name: str = DEFAULT_PROFILE
    kind: Literal["local"] = "local"
    workers: PositiveInt | Workers = 1
    resources_per_worker: Resources = Resources()
    threads_per_worker: PositiveInt | None = None
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.BF16)
    compile: bool = True
    mlflow: MLflowConfig = MLflowConfig()
    retries: Retries = Retries()
    timeouts: Timeouts = Timeouts()
    env: dict[str, str] = Field(default_factory=dict)

    @property
    def use_gpu(self) -> bool:
        """Whether each worker holds a GPU."""
        return self.resources_per_worker.GPU > 0

    def cpus_per_worker(self, num_workers: int) -> float:
        """CPUs that Ray reserves for each of `num_workers` workers."""
        if self.resources_per_worker.CPU is not None:
            return self.resources_per_worker.CPU
        return (os.cpu_count() or 1) / num_workers

    def threads(self, num_workers: int) -> int:
        """Torch threads of each worker. Results are bit-exact for an equal number of them only."""
        return self.threads_per_worker or max(1, int(self.cpus_per_worker(num_workers)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested data that `validate(Profile, ...)` reads back."""
        return self.model_dump(mode="json")


def load_profile(reference: str | None) -> Profile:
    """Read a profile by path or shipped name; None is the embedded default (`local`)."""
    path: Path = presets.find("cluster", reference or DEFAULT_PROFILE)
    content = read_yaml_mapping(path)
    content.setdefault("name", path.stem)
    return validate(Profile, content, str(path.name))
