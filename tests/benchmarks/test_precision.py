"""The rule by which benchmarks/precision.py calls a cheaper precision safe."""

from __future__ import annotations

import pytest

from benchmarks.precision import STEPS, line, line_of_losses, row_of, row_of_losses, trained_losses
from pipeline.data.shards import Dataset


def test_differences_are_paired_and_held_against_what_seeds_do() -> None:
    exact = [7.0, 5.0, 6.0, 8.0, 4.0]  # a standard deviation of 1.58 between seeds, a quarter of it is 0.395
    row = row_of(
        "digits ddim", 500, "fid_classifier_n500", exact, [v + d for v, d in zip(exact, (1, 2, 3, 2, 2), strict=True)]
    )
    assert (row["difference"], row["shown"], row["mean_within"]) == (2, False, False)
    assert row["half_interval"] == pytest.approx(2.776 * 0.7071 / 5**0.5, rel=1e-3)
    assert row["bound"] == pytest.approx(1.5811 / 4, rel=1e-3)
    assert "| no |" in line(row)
    close = row_of(
        "digits ddim",
        500,
        "fid_classifier_n500",
        exact,
        [v + d for v, d in zip(exact, (0.1, 0, 0.1, 0, 0.1), strict=True)],
    )
    assert (close["shown"], "| yes |" in line(close)) == (True, True)
    wide = row_of(
        "digits ddim",
        500,
        "fid_classifier_n500",
        exact,
        [v + d for v, d in zip(exact, (1, -1, 1, -1, 0.5), strict=True)],
    )
    assert (wide["shown"], wide["mean_within"], "| the mean |" in line(wide)) == (False, True, True)
    alike = row_of(
        "digits ddim", 500, "fid_classifier_n500", [50.0, 50.0, 50.1], [50.5, 50.5, 50.6]
    )  # 1 % of the value
    assert alike["shown"]


def test_losses_of_bf16_are_held_against_those_of_two_seeds() -> None:
    exact = [[1.0] * STEPS, [1.2] * STEPS, [1.4] * STEPS]  # on average 0.267 from each other
    near = row_of_losses("digits", exact, [[1.1, 0.9] * (STEPS // 2), [1.3] * STEPS, [1.5] * STEPS])
    assert (near["between_seeds"], near["apart"]) == (pytest.approx(0.8 / 3), pytest.approx(0.1))
    assert (near["shown"], near["last"]) == (True, pytest.approx(1.2))
    assert line_of_losses(near) == "| digits | 3 | 1.2 | 0.1 | 0.267 | yes |"
    assert not row_of_losses("digits", exact, [*exact[:2], [1.7] * STEPS])["shown"]


def test_a_seed_gives_the_same_losses_again_and_another_precision_others(dataset: Dataset) -> None:
    # the first steps are alike: the network's output begins at zero, and the learning rate too
    first, again = (trained_losses("digits", "fp32", 1, dataset, num_steps=6) for _ in range(2))
    assert first == again
    cheap, other = (trained_losses("digits", p, s, dataset, num_steps=6) for p, s in (("bf16", 1), ("fp32", 2)))
    assert 0 < abs(cheap[-1] - first[-1]) < abs(other[-1] - first[-1])
