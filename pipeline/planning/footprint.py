"""The memory that a training worker takes at its peak, estimated before anything is computed, and what lowers it at which price.

One step runs on fake tensors, which have sizes and no content: forwards and backwards, with the experiment's precision and levels that are
computed again. What lives at once is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ddpm import UNet
from pipeline.config.experiment import Experiment, Precision, with_overrides
from pipeline.console import plural, size
from pipeline.planning.memory import REMEDY
from pipeline.planning.plan import BYTES_PER_PARAMETER, Plan
from pipeline.sampling.memory import Alive
from pipeline.training.device import Capabilities, Compute, training_compute
from pipeline.training.models import Shape, build_model, build_objective, num_parameters

NUM_CLASSES = 10  # of a class-conditional network: their number hardly changes its speed and its size
RUNTIME_BYTES = (
    550 * 2**20
)  # of a process with torch, before it has a network: measured on a CPU; taken for a CUDA context too
KERNELS = 1.1  # what kernels and the allocator take beside tensors
HALF_ON_GPU = 4 / 3  # autocast of GPUs leaves norms in float32: 8 bytes of an element are kept where CPUs keep 6
LAYERS = 64  # more full-width results than the paper's networks keep
NEARLY_ALL = 0.85  # of the free memory: a measured peak was up to 15 % above the estimate (docs/training.md)


@dataclass(frozen=True)
class Footprint:
    """Estimated bytes of a worker at its peak, and the products of a step, each counted as two operations."""

    peak_bytes: int
    flops: int


@dataclass(frozen=True)
class WorkerMemory:
    """What the memory of a worker depends on, and the bytes that it may use (None if that is unknown here)."""

    experiment: Experiment
    shape: Shape
    images: int  # computed at once
    precision: Precision
    gpu: bool
    free_bytes: int | None = None

    @classmethod
    def of(cls, plan: Plan) -> WorkerMemory | None:
        """Return one worker of a plan; None until the shape of the images is known."""
        if plan.shape is None:
            return None
        training = plan.experiment.training
        part = training.batch_size // plan.num_workers
        if plan.profile.kind == "local" and not plan.missing:
            compute = training_compute(plan.experiment, plan.profile, plan.num_workers, plan.shape)
            sharing = plan.num_workers if not plan.profile.use_gpu else 1 / min(1, plan.profile.gpus_per_worker)
            images = min(part, compute.micro_batch_size or part)
            free = int(compute.free_bytes() / sharing)
            return cls(plan.experiment, plan.shape, images, compute.precision, plan.profile.use_gpu, free)
        precision = Precision.BF16 if training.precision is Precision.MIXED else training.precision
        images = min(part, training.micro_batch_size or part)
        return cls(plan.experiment, plan.shape, images, precision, plan.profile.use_gpu)

    def footprint(self, images: int | None = None, levels: int | None = None, bf16: bool = False) -> Footprint | None:
        """Return the estimate, with other images at once, levels computed again or precision; None for a network that needs values."""
        experiment = self.experiment
        if levels is not None:
            experiment = with_overrides(experiment, [f"training.activation_checkpointing={levels}"])
        half = bf16 or self.precision is not Precision.FP32
        training = experiment.training
        try:
            step, flops, parameters = _fake_step(experiment, self.shape, images or self.images, half)
        except Exception:  # a network of one's own may look at values, which are not there
            return None
        # Adam's moments, the averages, and the copy of the weights that grids of samples are drawn from
        copies = (
            2 + len(training.ema_decays) + len(training.ema_widths) + (experiment.logging.grid_every_steps is not None)
        )
        step *= KERNELS * (HALF_ON_GPU if half and self.gpu else 1)
        return Footprint(int(RUNTIME_BYTES + copies * parameters * BYTES_PER_PARAMETER + step), flops)

    def may_be_short(self) -> bool:
        """Whether the estimate is worth its seconds: False for U-Nets that are far too small to fill the memory."""
        model = self.experiment.model
        if self.free_bytes is None or model.type != "unet":
            return False
        widest = model.channels * max(model.channel_multipliers)
        return 2 * LAYERS * widest * self.shape[1] * self.shape[2] * 4 * self.images > self.free_bytes

    def is_short(self, peak_bytes: float) -> bool:
        """Whether so many bytes are more than the worker may use."""
        return self.free_bytes is not None and peak_bytes > NEARLY_ALL * self.free_bytes

    def advice(self) -> str:
        """Return what a step takes, and what would lower it and at which price, in one line."""
        now = self.footprint()
        if now is None:
            return REMEDY
        ways = list(self._ways(now))
        fit = [way for way in ways if not self.is_short(way.peak_bytes)]
        if fit:
            use = "use " + ", or ".join(f"-s {way.setting} ({size(way.peak_bytes)}, {way.cost})" for way in fit)
        elif ways:
            use = f"use several of {', '.join(f'-s {way.setting}' for way in ways)}, a smaller network, or a device with more memory"
        else:
            use = "use a smaller network, or a device with more memory"
        has = "" if self.free_bytes is None else f" and has {size(self.free_bytes)} free"
        return f"a worker takes about {size(now.peak_bytes)} for {plural(self.images, 'image')} at once{has}; {use}"

    def _ways(self, now: Footprint) -> Iterator[_Way]:
        """Yield each setting that lowers the memory, as far as is needed."""
        if self.images > 1 and (one := self.footprint(images=1)) is not None:
            each = (now.peak_bytes - one.peak_bytes) / (self.images - 1)
            images = self.images // 2
            while images > 1 and self.is_short(one.peak_bytes + (images - 1) * each):
                images //= 2
            cost = "slower if so few leave the GPU idle" if self.gpu else "about as fast"
            yield _Way(f"training.micro_batch_size={images}", one.peak_bytes + (images - 1) * each, cost)
        current = self.experiment.training.activation_checkpointing
        all_levels = len(self.experiment.model.channel_multipliers) if self.experiment.model.type == "unet" else 0
        for levels in sorted({1, 2, all_levels} & set(range(current + 1, all_levels + 1))):
            found = self.footprint(levels=levels)
            if found is not None and (levels == all_levels or not self.is_short(found.peak_bytes)):
                more = f"{round(100 * (found.flops / now.flops - 1))} % more arithmetic"
                yield _Way(f"training.activation_checkpointing={levels}", found.peak_bytes, more)
                break
        able = Capabilities.of_this_machine().fast_precisions(self.gpu) if self.free_bytes is not None else ()
        if (
            self.precision is Precision.FP32
            and Precision.BF16 in able
            and (found := self.footprint(bf16=True)) is not None
        ):
            yield _Way("training.precision=bf16", found.peak_bytes, "faster, with other last digits")


@dataclass(frozen=True)
class _Way:
    """A setting that lowers the memory, what is then taken, and what it costs."""

    setting: str
    peak_bytes: float
    cost: str


def memory_advice(plan: Plan) -> str:
    """Return what a worker of the plan takes and what lowers it, in one line."""
    worker = WorkerMemory.of(plan)
    return REMEDY if worker is None else worker.advice()


def memory_warnings(plan: Plan) -> tuple[str, ...]:
    """Return the advice as a warning if a worker of the plan probably takes more than is free; nothing if that is unknown."""
    worker = WorkerMemory.of(plan)
    if worker is None or not worker.may_be_short():
        return ()
    found = worker.footprint()
    return (worker.advice(),) if found is not None and worker.is_short(found.peak_bytes) else ()


def _fake_step(experiment: Experiment, shape: Shape, images: int, half: bool) -> tuple[float, int, int]:
    """Return the most bytes of weights, gradients and results alive at once in a step, its flops, and the network's parameters."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    num_classes = NUM_CLASSES if experiment.model.class_conditional else None
    model = build_model(experiment, shape, device="meta", num_classes=num_classes)
    objective = build_objective(experiment)
    compute = Compute(torch.device("cpu"), "gloo", threads=1, precision=Precision.BF16 if half else Precision.FP32)
    with FakeTensorMode(allow_non_fake_inputs=True), _Counted() as counted:
        model = model.to_empty(device="cpu").train()
        x0, eps = torch.empty(images, *shape), torch.empty(images, *shape)
        numbers = torch.empty(images, dtype=torch.int64)
        given: dict[str, Any] = {"keys": numbers} if isinstance(model, UNet) else {}
        if num_classes is not None:
            given["y"] = numbers
        with compute.autocast():
            losses = objective(partial(model, **given), x0, numbers, eps)
            with compute.no_autocast():
                losses.sum().backward()  # type: ignore[no-untyped-call]
    return counted.most, counted.flops, num_parameters(model)


class _Counted(Alive):  # type: ignore[no-untyped-call]
    """Counts the products of a step, too."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        result = super().__torch_dispatch__(func, types, args, kwargs)
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result
