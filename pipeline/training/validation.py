"""Losses while training: on images that are not trained on, and on as many that are. The gap between the two shows overfitting.

Each image is measured at the same t and with the same noise every time, both functions of (seed, row), by averaged weights in
float32. Workers share the images in canonical chunks, so that one checkpoint has the same values for any number of workers with
equal threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm import GaussianDiffusion, Model, conditioned, estimate_bound, range_midpoints, simple_losses
from pipeline.config.experiment import Experiment
from pipeline.data.image_set import ImageSet, Rows
from pipeline.data.images import to_float
from pipeline.data.labels import ClassNames, model_labels
from pipeline.training.chunks import chunks_of
from pipeline.training.device import Compute, exact_inference
from pipeline.training.models import build_diffusion
from pipeline.training.randomness import image_generators
from pipeline.training.team import Team

STEP_CALLS = 3  # network calls that cost what training does to an image: forwards once, backwards twice as much
NUM_TERMS = 4  # of the bound, drawn for each image
SHARE = 0.02  # of the training's network calls, by default

_CHUNK = 32


@dataclass(frozen=True)
class ValidationPlan:
    """How often a training validates, and what that costs, in network calls for one image and forwards only.

    `every_steps` is None where a single validation would take more than `SHARE` of the training's calls.
    """

    every_steps: int | None
    num_images: int
    calls: int
    times: int
    share: float

    @property
    def why_never(self) -> str:
        """Why no step is due, in words; "" where some are."""
        if self.every_steps is not None:
            return ""
        return (
            f"one with {self.num_images} images costs {self.calls:,} network calls, more than {SHARE:.0%} of so short a training's; "
            "set validation.every_steps, or fewer validation.num_images"
        )

    def is_due(self, step: int, last: bool) -> bool:
        """Return whether to validate after a step: every so many, and after the last one."""
        return self.every_steps is not None and (step % self.every_steps == 0 or last)


def plan_validation(experiment: Experiment) -> ValidationPlan | None:
    """Return how an experiment validates; None if it names no images for that."""
    settings, training = experiment.validation, experiment.training
    if settings.split is None and not settings.holdout:
        return None
    calls_per_image = len(range_midpoints(experiment.diffusion.num_timesteps)) + 1 + NUM_TERMS
    calls = 2 * settings.num_images * calls_per_image
    whole = STEP_CALLS * training.batch_size * training.steps
    every = settings.every_steps
    if every is None and (times := int(SHARE * whole / calls)):
        every = math.ceil(training.steps / times)
    times = 0 if every is None else math.ceil(training.steps / every)  # the last step too
    return ValidationPlan(every, settings.num_images, calls, times, times * calls / whole)


def rows_to_validate(num_rows: int, num_images: int) -> Rows:
    """Return equidistant rows: of images in the order of their classes, about as many of each."""
    count = min(num_rows, num_images)
    rows: Rows = (torch.arange(count) * num_rows // count).numpy()
    return rows


class Validation:
    """The images of one training's validations: those held out or of another split, then as many of those trained on."""

    def __init__(
        self, experiment: Experiment, validation: ImageSet, training: ImageSet, class_names: ClassNames
    ) -> None:
        self._diffusion = build_diffusion(experiment)
        self._seed, self._class_names = experiment.seed, class_names
        self._timesteps = range_midpoints(self._diffusion.num_timesteps)
        count = min(validation.manifest.num_rows, training.manifest.num_rows, experiment.validation.num_images)
        self._sets = [(images, rows_to_validate(images.manifest.num_rows, count)) for images in (validation, training)]
        self._chunks = [(part, indices) for part in range(2) for indices in chunks_of(count, _CHUNK)]
        self._read: dict[int, tuple[Tensor, Tensor | None]] = {}

    def measure(
        self, model: nn.Module, compute: Compute, team: Team, stop_requested: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Return the figures of a network with averaged weights, on every worker; None if a stop was requested meanwhile.

        All workers of a team call this together.
        """
        model.eval()
        values = torch.zeros(2, len(self._sets[0][1]), len(self._timesteps) + 1, dtype=torch.float64)
        for begin in range(0, len(self._chunks), team.size):
            if team.decide(stop_requested())[0]:
                return None
            mine = begin + team.rank
            if mine < len(self._chunks):
                part, indices = self._chunks[mine]
                values[part, indices.start : indices.stop] = self._measure(mine, model, compute)
        values = team.all_reduce(values)  # what others measure is 0 here
        return self._figures("", values[0]) | self._figures("train_", values[1])

    def _measure(self, chunk: int, model: nn.Module, compute: Compute) -> Tensor:
        """Return the losses at each t and the bound of the images of a chunk [n, num_t + 1], float64 on the CPU."""
        part, indices = self._chunks[chunk]
        images, all_rows = self._sets[part]
        rows = all_rows[indices.start : indices.stop]
        if chunk not in self._read:
            labels = torch.from_numpy(model_labels(images, rows, self._class_names)) if self._class_names else None
            self._read[chunk] = torch.from_numpy(images.read(rows)), labels
        pixels, labels = self._read[chunk]
        network: Model = model if labels is None else conditioned(model, compute.send(labels))
        with exact_inference(compute.device):
            values = measure_images(self._diffusion, network, compute.send(to_float(pixels)), rows, self._seed)
        return values.cpu().double()

    def _figures(self, prefix: str, values: Tensor) -> dict[str, float]:
        """Return the figures of some images from their values [n, num_t + 1]."""
        losses, bound = values[:, :-1].mean(0).tolist(), values[:, -1]
        by_t = {f"{prefix}loss_t_{t}": loss for t, loss in zip(self._timesteps, losses, strict=True)}
        figures = {f"{prefix}loss": sum(losses) / len(losses), **by_t, f"{prefix}bound_estimate": float(bound.mean())}
        if len(bound) > 1:
            figures[f"{prefix}bound_estimate_error"] = float(bound.std()) / math.sqrt(len(bound))
        return figures


def measure_images(diffusion: GaussianDiffusion, model: Model, x0: Tensor, rows: Rows, seed: int) -> Tensor:
    """Return L_simple at the middle of eight ranges of t, and the estimated bound in bits/dim, of images x0 [n,C,H,W]: [n, num_t + 1].

    t and noise of an image are functions of (seed, row).
    """
    generators = [image_generators(seed, range(row, row + 1), "validation")[0] for row in rows.tolist()]
    losses = simple_losses(diffusion, model, x0, range_midpoints(diffusion.num_timesteps), generator=generators)
    bound = estimate_bound(diffusion, model, x0, generator=generators, num_terms=NUM_TERMS)
    return torch.cat([losses, bound.total[:, None]], 1)
