"""Results do not depend on the number of workers: real DDP processes over gloo, on loopback."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.config.experiment import Experiment, Precision
from pipeline.data.shards import Dataset
from pipeline.training.batches import training_batches
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import build_model, build_objective
from pipeline.training.team import Team
from pipeline.worker.meters import slowest_of
from tests.kit.forks import run_team
from tests.pipeline.worker.steps import (
    CPU,
    STEPS,
    STREAMS,
    be_a_worker,
    be_slow_on_one_rank,
    by_stream,
    experiment,
    gathered,
    order_of,
    overflow_until_it_stops,
    train,
)


@pytest.fixture(scope="module")
def alone(dataset):
    return train(dataset, experiment(), Team())


@pytest.mark.promise("P3")
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_workers_see_the_same_images_timesteps_noise_flips_and_dropout_masks_and_learn_the_same(
    tmp_path, dataset, alone, size
):
    run_team(be_a_worker, (size, str(tmp_path), str(dataset.folder)), size)
    losses, seen, train_state = alone
    workers = gathered(tmp_path, size)
    for step in range(STEPS):
        batch = seen[step]
        for word in ("rows", "images", "u_t", "u_flip", "u_label", "eps", "keys"):
            expected = getattr(batch.draws, word) if hasattr(batch.draws, word) else getattr(batch, word)
            assert torch.equal(by_stream([w["told"][step][word] for w in workers]), expected), (step, word)
        together = torch.cat([w["losses"][step] for w in workers]).mean()
        torch.testing.assert_close(together, losses[step].mean(), rtol=1e-5, atol=0)
    for name, average in train_state.ema.shadow.items():
        assert all(torch.equal(w["ema"][name], workers[0]["ema"][name]) for w in workers)
        torch.testing.assert_close(workers[0]["ema"][name], average, rtol=1e-3, atol=1e-5)


def be_one_who_waits(rank: int, folder: str) -> None:
    """Wait for a decision of a worker that hangs, in a group of another backend than gloo, as NCCL's is."""
    dist.init_process_group("cpu:gloo,cuda:gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    team = Team.join(timeout_s=0.5)
    if rank == 1:
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="Timed out waiting 500ms"):
            team.decide(True)
        Path(folder, "given-up").write_text(str(time.monotonic() - begin))
    while not Path(folder, "given-up").exists():
        time.sleep(0.05)
    os._exit(0)  # a group that has failed would be waited for


def test_the_slowest_worker_is_named_once_it_is_slow_twice(tmp_path):
    run_team(be_slow_on_one_rank, (3, str(tmp_path)), 3)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [named for named, _ in told] == [[None, 1, None]] * 3
    seconds = told[0][1]
    assert told[1][1] == told[2][1] == seconds
    # the others waited for it in the backward pass, which is not their own time
    assert seconds[1] > 0.1 > max(seconds[0], seconds[2])


def test_slow_is_20_percent_behind_the_median():
    assert slowest_of([1.0, 1.0, 1.21, 1.0]) == 2
    assert slowest_of([1.0, 1.0, 1.19, 1.0]) is None
    assert slowest_of([1.0, 1.3]) == 1  # the median of two is the faster one
    assert slowest_of([2.0, 2.0, 1.0]) is None


@pytest.mark.fault(25)
@pytest.mark.slow
def test_a_decision_is_waited_for_no_longer_than_the_profile_says(tmp_path):
    run_team(be_one_who_waits, (str(tmp_path),), 2)
    assert (tmp_path / "given-up").exists()


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(dataset, alone):
    losses, _, train_state = train(dataset, experiment(), Team(), replace(CPU, micro_batch_size=5))
    for mine, theirs in zip(losses, alone[0], strict=True):
        torch.testing.assert_close(mine.mean(), theirs.mean(), rtol=1e-5, atol=0)
    for name, average in train_state.ema.shadow.items():
        torch.testing.assert_close(average, alone[2].ema.shadow[name], rtol=1e-3, atol=1e-5)


def test_the_gradient_is_clipped_to_its_norm(dataset):
    """With plain gradient descent's direction kept, a clip to c scales Adam's first moment after one step by c / norm."""
    free = train_one(dataset, experiment(grad_clip=None))
    clipped = train_one(dataset, experiment(grad_clip=0.01))
    assert free[1] > 0.01
    for name, moment in free[0].items():
        if name.startswith("exp_avg/"):
            torch.testing.assert_close(clipped[0][name], moment * (0.01 / free[1]), rtol=1e-3, atol=1e-9)


def train_one(dataset: Dataset, chosen: Experiment) -> tuple[dict[str, torch.Tensor], float]:
    train_state = TrainState.create(
        build_model(chosen, dataset.manifest.shape), chosen.training, chosen.diffusion.num_timesteps, CPU
    )
    batches = training_batches(dataset, order_of(dataset, chosen), range(STREAMS), 0, chosen.seed)
    steps = fit(train_state, train_state.model, build_objective(chosen), batches, chosen.training, CPU, seed=0)
    result = next(iter(steps))
    return train_state.tensors()["optimizer"], float(result.grad_norm)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_weights_average_and_moments_in_float32(dataset, precision):
    chosen = experiment(precision=precision)
    compute = replace(CPU, precision=Precision(precision), channels_last=True)
    train_state = TrainState.create(
        compute.place(build_model(chosen, dataset.manifest.shape)),
        chosen.training,
        chosen.diffusion.num_timesteps,
        compute,
    )
    batches = training_batches(dataset, order_of(dataset, chosen), range(STREAMS), 0, chosen.seed)
    for result in fit(
        train_state, train_state.model, build_objective(chosen), batches, chosen.training, compute, seed=0
    ):
        assert torch.isfinite(result.losses).all()
        if result.step == 3:
            break
    for group in train_state.tensors().values():
        assert {tensor.dtype for tensor in group.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.all), "bf16"])
def test_half_precision_learns_what_fp32_learns(dataset, alone, precision):
    """Losses of 20 steps agree to rounding: in fp16 the scale is taken off the gradient again, and the clip sees the true norm."""
    compute = replace(CPU, precision=Precision(precision), micro_batch_size=16)
    losses, _, _ = train(dataset, experiment(precision=precision), Team(), compute)
    for mine, theirs in zip(losses, alone[0], strict=True):
        torch.testing.assert_close(mine.mean(), theirs.mean(), rtol=2e-2, atol=0)


@pytest.mark.slow
@pytest.mark.fault(16)
def test_fp16_leaves_out_a_step_that_overflows_and_stops_when_the_scale_collapses(dataset):
    train_state, others = overflow_until_it_stops(dataset, replace(CPU, precision=Precision.FP16))
    for name, parameter in list(train_state.model.named_parameters())[1:]:
        assert torch.equal(parameter, others[name])
