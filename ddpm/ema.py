"""Moving averages of a model's parameters, for sampling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage(ABC):
    """Averages parameters, never buffers, in float32 on their device.

    shadow <- decay * shadow + (1 - decay) * parameters, in float32 at least. Call `update` after the optimizer's step.
    The model may be wrapped by DDP or torch.compile: names are those of the bare module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_updates = 0
        self._parameters = dict(bare(model).named_parameters())
        self.shadow = {name: _wide(p.detach()).clone() for name, p in self._parameters.items()}

    @abstractmethod
    def next_decay(self) -> float:
        """The decay that the next update will use."""

    @torch.no_grad()
    def update(self) -> None:
        """Take the current parameters into the average."""
        current = [_wide(p.detach()) for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - self.next_decay())
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the parameters of `model`, cast to their dtype; its buffers stay.

        Copy into another instance than the one in training: training must not continue from averaged weights.
        """
        parameters = dict(bare(model).named_parameters())
        _check_like(parameters, self.shadow, "the model")
        for name, parameter in parameters.items():
            parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """{"num_updates": int, "shadow": {parameter name: tensor}}; the tensors are the live ones, not copies."""
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, keeping this average's own tensors; ValueError where names or shapes differ."""
        _check_like(state["shadow"], self.shadow, "the saved average")
        for name, tensor in self.shadow.items():
            tensor.copy_(state["shadow"][name])
        self.num_updates = int(state["num_updates"])


class ExponentialMovingAverage(WeightAverage):
    """Decay min(decay, (1 + n) / (10 + n)) after n updates: the initial weights fade. Without `ramp_up`, `decay`."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, ramp_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}, expected a number in [0, 1)")
        super().__init__(model)
        self.decay, self.ramp_up = decay, ramp_up

    def next_decay(self) -> float:
        """The decay that the next update will use."""
        n = self.num_updates
        return min(self.decay, (1 + n) / (10 + n)) if self.ramp_up else self.decay


def bare(model: nn.Module) -> nn.Module:
    """The module inside DDP's and torch.compile's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _wide(p: Tensor) -> Tensor:
    return p if p.dtype == torch.float64 else p.float()


def _check_like(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    odd = sorted(
        name
        for name in got.keys() | expected.keys()
        if name not in got or name not in expected or got[name].shape != expected[name].shape
    )
    if odd:
        raise ValueError(
            f"{what} and the average differ at parameters {', '.join(odd[:5])}; both must come from the same network"
        )
