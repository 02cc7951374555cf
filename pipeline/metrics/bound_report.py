"""The report of a measured bound: figures with their standard errors, and curves over t as numbers and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.metrics.bound import PARTS, Bound, mean_and_error
from pipeline.metrics.metric_identity import BoundIdentity
from pipeline.metrics.score_table import aligned, bias_lines, with_spread
from pipeline.metrics.scores import SCORES_FILE, Figures, Spread
from pipeline.pictures.charts import dress, line_style, new_figure, save_figure
from pipeline.storage.durable import write_atomically, write_json
from pipeline.storage.home import make_folder
from pipeline.storage.tensor_file import pack

BOUND_FILE = "bound.safetensors"
CURVES_FILE = "curves.csv"
PICTURE_FILE = "curves.png"
EXPLAINED = {
    "prior": "L_T: what the last step still knows of the image",
    "divergences": "L_1 .. L_{T-1}: the steps between",
    "decoder": "L_0: the pixels, given the first step",
}

_FORMAT = 1


@dataclass(frozen=True)
class Measured(Figures):
    """A bound: its mean over images, and those of its parts, in bits per dimension.

    `label` ends its tracked names unless it is that of the run's usual weights and seed.
    """

    bound: Bound
    identity: BoundIdentity
    label: str = ""

    @classmethod
    def of(cls, bound: Bound, identity: BoundIdentity, label: str = "") -> Measured:
        count = len(bound.prior)
        parts = {identity.metric: bound.total} | {f"{identity.metric}_{part}": getattr(bound, part) for part in PARTS}
        identities = {named.key: named for named in map(identity.named, parts)}
        figures = dict(zip(identities, map(mean_and_error, parts.values()), strict=True))
        over = f"{count} images (standard error)"
        spreads = {key: Spread(error, over, standard_error=error) for key, (_, error) in figures.items() if count > 1}
        return cls({key: mean for key, (mean, _) in figures.items()}, identities, spreads, bound, identity, label)

    def to_json(self) -> dict[str, Any]:
        """Return figures and identities as plain data, in the form of sample metrics' scores."""
        return {"format": _FORMAT, **super().to_json()}

    def lines(self) -> list[str]:
        rows = [
            ["", "bits/dim"],
            *([key, with_spread(value, self.spreads.get(key))] for key, value in self.values.items()),
        ]
        lines = [
            f"{line}  {note}".rstrip() for line, note in zip(aligned(rows), ["", "", *EXPLAINED.values()], strict=True)
        ]
        identity = self.identity
        scope = (
            "every image"
            if identity.num_images == identity.of_images
            else f"{identity.num_images} of {identity.of_images} images"
        )
        return [
            *lines,
            "",
            f"±: standard error of the mean; {scope} of the {identity.split} split, {identity.weights} weights, {identity.process}",
            *bias_lines(identity.selection),
        ]


def write_measured(measured: Measured, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write figures (with `about` as further keys), bits per image, curves and a picture into a folder; return their paths."""
    make_folder(folder)
    paths = {name: folder / name for name in (SCORES_FILE, BOUND_FILE, CURVES_FILE, PICTURE_FILE)}
    write_json(paths[SCORES_FILE], {**about, **measured.to_json()})
    write_atomically(paths[BOUND_FILE], pack(measured.bound.to_arrays(), measured.identity.to_json()))
    write_atomically(paths[CURVES_FILE], curves_csv(measured.bound).encode())
    save_figure(curves_figure(measured.identity.key, measured.bound), paths[PICTURE_FILE])
    return list(paths.values())


def curves_csv(bound: Bound) -> str:
    """Return a row for each code index t: its term and standard error, and rate and distortion at x_t."""
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(["t", "bits_per_dim", "standard_error", "rate_bits_per_dim", "distortion_rmse"])
    rate, distortion = bound.rate_distortion()
    out.writerows(
        [t, *(repr(float(x)) for x in row)]
        for t, row in enumerate(zip(bound.terms.mean, bound.terms.standard_error, rate, distortion, strict=True))
    )
    return text.getvalue()


def curves_figure(name: str, bound: Bound) -> Any:
    """Return a figure: the bound's terms over t (Nichol & Dhariwal 2021, fig. 2), and distortion against rate (Ho et al. 2020, fig. 5)."""
    figure, style = new_figure(10.4, 4.2), line_style(0)
    over_t, trade = figure.subplots(1, 2)
    mean, error = bound.terms.mean, bound.terms.standard_error
    steps = np.arange(len(mean))
    over_t.plot(steps, mean, label=name, **style)
    if np.isfinite(error).all():
        lower = np.maximum(mean - error, mean / 10)
        over_t.fill_between(steps, lower, mean + error, color=style["color"], alpha=0.25, lw=0)
    rate, distortion = bound.rate_distortion()
    trade.plot(rate, distortion, label=name, **style)
    trade.plot(rate[:1], distortion[:1], "o", color=style["color"], ms=4)
    over_t.set_yscale("log")
    dress(over_t, "terms of the bound (t = 0: the decoder)", "bits/dim", "t")
    dress(trade, "rate and distortion (dot: t = 0)", "RMSE of the predicted image, of 255", "rate, bits/dim")
    trade.set_ylim(bottom=0)
    over_t.legend(frameon=False, fontsize=8.5)
    return figure
