"""Power-function averages: the exponent, the weights they give, and averages rebuilt from snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm import EMAProfile, PowerFunctionEMA, posthoc_error, posthoc_weights, reconstruct
from ddpm.posthoc_ema import gamma_of
from tests.kit.closed_forms import seeded


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.972), (0.10, 6.937)])
def test_published_exponents(sigma_rel: float, gamma: float) -> None:
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=6e-4)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_is_the_largest_root_of_the_cubic(sigma_rel: float) -> None:
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    assert gamma_of(sigma_rel) == pytest.approx(max(roots[np.isreal(roots)].real), rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_sigma_rel_is_the_relative_width_of_the_profile(sigma_rel: float) -> None:
    g = gamma_of(sigma_rel)
    s = (np.arange(200_000) + 0.5) / 200_000
    density = (g + 1) * s**g
    mean = (density * s).mean()
    assert np.sqrt((density * (s - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-4)


def test_an_update_weighs_steps_by_their_power() -> None:
    """Each parameter is 1 at one step and 0 at the others, so that the average holds the weight of every step."""
    steps = 400
    model = nn.Linear(steps, 1, bias=False).double()
    ema = PowerFunctionEMA(model, 0.1)
    nn.init.constant_(model.weight, 1e9)  # the initial weights, which must not count
    ema = PowerFunctionEMA(model, 0.1)
    for step in range(steps):
        nn.init.zeros_(model.weight)
        with torch.no_grad():
            model.weight[0, step] = 1
        ema.update()
    weights = ema.shadow["weight"][0]
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    s = torch.arange(1, steps + 1, dtype=torch.float64)
    profile = (s / steps) ** (ema.gamma + 1) - ((s - 1) / steps) ** (ema.gamma + 1)  # s^gamma over the step (s-1, s)
    torch.testing.assert_close(weights, profile, rtol=0, atol=1e-3 * float(profile.max()) * 10)
    # exactly: the share kept by the later decays
    kept = torch.tensor(
        [float(np.prod([(1 - 1 / t) ** (ema.gamma + 1) for t in range(i + 1, steps + 1)])) for i in range(1, steps + 1)]
    )
    exact = (1 - (1 - 1 / s) ** (ema.gamma + 1)) * kept
    torch.testing.assert_close(weights, exact, rtol=1e-5, atol=1e-12)
    assert (ema.sigma_rel, ema.num_updates) == (0.1, steps)


@pytest.mark.parametrize(
    ("one", "two"), [((0.05, 300), (0.1, 500)), ((0.1, 500), (0.1, 500)), ((0.2, 700), (0.05, 100))]
)
def test_the_inner_product_is_the_integral(one: tuple[float, int], two: tuple[float, int]) -> None:
    from ddpm.posthoc_ema import _inner

    grid = (np.arange(2_000_000) + 0.5) / 2_000_000 * 1000

    def density(sigma_rel: float, T: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        g = gamma_of(sigma_rel)
        values: np.ndarray[tuple[int], np.dtype[np.float64]] = np.where(
            grid <= T, (g + 1) / T * (np.minimum(grid, T) / T) ** g, 0.0
        )
        return values

    expected = float((density(*one) * density(*two)).mean() * 1000)
    gammas = {p[0]: gamma_of(p[0]) for p in (one, two)}
    assert _inner(EMAProfile(*one), EMAProfile(*two), gammas) == pytest.approx(expected, rel=1e-4)
    assert _inner(EMAProfile(*two), EMAProfile(*one), gammas) == pytest.approx(expected, rel=1e-4)


def test_a_snapshot_rebuilds_itself() -> None:
    snapshots = [EMAProfile(s, n) for n in (250, 500, 750, 1000) for s in (0.05, 0.1)]
    for i, target in enumerate(snapshots):
        weights = posthoc_weights(snapshots, target)
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert weights == pytest.approx([float(j == i) for j in range(8)], abs=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.075, 0.1, 0.15])
def test_an_average_that_was_tracked_is_rebuilt_from_two_others(sigma_rel: float) -> None:
    steps, every = 2000, 125
    model = nn.Linear(200, 1, bias=False)
    tracked = PowerFunctionEMA(model, sigma_rel)
    stored = [PowerFunctionEMA(model, 0.05), PowerFunctionEMA(model, 0.10)]
    g, snapshots, shadows = seeded(1), [], []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(torch.randn(1, 200, generator=g) / 10)
        for ema in (tracked, *stored):
            ema.update()
        if step % every == 0:
            snapshots += [EMAProfile(ema.sigma_rel, ema.num_updates) for ema in stored]
            shadows += [{"weight": ema.shadow["weight"].clone()} for ema in stored]
    weights = posthoc_weights(snapshots, EMAProfile(tracked.sigma_rel, tracked.num_updates))
    rebuilt, truth = reconstruct(iter(shadows), weights)["weight"], tracked.shadow["weight"]
    error = float((rebuilt - truth).norm())
    nearest = min(float((shadow["weight"] - truth).norm()) for shadow in shadows[-2:])
    assert rebuilt.dtype == torch.float32
    assert error < 0.02 * float(truth.norm())
    if sigma_rel != 0.1:
        assert error < 0.1 * nearest


def test_the_error_is_the_relative_distance_of_the_profiles() -> None:
    """Against the integral of the squared difference, on a grid; 0 for the target itself, 1 for nothing at all."""
    snapshots, target, weights = [EMAProfile(0.05, 600), EMAProfile(0.1, 1000)], EMAProfile(0.15, 900), [0.3, 0.6]
    grid = (np.arange(200_000) + 0.5) / 200

    def density(profile: EMAProfile) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        g, T = gamma_of(profile.sigma_rel), profile.num_updates
        values: np.ndarray[tuple[int], np.dtype[np.float64]] = np.where(
            grid <= T, (g + 1) / T * (np.minimum(grid, T) / T) ** g, 0.0
        )
        return values

    wanted = density(target)
    apart = weights[0] * density(snapshots[0]) + weights[1] * density(snapshots[1]) - wanted
    expected = float(np.sqrt((apart**2).mean() / (wanted**2).mean()))
    assert posthoc_error(snapshots, weights, target) == pytest.approx(expected, rel=1e-3)
    assert posthoc_error([target], [1.0], target) == pytest.approx(0, abs=1e-7)
    assert posthoc_error(snapshots, [0.0, 0.0], target) == 1


def test_reconstruction_is_a_weighted_sum_in_float64() -> None:
    shadows: list[dict[str, Tensor]] = [
        {"a": torch.tensor([1e8, 1.0])},
        {"a": torch.tensor([-1e8, 2.0])},
        {"a": torch.tensor([1.0, 3.0])},
    ]
    torch.testing.assert_close(reconstruct(shadows, [1.0, 1.0, 0.5])["a"], torch.tensor([0.5, 4.5]), rtol=0, atol=0)


def test_what_cannot_be_rebuilt_is_refused() -> None:
    for sigma_rel in (0.0, 0.3, -0.1, float("nan")):
        with pytest.raises(ValueError, match="expected a number in"):
            gamma_of(sigma_rel)
    with pytest.raises(ValueError, match="expected at most 100"):
        posthoc_weights([EMAProfile(0.05, 100)], EMAProfile(0.05, 200))
    with pytest.raises(ValueError, match="expected at least one"):
        posthoc_weights([], EMAProfile(0.05, 200))
    with pytest.raises(ValueError, match="one update or more"):
        posthoc_weights([EMAProfile(0.05, 0)], EMAProfile(0.05, 0))
