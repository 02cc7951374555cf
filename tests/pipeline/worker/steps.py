"""Twenty steps of training as one worker of a team, and what several workers see of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.experiment import Experiment, experiment_from
from pipeline.data.order import Order, streams_of_worker
from pipeline.data.shards import Dataset
from pipeline.errors import DivergedError
from pipeline.training.batches import Batch, Prefetch, training_batches
from pipeline.training.device import Compute
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import build_model, build_objective
from pipeline.training.team import Team
from pipeline.worker.meters import OwnTime
from tests.kit.experiments import TINY

STEPS = 20
STREAMS = 8
CPU = Compute(torch.device("cpu"), "gloo", threads=1)


def experiment(**training: Any) -> Experiment:
    settings = dict(TINY)
    settings["training"] = settings["training"] | {"batch_size": 32, "num_streams": STREAMS} | training
    settings["data"] = {"horizontal_flip": True}
    return experiment_from(settings)


def order_of(dataset: Dataset, chosen: Experiment) -> Order:
    return Order(
        dataset.manifest.row_groups, chosen.seed, STREAMS, chosen.training.batch_size, chosen.data.shuffle_window
    )


def train(
    dataset: Dataset, chosen: Experiment, team: Team, compute: Compute = CPU
) -> tuple[list[torch.Tensor], list[Batch], TrainState]:
    """Train 20 steps as one worker of a team; return its losses and batches by step, and the train_state."""
    torch.set_num_threads(1)
    model = compute.place(build_model(chosen, dataset.manifest.shape))
    train_state = TrainState.create(model, chosen.training, chosen.diffusion.num_timesteps, compute)
    seen: list[Batch] = []
    streams = streams_of_worker(team.rank, team.size, STREAMS)
    batches = training_batches(dataset, order_of(dataset, chosen), streams, 0, chosen.seed)

    def noted():
        for batch in batches:
            seen.append(batch)
            yield batch

    network = compute.compiled(team.share_gradients(train_state.model, compute))
    losses = []
    for result in fit(
        train_state,
        network,
        build_objective(chosen),
        noted(),
        chosen.training,
        compute,
        seed=chosen.seed,
        rank=team.rank,
        horizontal_flip=chosen.data.horizontal_flip,
    ):
        losses.append(result.losses.cpu())
        if result.step == STEPS:
            break
    return losses, seen, train_state


def be_a_worker(rank: int, size: int, folder: str, data: str, compute: Compute = CPU) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    compute.start()
    losses, seen, train_state = train(Dataset.open(data), experiment(), Team.join(60), compute)
    words = ("u_t", "u_flip", "u_label", "eps", "keys")
    told = [{"rows": b.rows, "images": b.images} | {w: getattr(b.draws, w) for w in words} for b in seen]
    torch.save({"losses": losses, "told": told, "ema": train_state.ema.shadow}, f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()


def gathered(folder: Path, size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


def by_stream(parts: list[torch.Tensor]) -> torch.Tensor:
    """Put the workers' parts of a step back into the order of streams: worker r of R holds streams r, r + R, ..."""
    per_worker = STREAMS // len(parts)
    pieces = [part.reshape(per_worker, -1, *part.shape[1:]) for part in parts]
    return torch.stack(pieces, dim=1).flatten(0, 2)


def overflow_until_it_stops(dataset: Dataset, compute: Compute) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """Train in fp16 with gradients that all overflow; return the train_state, and the weights that it began with, but the spoiled ones."""
    chosen = experiment(precision="fp16", warmup_steps=0)
    model = compute.place(build_model(chosen, dataset.manifest.shape))
    train_state = TrainState.create(model, chosen.training, chosen.diffusion.num_timesteps, compute)
    with torch.no_grad():
        next(train_state.model.parameters()).fill_(float("inf"))  # every gradient from here on is infinite or NaN
    others = {name: p.clone() for name, p in list(train_state.model.named_parameters())[1:]}
    batches = training_batches(dataset, order_of(dataset, chosen), range(STREAMS), 0, chosen.seed)
    steps = fit(train_state, train_state.model, build_objective(chosen), batches, chosen.training, compute, seed=0)
    done: list[int] = []
    with pytest.raises(DivergedError, match=r"loss scale down to 0\.5"):
        done.extend(result.step for result in steps)
    # halved once a step: 65,536 = 2^16 is below 1 after 17 steps, and that is noticed in the step that follows
    assert done == list(range(1, 18))
    return train_state, others


class SlowOn(nn.Module):
    """A network whose forward pass takes long on one rank."""

    def __init__(self, is_slow: bool) -> None:
        super().__init__()
        self.layer, self.is_slow = nn.Linear(2, 2), is_slow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1 * self.is_slow)
        return self.layer(x)


def be_slow_on_one_rank(rank: int, size: int, folder: str) -> None:
    """Make steps in a team whose rank 1 is slow; write which straggler is named after each of three intervals."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    team = Team.join(60)
    network = team.share_gradients(SlowOn(is_slow=rank == 1), CPU)
    named = []
    with Prefetch(iter(())) as batches:
        own = OwnTime(network, batches, team, 0, CPU)
        for step in (2, 4, 6):
            for _ in range(2):
                network(torch.ones(1, 2)).sum().backward()  # where the fast ones wait
            own.gather(step)
            named.append(own.straggler())
    Path(folder, f"{rank}.json").write_text(json.dumps([named, own.seconds]))
    dist.destroy_process_group()
