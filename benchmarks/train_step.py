"""Training and denoising beside diffusers: the same network, batch, optimizer and arithmetic, measured in turns in one run.

    python benchmarks/train_step.py                              (the digits preset, this machine's CPUs)
    python benchmarks/train_step.py --preset mnist --precision fp32
    python benchmarks/train_step.py --preset ddpm-cifar10 --device cuda

Ours is `pipeline.training.loop.fit`, fed by the prefetching thread, with the random numbers that are a function of (seed,
step, stream), and `ddpm.ddim`. The peer is diffusers' UNet2DModel, its DDPMScheduler,
EMAModel and DDIMScheduler in the plain loop of its own tutorial.
Images are random: their content does not change the speed. docs/speed.md explains the figures.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor, nn

from ddpm import ddim, timestep_subset
from pipeline.config import presets
from pipeline.config.experiment import Experiment, load_experiment
from pipeline.data.images import to_float
from pipeline.training.batches import Batch, Prefetch
from pipeline.training.device import AUTOCAST, Compute
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import build_diffusion, build_model, build_objective, num_parameters
from pipeline.training.randomness import training_draws

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "ddpm-cifar10": (3, 32, 32)}
Shape = tuple[int, int, int]
Work = Callable[[int], None]  # does so many steps


def random_batches(experiment: Experiment, shape: Shape) -> Iterator[Batch]:
    """Batches as a training gets them: rows of a set held in memory, and the chance that belongs to the step."""
    size = experiment.training.batch_size
    pool = torch.randint(0, 256, (2048, *shape), dtype=torch.uint8)
    for step in count():
        rows = torch.randint(len(pool), (size,))
        yield Batch(step, pool[rows], None, rows, training_draws(experiment.seed, step, 0, size, shape))


def our_training(
    experiment: Experiment, shape: Shape, compute: Compute, batches: Prefetch[Batch]
) -> tuple[Work, nn.Module]:
    model = compute.place(build_model(experiment, shape))
    train_state = TrainState.create(model, experiment.training, experiment.diffusion.num_timesteps, compute)
    steps = fit(
        train_state,
        compute.compiled(model),
        build_objective(experiment),
        batches,
        experiment.training,
        compute,
        seed=experiment.seed,
        horizontal_flip=experiment.data.horizontal_flip,
    )

    def work(num_steps: int) -> None:
        for _ in range(num_steps):
            next(steps)

    return work, model


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
    return peer


def peer_training(experiment: Experiment, shape: Shape, compute: Compute) -> tuple[Work, nn.Module]:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    settings, device = experiment.training, compute.device
    model = compute.place(peer_network(experiment, shape)).train()
    scheduler = DDPMScheduler(num_train_timesteps=experiment.diffusion.num_timesteps)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    ema = EMAModel(model.parameters(), decay=settings.ema_decay)
    network = compute.compiled(model)
    pool = torch.randint(0, 256, (2048, *shape), dtype=torch.uint8)

    def work(num_steps: int) -> None:
        for _ in range(num_steps):
            compute.begin_step()
            x0 = to_float(pool[torch.randint(len(pool), (settings.batch_size,))].to(device))
            eps = torch.randn(x0.shape, device=device)
            t = torch.randint(0, experiment.diffusion.num_timesteps, (len(x0),), device=device)
            x_t = scheduler.add_noise(x0, eps, t)
            if compute.channels_last:
                x_t = x_t.contiguous(memory_format=torch.channels_last)
            with compute.autocast():
                loss = nn.functional.mse_loss(network(x_t, t).sample, eps)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())

    return work, model


def our_denoising(experiment: Experiment, model: nn.Module, noise: Tensor) -> Work:
    diffusion = build_diffusion(experiment)

    def work(num_steps: int) -> None:
        for _ in ddim(diffusion, model, noise, timesteps=timestep_subset(diffusion.num_timesteps, num_steps)):
            pass

    return work


def peer_denoising(experiment: Experiment, model: nn.Module, noise: Tensor) -> Work:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=experiment.diffusion.num_timesteps, timestep_spacing="trailing")

    def work(num_steps: int) -> None:
        scheduler.set_timesteps(num_steps)
        x = noise
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t).sample, t, x).prev_sample

    return work


def seconds(work: Work, num_steps: int, compute: Compute) -> float:
    begin = time.perf_counter()
    work(num_steps)
    if compute.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(name: str, ours: Work, peer: Work, num_steps: int, rounds: int, images: int, compute: Compute) -> None:
    """Measure in turns, so that a machine that gets busier hits both; print medians and the median of the rounds' ratios."""
    for work in (ours, peer):
        seconds(work, num_steps, compute)  # warm up: kernels are chosen and memory is taken here
    pairs = [(seconds(ours, num_steps, compute), seconds(peer, num_steps, compute)) for _ in range(rounds)]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    print(f"{name:<24} {images / a:>12.1f} {images / b:>14.1f} {ratio:>8.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="digits")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of training (default: the preset's)")
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="a setting of the experiment; training.compile compiles both networks")  # fmt: skip
    parser.add_argument("--cuda-graphs", action="store_true", help="with training.compile: replay recorded kernels")
    parser.add_argument("--steps", type=int, default=10, help="training steps of a round (default 10)")
    parser.add_argument("--denoising-steps", type=int, default=10, help="DDIM steps of a round (default 10)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    precision = [] if asked.precision is None else [f"training.precision={asked.precision}"]
    overrides = [*precision, *asked.overrides]
    experiment, shape = load_experiment(presets.find("experiments", asked.preset), overrides), SHAPES[asked.preset]
    training, device = experiment.training, torch.device(asked.device, 0 if asked.device == "cuda" else None)
    threads = asked.threads or torch.get_num_threads()
    dtype = AUTOCAST[training.precision]
    compute = Compute(device, "gloo", dtype, training.compile, training.channels_last, threads, training.tf32,
                      cuda_graphs=asked.cuda_graphs and training.compile)  # fmt: skip
    compute.start()
    torch.manual_seed(0)
    with Prefetch(random_batches(experiment, shape)) as batches:
        ours, our_model = our_training(experiment, shape, compute, batches)
        peer, peer_model = peer_training(experiment, shape, compute)
        assert num_parameters(our_model) == num_parameters(peer_model)
        where = torch.cuda.get_device_name() if compute.on_gpu else f"{threads} threads, {platform.machine()}"
        print(f"{asked.preset}: {num_parameters(our_model):,} parameters, batch {training.batch_size}, "
              f"training in {training.precision}, denoising in fp32; {where}; torch {torch.__version__}")  # fmt: skip
        print(f"{'images/s':<24} {'ddpm-pipe':>12} {'diffusers':>14} {'ratio':>8}")
        size = training.batch_size
        compare("training step", ours, peer, asked.steps, asked.rounds, size * asked.steps, compute)
    noise = torch.randn(experiment.sampling.batch_size, *shape, device=device)
    num_steps = asked.denoising_steps
    our_sampler = our_denoising(experiment, our_model.eval(), noise)
    peer_sampler = peer_denoising(experiment, peer_model.eval(), noise)
    compare(f"DDIM, {num_steps} steps", our_sampler, peer_sampler, num_steps, asked.rounds, len(noise), compute)


if __name__ == "__main__":
    main()
