"""What loss-aware timesteps, labels and several averages learn does not depend on the number of workers, and each is what it says."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm import GaussianDiffusion, Objective
from pipeline.config.experiment import Experiment, differences, experiment_from, with_overrides
from pipeline.data.order import streams_of_worker
from pipeline.data.shards import Dataset
from pipeline.training.batches import training_batches
from pipeline.training.loop import StepResult, TrainState, fit
from pipeline.training.models import build_diffusion, build_model, build_objective
from pipeline.training.randomness import training_draws
from pipeline.training.team import Team
from tests.kit.experiments import TINY
from tests.kit.forks import run_team
from tests.pipeline.worker.steps import CPU, STREAMS, by_stream, order_of

STEPS, T, CLASSES = 20, 4, 10


def experiment(**changes: Any) -> Experiment:
    settings = dict(TINY)
    settings["model"] = settings["model"] | {"dropout": 0.0, "class_conditional": True}
    settings["diffusion"] = {"schedule": "cosine", "num_timesteps": T, "variance": "learned_range"}
    training = {
        "batch_size": 32,
        "num_streams": STREAMS,
        "objective": "vlb",
        "timestep_sampling": "loss_aware",
        "label_dropout": 0.25,
        "ema_decay": [0.9, 0.5],
        "ema_widths": [0.1],
        "ema_snapshot_every_steps": 10,
    }
    settings["training"] = settings["training"] | training | changes
    return experiment_from(settings)


class Listening(nn.Module):
    """A network that notes the labels it is told."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.labels = network, []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **keys: Tensor) -> Tensor:
        self.labels.append(y)
        out: Tensor = self.network(x, t, y, **keys)
        return out


@dataclass
class Trained:
    results: list[StepResult]
    labels: list[Tensor]
    train_state: TrainState


def train(dataset: Dataset, chosen: Experiment, team: Team) -> Trained:
    torch.set_num_threads(1)
    model = build_model(chosen, dataset.manifest.shape, num_classes=CLASSES)
    train_state = TrainState.create(model, chosen.training, T, CPU)
    network = Listening(team.share_gradients(model, CPU))
    streams = streams_of_worker(team.rank, team.size, STREAMS)
    batches = training_batches(dataset, order_of(dataset, chosen), streams, 0, chosen.seed)
    steps = fit(
        train_state,
        network,
        build_objective(chosen),
        batches,
        chosen.training,
        CPU,
        seed=chosen.seed,
        rank=team.rank,
        null_class=CLASSES,
        all_gather=partial(team.all_gather, num_streams=STREAMS),
    )
    results = [result for result, _ in zip(steps, range(STEPS), strict=False)]
    return Trained(results, network.labels, train_state)


def be_a_worker(rank: int, size: int, folder: str, data: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    mine = train(Dataset.open(data), experiment(), Team.join(60))
    told = [{"t": r.timesteps, "losses": r.losses, "weights": r.weights} for r in mine.results]
    averages = {name: average.shadow for name, average in mine.train_state.averages.items()}
    history = mine.train_state.timesteps.state_dict()
    content = {"told": told, "labels": mine.labels, "averages": averages, "history": history}
    torch.save(content, f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(dataset: Dataset) -> Trained:
    return train(dataset, experiment(), Team())


def test_layers_computed_again_change_no_byte_of_the_weights(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, labels and loss-aware timesteps, in fp32."""
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 6)
    plain = experiment()
    plain = plain.model_copy(update={"model": plain.model.model_copy(update={"dropout": 0.1})})
    kept = train(dataset, plain, Team())
    for levels in (1, 2):
        chosen = with_overrides(plain, [f"training.activation_checkpointing={levels}"])
        assert (chosen.hash("images"), differences(plain, chosen)) == (plain.hash("images"), [])
        again = train(dataset, chosen, Team())
        for mine, theirs in zip(again.results, kept.results, strict=True):
            assert torch.equal(mine.losses, theirs.losses)
        tensors = kept.train_state.tensors()
        for group, found in again.train_state.tensors().items():
            assert all(torch.equal(tensor, tensors[group][name]) for name, tensor in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_workers_draw_the_same_timesteps_and_labels_and_share_one_history(tmp_path, dataset, alone, size):
    run_team(be_a_worker, (size, str(tmp_path), str(dataset.folder)), size)
    workers = [torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
    for step, result in enumerate(alone.results):
        together = {k: by_stream([w["told"][step][k] for w in workers]) for k in ("t", "losses", "weights")}
        assert torch.equal(together["t"], result.timesteps)
        torch.testing.assert_close(together["weights"], result.weights, rtol=1e-4, atol=0)
        torch.testing.assert_close(together["losses"], result.losses, rtol=1e-3, atol=1e-4)
        assert torch.equal(by_stream([w["labels"][step] for w in workers]), alone.labels[step])
    for worker in workers:  # bit for bit the same on every worker, whatever the number
        for name, tensor in workers[0]["history"].items():
            assert torch.equal(worker["history"][name], tensor)
        for group, shadow in workers[0]["averages"].items():
            assert all(torch.equal(worker["averages"][group][name], tensor) for name, tensor in shadow.items())
    assert torch.equal(workers[0]["history"]["seen"], alone.train_state.timesteps.state_dict()["seen"])
    for group, average in alone.train_state.averages.items():
        for name, tensor in average.shadow.items():
            torch.testing.assert_close(workers[0]["averages"][group][name], tensor, rtol=1e-3, atol=1e-5)


def test_the_history_decides_the_draws_and_the_weights_make_up_for_it(alone):
    """Once every step of 4 has ten losses, those with large ones are drawn more often, and weigh less."""
    seen = torch.stack([torch.bincount(r.timesteps, minlength=T) for r in alone.results]).cumsum(0)
    begin = int((seen >= 10).all(1).nonzero()[0])
    assert all(bool((r.weights == 1).all()) for r in alone.results[: begin + 1])
    assert all(not bool((r.weights == 1).all()) for r in alone.results[begin + 1 :])
    assert len(alone.results) - begin > 10
    last = alone.results[-1]
    # p is 1 / (T weight): the weights of the steps drawn are those of one distribution
    p = {int(t): 1 / (T * float(w)) for t, w in zip(last.timesteps, last.weights, strict=True)}
    assert sum(p.values()) <= 1 + 1e-6


def test_labels_are_dropped_as_chance_says_and_nowhere_else(dataset, alone):
    chosen = experiment()
    batch = next(training_batches(dataset, order_of(dataset, chosen), streams_of_worker(0, 1, STREAMS), 0, chosen.seed))
    dropped = alone.labels[0] == CLASSES
    assert torch.equal(dropped, batch.draws.u_label < 0.25)
    assert torch.equal(alone.labels[0][~dropped], batch.labels[~dropped])
    share = torch.cat(alone.labels).eq(CLASSES).double().mean()
    assert float(share) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / (STEPS * 32)) ** 0.5)
    # a function of (seed, step, stream): the third stream's labels of step 0 are dropped by its own draws
    per_stream = 32 // STREAMS
    draws = training_draws(chosen.seed, 0, 2, per_stream, dataset.manifest.shape)
    assert torch.equal(dropped[2 * per_stream : 3 * per_stream], draws.u_label < 0.25)


def test_a_model_without_classes_is_told_no_labels(dataset):
    settings = experiment().to_dict()
    settings["model"]["class_conditional"] = False
    settings["training"]["label_dropout"] = 0.1
    chosen = experiment_from(settings)
    network = Listening(build_model(chosen, dataset.manifest.shape))
    train_state = TrainState.create(network.network, chosen.training, T, CPU)
    batches = training_batches(dataset, order_of(dataset, chosen), range(STREAMS), 0, chosen.seed)
    next(iter(fit(train_state, network, build_objective(chosen), batches, chosen.training, CPU, seed=0)))
    assert network.labels == [None]


@pytest.mark.parametrize("objective", ["vlb", "hybrid"])
def test_what_is_minimised_is_the_objective_of_the_core(dataset, objective):
    """The losses of the first step, from initial weights, are those of the core for the same rows, steps, noise and labels."""
    chosen = experiment(objective=objective, timestep_sampling="uniform")
    first = train(dataset, chosen, Team()).results[0]
    batch = next(training_batches(dataset, order_of(dataset, chosen), streams_of_worker(0, 1, STREAMS), 0, chosen.seed))
    model = build_model(chosen, dataset.manifest.shape, num_classes=CLASSES)
    diffusion: GaussianDiffusion = build_diffusion(chosen)
    t = (batch.draws.u_t * T).long()
    y = torch.where(batch.draws.u_label < 0.25, torch.tensor(CLASSES), batch.labels)
    x0 = batch.images.float() / 127.5 - 1
    losses = Objective(diffusion, objective)(lambda x, at: model(x, at, y), x0, t, batch.draws.eps)
    torch.testing.assert_close(first.losses, losses.detach(), rtol=1e-5, atol=1e-6)


def test_every_average_is_its_own_recursion(dataset):
    """shadow <- d shadow + (1 - d) weights, in float64 by hand, with each average's decay of the step."""
    chosen = experiment(timestep_sampling="uniform", ema_ramp_up=False)
    model = build_model(chosen, dataset.manifest.shape, num_classes=CLASSES)
    train_state = TrainState.create(model, chosen.training, T, CPU)
    batches = training_batches(dataset, order_of(dataset, chosen), range(STREAMS), 0, chosen.seed)
    name, parameter = next(iter(model.named_parameters()))
    start = parameter.detach().double().clone()
    by_hand = {"ema": start, "ema-0.5": start, "power-0.1": start}
    steps = fit(train_state, model, build_objective(chosen), batches, chosen.training, CPU, seed=0, null_class=CLASSES)
    gamma = 6.937  # of sigma_rel 0.1, Karras et al. 2024
    for n, _ in zip(range(1, 13), steps, strict=False):
        decays = {"ema": 0.9, "ema-0.5": 0.5, "power-0.1": (1 - 1 / n) ** (gamma + 1)}
        weights = parameter.detach().double()
        by_hand = {group: d * by_hand[group] + (1 - d) * weights for group, d in decays.items()}
    for group, expected in by_hand.items():
        torch.testing.assert_close(train_state.averages[group].shadow[name].double(), expected, rtol=1e-4, atol=1e-6)
