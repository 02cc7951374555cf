"""What a sweep tries next: repetitions of listed points, or points that TPE draws from the values so far. No Ray.

trials = Trials(sweep, points)
while (trial := trials.next()) is not None:         # None while trials run: a later call may return one
    trials.ended(trial, status, value, rungs)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.sweeps.config import Axis, Sweep
from pipeline.sweeps.ledger import LedgerEntry, Status
from pipeline.sweeps.points import MAX_DRAWS, Point, active, canonical
from pipeline.training.randomness import seed_of

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


class TPE:
    """The tree-structured Parzen estimator of Optuna (Bergstra et al. 2011), a function of the seed and of the values that it is given.

    `refuses` says whether a point cannot be trained, and is asked once for each; such points count as failures, and another is drawn. A
    point that was stopped early counts as pruned: worse than any finished one, and ranked among its like by its KID at its latest rung.
    """

    def __init__(self, space: dict[str, Axis], num_points: int, seed: int, refuses: Callable[[Point], bool]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed_of("tpe", seed) % 2**32, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler)
        self._space, self._num_points, self._refuses = space, num_points, refuses
        self._trials: dict[str, Any] = {}  # Optuna's, of the points that were drawn here or by an earlier driver
        self._refused: set[str] = set()
        self._in_vain = False  # nothing new was drawn since the last `tell`

    def draw(self) -> Point | None:
        """Return a new point that can be trained; None after `num_points`, or if `MAX_DRAWS` in a row are not new, until `tell`."""
        from optuna.trial import TrialState

        if len(self._trials) >= self._num_points or self._in_vain:
            return None
        for _ in range(MAX_DRAWS):
            trial = self._study.ask()
            point = active(self._space, {key: _suggest(trial, key, axis) for key, axis in self._space.items()})
            word = canonical(point)
            if word not in self._trials and word not in self._refused:
                if not self._refuses(point):
                    self._trials[word] = trial
                    return point
                self._refused.add(word)
            self._study.tell(trial, state=TrialState.FAIL)
        self._in_vain = True
        return None

    def take(self, point: Point) -> None:
        """Count a point of an earlier driver as drawn, whether its value is known yet or not."""
        word = canonical(point)
        if word not in self._trials:
            listed = {key: self._space[key].values is not None for key in point}
            self._study.enqueue_trial({key: _category(v) if listed[key] else v for key, v in point.items()})
            trial = self._trials[word] = self._study.ask()
            for key in point:
                _suggest(trial, key, self._space[key])

    def tell(self, point: Point, value: float | None, stopped: Rungs | None) -> None:
        """Take the mean over the seeds of a point, None if it has none; `stopped`: the rungs of a point that was stopped early."""
        from optuna.trial import TrialState

        self._in_vain = False
        trial = self._trials[canonical(point)]
        for share, kid in (stopped or {}).items():
            trial.report(kid, round(share * 1e6))  # Optuna counts whole steps: millionths of the budget
        ended = TrialState.FAIL if stopped is None else TrialState.PRUNED
        self._study.tell(trial, value, state=ended if value is None else TrialState.COMPLETE)


def _suggest(trial: Any, key: str, axis: Axis) -> Any:
    if axis.values is not None:
        return json.loads(trial.suggest_categorical(key, [_category(value) for value in axis.values]))
    low, high = axis.bounds
    if axis.integer is not None:
        return trial.suggest_int(key, int(low), int(high), step=axis.step)
    return axis.rounded(trial.suggest_float(key, float(low), float(high), log=axis.log is not None))


def _category(value: Any) -> str:
    return json.dumps(value)


class Trials:
    """The trials of a sweep in the order in which they are run: those of listed points, or of points that `tpe` draws.

    All points get their first seed before any gets its second, so that a sweep that is stopped halfway still compares all of them. With
    early stopping, only the first seed competes: the other seeds are spent on points that survive.
    """

    def __init__(self, sweep: Sweep, points: Iterable[Point] = (), tpe: TPE | None = None) -> None:
        self._sweep, self._tpe = sweep, tpe
        self._points = {canonical(point): Progress(point) for point in points}

    def known(self, entries: Iterable[LedgerEntry], begun: Iterable[Point] = ()) -> None:
        """Take an earlier driver's entries, and points it had begun, before the first `next`. Only a search that draws points needs it.

        Trials that failed or were only begun are run before more points are drawn.
        """
        entries = list(entries)
        for point in (*begun, *(entry.point for entry in entries)):
            if self._tpe is not None:
                self._tpe.take(point)
            self._points.setdefault(canonical(point), Progress(point))
        newest = {(canonical(entry.point), entry.seed): entry for entry in entries if entry.status != "failed"}
        for entry in newest.values():
            self.ended(Next(entry.point, entry.seed), entry.status, entry.value, entry.rungs)

    def next(self) -> Next | None:
        """Return the next trial; None if there is none, or none before one that runs has ended."""
        following = self._following()
        if following is not None:
            self._points[canonical(following.point)].running.add(following.seed)
        return following

    def has_next(self) -> bool:
        """Whether there is a trial to run now, which the next `next` returns."""
        return self._following() is not None

    def _following(self) -> Next | None:
        pending = self._pending()  # before a point is drawn: values of whole points teach more than many begun ones
        if pending is None and self._tpe is not None and (point := self._tpe.draw()) is not None:
            self._points[canonical(point)] = Progress(point)
            pending = self._pending()
        return pending

    def _pending(self) -> Next | None:
        for seed in range(self._sweep.seeds):
            for progress in self._points.values():
                if seed not in progress.values and seed not in progress.running and self._may_run(progress, seed):
                    return Next(progress.point, seed)
        return None

    def _may_run(self, progress: Progress, seed: int) -> bool:
        if seed == 0 or self._sweep.early_stopping is None:
            return True
        return progress.stopped is None and progress.values.get(0) is not None

    def ended(self, trial: Next, status: Status, value: float | None, rungs: Rungs) -> None:
        """Note how a trial ended; TPE gets the mean of a point after its last trial."""
        progress = self._points[canonical(trial.point)]
        progress.running.discard(trial.seed)
        progress.values[trial.seed] = value
        if status == "stopped":
            progress.stopped = dict(rungs)
        left = [seed for seed in range(self._sweep.seeds) if seed not in progress.values]
        if self._tpe is None or any(self._may_run(progress, seed) for seed in left):
            return
        values = [value for value in progress.values.values() if value is not None]
        self._tpe.tell(progress.point, statistics.fmean(values) if values else None, progress.stopped)
