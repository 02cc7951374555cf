"""The rule by which benchmarks/precision.py calls a cheaper precision safe."""

from __future__ import annotations

import pytest

from benchmarks.precision import line, row_of


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
