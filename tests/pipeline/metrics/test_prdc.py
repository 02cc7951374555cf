"""Precision, recall, density and coverage against closed forms, their definitions, and torch-fidelity and prdc."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.prdc import PRDC, prdc

Array = npt.NDArray[np.float64]


def gaussian(count: int, width: int, seed: int, mean: float = 0.0) -> Array:
    features: Array = np.random.default_rng(seed).normal(size=(count, width)) + mean
    return features


def by_definition(real: Array, generated: Array, k_precision: int, k_density: int) -> PRDC:
    """Every distance by itself, from differences."""

    def distances(a: Array, b: Array) -> Array:
        return np.array([[np.sqrt(np.sum((x - y) ** 2)) for y in b] for x in a])

    def radii(points: Array, k: int) -> Array:
        return np.array([sorted(np.delete(row, i))[k - 1] for i, row in enumerate(distances(points, points))])

    between = distances(real, generated)
    inside_wide = between <= radii(real, k_density)[:, None]
    return PRDC(
        precision=float((between <= radii(real, k_precision)[:, None]).any(0).mean()),
        recall=float((between <= radii(generated, k_precision)[None, :]).any(1).mean()),
        density=float(inside_wide.sum() / (k_density * len(generated))),
        coverage=float(inside_wide.any(1).mean()),
    )


@settings(max_examples=40)
@given(
    n=st.integers(4, 25),
    m=st.integers(4, 25),
    ks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    levels=st.sampled_from([2, 4, 1000]),
    offset=st.sampled_from([0.0, 4096.0]),
    seed=st.integers(0, 2**16),
)
def test_ties_and_duplicates_are_decided_as_the_definition_does(n, m, ks, levels, offset, seed):
    """Few levels make equal images and equal distances everywhere; far from the origin products lose their digits."""
    rng = np.random.default_rng(seed)
    real, generated = (rng.integers(levels, size=(count, 3)) * 0.1 + offset for count in (n, m))
    assert prdc(real, generated, k_precision=ks[0], k_density=ks[1]) == by_definition(real, generated, *ks)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_torch_fidelity(k: int) -> None:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    real, generated = gaussian(300, 8, seed=19), gaussian(250, 8, seed=20, mean=0.3) * 0.8
    theirs = prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=k, save_cpu_ram=False, verbose=False
    )
    ours = prdc(real, generated, k_precision=k)
    assert 0 < ours.precision < 1
    assert ours.precision == pytest.approx(theirs[KEY_METRIC_PRECISION], rel=1e-6)
    assert ours.recall == pytest.approx(theirs[KEY_METRIC_RECALL], rel=1e-6)


@pytest.mark.parametrize(("n", "m", "k"), [(300, 250, 5), (60, 90, 1)])
def test_density_and_coverage_equal_the_prdc_package(n: int, m: int, k: int) -> None:
    from prdc import compute_prdc  # type: ignore[import-untyped]

    real, generated = gaussian(n, 8, seed=21), gaussian(m, 8, seed=22, mean=0.3) * 0.9
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = compute_prdc(real, generated, nearest_k=k)
    ours = prdc(real, generated, k_precision=k, k_density=k)
    assert 0 < ours.coverage < 1
    assert ours._asdict() == pytest.approx(theirs, rel=1e-12)


def test_on_a_line() -> None:
    """k = 1: radius 1 around the real 0 1 .. 9; around the generated 4.5, 5.2 and 30 it is 0.7, 0.7 and 24.8."""
    real, generated = np.arange(10.0)[:, None], np.array([[4.5], [5.2], [30.0]])
    found = prdc(real, generated, k_precision=1, k_density=1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(6 / 10)  # 4 and 5 from the first two; 6..9 also from 30 - 24.8 = 5.2 on
    assert found.density == pytest.approx(4 / 3)  # 4.5 is in the balls of 4 and 5, 5.2 in those of 5 and 6, 30 in none
    assert found.coverage == pytest.approx(3 / 10)


def test_equal_images_are_inside_balls_of_radius_zero() -> None:
    """Sets of pairwise duplicates have radius 0 at k = 1: a distance off by rounding would give 0 instead of 1."""
    points = np.repeat(gaussian(40, 16, seed=21, mean=100.0), 2, axis=0)
    assert prdc(points, points.copy(), k_precision=1)[:2] == (1.0, 1.0)


def test_density_and_coverage_of_the_same_distribution() -> None:
    """Density 1 and coverage 1 - prod (N-j)/(N+M-j), j = 1..k (Naeem et al. 2020, lemma 2), mean over many draws."""
    n, m, k, draws = 60, 40, 5, 80
    got = [prdc(gaussian(n, 3, seed=s), gaussian(m, 3, seed=5000 + s), k_density=k)[2:] for s in range(draws)]
    density, coverage = np.mean(got, axis=0)
    spread = np.std(got, axis=0) / np.sqrt(draws)
    expected = 1 - np.prod([(n - j) / (n + m - j) for j in range(1, k + 1)])
    assert abs(density - 1) < 4 * spread[0]
    assert abs(coverage - expected) < 4 * spread[1]


def test_blocks_of_distances_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = gaussian(50, 4, seed=22), gaussian(37, 4, seed=23)
    whole = prdc(real, generated)
    monkeypatch.setattr("pipeline.metrics.prdc._BLOCK_VALUES", 7 * 50)
    assert prdc(real, generated) == whole


def test_too_few_images_for_the_neighbours_asked_for() -> None:
    with pytest.raises(ValueError, match="more than 5 images, got 5"):
        prdc(np.zeros((5, 2)), np.zeros((10, 2)))
    with pytest.raises(ValueError, match="more than 3 images, got 3"):
        prdc(np.zeros((10, 2)), np.zeros((3, 2)))
