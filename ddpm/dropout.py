"""Dropout whose masks are a function of (key of the image, layer, element): the same in any batch, on any device, in any memory format."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 2**16  # of probability: an element is dropped where 16 random bits are below probability * LEVELS
GAMMA = -0x61C8864680B583EB  # the odd increment of SplitMix64, 2^64 / golden ratio, as a signed integer


class Dropout(nn.Module):
    """Zeroes elements with a probability, and scales the others by 1 / (1 - probability), in training.

    `layer` numbers the dropout layers of a network: each has masks of its own. Without keys, torch's own generator draws.
    """

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x [B,C,H,W] and a random key for each image [B] int64 -> [B,C,H,W]."""
        if keys is None or not self.training or self.probability == 0:
            return functional.dropout(x, self.probability, self.training)
        dropped = round(self.probability * LEVELS)
        kept = random_bits(keys, self.layer, x.shape) >= dropped - LEVELS // 2
        return x * kept.to(x.dtype) * (LEVELS / (LEVELS - dropped))


def random_bits(keys: Tensor, layer: int, shape: torch.Size) -> Tensor:
    """16 random bits for each element of [B,C,H,W], as int16: SplitMix64 (Steele et al. 2014) with four elements to a number.

    Elements count in the order H, W, C, which is that of channels_last memory.
    """
    B, C, H, W = shape
    start = mixed(keys + ((layer * GAMMA + 2**63) % 2**64 - 2**63))  # as int64 would wrap
    counter = torch.arange((C * H * W + 3) // 4, device=keys.device) * GAMMA
    bits = mixed(start[:, None] + counter).view(torch.int16)[:, : C * H * W]
    return bits.view(B, H, W, C).permute(0, 3, 1, 2)


def mixed(state: Tensor) -> Tensor:
    """The finalizer of SplitMix64, int64 -> int64; overwrites its argument."""
    # ">>" of signed integers repeats the sign: the mask makes it the shift of unsigned ones
    state.bitwise_xor_((state >> 30).bitwise_and_(2**34 - 1)).mul_(-0x40A7B892E31B1A47)
    state.bitwise_xor_((state >> 27).bitwise_and_(2**37 - 1)).mul_(-0x6B2FB644ECCEEE15)
    return state.bitwise_xor_((state >> 31).bitwise_and_(2**33 - 1))
