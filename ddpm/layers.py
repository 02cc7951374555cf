"""The parts of the U-Net: Glorot-initialised layers, time embedding, residual block, attention, resampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm.dropout import Dropout
from ddpm.norm import norm_silu

ZERO_GAIN = 1e-5  # Ho's "zero" layers have variance scale 1e-10: every block starts as (about) the identity
FEW_PIXELS = 256  # 16x16, where the paper attends
REFERENCE_STEPS = 1000  # the embedding spans this range of t whatever the number of steps


def conv(n_in: int, n_out: int, kernel: int = 3, *, stride: int = 1, padding: int = 1, gain: float = 1.0) -> nn.Conv2d:
    """A convolution with Glorot-uniform weights times `gain` and zero biases."""
    layer = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=padding)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def linear(n_in: int, n_out: int, *, gain: float = 1.0, parts: int = 1) -> nn.Linear:
    """`parts` dense layers side by side: Glorot-uniform weights by the fan of each, times `gain`; zero biases."""
    layer = nn.Linear(n_in, parts * n_out)
    with torch.no_grad():
        for part in layer.weight.chunk(parts):
            nn.init.xavier_uniform_(part, gain)
    nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """t [B] -> [B, 4 channels]: sinusoids of t * 1000 / T, then two dense layers; float32 also under autocast.

    Sine before cosine unless `flip_sin_to_cos`; frequencies 10000 ** (-i / (half - freq_shift)).
    """

    def __init__(self, channels: int, num_timesteps: int, flip_sin_to_cos: bool, freq_shift: int) -> None:
        super().__init__()
        self.num_waves, self.freq_shift, self.flip = channels // 2, freq_shift, flip_sin_to_cos
        self.scale = REFERENCE_STEPS / num_timesteps
        self.width = 4 * channels
        self.dense1 = linear(channels, self.width)
        self.dense2 = linear(self.width, self.width)

    def forward(self, t: Tensor) -> Tensor:
        """The embedding [B, 4 channels] of code indices t [B]."""
        with torch.autocast(t.device.type, enabled=False):
            waves = self.waves(t.float() * self.scale).to(self.dense1.weight.dtype)
            embedding: Tensor = self.dense2(functional.silu(self.dense1(waves)))
        return embedding

    def waves(self, position: Tensor) -> Tensor:
        """The sinusoids [B, channels] of positions [B] on the range of 1000 steps, float32."""
        index = torch.arange(self.num_waves, dtype=torch.float32, device=position.device)
        frequencies = torch.exp(index * (-math.log(10000) / (self.num_waves - self.freq_shift)))
        angles = position[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()) if self.flip else (angles.sin(), angles.cos()), 1)


class ResidualBlock(nn.Module):
    """norm, swish, convolution; plus the projected embedding; norm, swish, dropout, convolution; plus the input.

    With `scale_shift` the embedding instead scales and shifts the second norm (Nichol & Dhariwal 2021).
    """

    def __init__(
        self, n_in: int, n_out: int, embedding: int, dropout: Dropout, groups: int, eps: float, scale_shift: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, n_in, eps)
        self.conv1 = conv(n_in, n_out)
        self.project = linear(embedding, 2 * n_out if scale_shift else n_out)
        self.norm2 = nn.GroupNorm(groups, n_out, eps)
        self.dropout = dropout
        self.conv2 = conv(n_out, n_out, gain=ZERO_GAIN)
        self.shortcut = conv(n_in, n_out, 1, padding=0) if n_in != n_out else nn.Identity()
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, activated: Tensor, keys: Tensor | None = None) -> Tensor:
        """x [B,n_in,H,W], the embedding after its swish, and the keys of the dropout masks -> [B,n_out,H,W]."""
        h = self.conv1(norm_silu(self.norm1, x))
        embedded = self.project(activated)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, 1)
            h = functional.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = norm_silu(self.norm2, h + embedded)
        out: Tensor = self.shortcut(x) + self.conv2(self.dropout(h, keys))
        return out


class Attention(nn.Module):
    """Self-attention over the pixels of a level, added to its input."""

    def __init__(self, channels: int, num_heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.qkv = linear(channels, channels, parts=3)
        self.out = linear(channels, channels, gain=ZERO_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        B, C, H, W = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B,HW,C]: a view where x is channels_last
        q, k, v = self.qkv(pixels).view(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = _attend(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        out: Tensor = self.out(mixed)
        return x + out.transpose(1, 2).reshape(B, C, H, W)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of [B,heads,N,d]."""
    # The fused kernel's backward is slow on CPUs, four times so in bfloat16, and saves nothing where N x N is small.
    if q.device.type == "cpu" and q.requires_grad and q.shape[-2] <= FEW_PIXELS:
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        mixed: Tensor = weights.to(v.dtype) @ v
        return mixed
    return functional.scaled_dot_product_attention(q, k, v)


class UNetBlock(nn.Module):
    """A residual block, followed by attention with `num_heads` heads unless that is None."""

    def __init__(self, residual: ResidualBlock, attention: Attention | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention if attention is not None else nn.Identity()

    def forward(self, x: Tensor, activated: Tensor, keys: Tensor | None = None) -> Tensor:
        """As `ResidualBlock`."""
        out: Tensor = self.attention(self.residual(x, activated, keys))
        return out


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2; `padding` 0 pads at right and bottom only, as Ho's "SAME" does on even sizes."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, stride=2, padding=padding)
        self.pads = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H/2,W/2]."""
        out: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)) if self.pads else x)
        return out


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,2H,2W]."""
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return out
