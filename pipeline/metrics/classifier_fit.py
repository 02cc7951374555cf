"""Fitting the small classifier: bit for bit the same weights for the same images and torch release, on any number of cores.

It also sees noise and scrambled images, which belong to no class (Hendrycks et al. 2019, outlier exposure), so that its confidence is low
for images unlike the dataset, such as those of an untrained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.image_set import Images
from pipeline.metrics.classifier import Labels, SmallNetwork
from pipeline.training.optimizer import AdamW
from pipeline.training.threads import one_thread


@one_thread()
def fit(
    images: Images,
    labels: Labels,
    num_classes: int,
    *,
    width: int,
    num_steps: int,
    batch_size: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SmallNetwork:
    """Fit a network on uint8 images [n, C, H, W] and labels int64 [n] in 0 .. num_classes - 1.

    The same weights, bit for bit, for the same arguments, torch release and kind of processor.
    """
    shape = (images.shape[1], images.shape[2], images.shape[3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNetwork(shape, num_classes, width)
    generator = torch.Generator().manual_seed(seed)
    pool, targets = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)
    optimizer = AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=num_steps, pct_start=0.2)
    for step in range(num_steps):
        rows = torch.randint(len(pool), (batch_size,), generator=generator)
        real = _jitter(pool[rows], generator)
        strange = _outliers(pool[rows[: batch_size // 4]], generator)
        _, logits = network(torch.cat([real, strange]))
        log_p = functional.log_softmax(logits, dim=1)
        loss = functional.nll_loss(log_p[:batch_size], targets[rows]) - log_p[batch_size:].mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, num_steps)
    return network.eval()


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, stretch and shear each image by up to 0.15, shift it by up to a tenth, add faint noise. No flips: a flipped 2 is no 2."""
    n = len(images)
    angle, zoom_x, zoom_y, shear = 0.15 * (2 * torch.rand(4, n, generator=generator) - 1)
    shift = 0.2 * (2 * torch.rand(n, 2, generator=generator) - 1)
    turn = torch.stack([1 + zoom_x, shear - angle, angle, 1 + zoom_y], dim=1).view(n, 2, 2)
    grid = functional.affine_grid(torch.cat([turn, shift[:, :, None]], dim=2), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    scale = 16 * torch.rand(n, 1, 1, 1, generator=generator)
    return (moved + scale * torch.randn(moved.shape, generator=generator)).clamp(0, 255)


def _outliers(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many images of no class: one third noise of any contrast, one third smooth noise, one third scrambled pixels."""
    n, channels, height, width = images.shape
    third = max(1, n // 3)
    contrast = 64 * torch.exp(torch.randn(2 * third, 1, 1, 1, generator=generator))
    level = 255 * torch.rand(2 * third, channels, 1, 1, generator=generator)
    noise = torch.randn(third, channels, height, width, generator=generator)
    coarse = torch.randn(third, channels, math.ceil(height / 3), math.ceil(width / 3), generator=generator)
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False) * 1.5
    scrambled = images[2 * third :].float().flatten(2)
    order = torch.rand(len(scrambled), 1, height * width, generator=generator).argsort(-1)
    scrambled = scrambled.gather(2, order.expand_as(scrambled)).view(-1, channels, height, width)
    return torch.cat([(level + contrast * torch.cat([noise, smooth])).clamp(0, 255), scrambled])
