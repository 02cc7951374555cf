"""The training loop: learning rate, loss, gradient, clip, step, average. Torch only; the caller's `for` body does everything else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm import (
    LossAwareTimesteps,
    TimestepSampler,
    UNet,
    UniformTimesteps,
    WeightAverage,
)
from pipeline.config.experiment import TrainingConfig
from pipeline.errors import DivergedError
from pipeline.training.averages import make_averages
from pipeline.training.batches import Batch, PlacedBatch
from pipeline.training.device import Compute, LossScaler
from pipeline.training.learning_rate import learning_rate_at
from pipeline.training.models import Loss, load_weights, weights_of
from pipeline.training.optimizer import AdamW
from pipeline.training.randomness import seed_dropout

LEAST_LOSS_SCALE = 1.0  # it begins at 65,536: below one, fp16 has nothing left to gain


@dataclass
class TrainState:
    """What training changes: the weights, the optimizer's moments, the averages of the weights, the losses that loss-aware timesteps
    remember, and the number of steps done. The first average is the one that is sampled.

    The scaler is fp16's: its state travels with the checkpoint, or a resumed training would scale anew. In other precisions it is idle.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[str, WeightAverage]
    timesteps: TimestepSampler
    scaler: LossScaler
    step: int = 0

    @classmethod
    def create(cls, model: nn.Module, settings: TrainingConfig, num_timesteps: int, compute: Compute) -> TrainState:
        """Return a train_state at step 0 for a network that is on its device already."""
        # with no weight decay it is Adam; both kinds of device have one fused kernel for all parameters
        optimizer = AdamW(
            model.parameters(),
            fused=True,
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )
        kind = LossAwareTimesteps if settings.timestep_sampling == "loss_aware" else UniformTimesteps
        return cls(model, optimizer, make_averages(model, settings), kind(num_timesteps), compute.loss_scaler())

    @property
    def ema(self) -> WeightAverage:
        """The average that is sampled."""
        return self.averages["ema"]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that a checkpoint must hold, as named groups of tensors."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}/{name}"] = value
        averages = {name: dict(average.shadow) for name, average in self.averages.items()}
        history = self.timesteps.state_dict()
        return {"model": weights_of(self.model), "optimizer": moments, **averages} | (
            {"timesteps": history} if history else {}
        )

    def restore(self, tensors: dict[str, dict[str, Tensor]], step: int) -> None:
        """Go back to what `tensors` returned at a step."""
        load_weights(self.model, tensors["model"])
        for name, average in self.averages.items():
            average.load_state_dict({"num_updates": step, "shadow": tensors[name]})  # one update a step
        self.timesteps.load_state_dict(tensors.get("timesteps", {}))
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            kind, _, name = key.partition("/")
            moments.setdefault(name, {})[kind] = value
        for name, parameter in self.model.named_parameters():
            if name in moments:
                self.optimizer.state[parameter] = {
                    key: _placed_like(value, parameter) for key, value in moments[name].items()
                }
        self.step = step


def _placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy on the parameter's device, and in its memory format: the fused kernel takes all of them for alike, the count of
    steps apart, which has no shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


@dataclass(frozen=True)
class StepResult:
    """One finished step of one worker; losses, timesteps and the gradient's norm stay on the device until somebody looks."""

    step: int  # steps done, this one included
    losses: Tensor  # float32 [b]
    weights: Tensor  # float32 [b]: 1, or what makes the mean loss unbiased where timesteps are not drawn uniformly
    timesteps: Tensor  # int64 [b]
    grad_norm: Tensor  # over all workers, before clipping
    learning_rate: float
    scaler: LossScaler

    def require_finite(self) -> None:
        """Raise DivergedError unless this step's gradient was finite; the norm is the same on every worker, so all raise together.

        In fp16 the optimizer left out such a step, and the loss is scaled by half as much from then on: to be expected now and then,
        but divergence once the scale has collapsed.
        """
        if torch.isfinite(self.grad_norm):
            return
        if not self.scaler.is_enabled():
            raise DivergedError(
                f"training diverged at step {self.step}: gradient norm is {self.grad_norm.item()} at learning rate "
                f"{self.learning_rate:.3g}; lower training.learning_rate, or raise training.warmup_steps"
            )
        scale = self.scaler.get_scale()
        if scale < LEAST_LOSS_SCALE:
            raise DivergedError(
                f"training diverged at step {self.step}: the gradient overflows fp16 even with its loss scale down to {scale:.3g}; "
                "lower training.learning_rate, or use -s training.precision=bf16 or fp32"
            )


def fit(
    train_state: TrainState,
    network: nn.Module,
    objective: Loss,
    batches: Iterable[Batch],
    settings: TrainingConfig,
    compute: Compute,
    *,
    seed: int,
    rank: int = 0,
    horizontal_flip: bool = False,
    null_class: int | None = None,
    all_gather: Callable[[Tensor], Tensor] = lambda mine: mine,
) -> Iterator[StepResult]:
    """Train on one batch after another, and yield after each step, when weights, moments and average belong together.

    `network` is `train_state.model` as it is to be called: itself, compiled, or wrapped for data parallelism. A gradient that is not
    finite raises DivergedError; it is looked at one step late, so that a GPU never waits, and `StepResult.require_finite` looks at once.
    With a `null_class` the network gets the labels, some of them dropped. `all_gather` returns the rows of all workers from the rows
    of this one, in one order for all: loss-aware timesteps remember the losses of them all.
    """
    result: StepResult | None = None
    keyed = isinstance(train_state.model, UNet)
    for batch in batches:
        rate = learning_rate_at(train_state.step, settings)
        for group in train_state.optimizer.param_groups:
            group["lr"] = rate
        seed_dropout(seed, train_state.step, rank)
        compute.begin_step()
        drawn = train_state.timesteps.draw(batch.draws.u_t)
        images = PlacedBatch.of(batch, drawn, compute, horizontal_flip, null_class, settings.label_dropout, keyed)
        losses = _backward(train_state, network, objective, images, compute)
        train_state.scaler.unscale_(train_state.optimizer)
        limit = settings.grad_clip if settings.grad_clip is not None else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(train_state.model.parameters(), limit)
        if result is not None:
            result.require_finite()
        train_state.scaler.step(train_state.optimizer)
        train_state.scaler.update()
        train_state.optimizer.zero_grad(set_to_none=True)
        for average in train_state.averages.values():
            average.update()
        if isinstance(train_state.timesteps, LossAwareTimesteps):
            _remember(train_state.timesteps, all_gather(torch.stack([drawn.t.double(), losses.cpu().double()], 1)))
        train_state.step += 1
        result = StepResult(
            train_state.step, losses, images.weights, images.timesteps, grad_norm, rate, train_state.scaler
        )
        yield result


def _remember(timesteps: LossAwareTimesteps, rows: Tensor) -> None:
    """Tell of losses, rows (t, loss); those of a step that overflows fp16, which is left out, are forgotten."""
    rows = rows[rows[:, 1].isfinite()]
    timesteps.update(rows[:, 0].long(), rows[:, 1])


def _backward(
    train_state: TrainState,
    network: nn.Module,
    objective: Loss,
    images: PlacedBatch,
    compute: Compute,
) -> Tensor:
    """Add up the gradient of the batch's mean weighted loss, over micro-batches where asked; return the losses [b]."""
    count = len(images.images)
    size = compute.micro_batch_size or count
    losses: list[Tensor] = []
    with compute.autocast():  # one context for all micro-batches: it casts each weight once
        for begin in range(0, count, size):
            rows = slice(begin, begin + size)
            x0, t, eps = images.part(rows, compute.channels_last)
            with _gradients_stay_local(network, begin + size < count):
                part_losses = objective(images.conditioned(network, rows), x0, t, eps)
                weighted = part_losses * images.weights[rows]
                with compute.no_autocast():
                    train_state.scaler.scale(weighted.sum() / count).backward()  # type: ignore[no-untyped-call]
            losses.append(part_losses.detach())
    return torch.cat(losses)


def _gradients_stay_local(network: nn.Module, stay: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which workers do not yet average their gradients: for all micro-batches but the last."""
    inner = getattr(network, "_orig_mod", network)  # of torch.compile's wrapper
    if stay and isinstance(inner, DistributedDataParallel):
        return inner.no_sync()
    return contextlib.nullcontext()
