"""The averages of the weights that a training keeps side by side, and which of them a reader asks for.

ema               the first of training.ema_decay, sampled by default      checkpoint group `ema`
ema:0.999         another of them                                          checkpoint group `ema-0.999`
raw               the weights of the last step                             checkpoint group `model`
posthoc:0.1       the power-function average of relative width 0.1, made from stored snapshots of training.ema_widths

snapshots/step-0000001000-1/    as a checkpoint, with the groups `power-0.05` `power-0.1` ... in float16 (Karras et al. 2024, C)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm import (
    EMAProfile,
    ExponentialMovingAverage,
    PowerFunctionEMA,
    WeightAverage,
    posthoc_error,
    posthoc_weights,
    reconstruct,
)
from pipeline.config.experiment import TrainingConfig
from pipeline.errors import CheckpointError, UsageError
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.training.threads import one_thread

SNAPSHOTS = "snapshots"
DEFAULT = "ema"
WORST_FIT = 0.1  # of the profile asked for, in the least-squares norm: beyond it the average would be another one


def make_averages(model: nn.Module, settings: TrainingConfig) -> dict[str, WeightAverage]:
    """Return every average that a training keeps, by its group in checkpoints, `ema` first."""
    first, *others = settings.ema_decays
    averages: dict[str, WeightAverage] = {DEFAULT: ExponentialMovingAverage(model, first, ramp_up=settings.ema_ramp_up)}
    for decay in others:
        averages[f"ema-{decay}"] = ExponentialMovingAverage(model, decay, ramp_up=settings.ema_ramp_up)
    return averages | {_power(width): PowerFunctionEMA(model, width) for width in settings.ema_widths}


@dataclass(frozen=True)
class Choice:
    """Weights that were asked for: their name in identities, and the checkpoint group or the width they come from."""

    name: str
    group: str | None
    sigma_rel: float | None = None


def choose(asked: str, settings: TrainingConfig) -> Choice:
    """Return the weights that `ema`, `ema:DECAY`, `raw` or `posthoc:WIDTH` names; raises UsageError if the training kept none."""
    kind, _, text = asked.partition(":")
    if asked == "raw":
        return Choice(asked, "model")
    if asked == DEFAULT:
        return Choice(asked, DEFAULT)
    try:
        number = float(text)
    except ValueError:
        kind = ""
    if kind == "ema":
        return _of_decay(number, settings.ema_decays)
    if kind == "posthoc":
        return _of_width(number, settings)
    raise UsageError(f"weights: got {asked!r}; expected ema, ema:DECAY, raw, or posthoc:WIDTH such as posthoc:0.1")


def _of_decay(decay: float, decays: tuple[float, ...]) -> Choice:
    if decay not in decays:
        raise UsageError(
            f"weights: no average of decay {decay:g}; this run kept {', '.join(f'ema:{d}' for d in decays)}"
        )
    return Choice(DEFAULT, DEFAULT) if decay == decays[0] else Choice(f"ema:{decay}", f"ema-{decay}")


def _of_width(sigma_rel: float, settings: TrainingConfig) -> Choice:
    if not settings.ema_widths:
        raise UsageError(
            "weights: this run stored no snapshots of power-function averages; train with training.ema_widths=[0.05, 0.1] "
            "and training.ema_snapshot_every_steps"
        )
    if not 0 < sigma_rel <= 12**-0.5:
        raise UsageError(
            f"weights: got a width of {sigma_rel:g}; expected above 0, at most 0.2886; 0.05 to 0.2 is usual"
        )
    return Choice(f"posthoc:{sigma_rel:g}", None, sigma_rel)


def save_snapshot(
    run_folder: Path, step: int, attempt: int, averages: dict[str, WeightAverage], may_commit: Callable[[], bool]
) -> None:
    """Store the power-function averages of a step, once: what an earlier attempt stored there has the same bytes."""
    root = run_folder / SNAPSHOTS
    if any(c.step == step for c in CheckpointStore(root).committed()):
        return
    groups = {
        name: {key: tensor.half() for key, tensor in average.shadow.items()}
        for name, average in averages.items()
        if isinstance(average, PowerFunctionEMA)
    }
    checkpoints.save(root, step, attempt, groups, {"step": step}, may_commit=may_commit)


@one_thread()
def posthoc(
    run_folder: Path, sigma_rel: float, widths: tuple[float, ...], step: int | None
) -> tuple[dict[str, Tensor], int]:
    """Return the power-function average of a width after `step` updates (by default at the last snapshot), and that step.

    Raises CheckpointError if there is no snapshot, and UsageError if the snapshots give no such average.
    """
    stored = sorted(CheckpointStore(run_folder / SNAPSHOTS).committed(), key=lambda c: c.step)
    if not stored:
        raise CheckpointError(f"{run_folder / SNAPSHOTS}: no snapshot is stored yet; train on, or use --weights ema")
    at = stored[-1].step if step is None else step
    # a snapshot of later weights has no part in an average of earlier ones
    usable = [snapshot for snapshot in stored if snapshot.step <= at]
    if not usable or usable[-1].step != at:
        steps = ", ".join(str(snapshot.step) for snapshot in stored)
        raise UsageError(f"no snapshot of step {at} is stored; there are: {steps}")
    parts = [(snapshot, width) for snapshot in usable for width in widths]
    profiles = [EMAProfile(width, snapshot.step) for snapshot, width in parts]
    target = EMAProfile(sigma_rel, at)
    weights = posthoc_weights(profiles, target)
    error = posthoc_error(profiles, weights, target)
    if error > WORST_FIT:
        raise UsageError(
            f"weights: {len(usable)} snapshots of widths {', '.join(map(str, widths))} give an average of width {sigma_rel:g} "
            f"to {error:.0%} only; choose a width between theirs, or store snapshots more often"
        )

    def shadows() -> Iterator[dict[str, Tensor]]:
        for snapshot, width in parts:
            tensors = snapshot.tensors(_power(width))[_power(width)]
            yield {key: tensor.to(torch.float32) for key, tensor in tensors.items()}

    return reconstruct(shadows(), weights), at


def _power(width: float) -> str:
    return f"power-{width}"
