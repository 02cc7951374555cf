"""Contestants measured in turns: a machine that gets busier slows all of them, and ratios of one round stay fair."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

Measure = Callable[[], float]  # one round of one contestant: images/s, steps/s or seconds
Round = dict[str, float]


@dataclass(frozen=True)
class Case:
    """Contestants that are measured in turns, and the figures that follow from each round.

    `prepare` builds the contestants; what must be closed after the last round goes onto the stack. `figures` maps the keys of
    results.json to functions of one round's measures.
    """

    title: str
    unit: str
    prepare: Callable[[ExitStack], dict[str, Measure]]
    figures: dict[str, Callable[[Round], float]]
    rounds: int
    quick_rounds: int = 1  # 0: left out of `make bench-quick`


def ratio(ours: str, peer: str) -> Callable[[Round], float]:
    return lambda measured: measured[ours] / measured[peer]


def rate(work: Callable[[], None], count: int) -> Measure:
    """A measure in `count` per second."""

    def measure() -> float:
        begin = time.perf_counter()
        work()
        return count / (time.perf_counter() - begin)

    return measure


def run(case: Case, quick: bool) -> dict[str, Any]:
    """Run all rounds of a case; return what results.json holds of it."""
    measured: list[Round] = []
    num_rounds = case.quick_rounds if quick else case.rounds
    with ExitStack() as stack:
        contestants = case.prepare(stack)
        for number in range(num_rounds):
            names = list(contestants)
            order = names[number % len(names) :] + names[: number % len(names)]  # nobody always goes first
            values = {name: contestants[name]() for name in order}
            measured.append({name: values[name] for name in names})
            values_of_round = "  ".join(f"{name} {value:.3g}" for name, value in measured[-1].items())
            print(
                f"{case.title} [{case.unit}], round {number + 1} of {num_rounds}: {values_of_round}",
                file=sys.stderr,
                flush=True,
            )
    return {
        "unit": case.unit,
        "measured": {name: summary([each[name] for each in measured]) for name in contestants},
        "figures": {key: summary([figure(each) for each in measured]) for key, figure in case.figures.items()},
    }


def summary(values: list[float]) -> dict[str, Any]:
    """The median, and the spread as [least, most]: None after a single round."""
    spread = [round(min(values), 4), round(max(values), 4)] if len(values) > 1 else None
    return {"median": round(statistics.median(values), 4), "spread": spread}
