"""GroupNorm followed by SiLU, with a backward pass of few large operations where torch's own is slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Milliseconds of CPU of both backward passes, 8 images in bfloat16, channels x side in 32 groups, torch's and ours: 128x32 13.5 and 3.9,
# 256x32 17.4 and 7.4, 256x16 4.6 and 2.3, but 512x16 2.4 and 3.7, 256x8 0.9 and 1.0. In float32 ours is never faster.
MANY_PIXELS, SOME_PIXELS = 32 * 32, 16 * 16
WIDE_GROUP = 16  # channels that torch adds up as one vector, below MANY_PIXELS


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) of [B,C,H,W]."""
    if _is_slow_in_torch(x, norm.num_groups):
        out: Tensor = _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        return out
    return functional.silu(norm(x))


def _is_slow_in_torch(x: Tensor, num_groups: int) -> bool:
    """Whether to differentiate by hand: large bfloat16 images in channels_last memory on a CPU, where no compiler fuses operations."""
    pixels, group = x.shape[2] * x.shape[3], x.shape[1] // num_groups
    return (
        x.device.type == "cpu"
        and x.dtype is torch.bfloat16
        and x.requires_grad
        and (pixels >= MANY_PIXELS or (pixels >= SOME_PIXELS and group < WIDE_GROUP))
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


class _NormSiLU(torch.autograd.Function):
    """y = silu(u), u = a x + b with a = rstd * weight, b = bias - a * mean, for each group of an image.

    With du = dy * silu'(u), N elements in a group, and over a group S1 = sum(weight * du), S2 = sum(weight * du * x):
    dx = a du + k1 x + k2, where k1 = rstd^3 (mean * S1 - S2) / N and k2 = -k1 * mean - rstd * S1 / N.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        B, C, H, W = x.shape
        u, mean, rstd = torch.native_group_norm(x, weight, bias, B, C, H * W, num_groups, eps)
        ctx.save_for_backward(x, u, mean, rstd, weight)
        return functional.silu(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, u, mean, rstd, weight = ctx.saved_tensors
        B, C, H, W = x.shape
        pixels = _pixels(x)
        du = torch.ops.aten.silu_backward(_pixels(dy), _pixels(u))
        # Sums over the pixels as products with ones: matrix units add up bfloat16 in float32.
        ones = x.new_ones(1, 1, H * W).expand(B, 1, H * W)
        groups = (B, mean.shape[1], C // mean.shape[1])
        sum_du, sum_du_x = (torch.bmm(ones, part).to(weight.dtype).view(groups) for part in (du, du * pixels))
        mean, rstd, weights = mean[..., None], rstd[..., None], weight.view(groups[1:])
        s1, s2 = ((weights * part).sum(2, keepdim=True) for part in (sum_du, sum_du_x))
        num_elements = H * W * groups[2]
        # k2 belongs to k1 as it was rounded: where the mean is large, they nearly cancel.
        k1 = (rstd**3 * (mean * s1 - s2) / num_elements).to(x.dtype)
        k2 = -k1.to(weight.dtype) * mean - rstd * s1 / num_elements
        of_channels = [k.to(x.dtype).expand(groups).reshape(B, 1, C) for k in (k2, k1, rstd * weights)]
        dx = torch.addcmul(of_channels[0], pixels, of_channels[1]).addcmul_(du, of_channels[2])
        dweight = (rstd * (sum_du_x - mean * sum_du)).sum(0).view(C)
        return dx.view(B, H, W, C).permute(0, 3, 1, 2), dweight, sum_du.sum(0).view(C), None, None


def _pixels(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,HW,C]: a view of channels_last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
