"""Contestants of training: `pipeline.training.loop.fit` as shipped, and diffusers' UNet2DModel in the loop of its own tutorial.

Both train the same network with the same settings on random images, whose content does not change the speed. Ours is fed by the
prefetching thread, with random numbers that are a function of (seed, step, stream).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import nn

from benchmarks.rounds import Case, Measure, rate, ratio
from pipeline.config import presets
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, Precision, load_experiment
from pipeline.data.images import to_float
from pipeline.training.batches import Batch, Prefetch
from pipeline.training.device import Compute, training_compute
from pipeline.training.loop import StepResult, TrainState, fit
from pipeline.training.models import build_model, build_objective, num_parameters
from pipeline.training.randomness import training_draws

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "ddpm-cifar10": (3, 32, 32)}
Shape = tuple[int, int, int]


def cases() -> list[Case]:
    """The paper's network at the paper's batch and at 16, and the small networks of the presets."""
    return [
        _case("ddpm-cifar10", 128, 1, rounds=3, prefix="train", micro=True),
        _case("ddpm-cifar10", 16, 1, rounds=7, quick_rounds=0, prefix="train_16"),
        _case("digits", 64, 20, rounds=9, quick_rounds=3, prefix="small_train"),
        _case("mnist", 64, 3, rounds=9, quick_rounds=0, prefix="mnist_train"),
    ]


def _case(
    preset: str,
    batch_size: int,
    num_steps: int,
    *,
    rounds: int,
    prefix: str,
    quick_rounds: int = 1,
    micro: bool = False,
) -> Case:
    """A training of a preset; `micro` adds diffusers in micro-batches of the size that ours chose."""
    figures = {
        f"{prefix}_vs_diffusers": ratio("ddpm-pipe", "diffusers"),
        f"{prefix}_vs_tuned": ratio("ddpm-pipe", "tuned"),
    }
    if micro:
        figures[f"{prefix}_vs_tuned_micro"] = ratio("ddpm-pipe", "tuned, micro-batches")
    prepare = partial(_contestants, preset, batch_size, num_steps, micro)
    return Case(f"training, {preset}, batch {batch_size}", "images/s", prepare, figures, rounds, quick_rounds)


def _contestants(preset: str, batch_size: int, num_steps: int, micro: bool, stack: ExitStack) -> dict[str, Measure]:
    experiment, shape = experiment_of(preset, batch_size), SHAPES[preset]
    compute = training_compute(experiment, Profile(), 1, shape)
    compute.start()
    shipped = replace(compute, precision=Precision.FP32, channels_last=False, compile=False)
    tuned = replace(shipped, precision=Precision.BF16, channels_last=True)
    works = {
        "ddpm-pipe": our_training(experiment, shape, compute, stack),
        "diffusers": peer_training(experiment, shape, shipped),
        "tuned": peer_training(experiment, shape, tuned),
    }
    if micro:
        works["tuned, micro-batches"] = peer_training(experiment, shape, tuned, compute.micro_batch_size)
    return {name: rate(partial(work, num_steps), batch_size * num_steps) for name, work in works.items()}


def experiment_of(preset: str, batch_size: int, settings: Sequence[str] = ()) -> Experiment:
    return load_experiment(presets.find("experiments", preset), [f"training.batch_size={batch_size}", *settings])


def random_batches(experiment: Experiment, shape: Shape) -> Iterator[Batch]:
    """Batches as a training gets them: rows of a set held in memory, and the chance that belongs to the step."""
    size = experiment.training.batch_size
    pool = torch.randint(0, 256, (2048, *shape), dtype=torch.uint8)
    for step in count():
        rows = torch.randint(len(pool), (size,))
        yield Batch(step, pool[rows], None, rows, training_draws(experiment.seed, step, 0, size, shape))


def our_steps(experiment: Experiment, shape: Shape, compute: Compute, batches: Iterator[Batch]) -> Iterator[StepResult]:
    """Train a new network, a step at a time."""
    model = compute.place(build_model(experiment, shape)).train()
    state = TrainState.create(model, experiment.training, experiment.diffusion.num_timesteps, compute)
    return fit(
        state,
        compute.compiled(model),
        build_objective(experiment),
        map(Batch.pin, batches) if compute.pin_memory else batches,
        experiment.training,
        compute,
        seed=experiment.seed,
        horizontal_flip=experiment.data.horizontal_flip,
    )


def our_training(experiment: Experiment, shape: Shape, compute: Compute, stack: ExitStack) -> Callable[[int], None]:
    batches: Iterator[Batch] = stack.enter_context(Prefetch(random_batches(experiment, shape)))
    steps = our_steps(experiment, shape, compute, batches)

    def work(num_steps: int) -> None:
        for _ in range(num_steps):
            next(steps)
        compute.wait()

    work(1)  # kernels are chosen and memory is taken here
    return work


def peer_network(experiment: Experiment, shape: Shape) -> nn.Module:
    """diffusers' network with the experiment's settings; `attention_head_dim` None is a single head."""
    from diffusers import UNet2DModel

    model = experiment.model
    sides = [max(shape[1:]) >> level for level in range(len(model.channel_multipliers))]
    attends = [side in model.attention_resolutions for side in sides]
    peer: nn.Module = UNet2DModel(
        sample_size=shape[1:],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(model.channels * m for m in model.channel_multipliers),
        layers_per_block=model.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        dropout=model.dropout,
        norm_num_groups=model.norm_groups,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        attention_head_dim=None,
    )
    assert num_parameters(peer) == num_parameters(build_model(experiment, shape, device="meta"))
    return peer


def peer_training(
    experiment: Experiment, shape: Shape, compute: Compute, micro_batch_size: int | None = None
) -> Callable[[int], None]:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    settings, device = experiment.training, compute.device
    model = compute.place(peer_network(experiment, shape)).train()
    scheduler = DDPMScheduler(num_train_timesteps=experiment.diffusion.num_timesteps)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    ema = EMAModel(model.parameters(), decay=settings.ema_decays[0])
    network = compute.compiled(model)
    pool = torch.randint(0, 256, (2048, *shape), dtype=torch.uint8)

    def backward(x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, share: float) -> None:
        if compute.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        with compute.autocast():
            loss = nn.functional.mse_loss(network(x_t, t).sample, eps)
        (loss * share).backward()  # type: ignore[no-untyped-call]

    def work(num_steps: int) -> None:
        size = settings.batch_size
        for _ in range(num_steps):
            compute.begin_step()
            x0 = to_float(pool[torch.randint(len(pool), (size,))].to(device))
            eps = torch.randn(x0.shape, device=device)
            t = torch.randint(0, experiment.diffusion.num_timesteps, (size,), device=device)
            x_t = scheduler.add_noise(x0, eps, t)
            for part in torch.arange(size).split(micro_batch_size or size):
                backward(x_t[part], t[part], eps[part], len(part) / size)
            nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
        compute.wait()

    if settings.batch_size * shape[1] * shape[2] < 1e5:  # else a step takes half a minute, and warming up is lost in it
        work(1)
    return work
