"""The named tables of betas: what each schedule is, before anything is derived from it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

BETA_FIRST, BETA_LAST = 1e-4, 0.02  # Ho et al. 2020, section 4, for T = 1000
MAX_COSINE_BETA = 0.999  # Nichol & Dhariwal 2021, section 3.2


def _linear(T: int, first: float, last: float) -> Tensor:
    return torch.linspace(first, last, T, dtype=torch.float64)


def _quadratic(T: int, first: float, last: float) -> Tensor:
    return torch.linspace(math.sqrt(first), math.sqrt(last), T, dtype=torch.float64) ** 2


def _constant(T: int, first: float, last: float) -> Tensor:
    return torch.full((T,), last, dtype=torch.float64)


def _warmup(T: int, first: float, last: float, *, fraction: float) -> Tensor:
    betas = _constant(T, first, last)
    rising = int(fraction * T)
    betas[:rising] = torch.linspace(first, last, rising, dtype=torch.float64)
    return betas


def _from_abar(T: int, abar: Callable[[Tensor], Tensor]) -> Tensor:
    """betas = 1 - abar((i+1)/T) / abar(i/T), at most 0.999 (Nichol & Dhariwal 2021, section 3.2)."""
    at = abar(torch.arange(T + 1, dtype=torch.float64) / T)
    return (1 - at[1:] / at[:-1]).clamp(max=MAX_COSINE_BETA)


def _cosine(T: int) -> Tensor:
    return _from_abar(T, lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def _sigmoid(T: int) -> Tensor:
    """Jabri et al. 2022, "Scalable adaptive computation": abar itself is a logistic curve in u, from -3 to 3."""
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    return _from_abar(T, lambda u: (high - torch.sigmoid(6 * u - 3)) / (high - low))


def _jsd(T: int) -> Tensor:
    """1 / (T - t), so that abar_t = 1 - (t+1)/T and the last beta is 1."""
    return 1 / torch.arange(T, 0, -1, dtype=torch.float64)


# Schedules given by their two end values, which belong to T = 1000.
_BY_ENDS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "constant": _constant,
    "warmup10": partial(_warmup, fraction=0.1),
    "warmup50": partial(_warmup, fraction=0.5),
}
_BY_LENGTH: dict[str, Callable[[int], Tensor]] = {"cosine": _cosine, "sigmoid": _sigmoid, "jsd": _jsd}
SCHEDULES: tuple[str, ...] = (*_BY_ENDS, *(f"{name}_raw" for name in _BY_ENDS), *_BY_LENGTH)


def named_betas(name: str, T: int) -> Tensor:
    """The T betas, float64, of one of `SCHEDULES`; ValueError for another name, or a T too short for its scaling."""
    if name in _BY_LENGTH:
        return _BY_LENGTH[name](T)
    if name.removesuffix("_raw") not in _BY_ENDS:
        near = difflib.get_close_matches(name, SCHEDULES)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown schedule {name!r}: {hint}expected one of {', '.join(SCHEDULES)}")
    curve = _BY_ENDS[name.removesuffix("_raw")]
    if name.endswith("_raw"):
        return curve(T, BETA_FIRST, BETA_LAST)
    scale = 1000 / T
    if BETA_LAST * scale >= 1:
        raise ValueError(
            f"schedule {name!r} with num_timesteps={T}: its last beta, 0.02 * 1000 / T = {BETA_LAST * scale:.3g}, is "
            f"not below 1; use num_timesteps above {int(1000 * BETA_LAST)}, or 'cosine', or '{name}_raw'"
        )
    return curve(T, BETA_FIRST * scale, BETA_LAST * scale)
