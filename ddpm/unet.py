"""The U-Net of Ho et al. 2020, appendix B, and the variants of Nichol & Dhariwal 2021.

With its defaults it is the paper's network for CIFAR-10, layer for layer: 35,746,307 parameters. Any callable
(x_t, t) -> prediction can stand in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ddpm.dropout import Dropout
from ddpm.layers import ZERO_GAIN, Attention, Downsample, ResidualBlock, TimeEmbedding, UNetBlock, Upsample, conv
from ddpm.norm import norm_silu


class UNet(nn.Module):
    """(x_t [B,C,H,W], t [B] int64, y [B] int64 with `num_classes`) -> [B,out_channels,H,W].

    Levels halve the resolution. Level i has channels * channel_multipliers[i] channels and `num_res_blocks` residual
    blocks, each followed by attention where the longer side of the level is in `attention_resolutions`; the middle
    always has attention. Both sides of an image must be multiples of 2 ** (levels - 1); sizes other than `image_size`
    that fit are taken too.

    `num_heads` heads, or as many as give `head_channels` channels each. `norm_groups` must divide `channels`: narrow
    networks need fewer than 32. `num_classes` adds a label embedding with a learned null class, of index `num_classes`,
    for guidance without a classifier. Nichol & Dhariwal's network has num_heads 4, scale_shift_norm True, norm_eps
    1e-5, flip_sin_to_cos True, freq_shift 0 and downsample_padding 1 (symmetric; 0 pads at right and bottom only).

    Training keeps the inputs alone of the layers of the first `activation_checkpointing` levels, and computes these layers
    again in the backward pass (Chen et al. 2016): less memory, more time, the same numbers.
    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        *,
        image_size: int | Sequence[int] = 32,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        num_timesteps: int = 1000,
        num_classes: int | None = None,
        num_heads: int = 1,
        head_channels: int | None = None,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        scale_shift_norm: bool = False,
        flip_sin_to_cos: bool = False,
        freq_shift: int = 1,
        downsample_padding: int = 0,
        activation_checkpointing: int = 0,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        _check_widths(in_channels, channels, channel_multipliers, num_res_blocks, num_timesteps)
        _check_norm(channels, norm_groups, freq_shift)
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes}, expected a positive integer, or None for no labels")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}, expected a number in [0, 1)")
        self.in_channels, self.num_classes = in_channels, num_classes
        self.size_multiple = 2 ** (len(channel_multipliers) - 1)
        self.activation_checkpointing = activation_checkpointing
        self._check_size(height, width)
        sides = [max(height, width) >> level for level in range(len(channel_multipliers))]
        _check_attention(attention_resolutions, sides)

        self.embedding = TimeEmbedding(channels, num_timesteps, flip_sin_to_cos, freq_shift)
        # One vector more than there are classes: the null class, for labels that are dropped or not given.
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, self.embedding.width)

        layers = count()

        def block(n_in: int, n_out: int, attends: bool) -> UNetBlock:
            residual = ResidualBlock(
                n_in,
                n_out,
                self.embedding.width,
                Dropout(dropout, layer=next(layers)),
                norm_groups,
                norm_eps,
                scale_shift_norm,
            )
            if not attends:
                return UNetBlock(residual, None)
            return UNetBlock(
                residual, Attention(n_out, _num_heads(n_out, num_heads, head_channels), norm_groups, norm_eps)
            )

        self.conv_in = conv(in_channels, channels)
        skips = [n := channels]  # channels of the skip connections, in the order they are made
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        levels = [(channels * m, s in attention_resolutions) for m, s in zip(channel_multipliers, sides, strict=True)]
        for level, (n_level, attends) in enumerate(levels):
            for _ in range(num_res_blocks):
                self.down.append(block(n, n_level, attends))
                skips.append(n := n_level)
            if level < len(levels) - 1:
                self.down.append(Downsample(n, downsample_padding))
                skips.append(n)
        self.middle = nn.ModuleList([block(n, n, True), block(n, n, False)])
        for level, (n_level, attends) in reversed(list(enumerate(levels))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(n + skips.pop(), n_level, attends))
                n = n_level
            if level > 0:
                self.up.append(Upsample(n))
        self.norm_out = nn.GroupNorm(norm_groups, n, norm_eps)
        self.conv_out = conv(n, out_channels or in_channels, gain=ZERO_GAIN)

    @property
    def null_class(self) -> int:
        """The label that stands for none; ValueError for a network without classes."""
        if self.num_classes is None:
            raise ValueError("this UNet has no classes, so no null class; build it with num_classes")
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """x_t [B,C,H,W], code indices t [B], labels y [B] (the null class if None) -> [B,out_channels,H,W].

        Dropout masks are a function of `keys` [B] int64, a random number for each image; without them torch's generator draws.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [B,{self.in_channels},H,W]")
        self._check_size(x.shape[2], x.shape[3])
        activated = functional.silu(self._embed(t, y))
        h = self.conv_in(x)
        skips, level = [h], 0
        for layer in self.down:
            if isinstance(layer, Downsample):
                h = self._run(level, layer, h)
                level += 1
            else:
                h = self._run(level, layer, h, activated, keys)
            skips.append(h)
        for layer in self.middle:
            h = self._run(level, layer, h, activated, keys)
        for layer in self.up:
            if isinstance(layer, Upsample):
                level -= 1
                h = self._run(level, layer, h)
            else:
                h = self._run(level, layer, (h, skips.pop()), activated, keys)
        return self._run(level, self._last, h)

    def _last(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv_out(norm_silu(self.norm_out, h))
        return out

    def _run(
        self, level: int, layer: Callable[..., Tensor], x: Tensor | tuple[Tensor, ...], *rest: Tensor | None
    ) -> Tensor:
        """Call a layer of a level with the channels of `x`; keep the inputs alone where the level is checkpointed."""

        def call(x: Tensor | tuple[Tensor, ...], *rest: Tensor | None) -> Tensor:
            return layer(torch.cat(x, 1) if isinstance(x, tuple) else x, *rest)

        if level >= self.activation_checkpointing or not (self.training and torch.is_grad_enabled()):
            return call(x, *rest)
        # only dropout without keys takes random numbers of torch's generator
        without_keys = bool(rest) and rest[-1] is None
        out: Tensor = checkpoint(call, x, *rest, use_reentrant=False, preserve_rng_state=without_keys)
        return out

    def _embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        embedding: Tensor = self.embedding(t)
        if self.label_embedding is None:
            if y is not None:
                raise ValueError("labels were given to a UNet without classes; build it with num_classes")
            return embedding
        labels: Tensor = self.label_embedding(torch.full_like(t, self.null_class) if y is None else y)
        return embedding + labels

    def _check_size(self, height: int, width: int) -> None:
        m = self.size_multiple
        if height % m or width % m or min(height, width) < m:
            fit = " or ".join(f"{_multiple(height, m, up)}x{_multiple(width, m, up)}" for up in (False, True))
            raise ValueError(
                f"image size {height}x{width} does not fit a UNet whose levels halve it to 1/{m}: both sides must be "
                f"multiples of {m}; use {fit}, or fewer channel_multipliers"
            )


def _check_widths(in_channels: int, channels: int, multipliers: Sequence[int], blocks: int, num_timesteps: int) -> None:
    counts = {"in_channels": in_channels, "channels": channels, "num_res_blocks": blocks}
    counts["num_timesteps"] = num_timesteps
    counts |= {f"channel_multipliers[{i}]": m for i, m in enumerate(multipliers)}
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name}={number}, expected a positive integer")
    if not multipliers:
        raise ValueError("channel_multipliers is empty, expected one positive integer per level")


def _check_norm(channels: int, norm_groups: int, freq_shift: int) -> None:
    if norm_groups < 1 or channels % norm_groups:
        groups = max(g for g in range(1, 33) if channels % g == 0)
        raise ValueError(
            f"channels={channels} is no multiple of norm_groups={norm_groups}; use norm_groups={groups}, or other "
            "channels"
        )
    if channels % 2 or channels // 2 <= freq_shift:
        raise ValueError(
            f"channels={channels}, expected an even number above {2 * freq_shift}: half sines, half cosines"
        )


def _multiple(side: int, m: int, up: bool) -> int:
    return max(m, -(-side // m) * m if up else side // m * m)


def _check_attention(resolutions: Sequence[int], sides: Sequence[int]) -> None:
    """A resolution that no level has would silently mean no attention there."""
    absent = [r for r in resolutions if r not in sides]
    if absent:
        raise ValueError(
            f"attention_resolutions {absent} are no level's; the levels' longer sides are {list(sides)}; use some of "
            "them, or ()"
        )


def _num_heads(channels: int, num_heads: int, head_channels: int | None) -> int:
    heads = num_heads if head_channels is None else channels // head_channels
    if heads < 1 or channels % heads or (head_channels is not None and heads * head_channels != channels):
        asked = f"num_heads={num_heads}" if head_channels is None else f"head_channels={head_channels}"
        raise ValueError(f"{asked} does not divide the {channels} channels of a level with attention; use a divisor")
    return heads
