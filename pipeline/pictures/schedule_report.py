"""What a noise schedule does to images, in figures: the numbers that distinguish schedules before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddpm import SCHEDULES, BetaSchedule
from pipeline.config.process import read_betas
from pipeline.errors import UsageError, nearest

COLUMNS = {
    "schedule": "schedule",
    "T": "num_timesteps",
    "abar_T": "abar_T",
    "L_T (bits/dim)": "prior_bits_per_dim_at_most",
    "SNR at t = 0": "snr_first",
    "SNR at T-1": "snr_last",
}
"""The columns of a table, each with the key of `ScheduleFacts.to_dict` that it shows."""


class Curves(NamedTuple):
    """What a schedule does at each step: float64 [T] each.

    Attributes:
        alphas_cumprod: abar, the share of the image's energy that is left.
        log_snr: ln(abar / (1 - abar)).
        marginal_variance: Var x_t = abar s^2 + 1 - abar, for pixels of variance s^2 (Ho et al. 2020, eq. 4).
        x0_weight: of x0 in the mean of q(x_{t-1} | x_t, x_0) (eq. 7).
    """

    alphas_cumprod: Tensor
    log_snr: Tensor
    marginal_variance: Tensor
    x0_weight: Tensor


def curves(schedule: BetaSchedule, variance: float) -> Curves:
    """Return the curves of a schedule for images whose pixels have a variance, on [-1, 1]."""
    abar = schedule.alphas_cumprod
    return Curves(abar, schedule.snr.log(), abar * variance + 1 - abar, schedule.posterior_mean_coef1)


@dataclass(frozen=True)
class ScheduleFacts:
    """One schedule of T steps: its tables, or the reason why there is none."""

    name: str
    num_timesteps: int
    schedule: BetaSchedule | None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; the figures are absent where the schedule is refused."""
        plain: dict[str, Any] = {"schedule": self.name, "num_timesteps": self.num_timesteps}
        if self.schedule is None:
            return {**plain, "refused": self.refused}
        figures = {
            "abar_T": float(self.schedule.alphas_cumprod[-1]),
            "prior_bits_per_dim_at_most": most_prior_bits(self.schedule),
            "snr_first": float(self.schedule.snr[0]),
            "snr_last": float(self.schedule.snr[-1]),
        }
        return {**plain, **figures, "warnings": list(self.schedule.warnings), "notes": list(self.schedule.notes)}

    def row(self) -> dict[str, object]:
        """Return the cells of a table with `COLUMNS`."""
        values = self.to_dict()
        return {column: values.get(key) for column, key in COLUMNS.items()}


def facts(
    names: Sequence[str], num_timesteps: Sequence[int], betas: Path | None = None, *, zero_terminal_snr: bool = False
) -> list[ScheduleFacts]:
    """Return the facts of every name at every T, then those of a table of betas; refused points are among them.

    No names and no table are all schedules but the raw forms. UsageError for a name that does not exist, for a table that cannot be
    read, and where every point is refused.
    """
    for name in names:
        if name not in SCHEDULES:
            raise UsageError(
                f"unknown schedule {name!r}{nearest(name, list(SCHEDULES))}; known: {', '.join(SCHEDULES)}"
            )
    if not names and betas is None:
        names = [name for name in SCHEDULES if not name.endswith("_raw")]
    found = [
        _made(name, T, lambda name=name, T=T: BetaSchedule.named(name, T), zero_terminal_snr)  # type: ignore[misc]
        for name in names
        for T in num_timesteps
    ]
    if betas is not None:
        table = read_betas(betas)
        found.append(
            _made(betas.name, len(table), lambda: BetaSchedule.from_betas(table, betas.name), zero_terminal_snr)
        )
    if all(fact.schedule is None for fact in found):
        raise UsageError("; ".join(fact.refused for fact in found))
    return found


def _made(name: str, num_timesteps: int, make: Callable[[], BetaSchedule], zero_terminal_snr: bool) -> ScheduleFacts:
    try:
        schedule = make().with_zero_terminal_snr() if zero_terminal_snr else make()
    except ValueError as error:
        return ScheduleFacts(name, num_timesteps, None, str(error))
    return ScheduleFacts(schedule.name, num_timesteps, schedule)


def most_prior_bits(schedule: BetaSchedule) -> float:
    """L_T, in bits/dim, of the image it is largest for: one of black and white alone.

    KL(N(sqrt(abar) x0, 1 - abar) || N(0, 1)) = (abar x0^2 - abar - ln(1 - abar)) / 2 nats (Ho et al. 2020, eq. 5), with x0^2 = 1.
    """
    return -math.log1p(-float(schedule.alphas_cumprod[-1])) / (2 * math.log(2))


def report_lines(facts: Sequence[ScheduleFacts]) -> list[str]:
    """Return what stands below the table: warnings, notes, and the reasons for what is refused."""
    lines = []
    for fact in facts:
        if fact.schedule is None:
            lines.append(f"refused: {fact.name}, T = {fact.num_timesteps}: {fact.refused}")
            continue
        lines += [f"warning: {warning}" for warning in fact.schedule.warnings]
        lines += [f"note: {fact.schedule.name}, T = {fact.num_timesteps}: {note}" for note in fact.schedule.notes]
    return lines
