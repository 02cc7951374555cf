"""Read folders of `ddpm-pipe export --format safetensors` as untrusted files: no code is imported, everything is checked."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, NonNegativeInt

from pipeline.config.experiment import Experiment
from pipeline.config.yaml_files import Section, validate
from pipeline.data.labels import ClassNames
from pipeline.exchange.diffusers_folder import ForeignModel
from pipeline.exchange.diffusers_scheduler import MAX_TIMESTEPS
from pipeline.exchange.diffusers_unet import (
    MAX_LEVELS,
    MAX_NORM_GROUPS,
    MAX_RES_BLOCKS,
    MAX_WIDTH,
    ImageChannels,
    Side,
)
from pipeline.storage.foreign_tensors import read_json, read_tensors
from pipeline.training.models import build_model
from pipeline.training.trained import EXPERIMENT_FILE, WEIGHTS_FILE

_MAX_LATENT_DIM = 1 << 16


class About(Section):
    """experiment.json, as `Trained.save` writes it."""

    model_config = ConfigDict(extra="ignore")

    experiment: Experiment
    shape: tuple[ImageChannels, Side, Side]
    class_names: tuple[str, ...] = ()
    untrained_classes: tuple[NonNegativeInt, ...] = ()
    step: NonNegativeInt | None = None
    weights: str = "ema"


def is_saved(folder: Path) -> bool:
    """Whether a folder has our own layout."""
    return (folder / EXPERIMENT_FILE).is_file()


def read_saved(folder: Path) -> ForeignModel:
    """Read such a folder; ValueError or UsageError if it is damaged, or names a network whose code would have to be imported."""
    about = validate(About, read_json(folder / EXPERIMENT_FILE), EXPERIMENT_FILE)
    experiment, shape, names = about.experiment, about.shape, about.class_names
    if ":" in experiment.model.type:
        raise ValueError(
            f"its network is {experiment.model.type!r}, which needs code that an import does not run; if you trust the code, train or "
            "load the model by that name"
        )
    if not all(number < len(names) for number in about.untrained_classes):
        raise ValueError(
            f"{EXPERIMENT_FILE}: untrained_classes: expected numbers below {len(names)}, that of the classes"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder.name}/ has no {WEIGHTS_FILE}")
    _check_sizes(experiment)
    model = build_model(experiment, shape, device="meta", num_classes=len(names))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = read_tensors(folder / WEIGHTS_FILE, expected)
    where = f"ddpm-pipe, weights {about.weights!r} of step {about.step}"
    return ForeignModel(
        experiment, shape, tensors, tensors, where, ClassNames(names, about.untrained_classes), about.step
    )


def _check_sizes(experiment: Experiment) -> None:
    """Raise ValueError beyond the limits: the layers alone would fill the memory, even on the meta device."""
    model = experiment.model
    sizes = {
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
