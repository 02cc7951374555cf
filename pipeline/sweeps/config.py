"""The sweep: which settings of an experiment are varied, how far each trial goes, and what they are ranked by.

base: digits                                  a preset, or an experiment file
space:
  diffusion.schedule: [linear, cosine]        a list is a grid
  training.learning_rate: {log: [1e-4, 1e-2]}
metric: fid
budget: {steps: 400}
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config import presets
from pipeline.config.experiment import Experiment, experiment_from, load_experiment
from pipeline.config.yaml_files import (
    Section,
    is_text,
    parse_override,
    parse_setting,
    parse_yaml,
    read_yaml_mapping,
    set_value,
    validate,
)
from pipeline.errors import UsageError, nearest
from pipeline.storage.next_command import typeable
from pipeline.storage.runs import normalise_name

DEFAULT_SWEEP = "sweep-schedules"
NOT_COMPARABLE = (
    "the training loss is not comparable across schedules, T or parameterisations: each weighs other noise levels, so that the lowest loss "
    "says nothing of the images; rank by kid or fid (equal images, sampler and network calls) or by bpd"
)
VARIED_DATA = ("data.horizontal_flip", "data.shuffle_window")  # how the images are read, not which they are

PositiveInt = Annotated[int, Field(ge=1)]
Number = int | float


class Axis(Section):
    """The values of one setting: a list of them, or a range. `when` keeps it to points where other settings have given values."""

    grid: tuple[Any, ...] | None = Field(default=None, min_length=1)
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    uniform: tuple[Number, Number] | None = None
    log: tuple[Number, Number] | None = None
    integer: tuple[int, int] | None = None
    step: PositiveInt = 1
    when: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        kinds = ("grid", "choice", "uniform", "log", "integer")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"got {' and '.join(given) or 'none'} of {', '.join(kinds)}; give one of them")
        if self.step != 1 and self.integer is None:
            raise ValueError("'step' belongs to 'integer'")
        if self.values is not None:
            _require_plain(given[0], self.values)
        else:
            low, high = self.bounds
            if not low < high or (self.log is not None and low <= 0):
                raise ValueError(f"{given[0]}: got [{low}, {high}]; expected [low, high], of a log scale above 0")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The listed values; None of a range."""
        return self.grid if self.grid is not None else self.choice

    @property
    def bounds(self) -> tuple[Number, Number]:
        """Low and high end of a range; for integers the last one that a step reaches."""
        if self.integer is not None:
            low, high = self.integer
            return low, low + (high - low) // self.step * self.step
        bounds = self.uniform or self.log
        assert bounds is not None
        return bounds

    def at(self, u: float) -> Number:
        """Return the value of a range at u in [0, 1), for random search."""
        low, high = self.bounds
        if self.integer is not None:
            return int(low) + int(u * ((high - low) // self.step + 1)) * self.step
        return self.rounded(low * (high / low) ** u if self.log is not None else low + u * (high - low))

    def rounded(self, value: float) -> float:
        """Return a value of a range rounded to four digits, still inside the range."""
        low, high = self.bounds
        return min(max(float(f"{value:.4g}"), float(low)), float(high))


def _require_plain(kind: str, values: Sequence[Any]) -> None:
    """Refuse what a setting cannot be, such as a date (ValueError): points are compared, and recorded, as JSON."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(
            f"{kind}: got {list(values)}; expected numbers, words, true, false, null or lists of them"
        ) from None


class Budget(Section):
    """What each trial may spend: one of the three, the same for all trials, so that only the settings make the difference."""

    steps: PositiveInt | None = None
    images: PositiveInt | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {' and '.join(given) or 'nothing'}; give steps, images or minutes")
        return self

    def to_text(self) -> str:
        if self.minutes is not None:
            return f"{self.minutes:g} minutes of training"
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.images:,} images"


class EarlyStopping(Section):
    """ASHA (Li et al. 2020): at each rung a trial continues if its KID is among the best 1/reduction_factor seen there.

    Rung k of `rungs` stands at reduction_factor^-k of the budget, the lowest first.
    """

    rungs: Annotated[int, Field(ge=1, le=5)] = 2
    reduction_factor: Annotated[int, Field(ge=2, le=10)] = 3
    num_images: Annotated[int, Field(ge=32)] = 256

    @property
    def shares(self) -> tuple[float, ...]:
        """Where the rungs stand, as shares of the budget, ascending."""
        return tuple(float(self.reduction_factor**-k) for k in range(self.rungs, 0, -1))


class Sweep(Section):
    """Everything that decides what a sweep does and finds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "sweep"
    base: str = "digits"
    overrides: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Axis] = Field(min_length=1)
    search: Literal["grid", "random", "tpe"] = "grid"
    num_points: PositiveInt | None = None
    budget: Budget
    metric: Literal["kid", "fid", "bpd"] = "fid"
    seeds: PositiveInt = 1
    more_network_calls: tuple[PositiveInt, ...] = ()
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        ranges = [key for key, axis in self.space.items() if axis.values is None]
        if self.search == "grid" and ranges:
            raise ValueError(f"search grid needs listed values, but {ranges[0]} is a range; use search random or tpe")
        if self.search == "grid" and self.num_points is not None:
            raise ValueError("num_points belongs to search random and tpe; a grid has the points that it has")
        if self.search != "grid" and self.num_points is None:
            raise ValueError(f"search {self.search} needs num_points: how many points to try")
        for key, axis in self.space.items():
            if key == "seed" or key.startswith(
                ("training.steps", "logging.", "checkpoint.", "evaluation.", "validation.", "name")
            ):
                remedy = "use 'seeds'" if key == "seed" else "it is the same for all trials; set it under 'overrides'"
                raise ValueError(f"space.{key}: cannot be varied; {remedy}")
            if key.startswith("data.") and key not in VARIED_DATA:
                raise ValueError(
                    f"space.{key}: cannot be varied: all trials train on the base's images and are judged by them; run a sweep for each "
                    f"dataset (set it with -s {key}=...), or vary {' or '.join(VARIED_DATA)}"
                )
            unknown = [other for other in axis.when if other not in self.space]
            if unknown:
                raise ValueError(f"space.{key}.when: {unknown[0]!r} is not in the space")
        by_dependency(self.space)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested data that `sweep_from` reads back."""
        return self.model_dump(mode="json", exclude_defaults=True)


def by_dependency(space: Mapping[str, Axis]) -> list[str]:
    """Return the settings, each after those that its condition names; ValueError if conditions form a circle."""
    try:
        return list(TopologicalSorter({key: list(axis.when) for key, axis in space.items()}).static_order())
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"space: the conditions go round in a circle: {circle}; drop one 'when'") from None


def sweep_from(content: dict[str, Any], where: str = "sweep") -> Sweep:
    """Return the checked sweep that plain data describes; UsageError names the first fault."""
    content = dict(content)
    if content.get("metric") in ("loss", "training_loss", "train_loss", "mse"):
        raise UsageError(f"{where}: metric: {NOT_COMPARABLE}")
    space = content.get("space")
    if isinstance(space, dict):
        content["space"] = {key: {"grid": axis} if isinstance(axis, list) else axis for key, axis in space.items()}
    return validate(Sweep, content, where)


def load_sweep(
    reference: str | None, over: Sequence[str], options: dict[str, Any], overrides: Sequence[str] = ()
) -> Sweep:
    """Read a sweep file (default: the shipped one); the command line's values replace the file's.

    `over` are axes such as "diffusion.schedule=linear,cosine": without a file, they are the whole space. `options` replace the file's keys,
    unless they are None.
    """
    path = presets.find("sweeps", reference or DEFAULT_SWEEP)
    content = read_yaml_mapping(path)
    if "space" not in content:
        raise UsageError(
            f"{path.name}: has no 'space', so it is no sweep; train it with: {typeable(f'train {shlex.quote(str(path))}')}"
        )
    content.setdefault("name", normalise_name(path.stem))
    if over and reference is None:
        content |= {"name": "sweep", "space": {}}
    for key in ("space", "overrides"):  # an empty one reads as null
        content[key] = _mapping(content.get(key), f"{path.name}: {key}")
    if reference is None and options.get("base") not in (None, content["base"]):
        # what suits the shipped sweep's base need not suit another one
        content = {key: value for key, value in content.items() if key != "more_network_calls"} | {"overrides": {}}
    for assignment in over:
        key, axis = axis_of(assignment)
        content["space"][key] = axis
    content |= {key: value for key, value in options.items() if value is not None}
    for assignment in overrides:
        key, value = parse_override(assignment)
        content["overrides"][key] = value
    return sweep_from(content, "sweep" if over and reference is None else path.name)


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if content is not None and not isinstance(content, dict):
        raise UsageError(
            f"{where}: got {type(content).__name__}; expected settings, each 'key: value' on a line of its own"
        )
    return dict(content or {})


def axis_of(assignment: str) -> tuple[str, dict[str, Any]]:
    """Return the setting and its axis, from "key=a,b,c" or from "key={log: [1e-4, 1e-2]}" as in a file; UsageError for other text."""
    key, equals, text = assignment.partition("=")
    if is_text(key.strip()) and text.strip()[:1] != "{":
        values: Any = [parse_setting(key.strip(), part, f"--over {key}") for part in text.split(",") if part.strip()]
    else:
        values = parse_yaml(f"[{text}]", f"--over {key}", key.strip()) if equals else None
    if not key.strip() or not values:
        raise UsageError(
            f"--over {assignment!r}: expected key=a,b,c, such as diffusion.schedule=linear,cosine, or a range, such as "
            "'training.learning_rate={log: [1e-4, 1e-2]}'"
        )
    return key.strip(), values[0] if len(values) == 1 and isinstance(values[0], dict) else {"grid": values}


def plain_base(sweep: Sweep) -> Experiment:
    """Return the base as its file has it; UsageError where a key of the space or of the overrides is unknown to it."""
    base = load_experiment(presets.find("experiments", sweep.base))
    known = [key for key in base.flat() if not key.startswith("model.arguments")]
    for key in [*sweep.space, *sweep.overrides]:
        if key not in known and not key.startswith("model.arguments."):
            raise UsageError(f"{key}: an experiment has no such setting{nearest(key, known)}")
    return base


def base_experiment(sweep: Sweep) -> Experiment:
    """Return the experiment that the trials vary; UsageError where a key of the space or of the overrides is unknown."""
    return with_settings(plain_base(sweep), sweep.overrides, "overrides")


def with_settings(experiment: Experiment, settings: dict[str, Any], where: str) -> Experiment:
    """Return the experiment with settings by dotted names replaced; UsageError where they do not fit."""
    content = experiment.to_dict()
    for key, value in settings.items():
        set_value(content, key, value)
    return experiment_from(content, where)


def trial_experiment(sweep: Sweep, base: Experiment, point: dict[str, Any], seed: int) -> Experiment:
    """Return the experiment of one trial: the base with the point's settings, the budget, and the seed of its repetition."""
    budget, batch = sweep.budget, base.training.batch_size
    if budget.steps is not None:
        steps = budget.steps
    elif budget.images is not None:
        batch = with_settings(base, point, "point").training.batch_size
        steps = math.ceil(budget.images / batch)
    else:
        steps = 10**9  # the clock ends it
    # FID and KID are of the same images; bits/dim are of none, which spares generating them
    metrics = ["bpd"] if sweep.metric == "bpd" else ["fid", "kid"]
    settings = {
        **point,
        "seed": base.seed + seed,
        "training.steps": steps,
        "evaluation.metrics": metrics,
        "evaluation.enabled": True,
    }
    return with_settings(base, settings, "point")
