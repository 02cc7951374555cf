"""The experiment: everything that decides a result, and nothing about where it runs.

Each default is written once, here. A file of experiments/ overrides some of them, `-s key=value` overrides the file, and the resolved
experiment is logged before any work starts. Where it runs is the cluster profile's business (cluster_profile.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import presets
from pipeline.config.process import DiffusionConfig as DiffusionConfig
from pipeline.config.process import Fraction, PositiveInt, settings_of, take_in_betas
from pipeline.config.process import ModelConfig as ModelConfig
from pipeline.config.process import SamplingConfig as SamplingConfig
from pipeline.config.yaml_files import Place, Section, flatten, parse_override, read_yaml_mapping, set_value, validate
from pipeline.errors import UsageError
from pipeline.storage.retention import Retention
from pipeline.storage.runs import normalise_name

DEFAULT_PRESET = "digits"
EXTRACTORS = ("auto", "classifier", "inception")  # or a file
# settings that a resumed run may change: those that do not change the weights at any step, and those of the arithmetic, which change the
# last bits of the weights from the step on that the run's log names
FREE_TO_CHANGE = (
    "name",
    "training.steps",
    "training.precision",
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.channels_last",
    "training.compile",
    "checkpoint.",
    "logging.",
    "sampling.",
    "evaluation.",
    "diffusion.betas_file",
    "validation.split",
    "validation.every_steps",
    "validation.num_images",
)


# settings of training that a model without a diffusion process does not read
OF_PROCESS = {"objective", "min_snr_gamma", "timestep_sampling", "label_dropout", "activation_checkpointing"}


class Precision(StrEnum):
    """Arithmetic of the network's forward and backward pass; weights, optimizer and EMA are float32 in all of them.

    `fp16` scales the loss. `mixed` is the fastest that the device computes itself: bf16 on GPUs from Ampere on and on CPUs with
    instructions for it, else fp16 on GPUs and fp32 on CPUs.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    MIXED = "mixed"


Side = Annotated[int, Field(ge=1, le=8192)]  # of an image, in pixels


class DataConfig(Section):
    """The images, and the order in which training reads them."""

    source: Place = "digits"
    """An ingested dataset, or a source that `ddpm-pipe ingest` takes: `digits`, `mnist`, a folder, Parquet, `.npz`."""
    split: str | None = None
    """Split of the source, such as `test`; null takes `train` where there are splits."""
    image_size: Side | tuple[Side, Side] | None = None
    """Height and width, or one number for both: the largest centred part of that shape is resized; null keeps the size."""
    mode: Literal["L", "RGB"] | None = None
    """Convert to grayscale (`L`) or colour (`RGB`); null keeps the mode."""
    image_column: str | None = None
    """Column of the images in Parquet or `.npz`; null finds it by type."""
    label_column: str | None = None
    """Column of the labels, or `none`; null finds it by type."""
    layout: Literal["flat", "classes", "splits"] | None = None
    """How to read the sub-folders of an image folder; null recognises it."""
    skip_damaged: Annotated[int, Field(ge=0)] = 0
    """Number of damaged images that may be left out before the source is refused."""
    horizontal_flip: bool = False
    """Mirror half of the images, at random."""
    shuffle_window: PositiveInt = 65_536
    """Least number of rows among which rows are permuted; groups of rows are permuted anyway."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class TrainingConfig(Section):
    """The optimisation. What is left to the device is recorded, and kept by `resume`."""

    steps: PositiveInt = 800_000
    """Optimizer steps."""
    batch_size: PositiveInt = 128
    """Images of a step, of all workers together: it does not change with their number."""
    num_streams: PositiveInt | None = None
    """Slices of an epoch, which workers share equally; null is the largest power of two up to 16 that divides the batch."""
    micro_batch_size: PositiveInt | None = None
    """Images that a worker computes at once; null leaves it to the device."""
    activation_checkpointing: Annotated[int, Field(ge=0)] = 0
    """Levels of the U-Net, from the first on, that are computed again in the backward pass: less memory, more time, the same weights."""
    objective: Literal["simple", "vlb", "hybrid", "min_snr"] = "simple"
    """Loss: the paper's, the variational bound, both (with `variance: learned_range`), or Min-SNR weights."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Gamma of `objective: min_snr`."""
    timestep_sampling: Literal["uniform", "loss_aware"] = "uniform"
    """How timesteps are drawn; `loss_aware` prefers those of large loss."""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of labels dropped in training, for classifier-free guidance; with `class_conditional` only."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Adam's learning rate after the warm-up."""
    learning_rate_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """The learning rate from the end of the warm-up to `decay_steps`; the value it has there is kept."""
    decay_steps: PositiveInt | None = None
    """Step at which the schedule of the learning rate ends; of `inverse_sqrt` null is never."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of `linear` and `cosine`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay; 0 is Adam."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5000
    """Steps in which the learning rate grows linearly from 0."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    ema_decay: Fraction | Annotated[tuple[Fraction, ...], Field(min_length=1)] = 0.9999
    """Decay of the averaged weights; of several, averaged at once, the first is sampled by default."""
    ema_ramp_up: bool = True
    """Let the decay grow from 0.1 in the first steps."""
    ema_widths: tuple[Annotated[float, Field(gt=0, le=0.2886)], ...] = ()
    """Relative widths sigma_rel of power-function averages (Karras et al. 2024), chosen after training by `--weights posthoc:0.1`."""
    ema_snapshot_every_steps: PositiveInt | None = None
    """Steps between stored snapshots of the power-function averages."""
    precision: Precision = Precision.FP32
    """Arithmetic of the network; weights, optimizer and averages are float32. `mixed` is the fastest that the device computes itself."""
    compile: bool | None = False
    """Compile the network with torch.compile; null does on GPUs, in trainings of 20,000 steps and more."""
    channels_last: bool | None = None
    """Memory layout of the network; null leaves it to the device."""
    tf32: bool = False
    """Let GPUs round the factors of float32 products to 10 bits."""
    deterministic: bool = True
    """Use GPU kernels that repeat bit for bit."""

    @model_validator(mode="after")
    def _streams_divide_the_batch(self) -> TrainingConfig:
        if self.num_streams is not None and self.batch_size % self.num_streams:
            raise ValueError(
                f"num_streams: got {self.num_streams}, which does not divide batch_size {self.batch_size}; "
                "leave it out or choose a divisor"
            )
        return self

    @model_validator(mode="after")
    def _schedule_has_a_length(self) -> TrainingConfig:
        schedule, length = self.learning_rate_schedule, self.decay_steps
        if schedule == "constant":
            if length is not None or self.final_learning_rate:
                raise ValueError(
                    "decay_steps and final_learning_rate: got a value with learning_rate_schedule constant, which reads neither; "
                    "leave them out, or choose linear or cosine"
                )
        elif length is None and schedule != "inverse_sqrt":
            raise ValueError(
                f"decay_steps: got none; learning_rate_schedule {schedule} needs the step at which it ends, such as {self.steps}"
            )
        elif length is not None and length <= self.warmup_steps:
            raise ValueError(
                f"decay_steps: got {length}, expected more than warmup_steps, {self.warmup_steps}; choose more, or warm up for less"
            )
        elif schedule == "inverse_sqrt" and self.final_learning_rate:
            raise ValueError(
                "final_learning_rate: got a value with learning_rate_schedule inverse_sqrt, which does not read it; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _averages_are_distinct(self) -> TrainingConfig:
        for field, values in (("ema_decay", self.ema_decays), ("ema_widths", self.ema_widths)):
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: got {list(values)}, in which one stands twice; leave it out")
        if bool(self.ema_widths) != (self.ema_snapshot_every_steps is not None):
            raise ValueError(
                "ema_widths and ema_snapshot_every_steps belong together: the widths of power-function averages, such as "
                "[0.05, 0.1], and how often they are stored"
            )
        return self

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays averaged at once; the first is the one sampled by default."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)


class KeepBestConfig(Section):
    """Which checkpoints are kept for their scores while training, by `evaluation.every_steps`."""

    metric: Literal["kid", "fid"] = "kid"
    """The score; lower is better."""
    n: PositiveInt = 1
    """Number of best checkpoints that are kept."""


class CheckpointConfig(Section):
    """When to save, and how many checkpoints to keep. The last step is always saved."""

    every_steps: PositiveInt | None = None
    """Save every so many steps; null does not."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    """Save every so many minutes; null does not."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints that are kept."""
    keep_best: KeepBestConfig | None = None
    """Keep the `n` checkpoints of the lowest `kid` or `fid` (`metric`), too; steps that `evaluation.every_steps` scores are saved."""
    milestones: tuple[PositiveInt, ...] = ()
    """Steps that are saved and kept for good."""

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        best = self.keep_best or KeepBestConfig()
        return Retention(self.keep, self.milestones, best.n if self.keep_best else 0, best.metric)


class LoggingConfig(Section):
    """What to record while training."""

    every_steps: PositiveInt = 50
    """Steps between two recorded losses."""
    grid_every_steps: PositiveInt | None = 5000
    """Steps between two pictures of samples; null draws none while training."""
    grid_images: PositiveInt = 64
    """Images in a picture of samples."""


class ValidationConfig(Section):
    """Losses while training, on images that are not trained on; none without `split` or `holdout`."""

    split: str | None = None
    """Split of the source that validates, such as `test`."""
    holdout: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the images that is not trained on but validates, chosen by content when they are ingested."""
    every_steps: PositiveInt | None = None
    """Steps between two validations; null is as often as costs 2 % of the training's network calls."""
    num_images: PositiveInt = 256
    """Images that validate; as many training images are measured beside them."""

    @model_validator(mode="after")
    def _one_source(self) -> ValidationConfig:
        if self.split is not None and self.holdout:
            raise ValueError(
                f"split and holdout: got {self.split!r} and {self.holdout}, expected one of them; leave the other out"
            )
        return self


class OnnxConfig(Section):
    """How images become the input of an extractor in ONNX form."""

    size: PositiveInt | None = None
    """Side in pixels that images are resized to; null is what the file says."""
    resize: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation, with antialias."""
    mean: tuple[float, ...] = Field(default=(0.485, 0.456, 0.406), min_length=1)
    """Subtracted from values in [0, 1], for each channel; by default ImageNet's."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.229, 0.224, 0.225), min_length=1)
    """What these are then divided by."""


class EvaluationConfig(Section):
    """The scores at the end of training, and of few images while training."""

    enabled: bool = True
    """Score the model and draw samples at the end of training."""
    extractor: Place = "auto"
    """`classifier`, `inception`, the path of an .onnx file, or `auto`: the classifier for small labelled gray images, else Inception."""
    onnx: OnnxConfig | None = None
    """How images become the input of a network from a file, where ImageNet's usual way is not meant (docs/metrics.md)."""
    num_images: PositiveInt = 10_000
    """Generated images that are scored."""
    metrics: tuple[Literal["fid", "kid", "is", "prdc", "bpd"], ...] = Field(default=("fid", "kid"), min_length=1)
    """Scores: FID, KID, Inception Score, precision and recall with density and coverage, bits/dim."""
    inception_weights: str | None = None
    """Path or URL of Inception's weights; null looks where docs/metrics.md says."""
    kid_subset_size: Annotated[int, Field(ge=2)] | None = None
    """Images of each of KID's subsets; null is 1000, or half of fewer images."""
    inception_score_splits: PositiveInt = 10
    """Parts over which the Inception Score is averaged; 1 is as Ho et al. take it."""
    every_steps: PositiveInt | None = None
    """Steps between two scores of few images while training, by KID, and FID where so few allow it; null scores at the end alone."""
    early_images: Annotated[int, Field(ge=3)] = 256
    """Generated images of each score while training."""

    @field_validator("extractor")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in EXTRACTORS and not value.lower().endswith(".onnx"):
            raise ValueError(f"got {value!r}, expected {', '.join(EXTRACTORS)}, or the path of an .onnx file")
        return value


class Experiment(Section):
    """Everything that decides the result of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "ddpm"
    """Name of the runs: letters, digits, `.`, `_` and `-`. Default: the file's name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random number: weights, order of the images, timesteps, noise, samples."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    sampling: SamplingConfig = SamplingConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _the_best_is_scored(self) -> Experiment:
        if self.checkpoint.keep_best is not None and self.evaluation.every_steps is None:
            raise ValueError(
                "checkpoint.keep_best: got a score to keep checkpoints by, but none is computed while training; set evaluation.every_steps"
            )
        return self

    @model_validator(mode="after")
    def _sampler_steps_fit(self) -> Experiment:
        steps, total = self.sampling.steps, self.diffusion.num_timesteps
        # the default means 50 steps, or all if there are fewer; a recorded experiment contains it, so it is not a request
        if steps is not None and steps > total and steps != SamplingConfig().steps:
            raise ValueError(
                f"sampling.steps: got {steps}, more than diffusion.num_timesteps {total}; choose at most {total}"
            )
        return self

    @model_validator(mode="after")
    def _validation_is_not_trained_on(self) -> Experiment:
        split, trained = self.validation.split, self.data.split or "train"
        if split is not None and trained in (split, "all"):
            raise ValueError(
                f"validation.split: got {split!r}, whose images are trained on (data.split {trained!r}); choose another split, or a "
                "validation.holdout"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested data that `experiment_from` reads back to an equal experiment."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """Return one level of dotted keys, as parameters of a tracked run are; a table of betas stands as its hash."""
        flat = flatten(self.to_dict())
        if self.diffusion.betas is not None:
            digest = hashlib.sha256(json.dumps(self.diffusion.betas).encode()).hexdigest()
            flat["diffusion.betas"] = f"sha256:{digest[:16]}"
        return flat

    def hash(self, fingerprint: str) -> str:
        """Return 16 hexadecimal digits that change with any setting that decides the weights, and with the images (`fingerprint`)."""
        kept = {
            key: value for key, value in self.flat().items() if not key.startswith((*FREE_TO_CHANGE, "data.source"))
        }
        if not self.validation.holdout:
            del kept["validation.holdout"]  # as if there were no such setting
        kept["dataset"] = fingerprint
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def experiment_from(content: dict[str, Any], where: str = "experiment") -> Experiment:
    """Return the checked experiment that nested plain data describes; UsageError names the first fault."""
    return validate(Experiment, content, where)


def load_experiment(path: Path, overrides: Sequence[str] = (), data: str | None = None) -> Experiment:
    """Read an experiment file and apply `key=value` overrides and a data source given on the command line.

    A file's `base` is a preset, or another file, whose settings apply where the file names none.
    """
    content = _read(path)
    plain = deepcopy(content)
    given = [parse_override(assignment) for assignment in overrides]
    _override(content, given)
    if any(key == "sampling.eta" for key, _ in given):
        _refuse_unread_eta(content)  # an eta of the file itself is kept for ddim
    if data is not None:
        set_value(content, "data.source", data)
    try:
        return experiment_from(content, path.name)
    except UsageError:
        if given:
            experiment_from(plain, path.name)  # the file's own fault is reported first
            return experiment_from(content, "-s")
        raise


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of an experiment file merged over that of its base."""
    if path in above:
        raise UsageError(f"{path}: base: is based on itself; name a preset, or another file")
    content = read_yaml_mapping(path)
    _refuse_unread_eta(content)
    base = content.pop("base", None)
    if base is None:
        take_in_betas(content, path.parent)
    else:
        beside = path.parent / str(base)
        found = beside.resolve() if beside.is_file() else presets.find("experiments", str(base))
        own = [(key, value) for key, value in flatten(content).items() if value != {}]
        content = _read(found, (*above, path)) | {"name": normalise_name(path.stem)}
        _override(content, own, path.parent)
    content.setdefault("name", normalise_name(path.stem))
    return content


def differences(old: Experiment, new: Experiment) -> list[str]:
    """Return "field: old -> new" for every setting that differs and decides the weights."""
    before, after = old.flat(), new.flat()
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed if not key.startswith(FREE_TO_CHANGE)]


def with_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return the experiment with `key=value` overrides applied."""
    content = experiment.to_dict()
    _override(content, [parse_override(assignment) for assignment in overrides])
    return experiment_from(content, "-s")


def _override(content: dict[str, Any], settings: Sequence[tuple[str, Any]], folder: Path | None = None) -> None:
    """Apply settings by their dotted keys.

    A table of betas and a schedule replace each other, and so do networks of different types. A path is relative to `folder`, by default
    the current one.
    """
    keys, own_sampler = {key for key, _ in settings}, _sampler(content)
    _replace_network(content, settings)
    for key, value in settings:
        set_value(content, key, value)
    if "sampling.sampler" in keys and not keys & {"sampling", "sampling.steps"} and _sampler(content) != own_sampler:
        content["sampling"].pop("steps", None)  # they were meant for the former sampler
    diffusion = content.get("diffusion")
    if not isinstance(diffusion, dict):
        return
    if "diffusion.betas_file" in keys:
        diffusion["betas"] = None  # replaced by the numbers of the file
        for key in {"schedule", "num_timesteps"} - {key.removeprefix("diffusion.") for key in keys}:
            diffusion.pop(key, None)
        take_in_betas(content, folder or Path.cwd())
    elif "diffusion.betas" in keys:
        diffusion["betas_file"] = None
    elif "diffusion.schedule" in keys and diffusion.get("betas") is not None:
        diffusion.update(betas=None, betas_file=None)


def read_by(kind: str) -> dict[str, set[str]]:
    """Return the settings that a type of network reads, for each section of which it does not read all."""
    read = {"model": settings_of(kind)}
    if kind == "vae":
        read |= {"diffusion": set(), "validation": set(), "sampling": {"batch_size"}}
        read["training"] = set(TrainingConfig.model_fields) - OF_PROCESS
    return read


def _replace_network(content: dict[str, Any], settings: Sequence[tuple[str, Any]]) -> None:
    """If the settings name another type of network, remove what only the former type, or its diffusion process, reads."""
    model, given, usual = content.get("model"), dict(settings), ModelConfig().type
    before = model.get("type", usual) if isinstance(model, dict) else usual
    whole = given.get("model")
    kind = given.get("model.type", whole.get("type", usual) if isinstance(whole, dict) else before)
    if kind == before or not isinstance(kind, str):
        return
    for name, read in read_by(kind).items():
        if isinstance(section := content.get(name), dict):
            content[name] = {key: value for key, value in section.items() if key in read}


def _sampler(content: dict[str, Any]) -> Any:
    """Return the sampler that unchecked settings name, or the default."""
    sampling = content.get("sampling")
    usual = SamplingConfig().sampler
    return sampling.get("sampler", usual) if isinstance(sampling, dict) else usual


def _refuse_unread_eta(content: dict[str, Any]) -> None:
    """Refuse an eta that is given together with a sampler that has none (UsageError)."""
    sampling = content.get("sampling")
    if isinstance(sampling, dict) and sampling.get("eta") and _sampler(content) != "ddim":
        raise UsageError(
            f"sampling.eta: got {sampling['eta']}, which is ddim's; the sampler is {sampling['sampler']!r}: leave eta out, or "
            "use sampler ddim"
        )
