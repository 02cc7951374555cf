"""Asynchronous successive halving (ASHA: Li et al. 2020, arXiv:1810.05934): which trials are worth their whole budget."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import numpy as np

WORST = sys.float_info.max  # where percentiles are taken, which know no infinity


class Halving:
    """The KIDs seen at each rung; lower is better. A trial is judged once at each rung, against those that were there before it.

    A value that is not finite is worse than any other: its trial is stopped, even if it is the first.
    """

    def __init__(self, reduction_factor: int) -> None:
        self._keep = 1 / reduction_factor
        self._seen: dict[float, dict[str, float]] = {}
        self._stopped: set[tuple[float, str]] = set()

    def take(self, rungs: Mapping[float, float], key: str) -> None:
        """Add what a trial showed under an earlier driver."""
        for rung, value in rungs.items():
            self._seen.setdefault(rung, {})[key] = value

    def goes_on(self, rung: float, key: str, value: float) -> bool:
        """Return whether a trial with this value at a rung is among the best 1/reduction_factor of those seen there so far.

        A trial whose process was killed may show a rung again, and gets the answer that it got before.
        """
        seen = self._seen.setdefault(rung, {})
        if key not in seen:
            before = [v if math.isfinite(v) else WORST for v in seen.values()]
            seen[key] = value
            if not math.isfinite(value) or (before and not value <= np.percentile(before, self._keep * 100)):
                self._stopped.add((rung, key))
        return (rung, key) not in self._stopped

    def rungs_of(self, key: str) -> dict[float, float]:
        """Return a trial's values, by rung."""
        return {rung: seen[key] for rung, seen in self._seen.items() if key in seen}
