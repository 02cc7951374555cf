"""Generated images: noise a function of (seed, image index), computed in canonical chunks (ARCHITECTURE.md, row 12)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from ddpm import (
    GaussianDiffusion,
    Model,
    ancestral,
    conditioned,
    ddim,
    dpm_solver,
    guided,
    normal_noise,
    timestep_subset,
)
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, SamplingConfig
from pipeline.data.images import to_uint8
from pipeline.data.labels import NO_CLASSES, ClassNames, class_name, labels_of
from pipeline.metrics.metric_identity import Generation
from pipeline.sampling.network import SamplingNetwork
from pipeline.training.chunks import chunks_of
from pipeline.training.device import Compute, sampling_precision
from pipeline.training.models import build_diffusion, has_process
from pipeline.training.randomness import image_generators
from pipeline.training.threads import num_threads, side_by_side
from pipeline.training.vae import Vae

Shape = tuple[int, int, int]
EARLY_STEPS = 50

_PROBED_VALUES, _MOST_PROBES = 2**18, 16
_WORTH_TRYING = 4  # calls to come for each probe


class ImageGenerator(ABC):
    """Generates images by canonical chunk, whatever kind of model it has."""

    sampling: SamplingConfig

    @property
    def chunk_size(self) -> int:
        """Images that the network sees at once."""
        return self.sampling.batch_size

    @abstractmethod
    def images(self, indices: range) -> Tensor:
        """Return images of one canonical chunk, uint8 [len(indices), C, H, W] on the CPU, whose bytes depend on their index alone."""

    @abstractmethod
    def on(self, compute: Compute) -> Self:
        """Return this with its network moved to another device."""

    @abstractmethod
    def identity(self, weights: str) -> Generation:
        """Return what, with the checkpoint, makes the images these: equal identities give equal bytes on equal machines."""

    def generate(self, num_images: int) -> Iterator[Tensor]:
        """Yield images 0 .. num_images - 1 as uint8 [n, C, H, W] on the CPU, a canonical chunk at a time."""
        chunks = chunks_of(num_images, self.chunk_size)
        yield from side_by_side(self.images, chunks, *self.split_threads(len(chunks)))

    def split_threads(self, num_chunks: int) -> tuple[int, int]:
        """Return how many chunks to compute at a time, and with how many threads each."""
        return 1, torch.get_num_threads()

    def _chunk_around(self, indices: range) -> range:
        begin = indices.start // self.chunk_size * self.chunk_size
        if indices.stop > begin + self.chunk_size:
            raise ValueError(f"{indices}: expected images of one chunk of {self.chunk_size}")
        return range(begin, begin + self.chunk_size)


@dataclass
class Denoiser(ImageGenerator):
    """A network with its process, and how it turns noise into images of a shape (C, H, W)."""

    diffusion: GaussianDiffusion
    model: nn.Module
    shape: Shape
    sampling: SamplingConfig
    seed: int
    compute: Compute
    class_names: ClassNames = NO_CLASSES  # of a class-conditional network
    _fast: SamplingNetwork = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Take the network as it is now: weights that change later are not seen."""
        self.sampling = settled(self.sampling, self.compute)
        self._fast = SamplingNetwork(self.model, self.diffusion.num_timesteps, self.sampling, self.compute)

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
        x_T = self.compute.send(normal_noise((len(indices), *self.shape), generators))
        network = self.network(indices)
        if sampling.sampler == "ancestral":
            yield from ancestral(self.diffusion, network, x_T, generator=generators, timesteps=timesteps)
        elif sampling.sampler == "dpm_solver":
            yield from dpm_solver(self.diffusion, network, x_T, timesteps=timesteps)
        else:
            yield from ddim(self.diffusion, network, x_T, generator=generators, timesteps=timesteps, eta=sampling.eta)

    def network(self, indices: range, *, exact: bool = False) -> Model:
        """Return (x_t, t) -> prediction for images of the given indices: with their labels and guided, where the model knows classes.

        `exact`: in float32 and uncompiled, whatever the settings.
        """
        model = self.model if exact else self._fast
        if not self.class_names:
            return model
        labels = self.compute.send(labels_of(indices, self.sampling.labels, self.class_names))
        none = torch.full_like(labels, len(self.class_names))
        return guided(conditioned(model, labels), conditioned(model, none), self.sampling.guidance_scale)

    def images(self, indices: range) -> Tensor:
        """Return images of one canonical chunk, uint8 [len(indices), C, H, W] on the CPU.

        Their bytes equal those in the whole chunk. As few images of the chunk are computed as that allows.
        """
        batch = self._batch_for(indices)
        _, x = deque(self.denoise(batch), maxlen=1).pop()
        return to_uint8(x[indices.start - batch.start :][: len(indices)]).cpu()

    def split_threads(self, num_chunks: int) -> tuple[int, int]:
        """Return one chunk for each thread where that changes no byte: threads that share a small operation wait for each other.

        Whether it does depends on processor, precision and sizes, and is tried.
        """
        at_once, each = self.compute.split_threads(num_chunks)
        one_by_one = 1, torch.get_num_threads()
        calls = num_chunks * len(self.timesteps)
        if at_once == 1 or self.sampling.compile or calls < _WORTH_TRYING * self._num_probes:
            return one_by_one
        chunk = range(self.chunk_size)

        def same() -> bool:
            shared = self._probe(chunk)
            with num_threads(each):
                return all(map(torch.equal, self._probe(chunk), shared))

        fits = self._fast.fits(torch.empty(at_once * self.chunk_size, *self.shape))
        return (at_once, each) if fits and self._fast.same_with(each, same) else one_by_one

    def _batch_for(self, indices: range) -> range:
        """Return the fewest images that the network can see at once so that those asked for are as in their whole chunk.

        Some kernels add up in another order for another batch; whether they do depends on processor, precision and sizes. So a smaller
        batch is tried, and taken where its rows have the same bytes.
        """
        chunk = self._chunk_around(indices)
        if self.sampling.compile:  # for a batch of another size it would be compiled anew
            return chunk
        among_all: list[Tensor] = []
        for length in sorted({len(indices), *(2**i for i in range(16))}):
            if not len(indices) <= length < len(chunk):
                continue
            begin = min(indices.start, chunk.stop - length)
            batch, first = range(begin, begin + length), begin - chunk.start

            def same(batch: range = batch, first: int = first) -> bool:
                among_all[:] = among_all or self._probe(chunk)
                alone = self._probe(batch)
                return all(torch.equal(a, b[first : first + len(a)]) for a, b in zip(alone, among_all, strict=True))

            if self._fast.same_alone(first, first + length, same):
                return batch
        return chunk

    @torch.no_grad()
    def _probe(self, indices: range) -> list[Tensor]:
        """Return what the network gives for noise: small networks are asked several times, since sums rarely differ in a rounded bit."""
        self.model.eval()
        network, generators = self.network(indices), image_generators(self.seed, indices, "probe")
        total, probes = self.diffusion.num_timesteps, self._num_probes
        found = []
        for probe in range(probes):
            x = self.compute.send(normal_noise((len(indices), *self.shape), generators))
            t = torch.full((len(indices),), probe * total // probes, dtype=torch.int64, device=x.device)
            found.append(network(x, t))
        return found

    @property
    def _num_probes(self) -> int:
        return min(_MOST_PROBES, -(-_PROBED_VALUES // (self.chunk_size * math.prod(self.shape))))

    def on(self, compute: Compute) -> Denoiser:
        return replace(self, model=compute.place(self.model), compute=compute)

    def identity(self, weights: str) -> Generation:
        return _denoised(self.sampling, self.diffusion.num_timesteps, self.seed, weights, self.class_names)


@dataclass(frozen=True)
class VaeSampler(ImageGenerator):
    """A VAE's decoder: image i is the mean of p(x | z) for the i-th code z ~ N(0, I)."""

    model: Vae
    sampling: SamplingConfig  # only batch_size is used
    seed: int
    compute: Compute

    @torch.no_grad()
    def images(self, indices: range) -> Tensor:
        """Return images of one canonical chunk, uint8 [len(indices), C, H, W] on the CPU; all of it is one call of the decoder."""
        self.model.eval()
        chunk = self._chunk_around(indices)
        codes = [torch.randn(self.model.latent_dim, generator=g) for g in image_generators(self.seed, chunk)]
        images = to_uint8(self.model.decode(self.compute.send(torch.stack(codes)))).cpu()
        return images[indices.start - chunk.start :][: len(indices)]

    def on(self, compute: Compute) -> VaeSampler:
        model = compute.place(self.model)
        assert isinstance(model, Vae)
        return replace(self, model=model, compute=compute)

    def identity(self, weights: str) -> Generation:
        return _decoded(self.sampling, self.seed, weights)


def make_sampler(
    experiment: Experiment,
    model: nn.Module,
    shape: Shape,
    sampling: SamplingConfig,
    seed: int,
    compute: Compute,
    class_names: ClassNames = NO_CLASSES,
) -> ImageGenerator:
    """Return what generates images of a shape (C, H, W) from the network of an experiment."""
    if isinstance(model, Vae):
        return VaeSampler(model, sampling, seed, compute)
    return Denoiser(build_diffusion(experiment), model, shape, sampling, seed, compute, class_names)


def settled(sampling: SamplingConfig, where: Compute | Profile) -> SamplingConfig:
    """Return the settings with the precision `mixed` replaced by what it is where images are generated."""
    return sampling.model_copy(update={"precision": sampling_precision(sampling.precision, where)})


def early_sampling(experiment: Experiment, num_images: int) -> SamplingConfig:
    """Return how few images are generated for a score while training: as the run samples, but in 50 steps of DDIM where that takes more."""
    sampling = experiment.sampling
    changes: dict[str, object] = {"batch_size": min(num_images, sampling.batch_size)}
    if sampling.num_steps(experiment.diffusion.num_timesteps) > EARLY_STEPS:
        changes |= {"sampler": "ddim", "steps": EARLY_STEPS, "eta": 0.0}
    return sampling.model_copy(update=changes)


def early_calls(experiment: Experiment, num_images: int) -> int:
    """Return the network calls of such a score, each for one image."""
    if not has_process(experiment):
        return num_images
    sampling = early_sampling(experiment, num_images)
    steps = sampling.num_steps(experiment.diffusion.num_timesteps)
    return num_images * steps * (1 if sampling.guidance_scale == 1 else 2)


def early_seed(experiment: Experiment) -> int:
    """Return the seed of these images, which no score at the end uses: what a checkpoint is chosen by must not judge it again."""
    return experiment.seed ^ 1 << 62


def usual_generation(
    experiment: Experiment, class_names: ClassNames = NO_CLASSES, *, mixed_is: str = "fp32"
) -> Generation:
    """Return how a run generates images by default: by its experiment's settings, from its averaged weights.

    `mixed_is` is the precision that `mixed` means on the machines that generate.
    """
    sampling, seed = experiment.sampling, experiment.seed
    if sampling.precision == "mixed":
        sampling = sampling.model_copy(update={"precision": mixed_is})
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
        precision=sampling.precision,
        compile=sampling.compile,
    )


def _decoded(sampling: SamplingConfig, seed: int, weights: str) -> Generation:
    return Generation(sampler="vae", steps=1, spacing="", weights=weights, seed=seed, chunk=sampling.batch_size)
