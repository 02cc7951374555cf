"""Convert the settings of our U-Net to and from diffusers' UNet2DModel, as in `google/ddpm-cifar10-32`.

Diffusers is not imported. Settings without an equivalent raise ValueError. The time embedding of diffusers takes t, ours t * 1000 / T; they
are equal at T = 1000. For another T, a learned table of T rows with our sinusoids is exported, which is equal by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddpm.layers import REFERENCE_STEPS
from pipeline.config.experiment import ModelConfig
from pipeline.training.models import Shape

CLASS = "UNet2DModel"
LEARNED, POSITIONAL = "learned", "positional"
# limits beyond every published network; an untrusted file that exceeds them is refused before the network is built
MAX_IMAGE_CHANNELS, MAX_SIDE = 64, 4096
MAX_WIDTH, MAX_LEVELS, MAX_RES_BLOCKS, MAX_NORM_GROUPS = 4096, 10, 32, 1024

# defaults of UNet2DModel
_THEIR_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": POSITIONAL,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# settings for which our network has only these values
_ONE_WAY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_padding": (0, 1),
    "freq_shift": (0, 1),
    "time_embedding_type": (POSITIONAL, LEARNED),
}


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
    return {
        "_class_name": CLASS,
        "act_fn": "silu",
        "add_attention": True,
        "attention_head_dim": _head_width(model, widths, attends),
        "attn_norm_num_groups": model.norm_groups,
        "block_out_channels": widths,
        "center_input_sample": False,
        "class_embed_type": None,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "downsample_padding": model.downsample_padding,
        "downsample_type": "conv",
        "dropout": model.dropout,
        "flip_sin_to_cos": model.flip_sin_to_cos,
        "freq_shift": model.freq_shift,
        "in_channels": shape[0],
        "layers_per_block": model.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2D",
        "norm_eps": model.norm_eps,
        "norm_num_groups": model.norm_groups,
        "num_class_embeds": None,
        "num_train_timesteps": num_timesteps if learned else None,
        "out_channels": out_channels,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "sample_size": shape[1] if shape[1] == shape[2] else [shape[1], shape[2]],
        "time_embedding_type": LEARNED if learned else POSITIONAL,
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "upsample_type": "conv",
    }


def from_their_config(config: Mapping[str, Any], num_timesteps: int) -> tuple[dict[str, Any], Shape, int]:
    """Return our model settings, image shape and output channels; ValueError if there is no equivalent."""
    theirs = _THEIR_DEFAULTS | {key: value for key, value in config.items() if key in _THEIR_DEFAULTS}
    for key, allowed in _ONE_WAY.items():
        if theirs[key] not in allowed:
            raise ValueError(f"{key} is {theirs[key]!r}; this package has only {' or '.join(map(repr, allowed))}")
    _check_kinds(theirs)
    widths, groups = theirs["block_out_channels"], theirs["norm_num_groups"]
    if theirs["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise ValueError(
            f"time_embedding_dim is {theirs['time_embedding_dim']!r}; this package has only 4 x {widths[0]}"
        )
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels are {widths}; this package has only multiples of the first one")
    scale_shift = theirs["resnet_time_scale_shift"] == "scale_shift"
    # by default the middle attention has the same groups, or no norm under scale_shift
    if theirs["attn_norm_num_groups"] not in ((groups,) if scale_shift else (None, groups)):
        raise ValueError(
            f"attn_norm_num_groups is {theirs['attn_norm_num_groups']!r}; this package has only norm_num_groups, {groups}"
        )
    shape = _shape(theirs)
    learned = theirs["time_embedding_type"] == LEARNED
    if not learned and num_timesteps != REFERENCE_STEPS:
        raise ValueError(
            f"T is {num_timesteps} and the time embedding takes t as it is; this package embeds t * 1000 / T, equal at T = 1000 only"
        )
    if learned and theirs["num_train_timesteps"] != num_timesteps:
        raise ValueError(
            f"the table of time embeddings has {theirs['num_train_timesteps']!r} rows, but the scheduler has T = {num_timesteps}"
        )
    settings = {
        "type": "unet",
        "channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": theirs["layers_per_block"],
        "attention_resolutions": _attention_resolutions(theirs, shape),
        "head_channels": theirs["attention_head_dim"],
        "dropout": theirs["dropout"],
        "norm_groups": groups,
        "norm_eps": theirs["norm_eps"],
        "scale_shift_norm": scale_shift,
        "flip_sin_to_cos": theirs["flip_sin_to_cos"],
        "freq_shift": theirs["freq_shift"],
        "downsample_padding": theirs["downsample_padding"],
    }
    return settings, shape, theirs["out_channels"]


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


def _attention_resolutions(theirs: Mapping[str, Any], shape: Shape) -> list[int]:
    down, up = theirs["down_block_types"], theirs["up_block_types"]
    for kinds, plain, attending in ((down, "DownBlock2D", "AttnDownBlock2D"), (up, "UpBlock2D", "AttnUpBlock2D")):
        other = sorted(set(kinds) - {plain, attending})
        if other:
            raise ValueError(f"a block is a {other[0]}; this package has only {plain} and {attending}")
    attends = [kind == "AttnDownBlock2D" for kind in down]
    if attends != [kind == "AttnUpBlock2D" for kind in reversed(up)]:
        raise ValueError(
            f"{down} and {up} attend at different levels; this package attends at the same ones down and up"
        )
    return [max(shape[1:]) >> level for level, here in enumerate(attends) if here]


def _check_kinds(theirs: Mapping[str, Any]) -> None:
    """Raise ValueError for values of another type, or beyond the limits."""
    counts = {
        "in_channels": MAX_IMAGE_CHANNELS,
        "out_channels": 2 * MAX_IMAGE_CHANNELS,
        "layers_per_block": MAX_RES_BLOCKS,
        "norm_num_groups": MAX_NORM_GROUPS,
    }
    for key, most in counts.items():
        if type(theirs[key]) is not int or not 1 <= theirs[key] <= most:
            raise ValueError(f"{key} is {theirs[key]!r}; expected an integer from 1 to {most}")
    lists = {"block_out_channels": int, "down_block_types": str, "up_block_types": str}
    for key, kind in lists.items():
        if not isinstance(theirs[key], list | tuple) or not all(type(item) is kind for item in theirs[key]):
            raise ValueError(f"{key} is {theirs[key]!r}; expected a list of {kind.__name__}")
    widths = theirs["block_out_channels"]
    if not 1 <= len(widths) <= MAX_LEVELS or not all(1 <= width <= MAX_WIDTH for width in widths):
        raise ValueError(f"block_out_channels are {widths}; expected 1 to {MAX_LEVELS} numbers from 1 to {MAX_WIDTH}")
    if not len(widths) == len(theirs["down_block_types"]) == len(theirs["up_block_types"]):
        raise ValueError("block_out_channels, down_block_types and up_block_types are not of one length")


def _shape(theirs: Mapping[str, Any]) -> Shape:
    size = theirs["sample_size"]
    sides = [size, size] if type(size) is int else size
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 2
        or not all(type(s) is int and 1 <= s <= MAX_SIDE for s in sides)
    ):
        raise ValueError(f"sample_size is {size!r}; expected the side of the images in pixels, or [height, width]")
    return theirs["in_channels"], sides[0], sides[1]
