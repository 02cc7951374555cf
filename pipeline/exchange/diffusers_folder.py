"""Folders in the layout of diffusers' DDPMPipeline: written from a trained model, and read as strangers' files are.

model_index.json
unet/config.json                              or flat, as in `google/ddpm-cifar10-32`, beside model_index.json
unet/diffusion_pytorch_model.safetensors      or .bin
unet_ema/...                                  averaged weights, where a training left them too
scheduler/scheduler_config.json               or flat
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ddpm import UNet
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.data.labels import NO_CLASSES, ClassNames
from pipeline.errors import UsageError
from pipeline.exchange import diffusers_scheduler, diffusers_unet, diffusers_weights
from pipeline.storage.foreign_tensors import read_json, read_tensors
from pipeline.training.models import Shape, build_model
from pipeline.training.trained import Trained

LAYOUT_OF = "0.35.0"  # the release of diffusers whose layout is written
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True)
class ForeignModel:
    """A model from a folder of somebody else's: what describes it in our terms, and its weights under our names."""

    experiment: Experiment
    shape: Shape
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    about: str  # one line on what was found
    class_names: ClassNames = NO_CLASSES


def write_pipeline(trained: Trained, folder: Path) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` loads; ValueError says what of the model has no equal there."""
    settings, T = trained.experiment.model, trained.diffusion.num_timesteps
    out_channels = trained.diffusion.output_channels(trained.shape[0])
    unet = diffusers_unet.to_their_config(settings, trained.shape, out_channels, T)
    scheduler = diffusers_scheduler.to_their_config(trained.diffusion)
    assert isinstance(trained.model, UNet)
    tensors = diffusers_weights.to_their_tensors(trained.model, settings.num_res_blocks, T)
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": LAYOUT_OF,
        "scheduler": ["diffusers", diffusers_scheduler.CLASS],
        "unet": ["diffusers", diffusers_unet.CLASS],
    }
    _write(folder / "model_index.json", index)
    _write(folder / "unet" / "config.json", unet)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    save_file(tensors, folder / "unet" / WEIGHTS[0], metadata={"format": "pt"})


def is_pipeline(folder: Path) -> bool:
    """Whether a folder has the layout of a DDPMPipeline."""
    return (folder / "unet" / "config.json").is_file() or (folder / "config.json").is_file()


def read_pipeline(folder: Path, name: str) -> ForeignModel:
    """Read a folder in the layout of a DDPMPipeline; ValueError where it is damaged, or has no equal here."""
    at = folder / "unet" if (folder / "unet").is_dir() else folder
    config, scheduler = read_json(_found(at, "config.json")), read_json(_scheduler_file(folder))
    kind = config.get("_class_name", diffusers_unet.CLASS)
    if kind != diffusers_unet.CLASS:
        raise ValueError(f"its network is a {kind!r}; this package reads {diffusers_unet.CLASS}")
    diffusion = diffusers_scheduler.from_their_config(scheduler)
    settings, shape, out_channels = diffusers_unet.from_their_config(config, diffusion["num_timesteps"])
    learned_variance = out_channels == 2 * shape[0]
    if out_channels != shape[0] and not learned_variance:
        raise ValueError(
            f"out_channels is {out_channels} for images of {shape[0]} channels; expected as many, or twice as many"
        )
    if learned_variance != (diffusion["variance"] == "learned_range"):
        raise ValueError(
            f"out_channels is {out_channels} for images of {shape[0]} channels, but variance_type is {scheduler.get('variance_type')!r}"
        )
    experiment = _experiment({"name": name, "model": settings, "diffusion": diffusion})
    model = _read_unet(at, config, experiment, shape)
    averaged, ema = folder / "unet_ema", model
    if averaged.is_dir():
        other = read_json(_found(averaged, "config.json"))
        if diffusers_unet.from_their_config(other, diffusion["num_timesteps"]) != (settings, shape, out_channels):
            raise ValueError("unet_ema/config.json describes another network than unet/config.json")
        ema = _read_unet(averaged, other, experiment, shape)
    return ForeignModel(
        experiment, shape, model, ema, "diffusers, with averaged weights" if averaged.is_dir() else "diffusers"
    )


def _experiment(content: dict[str, Any]) -> Experiment:
    """Return the experiment; sampling is as the pipeline does it: ancestral, all T steps."""
    try:
        return experiment_from({**content, "sampling": {"sampler": "ancestral", "steps": None}})
    except UsageError as error:  # here the settings are the folder's, not the user's
        raise ValueError(str(error)) from None


def _read_unet(folder: Path, config: dict[str, Any], experiment: Experiment, shape: Shape) -> dict[str, Tensor]:
    blocks, T = experiment.model.num_res_blocks, experiment.diffusion.num_timesteps
    try:
        model = build_model(experiment, shape, device="meta")
    except UsageError as error:
        raise ValueError(str(error)) from None
    assert isinstance(model, UNet)
    learned = config.get("time_embedding_type") == diffusers_unet.LEARNED
    expected = diffusers_weights.expected_shapes(model, blocks, T, learned=learned)
    theirs = read_tensors(_found(folder, *WEIGHTS), expected, diffusers_weights.with_current_names)
    return diffusers_weights.from_their_tensors(theirs, model, blocks)


def _scheduler_file(folder: Path) -> Path:
    below = folder / "scheduler"
    return _found(below if below.is_dir() else folder, "scheduler_config.json")


def _found(folder: Path, *names: str) -> Path:
    """Return the first of the names that is a file of the folder; ValueError where none is."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder.name}/ has no {' and no '.join(names)}")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
