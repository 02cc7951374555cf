"""Which weights `--weights` means: averages of several decays, and power-function averages made after training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm import EMAProfile, posthoc_error, posthoc_weights
from pipeline.config.experiment import experiment_from
from pipeline.errors import CheckpointError, UsageError
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.runs import Run
from pipeline.training import averages
from pipeline.training.trained import Trained
from tests.kit import trainer
from tests.kit.experiments import TINY

WIDTHS = [0.05, 0.1]


def train(home: Path, **training: object) -> Run:
    run = trainer.make_run(home, training=TINY["training"] | {"ema_decay": [0.9, 0.5]} | training)
    trainer.train(str(run.folder))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("widths"), ema_widths=WIDTHS, ema_snapshot_every_steps=2)


def parameters(run: Run, weights: str, step: int | None = None) -> dict[str, Tensor]:
    trained = Trained.from_run(run, step, weights)
    assert trained.weights == averages.choose(weights, trained.experiment.training).name
    return {name: p.detach() for name, p in trained.model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())


@pytest.mark.slow
def test_each_name_means_its_own_group_of_the_checkpoint(run):
    stored = CheckpointStore(run.checkpoints).newest_verified().checkpoint.tensors()
    for weights, group in {"ema": "ema", "ema:0.9": "ema", "ema:0.5": "ema-0.5", "raw": "model"}.items():
        found = parameters(run, weights)
        assert all(torch.equal(tensor, stored[group][name]) for name, tensor in found.items())
    assert averages.choose("ema:0.9", Trained.from_run(run).experiment.training).name == "ema"


@pytest.mark.slow
def test_an_average_made_after_training_is_the_one_that_would_have_been_kept(tmp_path):
    """Beside trainings that kept the width 0.15 itself, to step 90 and to step 60; what is added up is in float16.

    The theory is of continuous time: with 90 steps an average of width 0.1 still spans nine of them.
    """
    settings = {"ema_widths": [0.1, 0.25], "ema_snapshot_every_steps": 10, "steps": 90}
    run = train(tmp_path, **settings)
    apart = distance(parameters(run, "posthoc:0.1"), parameters(run, "posthoc:0.25"))
    for step in (90, 60):
        kept = train(tmp_path, ema_widths=[0.15], ema_snapshot_every_steps=step, steps=step)
        expected = CheckpointStore(kept.checkpoints).newest_verified().checkpoint.tensors("power-0.15")["power-0.15"]
        assert distance(parameters(run, "posthoc:0.15", step), expected) < 0.03 * apart
        assert Trained.from_run(run, step, "posthoc:0.15").step == step


def test_a_stored_width_comes_back_as_it_was_stored(run):
    stored = CheckpointStore(run.checkpoints).newest_verified().checkpoint.tensors("power-0.1")["power-0.1"]
    for name, tensor in parameters(run, "posthoc:0.1").items():
        torch.testing.assert_close(tensor, stored[name], rtol=1e-3, atol=1e-6)  # float16 has 11 bits


def test_snapshots_are_small_and_verified(run):
    snapshots = CheckpointStore(run.folder / "snapshots").committed()
    assert [snapshot.step for snapshot in reversed(snapshots)] == list(range(2, 31, 2))
    whole = CheckpointStore(run.checkpoints).newest_verified().checkpoint
    assert snapshots[0].num_bytes < whole.num_bytes / 5  # 2 averages of 2 bytes beside 7 times 4
    assert {str(t.dtype) for group in snapshots[0].tensors().values() for t in group.values()} == {"torch.float16"}


def test_a_damaged_snapshot_is_found(tmp_path):
    run = train(tmp_path, ema_widths=WIDTHS, ema_snapshot_every_steps=15)
    path = CheckpointStore(run.folder / "snapshots").committed()[1].folder / "power-0.05.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        parameters(run, "posthoc:0.07")


@pytest.mark.parametrize(
    ("weights", "step", "told"),
    [
        ("ema:0.99", None, "this run kept ema:0.9, ema:0.5"),
        ("ema:", None, "expected ema, ema:DECAY, raw, or posthoc:WIDTH"),
        ("last", None, "expected ema, ema:DECAY, raw, or posthoc:WIDTH"),
        ("posthoc:wide", None, "expected ema, ema:DECAY"),
        ("posthoc:0.5", None, "at most 0.2886"),
        ("posthoc:0.02", None, "choose a width between theirs"),
        ("posthoc:0.07", 7, "no snapshot of step 7"),
    ],
)
def test_weights_that_there_are_not_are_reported(run, weights, step, told):
    with pytest.raises(UsageError, match=told):
        Trained.from_run(run, step, weights)


def test_without_snapshots_there_is_nothing_to_add_up():
    with pytest.raises(UsageError, match="stored no snapshots"):
        averages.choose("posthoc:0.1", experiment_from({}).training)


def test_the_error_of_a_reconstruction_is_that_of_the_profiles():
    """Both profiles summed by hand over 4000 updates: the norm of their difference over that of the target's."""
    T = 4000
    s = torch.arange(1, T + 1, dtype=torch.float64) / T

    def profile(gamma: float, updates: int) -> Tensor:
        at = s * T / updates
        return torch.where(at <= 1, (gamma + 1) / updates * at**gamma, torch.zeros_like(at))

    gammas = {0.05: 16.972, 0.10: 6.937, 0.15: 3.56}  # the first two: MATHS; (g+1) / ((g+2)^2 (g+3)) = 0.15^2
    gammas[0.15] = next(
        g / 1000 for g in range(9000, 0, -1) if (g / 1000 + 1) > 0.0225 * (g / 1000 + 2) ** 2 * (g / 1000 + 3)
    )
    snapshots = [EMAProfile(width, updates) for updates in (1000, 2000, 3000, 4000) for width in (0.05, 0.10)]
    target = EMAProfile(0.15, T)
    weights = posthoc_weights(snapshots, target)
    total = sum(w * profile(gammas[p.sigma_rel], p.num_updates) for w, p in zip(weights, snapshots, strict=True))
    wanted = profile(gammas[0.15], T)
    by_hand = float((total - wanted).norm() / wanted.norm())
    assert posthoc_error(snapshots, weights, target) == pytest.approx(by_hand, rel=0.02)
