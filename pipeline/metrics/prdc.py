"""Precision, recall, density and coverage: which images of one set lie among those of the other, by their features.

All four compare distances with radii. Distances come from matrix products, in blocks of bounded size. If rounding leaves a comparison open,
the distance is computed again from differences, so every answer, ties included, follows the definition: equal images have distance
exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.metrics.fid import pair_of
from pipeline.training.threads import spread

_BLOCK_VALUES = 1 << 22  # distances of one block: 32 MB of float64, and a few masks of it, for each thread


class PRDC(NamedTuple):
    """Four shares (density may exceed 1)."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: npt.ArrayLike, generated: npt.ArrayLike, *, k_precision: int = 3, k_density: int = 5) -> PRDC:
    """Return the four shares for features [n, width] and [m, width]; each pair of images needs one distance.

    Improved precision and recall (Kynkäänniemi et al. 2019, eqs. 1-2): the share of generated images inside the ball of any real image,
    whose radius is the distance to the `k_precision`-th nearest other real image; and the share of real images inside the balls of the
    generated ones.

    Density and coverage (Naeem et al. 2020, eqs. 3-4) use balls of real images alone, with the radius to the `k_density`-th neighbour: the
    memberships (ball, generated image) over k times the generated images; and the share of real images whose ball has a generated one.

    ValueError for sets of at most k images.
    """
    r, g = (_Points.of(torch.from_numpy(features)) for features in pair_of(real, generated))
    real_radii, wide_radii = _radii(r, (k_precision, k_density))
    (generated_radii,) = _radii(g, (k_precision,))

    def judge(rows: slice) -> tuple[int, int, Tensor, Tensor]:
        part = g.part(rows)
        squares = _squares(part, r)
        precise = int(_within(squares, part, r, real_radii[None, :]).any(1).sum())
        inside = _within(squares, part, r, wide_radii[None, :])
        recalled = _within(squares, part, r, generated_radii[rows, None]).any(0)
        return precise, int(inside.sum()), recalled, inside.any(0)

    precise, memberships, recalled, covered = zip(*spread(judge, _blocks(g, r)), strict=True)
    return PRDC(
        sum(precise) / len(g.x),
        float(torch.stack(recalled).any(0).double().mean()),
        sum(memberships) / (k_density * len(g.x)),
        float(torch.stack(covered).any(0).double().mean()),
    )


class _Points(NamedTuple):
    """Points float64 [n, width] and their squared lengths [n]."""

    x: Tensor
    square: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Points:
        return cls(x, (x * x).sum(1))

    def part(self, rows: slice) -> _Points:
        return _Points(self.x[rows], self.square[rows])


def _radii(points: _Points, ks: Sequence[int]) -> list[Tensor]:
    """Return each point's distance [n] to its k-th nearest other point, for each k."""
    n, furthest = len(points.x), max(ks)
    if not 1 <= min(ks) <= furthest < n:
        raise ValueError(f"the {furthest}-th neighbour needs more than {furthest} images, got {n}")

    def of_rows(rows: slice) -> Tensor:
        part = points.part(rows)
        squares = _squares(part, points)
        own = torch.arange(len(part.x))
        squares[own, rows.start + own] = torch.inf  # a point is not its own neighbour
        nearest = squares.kthvalue(furthest, dim=1).values[:, None]
        # every candidate for the nearest, within the rounding error
        row, column = torch.nonzero(squares <= nearest + 2 * _doubt(part, points), as_tuple=True)
        exact = _exact(part, points, row, column)
        order = torch.from_numpy(np.lexsort((exact.numpy(), row.numpy())))
        first = torch.searchsorted(row, own)  # `row` ascends, before and after this sort
        return torch.stack([exact[order[first + k - 1]] for k in ks])

    return list(torch.cat(spread(of_rows, _blocks(points, points)), dim=1))


def _blocks(a: _Points, b: _Points) -> list[slice]:
    """Return blocks of rows of `a` whose distances to all of `b` are in memory at once."""
    step = max(1, _BLOCK_VALUES // len(b.x))
    return [slice(start, min(start + step, len(a.x))) for start in range(0, len(a.x), step)]


def _squares(a: _Points, b: _Points) -> Tensor:
    """Return squared distances [len(a), len(b)], with an error of at most `_doubt`."""
    return torch.addmm(a.square[:, None] + b.square[None, :], a.x, b.x.T, alpha=-2)


def _within(squares: Tensor, a: _Points, b: _Points, radii: Tensor) -> Tensor:
    """Return whether each distance is at most its radius: bool [len(a), len(b)]."""
    margin, limit = _doubt(a, b), radii * radii
    inside = squares <= limit
    row, column = torch.nonzero((squares - limit).abs() <= margin, as_tuple=True)
    if len(row):
        inside[row, column] = _exact(a, b, row, column) <= radii.expand_as(squares)[row, column]
    return inside


def _doubt(a: _Points, b: _Points) -> Tensor:
    """Return a bound [len(a), len(b)] on the rounding error of |a|^2 + |b|^2 - 2 a.b."""
    unit = 4 * (a.x.shape[1] + 4) * torch.finfo(torch.float64).eps
    return unit * (a.square[:, None] + b.square[None, :])


def _exact(a: _Points, b: _Points, row: Tensor, column: Tensor) -> Tensor:
    """Return the distances of some pairs, computed from differences."""
    step = max(1, _BLOCK_VALUES // a.x.shape[1])
    found = torch.empty(len(row), dtype=torch.float64)
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        found[part] = (a.x[row[part]] - b.x[column[part]]).square().sum(1).sqrt()
    return found
