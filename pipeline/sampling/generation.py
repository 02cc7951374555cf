"""Generated images: noise a function of (seed, image index), computed in canonical chunks (ARCHITECTURE.md, row 12)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ddpm import GaussianDiffusion, Model, ancestral, conditioned, ddim, dpm_solver, guided, timestep_subset
from pipeline.config.experiment import Experiment, SamplingConfig
from pipeline.data.images import to_uint8
from pipeline.data.labels import NO_CLASSES, ClassNames, class_name, labels_of
from pipeline.metrics.metric_identity import Generation
from pipeline.training.chunks import chunks_of
from pipeline.training.device import Compute
from pipeline.training.models import build_diffusion, has_process
from pipeline.training.randomness import image_generators
from pipeline.training.vae import Vae

Shape = tuple[int, int, int]


class ByChunk(ABC):
    """What generates images by canonical chunk, whatever kind of model it has."""

    sampling: SamplingConfig

    @property
    def chunk_size(self) -> int:
        """Images that the network sees at once."""
        return self.sampling.batch_size

    @abstractmethod
    def images(self, indices: range) -> Tensor:
        """Return the images of the given indices, uint8 [len(indices), C, H, W] on the CPU."""

    def generate(self, num_images: int) -> Iterator[Tensor]:
        """Yield images 0 .. num_images - 1 as uint8 [n, C, H, W] on the CPU, a canonical chunk at a time.

        The network sees whole chunks only, so that image i is the same bytes however many are asked for.
        """
        for indices in chunks_of(num_images, self.chunk_size):
            yield self.images(indices)[: num_images - indices.start]


@dataclass(frozen=True)
class Denoiser(ByChunk):
    """A network with its process, and how it turns noise into images of a shape (C, H, W)."""

    diffusion: GaussianDiffusion
    model: nn.Module
    shape: Shape
    sampling: SamplingConfig
    seed: int
    compute: Compute
    class_names: ClassNames = NO_CLASSES  # of a class-conditional network

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The code indices that are visited, ascending."""
        total = self.diffusion.num_timesteps
        return timestep_subset(total, self.sampling.num_steps(total), self.sampling.spacing)

    def denoise(self, indices: range) -> Iterator[tuple[int, Tensor]]:
        """Yield (t, x) along the way from noise to the images of the given indices; x is float32 [len(indices), C, H, W]."""
        self.model.eval()
        sampling, timesteps = self.sampling, self.timesteps
        generators = image_generators(self.seed, indices)
        x_T = self.compute.send(torch.stack([torch.randn(self.shape, generator=generator) for generator in generators]))
        network = self.network(indices)
        if sampling.sampler == "ancestral":
            yield from ancestral(self.diffusion, network, x_T, generator=generators, timesteps=timesteps)
        elif sampling.sampler == "dpm_solver":
            yield from dpm_solver(self.diffusion, network, x_T, timesteps=timesteps)
        else:
            yield from ddim(self.diffusion, network, x_T, generator=generators, timesteps=timesteps, eta=sampling.eta)

    def network(self, indices: range) -> Model:
        """Return (x_t, t) -> prediction for images of the given indices: with their labels and guided, where the model knows classes."""
        if not self.class_names:
            return self.model
        labels = self.compute.send(labels_of(indices, self.sampling.labels, self.class_names))
        none = torch.full_like(labels, len(self.class_names))
        return guided(conditioned(self.model, labels), conditioned(self.model, none), self.sampling.guidance_scale)

    def images(self, indices: range) -> Tensor:
        """Return the images of the given indices, uint8 [len(indices), C, H, W] on the CPU."""
        x = torch.empty(0)
        for _, x in self.denoise(indices):  # noqa: B007 - the last x is the image
            pass
        return to_uint8(x).cpu()

    def on(self, compute: Compute) -> Denoiser:
        """Return this with its network moved to another device."""
        return replace(self, model=compute.place(self.model), compute=compute)

    def identity(self, weights: str) -> Generation:
        """Return what, with the checkpoint, makes the images these: equal identities give equal bytes on equal machines."""
        return _denoised(self.sampling, self.diffusion.num_timesteps, self.seed, weights, self.class_names)


@dataclass(frozen=True)
class VaeSampler(ByChunk):
    """A VAE's decoder: image i is the mean of p(x | z) for the i-th code z ~ N(0, I)."""

    model: Vae
    sampling: SamplingConfig  # of which it reads the chunk alone
    seed: int
    compute: Compute

    @torch.no_grad()
    def images(self, indices: range) -> Tensor:
        """Return the images of the given indices, uint8 [len(indices), C, H, W] on the CPU."""
        self.model.eval()
        codes = [torch.randn(self.model.latent_dim, generator=g) for g in image_generators(self.seed, indices)]
        return to_uint8(self.model.decode(self.compute.send(torch.stack(codes)))).cpu()

    def on(self, compute: Compute) -> VaeSampler:
        """Return this with its network moved to another device."""
        model = compute.place(self.model)
        assert isinstance(model, Vae)
        return replace(self, model=model, compute=compute)

    def identity(self, weights: str) -> Generation:
        """Return what, with the checkpoint, makes the images these."""
        return _decoded(self.sampling, self.seed, weights)


def make_sampler(
    experiment: Experiment,
    model: nn.Module,
    shape: Shape,
    sampling: SamplingConfig,
    seed: int,
    compute: Compute,
    class_names: ClassNames = NO_CLASSES,
) -> Denoiser | VaeSampler:
    """Return what generates images of a shape (C, H, W) from the network of an experiment."""
    if isinstance(model, Vae):
        return VaeSampler(model, sampling, seed, compute)
    return Denoiser(build_diffusion(experiment), model, shape, sampling, seed, compute, class_names)


def usual_generation(experiment: Experiment, class_names: ClassNames = NO_CLASSES) -> Generation:
    """Return how a run generates images where nothing else is asked for: as its experiment says, from its averaged weights."""
    sampling, seed = experiment.sampling, experiment.seed
    if not has_process(experiment):
        return _decoded(sampling, seed, "ema")
    return _denoised(sampling, experiment.diffusion.num_timesteps, seed, "ema", class_names)


def _denoised(
    sampling: SamplingConfig, num_timesteps: int, seed: int, weights: str, class_names: ClassNames
) -> Generation:
    asked = sampling.num_steps(num_timesteps)
    steps = len(timestep_subset(num_timesteps, asked, sampling.spacing))
    return Generation(
        sampler=sampling.sampler,
        steps=steps,
        # quad takes steps that fall on one index once: how many were asked for then still decides which they are
        spacing=sampling.spacing + (f"_of_{asked}" if steps < asked else ""),
        eta=sampling.eta if sampling.sampler == "ddim" else 0.0,
        weights=weights,
        seed=seed,
        chunk=sampling.batch_size,
        guidance_scale=sampling.guidance_scale,
        labels=class_name(sampling.labels, class_names) if class_names else "",
    )


def _decoded(sampling: SamplingConfig, seed: int, weights: str) -> Generation:
    return Generation(sampler="vae", steps=1, spacing="", weights=weights, seed=seed, chunk=sampling.batch_size)
