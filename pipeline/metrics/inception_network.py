"""The Inception v3 of the original FID code: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2015, table 1), for its published weights.

Parameters are named as in the published file of the weights and in torchvision. Where the graph differs from torchvision's network:
averages leave padding out, the last block takes the maximum in their place, and there are 1008 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models import inception

SIDE = 299


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _Block35(inception.InceptionA):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _Block17(inception.InceptionC):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_average(x))], 1)


class _Block8(inception.InceptionE):  # type: ignore[misc]
    maximum = False

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        ends = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        ends += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *ends, self.branch_pool(pooled)], 1)


class InceptionV3(inception.Inception3):  # type: ignore[misc]
    """Images [n, 1 or 3, H, W] of 0 .. 255 -> features [n, 2048] and logits [n, 1008], these without their bias."""

    def __init__(self) -> None:
        blocks = [
            *(inception.BasicConv2d, _Block35, inception.InceptionB, _Block17, inception.InceptionD, _Block8),
            inception.InceptionAux,
        ]
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c.maximum = True
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of images of any size, uint8 or float."""
        x = (resized(images.expand(-1, 3, -1, -1).float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resized(x: Tensor, side: int) -> Tensor:
    """Resize x [n, C, H, W] bilinearly to side x side, as TensorFlow 1 does: pixel i of the result is at i H / side, without antialias."""
    top, bottom, down = _places(x.shape[2], side, x)
    left, right, along = _places(x.shape[3], side, x)
    upper, lower = x[:, :, top], x[:, :, bottom]
    above, below = (row[..., left] + (row[..., right] - row[..., left]) * along for row in (upper, lower))
    return above + (below - above) * down[:, None]


def _places(length: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the neighbours before and after each of `side` places, and the distance from the first neighbour."""
    at = torch.arange(side, dtype=torch.float32, device=like.device) * torch.tensor(length / side, dtype=torch.float32)
    first = at.floor().long()
    return first, (first + 1).clamp(max=length - 1), at - first
