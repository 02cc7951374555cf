"""Small models with weights that hide nothing, for what carries models to and from other programs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from pipeline.config.experiment import experiment_from
from pipeline.data.labels import ClassNames
from pipeline.training.models import build_model
from pipeline.training.trained import Trained

TINY: dict[str, Any] = {
    "channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "norm_groups": 4,
    "dropout": 0.1,
}
IDDPM: dict[str, Any] = {
    "num_heads": 1,
    "scale_shift_norm": True,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
}


def randomise(model: nn.Module) -> None:
    """Give every parameter a value that matters, those that start at zero too; outputs stay near the size of the input."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=g) * scale + (1.0 if re.search(r"norm\w*\.weight", name) else 0.0))


def made(shape: tuple[int, int, int] = (1, 8, 8), model: dict[str, Any] | None = None, **diffusion: Any) -> Trained:
    """Return a trained model, as far as anybody can tell."""
    content = {"name": "tiny", "model": TINY | (model or {}), "diffusion": diffusion, "sampling": {"steps": None}}
    content["sampling"]["sampler"] = "ancestral"
    experiment = experiment_from(content)
    network = build_model(experiment, shape, num_classes=3)
    randomise(network)
    names = ("a", "b", "c") if experiment.model.class_conditional else ()
    return Trained(network.eval(), experiment, shape, 7, "ema", 1.5, ClassNames(names))
