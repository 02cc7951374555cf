"""A trained model, ready to use: from a run's checkpoint, or from a folder of its own that needs neither the run nor its data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from ddpm import GaussianDiffusion
from pipeline.config.cluster_profile import Profile, settled, use_variables
from pipeline.config.experiment import Experiment, experiment_from, with_overrides
from pipeline.config.yaml_files import validate
from pipeline.data.labels import NO_CLASSES, ClassNames
from pipeline.errors import CheckpointError, UsageError
from pipeline.storage.checkpoint import Checkpoint
from pipeline.storage.durable import write_atomically, write_json
from pipeline.storage.folder import Folder
from pipeline.storage.judgements import FILE, best_first
from pipeline.storage.next_command import typeable
from pipeline.storage.retention import LAST, Which
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.training import averages
from pipeline.training.models import Shape, build_diffusion, build_model, load_weights, weights_of

EXPERIMENT_FILE = "experiment.json"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class Trained:
    """A network in eval mode, what it was trained for, and where it comes from."""

    model: nn.Module
    experiment: Experiment
    shape: Shape  # (C, H, W)
    step: int
    weights: str  # "ema", "ema:0.999", "raw", "posthoc:0.1"
    training_s: float
    class_names: ClassNames = NO_CLASSES  # of a class-conditional network
    selection: str = LAST  # how the checkpoint was chosen, as in a score's identity

    @cached_property
    def diffusion(self) -> GaussianDiffusion:
        """The process that the network reverses; raises UsageError if the model has none."""
        return build_diffusion(self.experiment)

    @classmethod
    def from_run(cls, run: Run, which: Which = None, weights: str = "ema") -> Trained:
        """Load a run's newest checkpoint that verifies, or another one; raises CheckpointError if there is none.

        `weights` are as in pipeline/training/averages.py; those that are made after training are of a snapshot's step.
        """
        experiment = experiment_of(run)
        if which == "best":
            best, selection = best_step(run, experiment)
            return replace(cls.from_run(run, best, weights), selection=selection)
        step = which
        choice = averages.choose(weights, experiment.training)
        # buffers, of a network that has them, are not averaged: they come from the model itself
        if choice.sigma_rel is not None:
            widths = experiment.training.ema_widths
            run.fetch_files(averages.SNAPSHOTS)
            averaged, at = averages.posthoc(run.folder, choice.sigma_rel, widths, step)
            checkpoint = _choose(run, None)
            tensors = checkpoint.tensors("model")["model"]
        else:
            checkpoint = _choose(run, step)
            groups = checkpoint.tensors("model", choice.group or "model")
            averaged, at, tensors = groups[choice.group or "model"], checkpoint.step, groups["model"]
        state = checkpoint.state()
        about = {**state, "step": at, "weights": choice.name, "training_s": state["elapsed_s"]}
        return cls._built(experiment, about, tensors | averaged)

    @classmethod
    def load(cls, folder: Path | str) -> Trained:
        """Load what `save` wrote."""
        folder = Path(folder)
        try:
            about = json.loads((folder / EXPERIMENT_FILE).read_text())
            tensors = parse_safetensors((folder / WEIGHTS_FILE).read_bytes())
        except OSError as error:
            raise CheckpointError(f"{folder}: not a saved model ({error.filename} cannot be read)") from None
        return cls._built(experiment_from(about["experiment"], EXPERIMENT_FILE), about, tensors)

    @classmethod
    def _built(cls, experiment: Experiment, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trained:
        """Build the network of an experiment with these weights; `about` has the keys of the method of that name."""
        shape: Shape = tuple(about["shape"])
        names = ClassNames.from_state(about)
        model = build_model(experiment, shape, num_classes=len(names))
        load_weights(model, tensors)
        return cls(model.eval(), experiment, shape, about["step"], about["weights"], about["training_s"], names)

    def save(self, folder: Path) -> Path:
        """Write weights and settings into a new folder, without pickle, and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in weights_of(self.model).items()}
        write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(tensors))
        write_json(folder / EXPERIMENT_FILE, self.about())
        return folder

    def about(self) -> dict[str, Any]:
        """Return what must be known of the weights to use them, as plain data."""
        return {
            "experiment": self.experiment.to_dict(),
            "shape": self.shape,
            **self.class_names.to_state(),
            "step": self.step,
            "weights": self.weights,
            "training_s": self.training_s,
        }


def experiment_of(run: Run) -> Experiment:
    """Return a run's experiment, with what a resume has changed since (settings that do not decide the weights)."""
    return with_overrides(experiment_from(run.record.experiment, f"run {run.id}"), run.state().overrides)


def best_step(run: Run, experiment: Experiment) -> tuple[int, str]:
    """Return the step of the best checkpoint by the scores while training, and how it was chosen; UsageError if there is none."""
    run.fetch_files(FILE)
    metric = experiment.checkpoint.retention.metric
    ranked = best_first(run.folder, metric)
    if not ranked:
        raise UsageError(
            f"run {run.id} has no best checkpoint: got no {metric} of a step, expected some while training; train with -s "
            "evaluation.every_steps=STEPS -s checkpoint.keep_best.n=1, or name a step or latest"
        )
    best, saved = ranked[0], RunCheckpoints(run).committed()
    if best.checkpoint not in [checkpoint.folder.name for checkpoint in saved]:
        why = (
            "checkpoint.keep_best is not set"
            if experiment.checkpoint.keep_best is None
            else "it was removed or is damaged"
        )
        raise UsageError(
            f"run {run.id}: step {best.step} is the best by {best.name}, but its checkpoint is not kept ({why}); "
            f"name one of: {_steps(saved)}"
        )
    return best.step, f"best of {len(ranked)} by {best.name}"


def not_trained(run: Run) -> str:
    """Return why a run's model cannot be used yet, "" if it can."""
    return "" if RunCheckpoints(run).committed() else "no checkpoint yet"


def profile_of(folder: Folder, named: Profile | None = None) -> Profile:
    """Return the profile that was named, or the one that a run or sweep was started with.

    Its `env` then holds here where nothing else does.
    """
    if named is not None:
        return named
    profile = settled(validate(Profile, folder.record.profile, f"{folder.KIND} {folder.id}"))
    use_variables(profile, over_others=False)
    return profile


def _choose(run: Run, step: int | None) -> Checkpoint:
    saved = RunCheckpoints(run)
    if step is None:
        found = saved.newest_verified()
        if found.checkpoint is None:
            why = found.warnings[0] if found.warnings else f"there is none in {run.checkpoints}"
            raise CheckpointError(
                f"run {run.id} has no checkpoint that verifies: {why}; {typeable(f'resume {run.id}')}"
            )
        return found.checkpoint
    committed = saved.committed()
    for checkpoint in committed:
        if checkpoint.step == step:
            return saved.verified(checkpoint)
    raise UsageError(f"run {run.id} has no checkpoint of step {step}; there are: {_steps(committed)}")


def _steps(committed: Sequence[Checkpoint]) -> str:
    return ", ".join(str(step) for step in sorted({checkpoint.step for checkpoint in committed})) or "none"
