"""The points of a sweep: listed or drawn, each checked before anything is spent; their titles and their keys in the ledger."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.experiment import Experiment
from pipeline.errors import PipelineError
from pipeline.sweeps.config import Axis, Sweep, by_dependency, trial_experiment, with_settings
from pipeline.training.randomness import seed_of

Point = dict[str, Any]
SHORT = {"diffusion.schedule": "", "diffusion.num_timesteps": "T", "training.learning_rate": "learning rate"}
MAX_DRAWS = 100  # of points that are new and not refused, for each one that is wanted


@dataclass(frozen=True)
class Refused:
    point: Point
    reason: str


class Checker:
    """Checks points before anything is spent: those that it keeps, those that it refuses, and warnings about some, by title.

    `test` takes the experiment of a point and returns warnings; a PipelineError refuses the point.
    """

    def __init__(self, sweep: Sweep, base: Experiment, test: Callable[[Experiment], Sequence[str]]) -> None:
        self.points: list[Point] = []
        self.refused: list[Refused] = []
        self.warnings: dict[str, str] = {}
        self._sweep, self._base, self._test = sweep, base, test
        self._seen: set[str] = set()

    def refuses(self, point: Point) -> bool:
        """Whether a point cannot be trained, or makes the same experiment as one that was kept."""
        try:
            experiment = trial_experiment(self._sweep, self._base, point, 0)
            same = canonical(experiment.to_dict())
            if same in self._seen:
                return True
            self._seen.add(same)
            warnings = self._test(experiment)
        except PipelineError as error:
            self.refused.append(Refused(point, str(error).removeprefix("point: ")))
            return True
        self.points.append(point)
        if warnings:
            self.warnings[title(point)] = "; ".join(warnings)
        return False


def active(space: dict[str, Axis], values: Point) -> Point:
    """Return the settings whose conditions hold. A setting that is left out keeps the base's value and fulfils no condition."""
    kept: Point = {}
    for key in by_dependency(space):
        wanted = {k: v if isinstance(v, list) else [v] for k, v in space[key].when.items()}
        if all(other in kept and kept[other] in allowed for other, allowed in wanted.items()):
            kept[key] = values[key]
    return {key: kept[key] for key in space if key in kept}


def grid(space: dict[str, Axis]) -> Iterator[Point]:
    """Yield every combination of listed values once, the last setting varying fastest."""
    axes = [axis.values or () for axis in space.values()]
    seen = set()
    for values in itertools.product(*axes):
        point = active(space, dict(zip(space, values, strict=True)))
        if (word := canonical(point)) not in seen:
            seen.add(word)
            yield point


def drawn(space: dict[str, Axis], seed: int) -> Iterator[Point]:
    """Yield points drawn independently, a function of the seed; the same point may come again.

    Each setting of each point has its own random number, so an extended sweep draws the same points again: with a further setting, the
    values of the others stay; with one more value, only the points that get it change.
    """
    for index in itertools.count():
        yield active(space, {key: _drawn_value(key, axis, seed, index) for key, axis in space.items()})


def _drawn_value(key: str, axis: Axis, seed: int, index: int) -> Any:
    if axis.values is None:
        return axis.at((seed_of(f"sweep {key}", seed, index) >> 10) / 2**53)
    # each value draws a number, and the highest wins: a value that is added later changes only the points where its number is the highest
    return max(axis.values, key=lambda value: seed_of(f"sweep {key} {json.dumps(value)}", seed, index))


def check_all(sweep: Sweep, base: Experiment, checker: Checker) -> None:
    """Check every point of a grid; those that random search draws until there are as many as it wants."""
    wanted = sweep.num_points
    source = (
        grid(sweep.space) if wanted is None else itertools.islice(drawn(sweep.space, base.seed), wanted * MAX_DRAWS)
    )
    seen = set()
    for point in source:
        if wanted is not None and len(checker.points) == wanted:
            break
        if (word := canonical(point)) not in seen:
            seen.add(word)
            checker.refuses(point)


def completed(sweep: Sweep, base: Experiment, point: Point) -> Point:
    """Return a point with all settings of the space that apply to it, as an experiment has them: equal settings make equal points.

    If the space got a further setting later, the point has the base's value of it.
    """
    content = with_settings(base, point, "point").to_dict()
    values = {key: content_at(content, key) for key in sweep.space}
    found = active(sweep.space, values)
    return {key: value for key, value in found.items() if value is not None or key in point}


def content_at(content: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key in nested data; None if there is none."""
    node: Any = content
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def canonical(point: Point) -> str:
    """Return text that is equal for equal points."""
    return json.dumps(point, sort_keys=True)


def title(point: Point) -> str:
    """Return a point in words: "cosine, T = 250, learning rate = 0.001"."""
    words = []
    for key, value in point.items():
        name = SHORT.get(key, key.rpartition(".")[2].replace("_", " "))
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f"{name} = {shown}" if name else shown)
    return ", ".join(words) or "the base"


def key_of(sweep: Sweep, experiment: Experiment, fingerprint: str, judged_by: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that are equal for trials with equal results.

    They stand for the settings that decide the weights, the budget, the images, and the identity of the metric. `judged_by` names the
    extractor and the reference.
    """
    evaluation = experiment.evaluation.model_dump(mode="json", exclude={"metrics", "enabled"})
    parts = {
        "experiment": experiment.hash(fingerprint),
        "budget": sweep.budget.model_dump(),
        "metric": sweep.metric,
        "sampling": experiment.sampling.model_dump(mode="json"),
        "evaluation": evaluation,
        "judged_by": dict(judged_by),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
