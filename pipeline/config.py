"""The experiment: everything that decides a result, and nothing about where it runs.

Each default is written once, here. A file of experiments/ overrides some of them, `-s key=value` overrides the file, and the resolved
experiment is logged before any work starts. Where it runs is the cluster profile's business (cluster_profile.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import UsageError
from pipeline.yaml_files import Section, flatten, read_yaml_mapping, set_override, validate

DEFAULT_PRESET = "digits"
# settings that do not change the weights at any step: a resumed run may change them
FREE_TO_CHANGE = ("name", "training.steps", "checkpoint.", "logging.", "sampling.", "evaluation.")

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Precision(StrEnum):
    """Arithmetic of the network's forward and backward pass; weights, optimizer and EMA are float32 in all."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"  # with loss scaling, where a GPU lacks bf16


class DataConfig(Section):
    """The images, and the order in which training reads them."""

    source: str = "digits"
    split: str | None = None
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    mode: Literal["L", "RGB"] | None = None
    image_column: str | None = None
    label_column: str | None = None
    horizontal_flip: bool = False
    shuffle_window: PositiveInt = 65_536


class ModelConfig(Section):
    """The network: the paper's U-Net, or `package.module:Class` called with `arguments`."""

    type: str = "unet"
    channels: PositiveInt = 128
    channel_multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 2, 2), min_length=1)
    num_res_blocks: PositiveInt = 2
    attention_resolutions: tuple[PositiveInt, ...] = (16,)
    dropout: Fraction = 0.1
    norm_groups: PositiveInt = 32
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_kind(self) -> ModelConfig:
        if self.type == "unet":
            if self.arguments:
                raise ValueError("'arguments' belong to a network of your own; with type 'unet' set its keys directly")
            return self
        module, colon, name = self.type.partition(":")
        parts = module.split(".")
        if not colon or not name.isidentifier() or not all(part.isidentifier() for part in parts):
            raise ValueError(f"type: got {self.type!r}; expected 'unet' or 'package.module:Class'")
        fields = type(self).model_fields
        unet_only = sorted(k for k in fields.keys() - {"type", "arguments"} if getattr(self, k) != fields[k].default)
        if unet_only:
            raise ValueError(
                f"{', '.join(unet_only)} belong to type 'unet'; give {self.type} its settings under 'arguments'"
            )
        return self


class DiffusionConfig(Section):
    """The diffusion process, in the names of the `ddpm` package."""

    schedule: str = "linear"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip_x0: bool = True


class TrainingConfig(Section):
    """The optimisation. `batch_size` is global: it does not change with the number of workers."""

    steps: PositiveInt = 800_000
    batch_size: PositiveInt = 128
    num_streams: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_steps: Annotated[int, Field(ge=0)] = 5000
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    ema_ramp_up: bool = True
    precision: Precision = Precision.FP32
    compile: bool = False
    channels_last: bool = False

    @model_validator(mode="after")
    def _streams_divide_the_batch(self) -> TrainingConfig:
        if self.num_streams is not None and self.batch_size % self.num_streams:
            raise ValueError(
                f"num_streams: got {self.num_streams}, which does not divide batch_size {self.batch_size}; "
                "leave it out or choose a divisor"
            )
        return self


class CheckpointConfig(Section):
    """When to save, and how many checkpoints to keep. The last step is always saved."""

    every_steps: PositiveInt | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    keep: Annotated[int, Field(ge=2)] = 2


class LoggingConfig(Section):
    """What to record while training."""

    every_steps: PositiveInt = 50
    grid_every_steps: PositiveInt | None = 5000
    grid_images: PositiveInt = 64


class SamplingConfig(Section):
    """How images are generated. `batch_size` is the canonical chunk: files are byte-equal only for an equal one."""

    sampler: Literal["ddim", "ancestral"] = "ddim"
    steps: PositiveInt | None = 50
    spacing: Literal["trailing", "linspace", "leading", "quad"] = "trailing"
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    batch_size: PositiveInt = 100

    def num_steps(self, num_timesteps: int) -> int:
        """Return the network calls along one image: `steps`, or all T of them."""
        return min(self.steps or num_timesteps, num_timesteps)


class EvaluationConfig(Section):
    """The scores at the end of training. `extractor: auto` is the classifier for small labelled gray images, else Inception."""

    enabled: bool = True
    extractor: Literal["auto", "classifier", "inception"] = "auto"
    num_images: PositiveInt = 10_000
    inception_weights: str | None = None


class Experiment(Section):
    """Everything that decides the result of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "ddpm"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _sampler_steps_fit(self) -> Experiment:
        steps, total = self.sampling.steps, self.diffusion.num_timesteps
        if steps is not None and steps > total and "steps" in self.sampling.model_fields_set:
            raise ValueError(
                f"sampling.steps: got {steps}, more than diffusion.num_timesteps {total}; choose at most {total}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested data that `experiment_from` reads back to an equal experiment."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """Return one level of dotted keys, as parameters of a tracked run are."""
        return flatten(self.to_dict())

    def hash(self) -> str:
        """Return 16 hexadecimal digits that change with any setting that decides the weights."""
        kept = {key: value for key, value in self.flat().items() if not key.startswith(FREE_TO_CHANGE)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def experiment_from(content: dict[str, Any], where: str = "experiment") -> Experiment:
    """Return the checked experiment that nested plain data describes; UsageError names the first fault."""
    return validate(Experiment, content, where)


def load_experiment(path: Path, overrides: Sequence[str] = (), data: str | None = None) -> Experiment:
    """Read an experiment file and apply `key=value` overrides and a data source given on the command line."""
    content = read_yaml_mapping(path)
    content.setdefault("name", path.stem)
    for assignment in overrides:
        set_override(content, assignment)
    if data is not None:
        set_override(content, "data.source=''")
        content["data"]["source"] = data
    return experiment_from(content, str(path.name))


def differences(old: Experiment, new: Experiment) -> list[str]:
    """Return "field: old -> new" for every setting that differs and decides the weights."""
    before, after = old.flat(), new.flat()
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed if not key.startswith(FREE_TO_CHANGE)]


def with_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return the experiment with `key=value` overrides applied."""
    content = experiment.to_dict()
    for assignment in overrides:
        set_override(content, assignment)
    return experiment_from(content, "-s")


def require_divisible(experiment: Experiment, num_workers: int, num_streams: int) -> None:
    """Refuse a worker count that does not divide the number of streams (UsageError)."""
    if num_streams % num_workers:
        fits = [n for n in range(1, num_streams + 1) if num_streams % n == 0]
        raise UsageError(
            f"workers: got {num_workers}, which does not divide training.num_streams {num_streams} "
            f"(batch_size {experiment.training.batch_size}); choose one of {fits}"
        )
