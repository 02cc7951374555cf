"""Power-function averages, whose length can be chosen after training (Karras et al. 2024, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm.ema import WeightAverage

MAX_SIGMA_REL = 12**-0.5  # that of gamma = 0: the plain mean of all steps


class EMAProfile(NamedTuple):
    """A power-function average: its relative width, and the number of updates it has seen."""

    sigma_rel: float
    num_updates: int


def gamma_of(sigma_rel: float) -> float:
    """The exponent g of the profile of relative width sigma_rel: (g+1) / ((g+2)^2 (g+3)) = sigma_rel^2.

    sigma_rel in (0, 0.2887]; the left side falls with g, so that bisection finds the largest real root.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(
            f"sigma_rel={sigma_rel}, expected a number in (0, {MAX_SIGMA_REL:.4f}]; 0.05 and 0.10 are usual"
        )
    low, high = 0.0, 1 / sigma_rel  # the left side is below 1 / g^2
    for _ in range(100):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class PowerFunctionEMA(WeightAverage):
    """An average whose weight at step s of t is proportional to s^gamma, so that it grows with training.

    Update t = 1, 2, ... has decay (1 - 1/t)^(gamma+1): the initial weights get none. Store snapshots of two of them,
    say sigma_rel 0.05 and 0.10, each with its `EMAProfile`, for `posthoc_weights`.
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        super().__init__(model)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def next_decay(self) -> float:
        """The decay that the next update will use."""
        return float((1 - 1 / (self.num_updates + 1)) ** (self.gamma + 1))


def posthoc_weights(snapshots: Sequence[EMAProfile], target: EMAProfile) -> list[float]:
    """The weights, of sum 1, with which snapshots add up to the average nearest to `target`, in least squares.

    ValueError where a profile has no updates, or the target is longer than every snapshot.
    """
    if not snapshots or min(target.num_updates, *(s.num_updates for s in snapshots)) < 1:
        raise ValueError(
            f"{len(snapshots)} snapshots for target {target}, expected at least one, each with one update or more"
        )
    longest = max(s.num_updates for s in snapshots)
    if target.num_updates > longest:
        raise ValueError(
            f"target at update {target.num_updates}, expected at most {longest}, that of the last snapshot"
        )
    A, B, _ = _products(snapshots, target)
    # Unit diagonal, and of several solutions the smallest: large weights of both signs would magnify rounding.
    scale = A.diagonal().rsqrt()
    solution = torch.linalg.lstsq(scale[:, None] * A * scale, scale * B, rcond=1e-13, driver="gelsd").solution * scale
    return (solution / solution.sum()).tolist()  # type: ignore[no-any-return]


def posthoc_error(snapshots: Sequence[EMAProfile], weights: Sequence[float], target: EMAProfile) -> float:
    """How far the weighted snapshots are from `target`: the norm of the difference of the profiles over that of the target's."""
    A, B, norm = _products(snapshots, target)
    X = torch.tensor(list(weights), dtype=torch.float64)
    return math.sqrt(max(float(X @ A @ X - 2 * B @ X) + norm, 0.0) / norm)


def reconstruct(shadows: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of snapshots, accumulated in float64, in their dtype; they may be loaded one at a time."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for weight, shadow in zip(weights, shadows, strict=True):
        for name, tensor in shadow.items():
            dtypes.setdefault(name, tensor.dtype)
            part = weight * tensor.double()
            total[name] = total[name] + part if name in total else part
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}


def _products(snapshots: Sequence[EMAProfile], target: EMAProfile) -> tuple[Tensor, Tensor, float]:
    """The inner products of the snapshots' profiles [n,n], theirs with the target's [n], and the target's with itself."""
    gammas = {p.sigma_rel: gamma_of(p.sigma_rel) for p in (*snapshots, target)}
    A = torch.tensor([[_inner(a, b, gammas) for b in snapshots] for a in snapshots], dtype=torch.float64)
    B = torch.tensor([_inner(a, target, gammas) for a in snapshots], dtype=torch.float64)
    return A, B, _inner(target, target, gammas)


def _inner(a: EMAProfile, b: EMAProfile, gammas: Mapping[float, float]) -> float:
    """(ga+1)(gb+1)/(ga+gb+1) min(Ta,Tb)^(ga+gb+1) / (Ta^(ga+1) Tb^(gb+1)), by a ratio: the powers would overflow."""
    short, long = (a, b) if a.num_updates <= b.num_updates else (b, a)
    g_short, g_long = gammas[short.sigma_rel], gammas[long.sigma_rel]
    ratio: float = (short.num_updates / long.num_updates) ** g_long / long.num_updates
    return (g_short + 1) * (g_long + 1) / (g_short + g_long + 1) * ratio
