"""Convert the weights of our U-Net to and from the names of diffusers' UNet2DModel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import UNet
from ddpm.layers import REFERENCE_STEPS, Downsample, TimeEmbedding, Upsample

TIME_TABLE = "time_proj.weight"

_OLD_NAMES = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
}  # before diffusers 0.17


def to_their_tensors(model: UNet, num_res_blocks: int, num_timesteps: int) -> dict[str, Tensor]:
    """Return the weights of a U-Net with UNet2DModel's names."""
    ours = dict(model.state_dict())
    theirs: dict[str, Tensor] = {}
    for name, their_names in _paired_tensors(model, num_res_blocks):
        parts = ours.pop(name).chunk(len(their_names))
        theirs |= {their: part.clone() for their, part in zip(their_names, parts, strict=True)}
    if ours:
        raise ValueError(f"{sorted(ours)[0]} has no name in a UNet2DModel")
    if num_timesteps != REFERENCE_STEPS:
        theirs[TIME_TABLE] = time_table(model.embedding, num_timesteps)
    return theirs


def expected_shapes(
    model: UNet, num_res_blocks: int, num_timesteps: int, *, learned: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the equivalent UNet2DModel, by name (`model` may be on the meta device)."""
    ours = model.state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, their_names in _paired_tensors(model, num_res_blocks):
        first, *rest = ours[name].shape
        shapes |= dict.fromkeys(their_names, (first // len(their_names), *rest))
    if learned:
        shapes[TIME_TABLE] = (num_timesteps, 2 * model.embedding.num_waves)
    return shapes


def from_their_tensors(theirs: Mapping[str, Tensor], model: UNet, num_res_blocks: int) -> dict[str, Tensor]:
    """Return weights with our names, float32; `theirs` has the shapes of `expected_shapes`. ValueError for another time embedding."""
    if TIME_TABLE in theirs:
        table = theirs[TIME_TABLE]
        ours = time_table(model.embedding, len(table))
        if not torch.allclose(table.float(), ours, rtol=0, atol=1e-3):
            raise ValueError(
                "its learned time embeddings are not the sinusoids of t * 1000 / T, the only ones this package has"
            )
    return {
        name: torch.cat([theirs[their] for their in their_names]).float()
        for name, their_names in _paired_tensors(model, num_res_blocks)
    }


def with_current_names(names: Sequence[str]) -> dict[str, str]:
    """Return {name in the file: current name}; before diffusers 0.17 attention weights were query, key, value and proj_attn."""
    current = {old: new for new, old in _OLD_NAMES.items()}
    pattern = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))$")
    return {name: pattern.sub(lambda found: found[1] + current[found[2]] + found[3], name) for name in names}


def time_table(embedding: TimeEmbedding, num_timesteps: int) -> Tensor:
    """Return our sinusoids of t * 1000 / T, one row for each of T steps: float32 [T, channels]."""
    scale = REFERENCE_STEPS / num_timesteps
    return embedding.waves(torch.arange(num_timesteps).float() * scale)


def _paired_tensors(model: UNet, num_res_blocks: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (our tensor, their tensors): one, or three where ours holds query, key and value side by side."""
    for ours, theirs in _paired_modules(model, num_res_blocks):
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs)


def _paired_modules(model: UNet, num_res_blocks: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    for ours, theirs in (
        ("conv_in", "conv_in"),
        ("embedding.dense1", "time_embedding.linear_1"),
        ("embedding.dense2", "time_embedding.linear_2"),
        ("norm_out", "conv_norm_out"),
        ("conv_out", "conv_out"),
    ):
        yield ours, (theirs,)
    for side, per_level in (("down", num_res_blocks), ("up", num_res_blocks + 1)):
        for i, module in enumerate(getattr(model, side)):
            level, j = divmod(i, per_level + 1)
            at = f"{side}_blocks.{level}"
            if isinstance(module, Downsample | Upsample):
                yield f"{side}.{i}.conv", (f"{at}.{side}samplers.0.conv",)
            else:
                yield from _paired_block(f"{side}.{i}", module, f"{at}.resnets.{j}", f"{at}.attentions.{j}")
    for j, module in enumerate(model.middle):
        yield from _paired_block(f"middle.{j}", module, f"mid_block.resnets.{j}", "mid_block.attentions.0")


def _paired_block(at: str, block: Any, resnet: str, attention: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    names = {"norm1": "norm1", "conv1": "conv1", "project": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
    for ours, theirs in names.items():
        yield f"{at}.residual.{ours}", (f"{resnet}.{theirs}",)
    if not isinstance(block.residual.shortcut, nn.Identity):
        yield f"{at}.residual.shortcut", (f"{resnet}.conv_shortcut",)
    if not isinstance(block.attention, nn.Identity):
        yield f"{at}.attention.norm", (f"{attention}.group_norm",)
        yield f"{at}.attention.qkv", tuple(f"{attention}.to_{part}" for part in "qkv")
        yield f"{at}.attention.out", (f"{attention}.to_out.0",)
