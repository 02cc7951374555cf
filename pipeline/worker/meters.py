"""What a worker measures beside the loop: the loss since the last report, and the speed of training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.batches import Prefetch
from pipeline.training.device import Compute
from pipeline.training.loop import StepResult
from pipeline.training.team import Team

PUBLISH_EVERY_S = 0.25


@dataclass
class LossMeter:
    """Loss summed since the last report, by quartile of t: row 0 weighted sums, row 1 sums of weights (counts, where t is drawn
    uniformly); float64 so that order hardly matters."""

    num_timesteps: int
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, 4, dtype=torch.float64))

    def add(self, result: StepResult) -> None:
        """Add one step of this worker, on the device of its losses."""
        quartile = result.timesteps * 4 // self.num_timesteps
        weights = result.weights.double()
        values = torch.stack([result.losses.double() * weights, weights])
        self.sums = self.sums.to(values.device).index_add(1, quartile, values)

    def gather(self, team: Team) -> None:
        """Move the sums of all workers to rank 0."""
        total = team.all_reduce(self.sums.cpu())
        self.sums = total if team.is_main else torch.zeros_like(total)

    def report(self) -> dict[str, float]:
        """Return the means since the last report, and start again."""
        sums, counts = self.sums.cpu()
        metrics = {"loss": float(sums.sum() / counts.sum())}
        for i in range(4 if self.num_timesteps > 1 else 0):
            if counts[i] > 0:
                metrics[f"loss_t_quartile_{i + 1}"] = float(sums[i] / counts[i])
        self.sums = torch.zeros_like(self.sums)
        return metrics


class OwnTime:
    """The time that this worker spends on its own part of a step: waiting for its data, and in the forward pass, where no worker waits for
    another. `seconds` are those of all workers for a step, by rank, as of the last `gather`; a worker alone has none.
    """

    def __init__(self, network: nn.Module, batches: Prefetch, team: Team, step: int, compute: Compute) -> None:
        self.seconds: list[float] = []
        self._batches, self._team, self._step, self._compute = batches, team, step, compute
        self._begin: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._waited_s = 0.0
        self._suspect: int | None = None
        self._named: set[int] = set()
        if team.size > 1:
            network.register_forward_pre_hook(self._before)
            network.register_forward_hook(self._after)

    def gather(self, step: int) -> None:
        """Bring the seconds of all workers together: one small collective call."""
        if self._team.size == 1:
            return
        spent = sum(self._compute.seconds_between(begin, end) for begin, end in self._spans)
        spent += self._batches.waited_s - self._waited_s
        mine = torch.zeros(self._team.size, dtype=torch.float64)
        mine[self._team.rank] = spent / max(step - self._step, 1)
        self._spans, self._waited_s, self._step = [], self._batches.waited_s, step
        self.seconds = self._team.all_reduce(mine).tolist()

    def straggler(self) -> int | None:
        """Return the rank that has been slow since the last two calls, the first time that it has; None if there is none."""
        before, self._suspect = self._suspect, slowest_of(self.seconds) if self.seconds else None
        if self._suspect is None or self._suspect != before or self._suspect in self._named:
            return None
        self._named.add(self._suspect)
        return self._suspect

    def _before(self, *_: Any) -> None:
        self._begin = self._compute.mark()

    def _after(self, *_: Any) -> None:
        self._spans.append((self._begin, self._compute.mark()))


def slowest_of(seconds: Sequence[float]) -> int | None:
    """Return the rank that takes the longest if that is 20 % more than the median (of two workers, than the other); else None."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return slowest if seconds[slowest] > 1.2 * statistics.median_low(seconds) else None


class Pace:
    """The speed of training: since the last report for the record, smoothed for the progress bar."""

    def __init__(self, step: int, batches: Prefetch) -> None:
        self._batches = batches
        self._reported = (step, time.monotonic(), 0.0)
        self._published = 0.0
        self._recent: list[tuple[int, float]] = [(step, time.monotonic())]

    def report(self, step: int, batch_size: int) -> dict[str, float]:
        """Return images per second and the share of time spent waiting for data, since the last report."""
        now, waited = time.monotonic(), self._batches.waited_s
        before_step, before, before_waited = self._reported
        self._reported = (step, now, waited)
        wall = max(now - before, 1e-9)
        return {
            "images_per_s": (step - before_step) * batch_size / wall,
            "data_wait_share": (waited - before_waited) / wall,
        }

    def images_per_s(self, step: int, batch_size: int) -> float:
        """Return images per second over the last few seconds."""
        self._recent = [*self._recent, (step, time.monotonic())][-40:]
        (first_step, first), (last_step, last) = self._recent[0], self._recent[-1]
        return (last_step - first_step) * batch_size / max(last - first, 1e-9)

    def is_due(self) -> bool:
        """Return whether it is time to publish progress again."""
        due = time.monotonic() - self._published >= PUBLISH_EVERY_S
        if due:
            self._published = time.monotonic()
        return due
