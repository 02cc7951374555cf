"""Contestants of sampling: our sampler as shipped and compiled, and diffusers' UNet2DModel with its DDIMScheduler, as shipped and tuned.

All take DDIM steps with the same network from noise to 100 images, the peers in one batch, ours in its own chunks. Weights are random: what
they are does not change the speed. `scoring_network_share` is the network's part of the time that an evaluation of the digits takes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.rounds import Case, Measure, rate, ratio
from benchmarks.training import SHAPES, Shape, experiment_of, peer_network
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import DataConfig, Experiment
from pipeline.ingest.ingest import ensure_ingested
from pipeline.metrics.features import Extracted, concatenate
from pipeline.metrics.scoring import Scorer, choose_extractor, prepare_reference, score
from pipeline.sampling.generated import GenerateTask
from pipeline.sampling.generation import Denoiser
from pipeline.sampling.network import SamplingNetwork
from pipeline.training.chunks import chunks_of
from pipeline.training.device import Compute, sampling_compute
from pipeline.training.models import build_diffusion, build_model

IMAGES, SCORED = 100, 512


def cases() -> list[Case]:
    return [
        _case("ddpm-cifar10", 2, rounds=5, prefix="sample"),
        _case("digits", 50, rounds=9, prefix="small_sample", quick_rounds=3),
        _case("ddpm-cifar10", 2, rounds=5, prefix="sample_compiled", quick_rounds=0, compiled=True),
        _case("digits", 50, rounds=9, prefix="small_sample_compiled", quick_rounds=0, compiled=True),
        Case("scoring, digits", "share", _scoring, {"scoring_network_share": lambda s: s["network"]}, rounds=5),
    ]


def _case(
    preset: str, num_steps: int, *, rounds: int, prefix: str, quick_rounds: int = 1, compiled: bool = False
) -> Case:
    figures = {f"{prefix}_vs_{peer}": ratio("ddpm-pipe", peer) for peer in ("diffusers", "tuned")}
    title = f"{IMAGES} images, {preset}" + (", ours compiled" if compiled else "")
    prepare = partial(_contestants, preset, num_steps, compiled)
    return Case(title, "network rows/s", prepare, figures, rounds, quick_rounds)


def _contestants(preset: str, num_steps: int, compiled: bool, stack: ExitStack) -> dict[str, Measure]:
    experiment, shape = experiment_of(preset, 64), SHAPES[preset]
    compute = sampling_compute(Profile())
    compute.start()
    works = {
        "ddpm-pipe": our_sampling(changed(experiment, compile=compiled), shape, IMAGES, num_steps, compute),
        "diffusers": peer_sampling(changed(experiment, precision="fp32"), shape, IMAGES, num_steps, compute),
        "tuned": peer_sampling(changed(experiment, precision="bf16"), shape, IMAGES, num_steps, compute),
    }
    for work in works.values():  # kernels are chosen, compiled, and memory is taken here
        work()
    return {name: rate(work, IMAGES * num_steps) for name, work in works.items()}


def changed(experiment: Experiment, **sampling: Any) -> Experiment:
    return experiment.model_copy(update={"sampling": experiment.sampling.model_copy(update=sampling)})


def our_sampling(
    experiment: Experiment, shape: Shape, num_images: int, num_steps: int, compute: Compute
) -> Callable[[], Any]:
    denoiser = _denoiser(experiment, shape, num_steps, compute)
    return lambda: list(denoiser.generate(num_images))


def _denoiser(experiment: Experiment, shape: Shape, num_steps: int, compute: Compute) -> Denoiser:
    chosen = changed(experiment, sampler="ddim", steps=num_steps, eta=0.0)
    model = compute.place(build_model(experiment, shape))
    return Denoiser(build_diffusion(experiment), model, shape, chosen.sampling, experiment.seed, compute)


def peer_sampling(
    experiment: Experiment, shape: Shape, num_images: int, num_steps: int, compute: Compute
) -> Callable[[], Any]:
    """diffusers' sampler; in bf16 with weights of that type, in channels_last."""
    model = compute.place(peer_network(experiment, shape).eval())
    if experiment.sampling.precision == "bf16":
        model = model.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return partial(_denoise, experiment, model, torch.randn(num_images, *shape, device=compute.device), num_steps)


@torch.no_grad()
def _denoise(experiment: Experiment, model: nn.Module, noise: Tensor, num_steps: int) -> None:
    from diffusers import DDIMScheduler

    dtype = next(model.parameters()).dtype
    scheduler = DDIMScheduler(num_train_timesteps=experiment.diffusion.num_timesteps, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    x = noise.contiguous(memory_format=torch.channels_last) if dtype == torch.bfloat16 else noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x.to(dtype), t).sample.float(), t, x).prev_sample


def _scoring(stack: ExitStack) -> dict[str, Measure]:
    """The evaluation of a training on the digits, without its preparation, which is kept for all: extractor and reference."""
    experiment, compute = experiment_of("digits", 64), sampling_compute(Profile())
    compute.start()
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scoring-")))
    dataset = ensure_ingested(DataConfig(), home)
    extractor = choose_extractor(dataset, home)
    reference = prepare_reference(dataset, extractor, SCORED, home)
    denoiser = _denoiser(experiment, SHAPES["digits"], 50, compute)
    task, spent_s = GenerateTask(denoiser, 0, extractor), [0.0]

    def timed(network: SamplingNetwork, *tensors: Tensor) -> Tensor:
        begin = time.perf_counter()
        out = call(network, *tensors)
        spent_s[0] += time.perf_counter() - begin
        return out

    call = SamplingNetwork.__call__
    stack.enter_context(patch.object(SamplingNetwork, "__call__", timed))

    def measure() -> float:
        spent_s[0], begin = 0.0, time.perf_counter()
        parts = [task(indices) for indices in chunks_of(SCORED, denoiser.chunk_size)]
        found = concatenate([Extracted.from_arrays(part) for part in parts], extractor)
        score(found, Scorer(dataset, extractor, reference), denoiser.identity("ema"))
        return spent_s[0] / (time.perf_counter() - begin)

    measure()
    return {"network": measure}
