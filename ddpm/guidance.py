"""Class labels: dropping them in training, and guidance without a classifier in sampling (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion import Model

ConditionalModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], t [B], y [B] int64) -> prediction."""


def drop_labels(y: Tensor, u: Tensor, probability: float, null_class: int) -> Tensor:
    """Labels [B] of which each is replaced by `null_class` with `probability`, 0.1 to 0.2 in the paper.

    `u` [B] are uniform numbers in [0, 1), one for each label: those below the probability drop theirs.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} of dropping a label, expected a number in [0, 1]")
    return torch.where(u < probability, torch.full_like(y, null_class), y)


def conditioned(model: ConditionalModel, y: Tensor) -> Model:
    """`model` with its labels bound: (x_t, t) -> prediction."""
    return lambda x_t, t: model(x_t, t, y)


def guided(conditional: Model, unconditional: Model, scale: float) -> Model:
    """unconditional + scale * (conditional - unconditional), Ho & Salimans 2022, eq. 6, with scale s = 1 + w.

    1 is no guidance (the unconditional network is not called then), 0 ignores the label; otherwise a step costs two
    network calls. The same scale does the same on eps, x0 and v. A learned variance is the conditional network's. x0 is
    clipped afterwards, by the sampler.
    """
    if scale == 1:
        return conditional

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        with_label, without = conditional(x_t, t), unconditional(x_t, t)
        channels = x_t.shape[1]
        mixed = torch.lerp(without[:, :channels], with_label[:, :channels], scale)
        return torch.cat([mixed, with_label[:, channels:]], 1)

    return model
