"""Folders in the layout of diffusers' DDPMPipeline: written from a trained model, and read as untrusted files.

model_index.json
unet/config.json                              or flat, as in `google/ddpm-cifar10-32`, beside model_index.json
unet/diffusion_pytorch_model.safetensors      or .bin; or a variant (.fp16.safetensors); or shards with their .index.json
unet_ema/...                                  averaged weights, if a training left them
scheduler/scheduler_config.json               or flat
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ddpm import UNet
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.data.labels import NO_CLASSES, ClassNames
from pipeline.exchange import diffusers_scheduler, diffusers_unet, diffusers_weights
from pipeline.storage.durable import write_atomically
from pipeline.storage.foreign_tensors import Shapes, read_json, read_tensors
from pipeline.training.models import Shape, build_model
from pipeline.training.trained import Trained

LAYOUT_OF = "0.35.0"  # the release of diffusers whose layout is written
STEM = "diffusion_pytorch_model"
WHOLE = re.compile(rf"{STEM}(\.\w+)?\.(safetensors|bin)")
INDEX = re.compile(rf"{STEM}\.(safetensors|bin)\.index(\.\w+)?\.json")
SHARD = re.compile(rf"{STEM}(\.\w+)?-\d+-of-\d+\.(safetensors|bin)")


@dataclass(frozen=True)
class ForeignModel:
    """A model read from an untrusted folder: its settings in our terms, and its weights under our names."""

    experiment: Experiment
    shape: Shape
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    about: str  # origin, in one line
    class_names: ClassNames = NO_CLASSES
    step: int | None = None  # of its training, if the folder says


def write_pipeline(trained: Trained, folder: Path) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` loads; ValueError names a setting that has no equivalent there."""
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
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomically(folder / "unet" / f"{STEM}.safetensors", weights)


def is_pipeline(folder: Path) -> bool:
    """Whether a folder has the layout of a DDPMPipeline."""
    return (folder / "unet" / "config.json").is_file() or (folder / "config.json").is_file()


def read_pipeline(folder: Path, name: str) -> ForeignModel:
    """Read a folder in the layout of a DDPMPipeline; ValueError or UsageError if it is damaged, or has no equivalent here."""
    at = folder / "unet" if (folder / "unet").is_dir() else folder
    config, scheduler = read_json(_found(at, "config.json")), read_json(_scheduler_file(folder))
    kind = config.get("_class_name", diffusers_unet.CLASS)
    if kind != diffusers_unet.CLASS:
        raise ValueError(f"its network: got {kind!r}, expected {diffusers_unet.CLASS}")
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
    sampling = {"sampler": "ancestral", "steps": None}  # as the pipeline samples: all T steps
    experiment = experiment_from({"name": name, "model": settings, "diffusion": diffusion, "sampling": sampling})
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


def _read_unet(folder: Path, config: dict[str, Any], experiment: Experiment, shape: Shape) -> dict[str, Tensor]:
    blocks, T = experiment.model.num_res_blocks, experiment.diffusion.num_timesteps
    model = build_model(experiment, shape, device="meta")
    assert isinstance(model, UNet)
    learned = config.get("time_embedding_type") == diffusers_unet.LEARNED
    expected = diffusers_weights.expected_shapes(model, blocks, T, learned=learned)
    theirs = _read_weights(folder, expected)
    return diffusers_weights.from_their_tensors(theirs, model, blocks)


def _read_weights(folder: Path, expected: Shapes) -> dict[str, Tensor]:
    """Read the one file of weights, or the shards that an index names: safetensors before .bin, the full precision before a variant."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    weights = sorted((name for name in names if WHOLE.fullmatch(name) or INDEX.fullmatch(name)), key=_preference)
    if not weights:
        raise ValueError(
            f"{folder.name}/ has no weights: got {', '.join(sorted(names))}; expected {STEM}.safetensors or .bin, a variant such as "
            f"{STEM}.fp16.safetensors, or shards with their .index.json"
        )
    if WHOLE.fullmatch(weights[0]):
        return read_tensors(folder / weights[0], expected, diffusers_weights.with_current_names)
    tensors: dict[str, Tensor] = {}
    for shard, shapes in _shards(folder, weights[0], expected).items():
        tensors |= read_tensors(_found(folder, shard), shapes, diffusers_weights.with_current_names)
    return tensors


def _shards(folder: Path, index: str, expected: Shapes) -> dict[str, Shapes]:
    """Return the shape of every tensor of each shard, as the index says which shard has it."""
    found = read_json(folder / index).get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and SHARD.fullmatch(file) for file in found.values()
    ):
        raise ValueError(f"{index} has no weight_map of shards of this folder")
    current = diffusers_weights.with_current_names(list(found))
    files = {current[name]: file for name, file in found.items()}
    for name in sorted(expected.keys() ^ files.keys()):
        raise ValueError(
            f"{index}: " + (f"has no {name}" if name in expected else f"holds {name}, which this network does not have")
        )
    return {
        shard: {name: expected[name] for name, file in files.items() if file == shard}
        for shard in sorted(set(files.values()))
    }


def _preference(name: str) -> tuple[bool, bool, int, str]:
    return INDEX.fullmatch(name) is not None, ".safetensors" not in name, name.count("."), name


def _scheduler_file(folder: Path) -> Path:
    below = folder / "scheduler"
    return _found(below if below.is_dir() else folder, "scheduler_config.json")


def _found(folder: Path, name: str) -> Path:
    """Return the path of a file of the folder; ValueError if it is missing."""
    if not (folder / name).is_file():
        raise ValueError(f"{folder.name}/ has no {name}")
    return folder / name


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
