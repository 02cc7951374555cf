"""Asynchronous successive halving (ASHA: Li et al. 2020, arXiv:1810.05934): which trials are worth their whole budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Halving:
    """What was seen at each rung, of which lower is better. A trial's place at a rung is judged once, by those before it."""

    def __init__(self, reduction_factor: int) -> None:
        self._keep = 1 / reduction_factor
        self._seen: dict[float, dict[str, float]] = {}

    def take(self, rungs: Mapping[float, float], key: str) -> None:
        """Take up what a trial showed under an earlier driver."""
        for rung, value in rungs.items():
            self._seen.setdefault(rung, {})[key] = value

    def goes_on(self, rung: float, key: str, value: float) -> bool:
        """Return whether a trial with this value at a rung is among the best 1/reduction_factor of those seen there so far."""
        seen = self._seen.setdefault(rung, {})
        if key in seen:
            return True
        cutoff = np.nanpercentile(list(seen.values()), self._keep * 100) if seen else None
        seen[key] = value
        return cutoff is None or bool(value <= cutoff)

    def rungs_of(self, key: str) -> dict[float, float]:
        """Return what a trial showed, by rung."""
        return {rung: seen[key] for rung, seen in self._seen.items() if key in seen}
