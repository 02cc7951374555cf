"""Convert the settings of our U-Net to and from diffusers' UNet2DModel, as in `google/ddpm-cifar10-32`.

Diffusers is not imported. Settings without an equivalent raise ValueError. The time embedding of diffusers takes t, ours t * 1000 / T; they
are equal at T = 1000. For another T, a learned table of T rows with our sinusoids is exported, which is equal by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt

from ddpm.layers import REFERENCE_STEPS
from pipeline.config.experiment import ModelConfig
from pipeline.config.yaml_files import Section, validate
from pipeline.training.models import Shape

CLASS = "UNet2DModel"
LEARNED, POSITIONAL = "learned", "positional"
# limits beyond every published network; an untrusted file that exceeds them is refused before the network is built
MAX_IMAGE_CHANNELS, MAX_SIDE = 64, 4096
MAX_WIDTH, MAX_LEVELS, MAX_RES_BLOCKS, MAX_NORM_GROUPS = 4096, 10, 32, 1024

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Sides = Annotated[tuple[Side, Side], BeforeValidator(lambda size: (size, size) if isinstance(size, int) else size)]
ImageChannels = Annotated[int, Field(ge=1, le=MAX_IMAGE_CHANNELS)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Groups = Annotated[int, Field(ge=1, le=MAX_NORM_GROUPS)]


class UNet2DConfig(Section):
    """The config.json of a UNet2DModel, with its defaults; the types allow what this package has."""

    model_config = ConfigDict(extra="ignore")

    act_fn: Literal["silu", "swish"] = "silu"
    add_attention: Literal[True] = True
    attention_head_dim: PositiveInt | None = 8
    attn_norm_num_groups: Groups | None = None
    block_out_channels: tuple[Width, ...] = Field((224, 448, 672, 896), min_length=1, max_length=MAX_LEVELS)
    center_input_sample: Literal[False] = False
    class_embed_type: Literal[None] = None
    down_block_types: tuple[Literal["DownBlock2D", "AttnDownBlock2D"], ...] = ("DownBlock2D", *3 * ("AttnDownBlock2D",))
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv"] = "conv"
    dropout: float = 0.0
    flip_sin_to_cos: bool = True
    freq_shift: Literal[0, 1] = 0
    in_channels: ImageChannels = 3
    layers_per_block: Annotated[int, Field(ge=1, le=MAX_RES_BLOCKS)] = 2
    mid_block_scale_factor: Literal[1] = 1
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    norm_eps: float = 1e-5
    norm_num_groups: Groups = 32
    num_class_embeds: Literal[None] = None
    num_train_timesteps: int | None = None
    out_channels: Annotated[int, Field(ge=1, le=2 * MAX_IMAGE_CHANNELS)] = 3
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    sample_size: Sides
    time_embedding_dim: int | None = None
    time_embedding_type: Literal["positional", "learned"] = "positional"
    up_block_types: tuple[Literal["UpBlock2D", "AttnUpBlock2D"], ...] = (*3 * ("AttnUpBlock2D",), "UpBlock2D")
    upsample_type: Literal["conv"] = "conv"


def to_their_config(model: ModelConfig, shape: Shape, out_channels: int, num_timesteps: int) -> dict[str, Any]:
    """Return the config.json of an equivalent UNet2DModel; ValueError names a setting without an equivalent."""
    if model.type != "unet":
        raise ValueError(
            f"model.type {model.type!r} is not one of this package's U-Nets; export it as safetensors or onnx"
        )
    if model.class_conditional:
        raise ValueError(
            "a DDPMPipeline passes no labels to the network; export a class-conditional model as safetensors or onnx"
        )
    if model.channel_multipliers[0] != 1:
        raise ValueError(
            f"channel_multipliers start with {model.channel_multipliers[0]}: the first level of a UNet2DModel is as wide as its "
            "first convolution, so that only 1 has an equal"
        )
    widths = [model.channels * m for m in model.channel_multipliers]
    sides = [max(shape[1:]) >> level for level in range(len(widths))]
    attends = [side in model.attention_resolutions for side in sides]
    learned = num_timesteps != REFERENCE_STEPS
    config = {
        "attention_head_dim": _head_width(model, widths, attends),
        "attn_norm_num_groups": model.norm_groups,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "downsample_padding": model.downsample_padding,
        "dropout": model.dropout,
        "flip_sin_to_cos": model.flip_sin_to_cos,
        "freq_shift": model.freq_shift,
        "in_channels": shape[0],
        "layers_per_block": model.num_res_blocks,
        "norm_eps": model.norm_eps,
        "norm_num_groups": model.norm_groups,
        "num_train_timesteps": num_timesteps if learned else None,
        "out_channels": out_channels,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "sample_size": shape[1:],
        "time_embedding_type": LEARNED if learned else POSITIONAL,
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
    }
    whole = validate(UNet2DConfig, config, CLASS).model_dump(exclude={"time_embedding_dim"})
    return {"_class_name": CLASS, **whole, "sample_size": shape[1] if shape[1] == shape[2] else shape[1:]}


def from_their_config(content: Mapping[str, Any], num_timesteps: int) -> tuple[dict[str, Any], Shape, int]:
    """Return our model settings, image shape and output channels.

    Raises ValueError, or UsageError for a value of another type, if there is no equivalent.
    """
    theirs = validate(UNet2DConfig, dict(content), "config.json")
    widths, groups = theirs.block_out_channels, theirs.norm_num_groups
    if theirs.time_embedding_dim not in (None, 4 * widths[0]):
        raise ValueError(f"time_embedding_dim is {theirs.time_embedding_dim!r}; this package has only 4 x {widths[0]}")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels are {widths}; this package has only multiples of the first one")
    scale_shift = theirs.resnet_time_scale_shift == "scale_shift"
    # by default the middle attention has the same groups, or no norm under scale_shift
    if theirs.attn_norm_num_groups not in ((groups,) if scale_shift else (None, groups)):
        raise ValueError(
            f"attn_norm_num_groups is {theirs.attn_norm_num_groups!r}; this package has only norm_num_groups, {groups}"
        )
    learned = theirs.time_embedding_type == LEARNED
    if not learned and num_timesteps != REFERENCE_STEPS:
        raise ValueError(
            f"T is {num_timesteps} and the time embedding takes t as it is; this package embeds t * 1000 / T, equal at T = 1000 only"
        )
    if learned and theirs.num_train_timesteps != num_timesteps:
        raise ValueError(
            f"the table of time embeddings has {theirs.num_train_timesteps!r} rows, but the scheduler has T = {num_timesteps}"
        )
    settings = {
        "type": "unet",
        "channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": theirs.layers_per_block,
        "attention_resolutions": _attention_resolutions(theirs),
        "head_channels": theirs.attention_head_dim,
        "dropout": theirs.dropout,
        "norm_groups": groups,
        "norm_eps": theirs.norm_eps,
        "scale_shift_norm": scale_shift,
        "flip_sin_to_cos": theirs.flip_sin_to_cos,
        "freq_shift": theirs.freq_shift,
        "downsample_padding": theirs.downsample_padding,
    }
    return settings, (theirs.in_channels, *theirs.sample_size), theirs.out_channels


def _head_width(model: ModelConfig, widths: Sequence[int], attends: Sequence[bool]) -> int | None:
    """Return attention_head_dim, which is one width for all levels, or None for a single head everywhere."""
    if model.head_channels is not None or model.num_heads == 1:
        return model.head_channels
    attending = {width for width, here in zip(widths, attends, strict=True) if here} | {
        widths[-1]
    }  # and the middle block
    if len(attending) > 1:
        raise ValueError(
            f"num_heads {model.num_heads} at levels of {sorted(attending)} channels: a UNet2DModel has heads of one width everywhere"
        )
    return attending.pop() // model.num_heads


def _attention_resolutions(theirs: UNet2DConfig) -> list[int]:
    down, up = theirs.down_block_types, theirs.up_block_types
    if not len(theirs.block_out_channels) == len(down) == len(up):
        raise ValueError("block_out_channels, down_block_types and up_block_types are not of one length")
    attends = [kind == "AttnDownBlock2D" for kind in down]
    if attends != [kind == "AttnUpBlock2D" for kind in reversed(up)]:
        raise ValueError(
            f"{down} and {up} attend at different levels; this package attends at the same ones down and up"
        )
    return [max(theirs.sample_size) >> level for level, here in enumerate(attends) if here]
