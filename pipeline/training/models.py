"""From an experiment to its objects: the network and the diffusion process."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddpm import (
    BetaSchedule,
    GaussianDiffusion,
    Objective,
    UNet,
)
from pipeline.config.experiment import Experiment
from pipeline.config.process import settings_of
from pipeline.errors import UsageError, nearest
from pipeline.training.randomness import seed_of
from pipeline.training.vae import Vae, VaeObjective

Shape = tuple[int, int, int]


class Loss(Protocol):
    """What training minimises: for images x0 and noise eps [B,C,H,W] and t [B] in 0 .. num_timesteps - 1, the loss of each [B]."""

    @property
    def num_timesteps(self) -> int:
        """From how many t is drawn; 1 for a model that knows no t."""

    def __call__(self, model: Any, x0: Tensor, t: Tensor, eps: Tensor, /) -> Tensor:
        """Return the losses [B], with gradients."""


def has_process(experiment: Experiment) -> bool:
    """Whether an experiment's model is a diffusion model, and not the autoencoder that they are compared with."""
    return experiment.model.type != "vae"


def build_diffusion(experiment: Experiment) -> GaussianDiffusion:
    """Return the diffusion process of an experiment; raises UsageError if there is none, or it refuses the settings."""
    if not has_process(experiment):
        raise UsageError(
            "a vae has no diffusion process; this needs a diffusion model, such as one of model.type 'unet'"
        )
    settings = experiment.diffusion
    try:
        if settings.betas is not None:
            schedule = BetaSchedule.from_betas(settings.betas, settings.schedule)
        else:
            schedule = BetaSchedule.named(settings.schedule, num_timesteps=settings.num_timesteps)
        if settings.zero_terminal_snr:
            schedule = schedule.with_zero_terminal_snr()
        return GaussianDiffusion(
            schedule,
            prediction=settings.prediction,
            variance=settings.variance,
            clip_x0=settings.clip_x0,
        )
    except ValueError as error:
        raise UsageError(f"diffusion: {error}") from None


def build_objective(experiment: Experiment) -> Loss:
    """Return what training minimises; raises UsageError if that makes no sense for the process."""
    if not has_process(experiment):
        return VaeObjective()
    settings = experiment.training
    try:
        return Objective(build_diffusion(experiment), settings.objective, gamma=settings.min_snr_gamma)
    except ValueError as error:
        raise UsageError(f"training: {error}") from None


def build_model(
    experiment: Experiment, shape: Shape, device: str = "cpu", *, num_classes: int | None = None
) -> nn.Module:
    """Return the network of an experiment for images (C, H, W), with initial weights that are a function of the seed.

    `num_classes` is asked for by class-conditional ones. With device "meta" nothing is allocated: for counting parameters.
    Raises UsageError if the network cannot be built.
    """
    out_channels = output_channels(experiment, shape)
    torch.manual_seed(seed_of("weights", experiment.seed))
    # the constructor of a user's own network may compute with values, which tensors on `meta` do not have
    with torch.device("cpu" if is_own_network(experiment) else device):
        if is_own_network(experiment):
            return _own_network(experiment)
        try:
            if not has_process(experiment):
                return Vae(shape, **experiment.model.model_dump(include=settings_of("vae")))
            return _unet(experiment, shape, out_channels, num_classes)
        except ValueError as error:
            raise UsageError(f"model: {error}") from None


def output_channels(experiment: Experiment, shape: Shape) -> int:
    """Return the number of channels that the network of an experiment predicts for images (C, H, W)."""
    return build_diffusion(experiment).output_channels(shape[0]) if has_process(experiment) else shape[0]


def is_own_network(experiment: Experiment) -> bool:
    """Whether the network is a class of the user's own, `package.module:Class`."""
    return ":" in experiment.model.type


@torch.no_grad()
def check_own_network(model: nn.Module, experiment: Experiment, shape: Shape, device: torch.device) -> None:
    """Call a network of the user's own once, in evaluation mode; UsageError unless it returns a tensor of the shape that training needs."""
    wanted = (1, output_channels(experiment, shape), *shape[1:])
    name = experiment.model.type
    model.eval()
    try:
        out: Any = model(torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"model.type: {name} failed for x_t {[1, *shape]} float32 and t [1] int64 ({reason}); it must take both and return a tensor"
        ) from error
    if not isinstance(out, Tensor):
        raise UsageError(f"model.type: {name} returned {type(out).__name__}, expected one tensor {list(wanted)}")
    if tuple(out.shape) != wanted:
        raise UsageError(f"model.type: {name} returned a tensor {list(out.shape)}, expected {list(wanted)}")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network by name; one that has several names (tied weights) under the first alone, as files hold it."""
    return {name: tensor.detach() for name, tensor in _by_first_name(model).items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load what `weights_of` returned."""
    first = {id(tensor): name for name, tensor in _by_first_name(model).items()}
    names = {name: first[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    model.load_state_dict({name: weights[names[name]] for name in names})


def _by_first_name(model: nn.Module) -> dict[str, Tensor]:
    named: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if named.setdefault(id(tensor), name) == name}


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers in a network."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def misfit_of(weights: Mapping[str, Tensor], model: nn.Module) -> str:
    """Describe the first of these tensors that does not fit a network; "" if all fit."""
    wanted = weights_of(model)
    for name in [*wanted, *sorted(weights)]:
        if name not in weights:
            return f"the weights have no {name}"
        if name not in wanted:
            return f"the network has no {name}"
        if weights[name].shape != wanted[name].shape:
            return f"{name} is {list(weights[name].shape)}, expected {list(wanted[name].shape)}"
    return ""


def _unet(experiment: Experiment, shape: Shape, out_channels: int, num_classes: int | None) -> nn.Module:
    settings = experiment.model.model_dump(include=settings_of("unet"))
    class_conditional = settings.pop("class_conditional")
    if class_conditional and num_classes is None:
        raise ValueError("a class-conditional network needs the number of classes")
    return UNet(
        in_channels=shape[0],
        out_channels=out_channels,
        image_size=(shape[1], shape[2]),
        num_timesteps=experiment.diffusion.num_timesteps,
        num_classes=num_classes if class_conditional else None,
        activation_checkpointing=experiment.training.activation_checkpointing,
        **settings,
    )


def _own_network(experiment: Experiment) -> nn.Module:
    """Import and build the network that an experiment names as `package.module:Class`."""
    settings = experiment.model
    module_name, _, class_name = settings.type.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"model.type: cannot import {module_name!r} ({reason}); it must be installed or stand in the current directory"
        ) from None
    network: Any = getattr(module, class_name, None)
    if network is None:
        known = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(f"model.type: {module_name!r} has no {class_name!r}{nearest(class_name, known)}")
    try:
        model = network(**settings.arguments)
    except Exception as error:
        raise UsageError(f"model.arguments: {settings.type} refused them ({type(error).__name__}: {error})") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"model.type: {settings.type} made a {type(model).__name__}; expected a torch.nn.Module")
    return model
