"""FID, KID and Inception Score against closed forms and peer libraries."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.fid import (
    Moments,
    frechet_distance,
    inception_score,
    kid,
    kid_with_error,
)

Array = npt.NDArray[np.float64]


def gaussian(count: int, width: int, seed: int, mean: float = 0.0) -> Array:
    """Return correlated features [count, width]."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(width).normal(size=(width, width)) / np.sqrt(width)
    features: Array = rng.normal(size=(count, width)) @ mixing + mean
    return features


def orthogonal(width: int, seed: int) -> Array:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return np.asarray(q)


def moments_with(covariance: Array, mean: Array, count: int = 1001) -> Moments:
    return Moments(count, mean, (covariance + covariance.T) / 2 * (count - 1))


def test_moments_are_read_back_from_their_arrays_as_they_were() -> None:
    moments = Moments.of(gaussian(5, 3, seed=0))
    read = Moments.from_arrays(moments.to_arrays("real"), "real")
    assert (read.count, type(read.count)) == (5, int)
    assert np.array_equal(read.mean, moments.mean)
    assert np.array_equal(read.scatter, moments.scatter)


@pytest.mark.oracle(9)
@pytest.mark.parametrize(("width", "rank"), [(3, 3), (64, 64), (64, 10), (512, 100)])
def test_oracle_9_commuting_covariances(width: int, rank: int) -> None:
    """|mu_a - mu_b|^2 + sum (sqrt a - sqrt b)^2 for covariances with common eigenvectors, one of deficient rank."""
    rng = np.random.default_rng(width + rank)
    basis = orthogonal(width, seed=1)
    a, b = rng.uniform(0.1, 2.0, size=(2, width))
    a[rank:] = 0.0
    mean_a, mean_b = rng.normal(size=(2, width))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    got = frechet_distance(moments_with((basis * a) @ basis.T, mean_a), moments_with((basis * b) @ basis.T, mean_b))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.oracle(9)
@pytest.mark.parametrize(("count", "width"), [(2000, 32), (20, 64), (100, 512), (2, 8)])
def test_oracle_9_distance_of_a_set_with_itself_is_zero_even_when_rank_deficient(count: int, width: int) -> None:
    moments = Moments.of(gaussian(count, width, seed=3, mean=5.0))
    assert frechet_distance(moments, moments) <= 1e-6 * np.trace(moments.covariance)
    # The bound above is the promise; the method gives far more.
    assert frechet_distance(moments, moments) <= 1e-12 * np.trace(moments.covariance)


def test_frechet_distance_of_general_covariances_is_the_matrix_square_root_formula() -> None:
    a, b = Moments.of(gaussian(400, 24, seed=4)), Moments.of(gaussian(300, 24, seed=5, mean=0.3) ** 2)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


@pytest.mark.parametrize("width", [16, 64, 256])
def test_fid_equals_torch_fidelity_and_torchmetrics_on_the_same_features(width: int) -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    x, y = gaussian(4 * width, width, seed=6), gaussian(4 * width, width, seed=7, mean=0.2) * 1.1
    ours = frechet_distance(Moments.of(x), Moments.of(y))
    statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    metrics = _compute_fid(*(torch.from_numpy(s[key]) for s in statistics for key in ("mu", "sigma")))
    assert ours == pytest.approx(fidelity, rel=1e-6)
    assert ours == pytest.approx(float(metrics), rel=1e-6)


@pytest.mark.oracle(10)
@settings(deadline=None, max_examples=30)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=6), order_seed=st.integers(0, 2**16), offset=st.sampled_from([0, 1e3])
)
def test_oracle_10_moments_of_shards_in_any_order_are_the_moments_of_the_whole(
    cuts: list[int], order_seed: int, offset: float
) -> None:
    x = gaussian(200, 5, seed=8, mean=offset)
    bounds = [0, *sorted(cuts), len(x)]
    shards = [x[i:j] for i, j in itertools.pairwise(bounds)]  # some of them empty
    np.random.default_rng(order_seed).shuffle(shards)
    merged = Moments.empty(5)
    for shard in shards:
        merged = merged.add(shard)
    assert merged.count == 200
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12)


@pytest.mark.oracle(10)
def test_oracle_10_merging_is_commutative_and_associative() -> None:
    parts = [Moments.of(gaussian(n, 6, seed=n, mean=n / 10)) for n in (3, 50, 200)]
    results = [a.merge(b).merge(c) for a, b, c in itertools.permutations(parts)]
    results += [a.merge(b.merge(c)) for a, b, c in itertools.permutations(parts)]
    for other in results[1:]:
        np.testing.assert_allclose(other.mean, results[0].mean, rtol=1e-12)
        np.testing.assert_allclose(other.scatter, results[0].scatter, rtol=1e-12)


def test_float32_features_far_from_the_origin_keep_their_covariance() -> None:
    """Trap 8: a float32 sum of outer products loses every digit here."""
    x = (gaussian(500, 4, seed=9) * 0.01 + 4096).astype(np.float32)
    np.testing.assert_allclose(Moments.of(x).covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)


def test_moments_refuse_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Moments.of(np.zeros(3))
    with pytest.raises(ValueError, match="at least 2"):
        _ = Moments.of(np.zeros((1, 3))).covariance
    with pytest.raises(ValueError, match="width 2 and 3"):
        frechet_distance(Moments.of(np.zeros((5, 2))), Moments.of(np.zeros((5, 3))))
    with pytest.raises(ValueError, match="width 2 and 3"):
        Moments.empty(2).merge(Moments.empty(3))


@pytest.mark.parametrize(("n", "m", "subset_size"), [(300, 300, 100), (250, 400, 250)])
def test_kid_equals_torch_fidelity_on_the_same_features_and_subsets(n: int, m: int, subset_size: int) -> None:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    x, y = gaussian(n, 48, seed=10), gaussian(m, 48, seed=11, mean=0.3)
    ours = kid(x, y, num_subsets=20, subset_size=subset_size, seed=2020)
    theirs = kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        kid_subsets=20,
        kid_subset_size=subset_size,
        verbose=False,
        rng_seed=2020,
    )
    assert ours.mean == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-6)
    assert ours.std == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-6, abs=1e-12)


def test_kid_of_whole_sets_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    x, y = gaussian(200, 48, seed=12), gaussian(200, 48, seed=13, mean=0.3)
    ours = kid(x, y, num_subsets=1, subset_size=200)
    assert ours.mean == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-6)


def test_kid_is_the_double_sum_of_its_definition() -> None:
    x, y = gaussian(7, 3, seed=14), gaussian(7, 3, seed=15)

    def k(a: Array, b: Array) -> float:
        return float((a @ b / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7)]
    off = [(i, j) for i, j in pairs if i != j]
    expected = np.mean([k(x[i], x[j]) for i, j in off]) + np.mean([k(y[i], y[j]) for i, j in off])
    expected -= 2 * np.mean([k(x[i], y[j]) for i, j in pairs])
    assert kid(x, y, num_subsets=3, subset_size=7).mean == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased_so_it_falls_below_zero_for_equal_distributions() -> None:
    results = [kid(gaussian(60, 8, seed=s), gaussian(60, 8, seed=1000 + s), num_subsets=1) for s in range(60)]
    means = np.array([r.mean for r in results])
    assert {r.subset_size for r in results} == {60}  # made smaller than the 1000 asked for, and recorded
    assert (means < 0).any()
    assert (means > 0).any()
    assert abs(means.mean()) < 3 * means.std() / np.sqrt(len(means))


def test_the_kid_of_all_pairs_and_its_error_are_those_of_leaving_each_image_out() -> None:
    x, y = gaussian(9, 3, seed=18), gaussian(12, 3, seed=19, mean=0.3)

    def mmd2(x: Array, y: Array) -> float:
        within = [((a @ a.T / 3 + 1) ** 3)[~np.eye(len(a), dtype=bool)].mean() for a in (x, y)]
        return float(sum(within) - 2 * ((x @ y.T / 3 + 1) ** 3).mean())

    without = ([mmd2(np.delete(x, i, 0), y) for i in range(9)], [mmd2(x, np.delete(y, i, 0)) for i in range(12)])
    expected = np.sqrt(sum((len(values) - 1) * np.var(values) for values in without))
    assert kid_with_error(x, y) == pytest.approx((mmd2(x, y), expected), rel=1e-10)


def test_the_error_of_kid_is_how_far_it_scatters() -> None:
    pairs = [kid_with_error(gaussian(100, 32, seed=s), gaussian(150, 32, seed=5000 + s, mean=0.3)) for s in range(80)]
    values, errors = np.array(pairs).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.25)


def test_kid_depends_on_its_seed_alone() -> None:
    x, y = gaussian(200, 8, seed=16), gaussian(200, 8, seed=17)
    first = kid(x, y, num_subsets=5, subset_size=50, seed=1)
    np.random.seed(5)
    assert kid(x, y, num_subsets=5, subset_size=50, seed=1) == first
    assert kid(x, y, num_subsets=5, subset_size=50, seed=2) != first


def test_inception_score_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    logits = gaussian(503, 12, seed=18) * 4
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=7)
    mean, std = inception_score(logits, num_splits=10, seed=7)
    assert mean == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert std == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-6)


def test_inception_score_reaches_its_bounds() -> None:
    """1 when every image is judged alike, the number of classes when they are certain and balanced."""
    assert inception_score(np.tile([[2.0, -1.0, 0.5]], (30, 1)), num_splits=3)[0] == pytest.approx(1, abs=1e-12)
    certain = np.tile(np.eye(5) * 1e4, (20, 1))
    assert inception_score(certain, num_splits=1)[0] == pytest.approx(5, abs=1e-12)


def test_too_few_images_or_splits() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        kid(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="1 to n = 4 splits"):
        inception_score(np.zeros((4, 2)), num_splits=5)
