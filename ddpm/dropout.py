"""Dropout whose masks are a function of (key of the image, layer, element): the same in any batch, on any device, in any memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 2**16  # of probability: an element is dropped where 16 random bits are below probability * LEVELS
GAMMA = -0x61C8864680B583EB  # the odd increment of SplitMix64, 2^64 / golden ratio, as a signed integer
CACHED = 2**16  # numbers mixed at once on a CPU: a dozen operations go over them
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


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
        # -1, all bits, for elements that are kept, else 0
        kept = random_bits(keys, self.layer, x.shape).ge_(dropped - LEVELS // 2).neg_()
        out: Tensor = _Masked.apply(x, kept, LEVELS / (LEVELS - dropped))
        return out


class _Masked(torch.autograd.Function):
    """x * scale where the mask is -1, and 0 where it is 0; by bits, since floating-point masks take four times as long to make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return x.view(INTEGERS[x.element_size()]).bitwise_and(mask).view(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        dx: Tensor = _Masked.apply(dy, mask, ctx.scale)
        return dx, None, None


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
    """The finalizer of SplitMix64, int64 -> int64; overwrites its argument, which is contiguous."""
    in_parts = state.device.type == "cpu" and not torch.compiler.is_compiling()
    for part in torch.split(state.view(-1), CACHED if in_parts else state.numel()):
        # ">>" of signed integers repeats the sign: the mask makes it the shift of unsigned ones
        part.bitwise_xor_((part >> 30).bitwise_and_(2**34 - 1)).mul_(-0x40A7B892E31B1A47)
        part.bitwise_xor_((part >> 27).bitwise_and_(2**37 - 1)).mul_(-0x6B2FB644ECCEEE15)
        part.bitwise_xor_((part >> 31).bitwise_and_(2**33 - 1))
    return state
