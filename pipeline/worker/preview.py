"""Images of a model in training: from a copy of its averaged weights, with the same noise every time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pipeline.config.experiment import Experiment, SamplingConfig
from pipeline.data.labels import ClassNames
from pipeline.metrics.metric_identity import Generation
from pipeline.sampling.generation import ImageGenerator, early_sampling, early_seed, make_sampler
from pipeline.training.chunks import chunks_of
from pipeline.training.device import Compute
from pipeline.training.loop import TrainState
from pipeline.training.models import Shape
from pipeline.training.team import Team
from pipeline.training.threads import side_by_side


class Preview:
    """A second network, which is sampled while the first is trained."""

    def __init__(self, experiment: Experiment, shape: Shape, class_names: ClassNames) -> None:
        self._experiment, self._shape, self._class_names = experiment, shape, class_names
        self.model: nn.Module | None = None

    def copy(self, train_state: TrainState) -> None:
        """Copy the current averaged weights."""
        if self.model is None:
            self.model = copy.deepcopy(train_state.model)
        self.model.load_state_dict(train_state.model.state_dict())  # for the buffers, which are not averaged
        train_state.ema.copy_to(self.model)

    def images(self, count: int, compute: Compute) -> Tensor:
        """Return uint8 images [count, C, H, W] from the copied weights, sampled as the run's own."""
        sampling = self._experiment.sampling
        sampling = sampling.model_copy(update={"batch_size": min(count, sampling.batch_size)})
        return torch.cat(list(self._sampler(sampling, self._experiment.seed, compute).generate(count)))

    def scored_images(self, count: int, compute: Compute, team: Team) -> tuple[Tensor, Generation]:
        """Return the images that are scored while training, and how they were generated; each worker generates a share of the chunks."""
        sampler = self._sampler(early_sampling(self._experiment, count), early_seed(self._experiment), compute)
        images = torch.zeros(count, *self._shape, dtype=torch.uint8)
        mine = chunks_of(count, sampler.chunk_size)[team.rank :: team.size]
        found = side_by_side(sampler.images, mine, *sampler.split_threads(len(mine)))
        for indices, part in zip(mine, found, strict=True):
            images[indices.start : indices.stop] = part
        return team.all_reduce(images), sampler.identity("ema")

    def _sampler(self, sampling: SamplingConfig, seed: int, compute: Compute) -> ImageGenerator:
        assert self.model is not None
        return make_sampler(self._experiment, self.model, self._shape, sampling, seed, compute, self._class_names)
