"""What a sweep tries next: repetitions of listed points, or points that TPE draws from the values so far. No Ray.

trials = Trials(sweep, points)
while (trial := trials.next()) is not DONE:         # None: wait for one that runs
    trials.ended(trial, status, value, rungs)
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from pipeline.sweeps.config import Axis, Sweep
from pipeline.sweeps.ledger import LedgerEntry, Status
from pipeline.sweeps.points import MAX_DRAWS, Point, active, canonical
from pipeline.training.randomness import seed_of


class _Done: ...


DONE: Final = _Done()


Rungs = Mapping[float, float]
"""KID of few images, by the share of the budget at which it was taken."""


@dataclass(frozen=True)
class Next:
    """One trial to run: a point, and the number of its repetition."""

    point: Point
    seed: int


@dataclass
class Progress:
    """The state of a point: values by seed (None if it gave none), seeds that run, and its rungs if it was stopped early."""

    point: Point
    values: dict[int, float | None] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    stopped: Rungs | None = None


class PointSource(Protocol):
    """Where points come from; `learns`: whether values decide which points come next."""

    learns: bool

    def draw(self) -> Point | None:
        """Return a new point, or None if there are no more."""

    def take(self, point: Point) -> None:
        """Note a point that an earlier driver tried; it is not drawn again."""

    def tell(self, point: Point, value: float | None, stopped: Rungs | None) -> None:
        """Take the mean over the seeds of a point, None if it has none; `stopped`: the rungs of a point that was stopped early."""


class Listed:
    learns = False

    def __init__(self, points: list[Point]) -> None:
        self._points = list(points)

    def draw(self) -> Point | None:
        return self._points.pop(0) if self._points else None

    def take(self, point: Point) -> None:
        """Do nothing: the ledger holds what is done."""

    def tell(self, point: Point, value: float | None, stopped: Rungs | None) -> None:
        """Do nothing: listed points do not depend on values."""


class TPE:
    """The tree-structured Parzen estimator of Optuna (Bergstra et al. 2011), a function of the seed and of the values that it is given.

    `refuses` says whether a point cannot be trained, and is asked once for each; such points count as failures, and another is drawn. A
    point that was stopped early counts as pruned: worse than any finished one, and ranked among its like by its KID at its latest rung.
    """

    learns = True

    def __init__(self, space: dict[str, Axis], num_points: int, seed: int, refuses: Callable[[Point], bool]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed_of("tpe", seed) % 2**32, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler)
        self._space, self._num_points, self._refuses = space, num_points, refuses
        self._given: set[str] = set()  # here, or under an earlier driver
        self._refused: set[str] = set()
        self._asked: dict[str, Any] = {}
        self._known: dict[str, tuple[float | None, Rungs | None]] = {}
        self._in_vain = False  # nothing new was drawn since the last `tell`

    def draw(self) -> Point | None:
        """Return a new point that can be trained; None after `num_points`, or if `MAX_DRAWS` in a row are not new, until `tell`."""
        import optuna

        if len(self._given) >= self._num_points or self._in_vain:
            return None
        for _ in range(MAX_DRAWS):
            trial = self._study.ask()
            point = active(self._space, {key: _suggest(trial, key, axis) for key, axis in self._space.items()})
            word = canonical(point)
            if word in self._known:
                self._answer(trial, *self._known[word])
            elif word in self._given or self._is_refused(word, point):
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                self._asked[word] = trial
                self._given.add(word)
                return point
        self._in_vain = True
        return None

    def take(self, point: Point) -> None:
        """Count a point of an earlier driver as drawn, whether its value is known yet or not."""
        self._given.add(canonical(point))

    def tell(self, point: Point, value: float | None, stopped: Rungs | None) -> None:
        """Take the value of a point, drawn here or by an earlier driver; possibly again, if its first repetition failed."""
        import optuna

        self._in_vain = False
        word = canonical(point)
        self._known[word] = (value, stopped)
        if (trial := self._asked.pop(word, None)) is not None:
            self._answer(trial, value, stopped)
            return
        if value is None and stopped is None:
            return
        self._study.add_trial(
            optuna.trial.create_trial(
                state=_state(value, stopped),
                params={key: _category(v) if self._space[key].values is not None else v for key, v in point.items()},
                distributions={key: _distribution(self._space[key]) for key in point},
                value=value,
                intermediate_values=_by_step(stopped),
            )
        )

    def _is_refused(self, word: str, point: Point) -> bool:
        if word not in self._refused and self._refuses(point):
            self._refused.add(word)
        return word in self._refused

    def _answer(self, trial: Any, value: float | None, stopped: Rungs | None) -> None:
        for step, kid in _by_step(stopped).items():
            trial.report(kid, step)
        self._study.tell(trial, value, state=_state(value, stopped))


def _state(value: float | None, stopped: Rungs | None) -> Any:
    from optuna.trial import TrialState

    if value is not None:
        return TrialState.COMPLETE
    return TrialState.FAIL if stopped is None else TrialState.PRUNED


def _by_step(stopped: Rungs | None) -> dict[int, float]:
    """Return a stopped point's KID by millionths of the budget, since Optuna counts whole steps."""
    return {round(share * 1e6): kid for share, kid in (stopped or {}).items()}


def _suggest(trial: Any, key: str, axis: Axis) -> Any:
    if axis.values is not None:
        return json.loads(trial.suggest_categorical(key, [_category(value) for value in axis.values]))
    low, high = axis.bounds
    if axis.integer is not None:
        return trial.suggest_int(key, int(low), int(high), step=axis.step)
    return axis.rounded(trial.suggest_float(key, float(low), float(high), log=axis.log is not None))


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values is not None:
        return CategoricalDistribution([_category(value) for value in axis.values])
    low, high = axis.bounds
    if axis.integer is not None:
        return IntDistribution(int(low), int(high), step=axis.step)
    return FloatDistribution(float(low), float(high), log=axis.log is not None)


def _category(value: Any) -> str:
    return json.dumps(value)


class Trials:
    """The trials of a sweep in the order in which they are run.

    All points get their first seed before any gets its second, so that a sweep that is stopped halfway still compares all of them. With
    early stopping, only the first seed competes: the other seeds are spent on points that survive.
    """

    def __init__(self, sweep: Sweep, source: PointSource) -> None:
        self._sweep, self._source = sweep, source
        self._points: dict[str, Progress] = {}

    def known(self, entries: Iterable[LedgerEntry], begun: Iterable[Point] = ()) -> None:
        """Take an earlier driver's entries, and points it had begun, before the first `next`. Only a search that draws points needs it.

        Trials that failed or were only begun are run before more points are drawn.
        """
        for point in begun:
            self._take(point)
        for entry in entries:
            progress = self._take(entry.point)
            if entry.status != "failed":
                self._note(progress, entry.seed, entry.status, entry.value, entry.rungs)
        for progress in self._points.values():
            self._tell_if_complete(progress)

    def _take(self, point: Point) -> Progress:
        self._source.take(point)
        return self._points.setdefault(canonical(point), Progress(point))

    def next(self) -> Next | _Done | None:
        """Return the next trial, None to wait for one that runs, or DONE."""
        following = self._following()
        if following is not None:
            self._points[canonical(following.point)].running.add(following.seed)
            return following
        return None if any(progress.running for progress in self._points.values()) else DONE

    def has_next(self) -> bool:
        """Whether there is a trial to run now, which the next `next` returns."""
        return self._following() is not None

    def _following(self) -> Next | None:
        if self._source.learns and (pending := self._pending()) is not None:
            return pending  # values of whole points teach more than many begun ones
        point = self._source.draw()
        if point is not None:
            self._points.setdefault(canonical(point), Progress(point))
        return self._pending()

    def _pending(self) -> Next | None:
        for seed in range(self._sweep.seeds):
            for progress in self._points.values():
                if seed in progress.values or seed in progress.running or not self._may_repeat(progress, seed):
                    continue
                return Next(progress.point, seed)
        return None

    def ended(self, trial: Next, status: Status, value: float | None, rungs: Rungs) -> None:
        """Note how a trial ended."""
        progress = self._points[canonical(trial.point)]
        progress.running.discard(trial.seed)
        self._note(progress, trial.seed, status, value, rungs)
        self._tell_if_complete(progress)

    def _note(self, progress: Progress, seed: int, status: Status, value: float | None, rungs: Rungs) -> None:
        progress.values[seed] = value if value is not None and math.isfinite(value) else None
        if status == "stopped":
            progress.stopped = dict(rungs)

    def _may_repeat(self, progress: Progress, seed: int) -> bool:
        if seed == 0 or self._sweep.early_stopping is None:
            return True
        return progress.stopped is None and progress.values.get(0) is not None

    def _tell_if_complete(self, progress: Progress) -> None:
        wanted = self._sweep.seeds
        if progress.stopped is None and len(progress.values) < wanted and progress.values.get(0, math.nan) is not None:
            return
        values = [value for value in progress.values.values() if value is not None]
        self._source.tell(progress.point, statistics.fmean(values) if values else None, progress.stopped)
