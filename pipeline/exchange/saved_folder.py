"""Read folders of `ddpm-pipe export --format safetensors` as untrusted files: no code is imported, everything is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.experiment import Experiment, experiment_from
from pipeline.data.labels import ClassNames
from pipeline.errors import UsageError
from pipeline.exchange.diffusers_folder import ForeignModel
from pipeline.exchange.diffusers_scheduler import MAX_TIMESTEPS
from pipeline.exchange.diffusers_unet import (
    MAX_IMAGE_CHANNELS,
    MAX_LEVELS,
    MAX_NORM_GROUPS,
    MAX_RES_BLOCKS,
    MAX_SIDE,
    MAX_WIDTH,
)
from pipeline.storage.foreign_tensors import read_json, read_tensors
from pipeline.training.models import Shape, build_model
from pipeline.training.trained import EXPERIMENT_FILE, WEIGHTS_FILE

_MAX_LATENT_DIM = 1 << 16


def is_saved(folder: Path) -> bool:
    """Whether a folder has our own layout."""
    return (folder / EXPERIMENT_FILE).is_file()


def read_saved(folder: Path) -> ForeignModel:
    """Read such a folder; ValueError if it is damaged, or names a network whose code would have to be imported."""
    about = read_json(folder / EXPERIMENT_FILE)
    settings = about.get("experiment")
    if not isinstance(settings, dict) or not isinstance(settings.get("model", {}), dict):
        raise ValueError(f"{EXPERIMENT_FILE} has no experiment")
    kind = settings.get("model", {}).get("type", "unet")
    if ":" in str(kind):
        raise ValueError(
            f"its network is {kind!r}, which needs code that an import does not run; if you trust the code, train or load the model by "
            "that name"
        )
    shape, names = _shape(about.get("shape")), about.get("class_names", [])
    untrained = about.get("untrained_classes", [])
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if shape is None or not named or not _are_numbers_below(untrained, len(names)):
        raise ValueError(f"{EXPERIMENT_FILE} has no shape of the images, or no names of the classes")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder.name}/ has no {WEIGHTS_FILE}")
    try:
        experiment = experiment_from(settings, EXPERIMENT_FILE)
        _check_sizes(experiment, shape)
        model = build_model(experiment, shape, device="meta", num_classes=len(names))
    except UsageError as error:  # the settings come from the folder, not from the user
        raise ValueError(str(error)) from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = read_tensors(folder / WEIGHTS_FILE, expected)
    step = about.get("step")
    where = f"ddpm-pipe, weights {about.get('weights')!r} of step {step!r}"
    known = step if type(step) is int and step >= 0 else None
    return ForeignModel(experiment, shape, tensors, tensors, where, ClassNames(names, untrained), known)


def _shape(value: Any) -> Shape | None:
    """Return (C, H, W), or None for anything else."""
    sides = isinstance(value, list) and len(value) == 3 and all(type(n) is int and 1 <= n <= MAX_SIDE for n in value)
    return (value[0], value[1], value[2]) if sides else None


def _are_numbers_below(values: Any, end: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < end for value in values)


def _check_sizes(experiment: Experiment, shape: Shape) -> None:
    """Raise ValueError beyond the limits: the layers alone would fill the memory, even on the meta device."""
    model = experiment.model
    sizes = {
        "the images' channels": (shape[0], MAX_IMAGE_CHANNELS),
        "diffusion.num_timesteps": (experiment.diffusion.num_timesteps, MAX_TIMESTEPS),
        "model.channels, of the widest level": (model.channels * max(model.channel_multipliers), MAX_WIDTH),
        "model.channel_multipliers, their number": (len(model.channel_multipliers), MAX_LEVELS),
        "model.num_res_blocks": (model.num_res_blocks, MAX_RES_BLOCKS),
        "model.norm_groups": (model.norm_groups, MAX_NORM_GROUPS),
        "model.latent_dim": (model.latent_dim, _MAX_LATENT_DIM),
    }
    for what, (number, most) in sizes.items():
        if number > most:
            raise ValueError(f"{what}: got {number}, expected at most {most}")
