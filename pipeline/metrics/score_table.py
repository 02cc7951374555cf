"""Scores as lines of text: a row for each value, beside those of real images and of noise by the same code."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.metrics.scores import Scores, Spread
from pipeline.storage.retention import LAST

YARDSTICK_NAMES = {"real_half": "real half against real half", "uniform_noise": "uniform noise"}


def score_lines(scores: Scores) -> list[str]:
    """Return a table of scores beside their yardsticks, and the classifier's summary of the images."""
    rows = [["", "generated", *YARDSTICK_NAMES.values()]]
    for key, value in scores.values.items():
        metric = scores.identities[key].metric
        beside = [f"{scores.yardsticks[name][metric]:.4g}" for name in YARDSTICK_NAMES]
        rows.append([key, with_spread(value, scores.spreads.get(key)), *beside])
    lines = aligned(rows)
    if scores.spreads:
        over = dict.fromkeys(spread.over for spread in scores.spreads.values())
        lines += ["", f"±: standard deviation over {', '.join(over)}; no standard error"]
    if scores.confident:
        share, real = scores.confident["generated"], scores.confident["real_half"]
        rarest = min(scores.class_shares, key=lambda name: scores.class_shares[name])
        lines += [
            "",
            f"{share:.1%} of the generated images get a classifier confidence above 0.9 (real images: {real:.1%}); "
            f"the rarest class, {rarest!r}, is {scores.class_shares[rarest]:.1%} of them",
        ]
    lines += bias_lines(next(iter(scores.identities.values())).generation.selection)
    if scores.unjudged:
        lines.append(
            f"the classifier was fitted on no image of class {', '.join(map(repr, scores.unjudged))}, and cannot see it"
        )
    return lines


def bias_lines(selection: str) -> list[str]:
    """Return what to know of the scores of a checkpoint that was chosen by earlier ones, nothing if it was not."""
    if selection == LAST:
        return []
    return [
        "",
        f"biased: this checkpoint is the {selection}, chosen because its score was low, though by images of other seeds;",
        "`compare` does not rank it beside last checkpoints unless --across selection asks for it",
    ]


def with_spread(value: float, spread: Spread | None) -> str:
    """Return "0.5416 ± 0.012", or the value alone."""
    return f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread.value:.2g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, the first column aligned left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
