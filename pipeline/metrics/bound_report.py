"""The report of a measured bound: figures with their standard errors, and curves over t as numbers and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.metrics.bound import PARTS, Bound, mean_and_error
from pipeline.metrics.metric_identity import BoundIdentity
from pipeline.metrics.score_table import aligned, with_spread
from pipeline.metrics.scores import SCORES_FILE, Spread
from pipeline.pictures.charts import dress, line_style, new_figure, save_figure
from pipeline.storage.durable import write_atomically
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
class Measured:
    """A bound and its identity; `label` ends its tracked names unless it is that of the run's usual weights and seed."""

    bound: Bound
    identity: BoundIdentity
    label: str = ""

    @property
    def identities(self) -> dict[str, BoundIdentity]:
        """Identities of the total and its parts, by name."""
        metrics = [self.identity.metric, *(f"{self.identity.metric}_{part}" for part in PARTS)]
        return {identity.key: identity for identity in map(self.identity.named, metrics)}

    @property
    def values(self) -> dict[str, float]:
        """Means over images, bits per dimension: the total and its parts, by name."""
        return {key: mean for key, (mean, _) in self._figures().items()}

    @property
    def spreads(self) -> dict[str, Spread]:
        """Standard errors of the means, by the same names; {} for one image."""
        count = len(self.bound.prior)
        if count == 1:
            return {}
        over = f"{count} images (standard error)"
        return {key: Spread(error, over, standard_error=error) for key, (_, error) in self._figures().items()}

    def _figures(self) -> dict[str, tuple[float, float]]:
        columns = [self.bound.total, *(getattr(self.bound, part) for part in PARTS)]
        return {key: mean_and_error(values) for key, values in zip(self.identities, columns, strict=True)}

    def flat(self) -> dict[str, float]:
        """Return all numbers by the names that a tracking server gets."""
        errors = {
            self.identities[k].named(f"{self.identities[k].metric}_{s.suffix}").key: s.value
            for k, s in self.spreads.items()
        }
        return self.values | errors

    def to_json(self) -> dict[str, Any]:
        """Return figures and identities as plain data, in the form of sample metrics' scores."""
        return {
            "format": _FORMAT,
            "values": self.values,
            "identities": {key: identity.to_json() for key, identity in self.identities.items()},
            "spreads": {key: spread.to_json() for key, spread in self.spreads.items()},
        }

    def lines(self) -> list[str]:
        values, spreads = self.values, self.spreads
        rows = [["", "bits/dim"], *([key, with_spread(values[key], spreads.get(key))] for key in values)]
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
        ]


def write_measured(measured: Measured, folder: Path, about: Mapping[str, Any] | None = None) -> list[Path]:
    """Write figures (with `about` as further keys), bits per image, curves and a picture into a folder; return their paths."""
    make_folder(folder)
    paths = {name: folder / name for name in (SCORES_FILE, BOUND_FILE, CURVES_FILE, PICTURE_FILE)}
    write_atomically(
        paths[SCORES_FILE], (json.dumps({**(about or {}), **measured.to_json()}, indent=1) + "\n").encode()
    )
    write_atomically(paths[BOUND_FILE], pack(measured.bound.to_arrays(), measured.identity.to_json()))
    write_atomically(paths[CURVES_FILE], curves_csv(measured.bound).encode())
    save_figure(curves_figure([(measured.identity.key, measured.bound)]), paths[PICTURE_FILE])
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


def curves_figure(bounds: list[tuple[str, Bound]]) -> Any:
    """Return a figure: the bound's terms over t (Nichol & Dhariwal 2021, fig. 2), and distortion against rate (Ho et al. 2020, fig. 5)."""
    figure = new_figure(10.4, 4.2)
    over_t, trade = figure.subplots(1, 2)
    for i, (name, bound) in enumerate(bounds):
        style = line_style(i)
        steps = np.arange(len(bound.terms.mean))
        mean, error = bound.terms.mean, bound.terms.standard_error
        over_t.plot(steps, mean, label=name, **style)
        if np.isfinite(error).all():
            over_t.fill_between(
                steps, np.maximum(mean - error, mean / 10), mean + error, color=style["color"], alpha=0.25, lw=0
            )
        rate, distortion = bound.rate_distortion()
        trade.plot(rate, distortion, label=name, **style)
        trade.plot(rate[:1], distortion[:1], "o", color=style["color"], ms=4)
    over_t.set_yscale("log")
    dress(over_t, "terms of the bound (t = 0: the decoder)", "bits/dim", "t")
    dress(trade, "rate and distortion (dot: t = 0)", "RMSE of the predicted image, of 255", "rate, bits/dim")
    trade.set_ylim(bottom=0)
    over_t.legend(frameon=False, fontsize=8.5)
    return figure
