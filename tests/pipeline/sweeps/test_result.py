"""What a sweep says at the end: which point is best, what the noise leaves open, and what does not compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel, tukey_hsd

from pipeline.sweeps.ledger import LedgerEntry
from pipeline.sweeps.pictures import pareto
from pipeline.sweeps.result import Result, differ, result_of, statement, within_noise
from pipeline.sweeps.text import next_commands, rows
from tests.pipeline.sweeps.swept_entries import entry


def found(values: list[list[float]], **more: Any) -> Result:
    """A result of points a = 0, 1, ... with a value for each seed."""
    return result_of(
        "s", "s", "fid", [entry({"a": a}, s, v, **more) for a, row in enumerate(values) for s, v in enumerate(row)]
    )


def at(result: Result, a: int) -> Any:
    (point,) = [point for point in result.points if point.point == {"a": a}]
    return point


# -- the noise


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=2, max_size=6))
def test_two_points_of_the_same_seeds_differ_where_the_paired_t_test_says_so(pairs: list[tuple[float, float]]) -> None:
    left, right = (list(side) for side in zip(*pairs, strict=True))
    if np.std(np.subtract(left, right)) < 1e-9:  # the test divides by it
        return
    result, p = found([left, right]), ttest_rel(left, right).pvalue
    if abs(p - 0.05) > 1e-6:
        assert differ(result, *result.points) == (p < 0.05)


@pytest.mark.parametrize("seed", range(6))
def test_points_of_unequal_seeds_differ_where_tukey_and_kramer_say_so(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = [(generator.normal(2.2 * a, 1, n)).tolist() for a, n in enumerate((2, 4, 3, 2))]
    result, p = found(values), tukey_hsd(*values).pvalue
    assert all(differ(result, at(result, a), at(result, b)) == (p[a, b] < 0.05) for a in range(4) for b in range(a))


def test_what_a_seed_does_to_all_points_is_no_noise() -> None:
    generator = np.random.default_rng(0)
    x = np.arange(4)[:, None] + generator.normal(0, 50, 3) + generator.normal(0, 0.1, (4, 3))
    design = np.array(
        [[a == i for i in range(4)] + [s == j for j in range(1, 3)] for a in range(4) for s in range(3)], float
    )
    residual = x.ravel() - design @ np.linalg.lstsq(design, x.ravel())[0]
    noise = found(x.tolist()).noise
    assert noise is not None
    assert (noise.freedom, noise.num_points) == (6, 4)
    assert noise.variance == pytest.approx(residual @ residual / 6, rel=1e-6)
    assert not within_noise(found(x.tolist()))


@pytest.mark.parametrize(("seeds", "spread"), [([2] * 9, 3.0), ([2, 2, 2, 3, 3, 4], 0.0)])
def test_of_equal_points_some_are_called_different_in_one_sweep_of_twenty(seeds: list[int], spread: float) -> None:
    generator, sweeps, wrong = np.random.default_rng(1), 1500, 0
    for _ in range(sweeps):
        shared = generator.normal(0, spread, max(seeds))
        result = found([(generator.normal(0, 1, n) + shared[:n]).tolist() for n in seeds])
        wrong += len(within_noise(result)) < len(seeds) - 1
    # four standard deviations of the share about 5 %; Tukey's test of unequal counts is a little below it
    assert (0.028 if len(set(seeds)) == 1 else 0.015) < wrong / sweeps < 0.072


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=3, max_size=6))
def test_where_a_point_is_told_apart_so_is_every_worse_one(values: list[list[float]]) -> None:
    result = found(values)
    told = [differ(result, result.points[0], point) for point in result.points[1:]]
    assert told == sorted(told)


def test_a_single_seed_tells_nothing_even_beside_points_of_many() -> None:
    result = found([[1.0], [2.0, 2.1], [9.0, 9.1]])
    assert differ(result, at(result, 0), at(result, 1)) is None
    assert "Too few seeds to compare it with the others" in statement(result)
    mixed = found([[1.0, 1.1], [2.0], [9.0, 9.1]])
    assert "Too few seeds to compare it with: a = 1." in statement(mixed)
    assert "better than" not in statement(mixed)


def test_the_statement_says_what_the_noise_leaves_open() -> None:
    clear = found([[a + 0.01 * s + 0.001 * a * s for s in range(2)] for a in (1, 2, 3)])
    assert "It is better than every other point by more than the noise" in statement(clear)
    assert [point.mean for point in clear.points] == pytest.approx([1.0055, 2.006, 3.0065])
    noisy = found([[1.0, 4.5], [2.0, 5.0]])
    assert "Within the noise (95%) of it: a = 1" in statement(noisy)
    assert "one seed" in statement(found([[1.0], [2.0]]))
    assert statement(result_of("s", "s", "fid", [entry({"a": 1}, 0, None)])) == "No trial gave a value."


# -- what is no value


def test_a_point_of_which_a_seed_failed_is_below_the_complete_ones_and_named() -> None:
    entries = [entry({"a": 0}, 0, 0.1), entry({"a": 0}, 1, None, reason="diverged at step 7")]
    entries += [entry({"a": a}, s, a + 0.1 * s * a) for a in (1, 2) for s in range(2)]
    result = result_of("s", "s", "fid", [*entries, entry({"a": 3}, 0, None, status="stopped")])
    assert [point.point["a"] for point in result.points] == [1, 2, 0, 3]
    assert result.best is at(result, 1)
    assert differ(result, at(result, 1), at(result, 0)) is None
    assert "Not compared, ranked below the complete points: a = 0 (seed 1 failed)." in statement(result)
    (row,) = [row for row in rows(result) if row["a"] == 0]
    assert (row["seeds"], row["note"]) == ("1 of 2", "seed 1 failed")
    alone = result_of("s", "s", "fid", entries[:2])
    assert "no point is complete: a = 0 (seed 1 failed)" in statement(alone)
    assert rows(alone)[0]["note"] == "best; seed 1 failed"


def judged(a: int, seed: int, value: float, **identity: Any) -> LedgerEntry:
    usual = {
        "metric": "fid",
        "extractor_sha256": "old",
        "reference": "all",
        "generation": {"sampler": "ddim", "steps": 50, "seed": seed},
    }
    return entry({"a": a}, seed, value, identity={**usual, **identity})


def test_values_that_were_judged_otherwise_are_refused_and_what_differs_is_named() -> None:
    old, new = judged(1, 0, 0.1), judged(2, 0, 0.9, extractor_sha256="new")
    result = result_of("k7m2", "s", "fid", [old, new])
    assert result.best is at(result, 2)
    assert len(result.points) == 1
    (refused,) = result.refused
    assert refused.point == {"a": 1}
    assert "extractor_sha256: old, new" in refused.reason
    assert "ddpm-pipe resume k7m2" in refused.reason
    again = result_of("k7m2", "s", "fid", [old, new, judged(1, 0, 0.2, extractor_sha256="new")])
    assert not again.refused
    assert again.best is at(again, 1)
    assert at(again, 1).values == [0.2]


def test_noise_seeds_and_settings_of_the_sampler_make_no_values_unlike() -> None:
    guided = judged(2, 1, 0.5, generation={"sampler": "ddim", "steps": 20, "guidance_scale": 2.0, "seed": 1})
    result = result_of("s", "s", "fid", [judged(1, 0, 0.1), guided])
    assert not result.refused
    assert at(result, 2).nfe == 40


def test_a_single_seed_shows_the_deviation_of_its_value_as_what_it_is() -> None:
    result = result_of("s", "s", "kid", [entry({"a": 1}, 0, 0.25, std=0.031, std_over="100 subsets of 279")])
    assert rows(result)[0]["fid_x_n1"] == "0.25 (std 0.031 over 100 subsets of 279)"


def test_more_seeds_are_proposed_than_there_are() -> None:
    assert "sweep --extend s --seeds 8" in next_commands(found([[1.0, 2.0, 3.0, 4.0]]))


def test_the_table_is_best_first_and_what_has_no_value_comes_last() -> None:
    found = result_of("s", "s", "fid", [entry({"a": 3}, 0, None), entry({"a": 2}, 0, 0.9), entry({"a": 1}, 0, 0.4)])
    assert [(row["a"], row["note"]) for row in rows(found)] == [(1, "best"), (2, ""), (3, "failed")]
    assert len(found.failed) == 1


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), max_size=12))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    beaten = [p for p in points if any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)]
    assert set(front) == set(points) - set(beaten)
