"""Images of a model in training: from a copy of its averaged weights, with the same noise every time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pipeline.config.experiment import Experiment
from pipeline.data.labels import ClassNames
from pipeline.metrics.metric_identity import Generation
from pipeline.sampling.generation import make_sampler
from pipeline.training.device import Compute
from pipeline.training.loop import TrainState
from pipeline.training.models import Shape


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

    def images(self, count: int, compute: Compute) -> tuple[Tensor, Generation]:
        """Return uint8 images [count, C, H, W] from the copied weights, and how they were generated."""
        assert self.model is not None
        experiment = self._experiment
        batch_size = min(count, experiment.sampling.batch_size)
        sampling = experiment.sampling.model_copy(update={"batch_size": batch_size})
        sampler = make_sampler(
            experiment, self.model, self._shape, sampling, experiment.seed, compute, self._class_names
        )
        return torch.cat(list(sampler.generate(count))), sampler.identity("ema")
