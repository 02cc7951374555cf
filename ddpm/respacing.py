"""Which steps of a chain a sampler visits."""

from __future__ import annotations

from collections.abc import Sequence

from ddpm.schedule import DEGENERATE_ABAR, BetaSchedule

TIMESTEP_SPACINGS = ("trailing", "linspace", "leading", "quad")


def timestep_subset(num_timesteps: int, steps: int, spacing: str = "trailing") -> tuple[int, ...]:
    """`steps` code indices out of 0 .. T-1, ascending.

    trailing  round(arange(T, 0, -T/S)) - 1, reaches T-1
    linspace  round(linspace(0, T-1, S)), reaches T-1
    leading   arange(S) * (T // S), misses T-1 unless S = T
    quad      floor(linspace(0, sqrt(0.8 T), S)^2), DDIM's choice on CIFAR-10; ends near 0.8 T

    With quad there can be fewer than S: steps that fall on one index are taken once, since a step from an index to
    itself changes nothing. ValueError unless 1 <= steps <= T.
    """
    T, S = num_timesteps, steps
    if not 1 <= S <= T:
        raise ValueError(f"steps={S}, expected 1 .. {T}, the number of steps the schedule has")
    if spacing == "trailing":
        return tuple(round(T - i * T / S) - 1 for i in reversed(range(S)))
    if spacing == "linspace":
        return tuple(round(i * (T - 1) / (S - 1)) for i in range(S)) if S > 1 else (T - 1,)
    if spacing == "leading":
        return tuple(i * (T // S) for i in range(S))
    if spacing == "quad":
        # 4/5 T (i / (S-1))^2 in integers: in floats an exact square may come out just below itself.
        return tuple(sorted({4 * T * i * i // (5 * max(S - 1, 1) ** 2) for i in range(S)}))
    raise ValueError(f"spacing={spacing!r}, expected one of {', '.join(TIMESTEP_SPACINGS)}")


def kept_timesteps(schedule: BetaSchedule, timesteps: Sequence[int] | None) -> tuple[int, ...]:
    """The code indices to visit, ascending: all by default; ValueError unless they are a subset one can start from."""
    if timesteps is None:
        return tuple(range(schedule.num_timesteps))
    kept = tuple(int(t) for t in timesteps)
    schedule.respaced(kept)  # checks the indices
    if schedule.has_zero_terminal_snr and kept[-1] != schedule.num_timesteps - 1:
        raise ValueError(
            f"timesteps end at {kept[-1]}, expected {schedule.num_timesteps - 1}: with zero terminal SNR only the "
            "last step is pure noise; use the spacing 'trailing' or 'linspace'"
        )
    return kept


def late_start_warning(schedule: BetaSchedule, timesteps: Sequence[int]) -> str | None:
    """Why sampling over ascending `timesteps` would disappoint: it starts from pure noise at a step that is not; or None.

    A schedule that never reaches the prior says so itself (`BetaSchedule.warnings`), whatever the steps.
    """
    abar = float(schedule.alphas_cumprod[timesteps[-1]])
    if schedule.is_degenerate or abar <= DEGENERATE_ABAR:
        return None
    return (
        f"the {len(timesteps)} steps start at t={timesteps[-1]} of 0 .. {schedule.num_timesteps - 1}, where abar = {abar:.3g} is "
        f"above {DEGENERATE_ABAR}, so that sampling starts from noise the training never saw there; use the spacing 'trailing' "
        "or 'linspace', or more steps"
    )
