"""One picture of noise schedules: what they leave of an image at every step, as curves and on a real image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm import BetaSchedule, GaussianDiffusion
from pipeline.data.images import to_float, to_uint8
from pipeline.pictures.charts import INK, dress, line_style, new_figure, save_figure
from pipeline.pictures.schedule_report import curves

if TYPE_CHECKING:
    from pipeline.data.shards import Dataset

_FRAMES = 11
_LEAST_LOG_SNR, _LEAST_WEIGHT = -25.0, 1e-7  # the axes end here: some schedules go on for ever


def draw_schedules(schedules: Sequence[BetaSchedule], image: Tensor, variance: float, path: Path) -> None:
    """Write `schedules_figure` as a PNG; raises StorageError if that fails."""
    save_figure(schedules_figure(schedules, image, variance), path)


def schedules_figure(schedules: Sequence[BetaSchedule], image: Tensor, variance: float) -> Any:
    """Return a figure: four curves for each schedule, and a strip of one image noised at equal steps.

    Args:
        schedules: the same noise is added under each.
        image: uint8 [C, H, W] with one channel or three (of others the first is drawn).
        variance: of the pixels of such images, on [-1, 1].
    """
    height, width = image.shape[1:]
    cell = 9.6 / (_FRAMES + 1.6)
    strip = 0.45 + len(schedules) * cell * min(height / width, 2.0)
    figure = new_figure(10.4, 6.9 + strip)
    upper, lower = figure.subfigures(2, 1, height_ratios=[6.9, strip])
    (abar, log_snr), (marginal, weight) = upper.subplots(2, 2)
    alike = len({schedule.num_timesteps for schedule in schedules}) == 1
    for i, schedule in enumerate(schedules):
        line = line_style(i)
        T = schedule.num_timesteps
        steps = torch.arange(T) if alike else torch.arange(T) / (T - 1)
        curve = curves(schedule, variance)
        abar.plot(steps, curve.alphas_cumprod, label=_name(schedule, alike), **line)
        log_snr.plot(steps, _finite(curve.log_snr), **line)
        marginal.plot(steps, curve.marginal_variance, **line)
        weight.plot(steps, _finite(curve.x0_weight), **line)
    dress(abar, "what is left of the image", r"$\bar\alpha_t$")
    dress(log_snr, "signal to noise", r"$\log\ \bar\alpha_t / (1 - \bar\alpha_t)$")
    dress(marginal, f"variance of a pixel of $x_t$, from {variance:.2f} in the images to 1", r"Var $x_t$")
    dress(weight, r"weight of $x_0$ in the mean of $q(x_{t-1} \mid x_t, x_0)$", r"coefficient of $x_0$")
    weight.set_yscale("log")
    abar.set_ylim(-0.02, 1.02)
    bottom, top = log_snr.get_ylim()
    log_snr.set_ylim(max(bottom, _LEAST_LOG_SNR), min(top, float(max(s.snr[0] for s in schedules).log()) + 1))
    weight.set_ylim(bottom=max(weight.get_ylim()[0], _LEAST_WEIGHT), top=2)
    for axes in (marginal, weight):
        axes.set_xlabel("t" if alike else "t / (T - 1)", color=INK)
    upper.legend(loc="outside upper center", ncols=min(len(schedules), 5), frameon=False, fontsize=10)
    _draw_strip(lower, schedules, image, alike)
    return figure


def example_digit() -> tuple[Tensor, float]:
    """Return a real image, uint8 [1, 8, 8], that needs no data to be at hand, and the variance of the pixels of its kind on [-1, 1]."""
    from pipeline.ingest.sources import digits

    pixels = torch.stack([torch.from_numpy(item.image).permute(2, 0, 1) for item in digits().items()])
    return pixels[0], float(to_float(pixels).var())


def example_of(dataset: Dataset) -> tuple[Tensor, float]:
    """Return the first image of a dataset, uint8 [C, H, W], and the variance of its pixels on [-1, 1]."""
    import numpy as np

    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (dataset.manifest.mean, dataset.manifest.std))
    variance = (mean.square() + std.square()).mean() - mean.mean().square()
    return torch.from_numpy(dataset.read(np.array([0]))[0]), float(variance)


def _draw_strip(figure: Any, schedules: Sequence[BetaSchedule], image: Tensor, alike: bool) -> None:
    """Draw rows of the image from x_0 to x_{T-1}, the noise of one draw growing in all of them alike."""
    x0 = to_float(image)[None]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    cells = figure.subplots(len(schedules), _FRAMES, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for i, (row, schedule) in enumerate(zip(cells, schedules, strict=True)):
        diffusion = GaussianDiffusion(schedule, prediction="x0")
        T = schedule.num_timesteps
        for k, axes in enumerate(row):
            t = round(k * (T - 1) / (_FRAMES - 1))
            x = x0 if k == 0 else diffusion.q_sample(x0, torch.tensor([t]), eps)
            axes.imshow(_drawable(to_uint8(x)[0]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if i == 0:
                at = f"t = {t}" if alike else f"{k / (_FRAMES - 1):.0%} of T"
                axes.set_title(r"$x_0$" if k == 0 else at, fontsize=8.5, color=INK, pad=3)
        row[0].set_ylabel(
            _name(schedule, alike),
            rotation=0,
            ha="right",
            va="center",
            color=line_style(i)["color"],
            fontsize=9,
            labelpad=6,
        )


def _drawable(pixels: Tensor) -> Any:
    """uint8 [C, H, W] -> [H, W, 3], or [H, W] of the first channel where there are not three."""
    return (pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]).numpy()


def _finite(values: Tensor) -> Tensor:
    """Values with a gap where log 0 is not drawn."""
    return torch.where(torch.isfinite(values) & (values != 0), values, math.nan)


def _name(schedule: BetaSchedule, alike: bool) -> str:
    return schedule.name if alike else f"{schedule.name}, T = {schedule.num_timesteps}"
