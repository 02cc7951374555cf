"""Networks of a user's own: what PyTorch allows works here, and what cannot work is refused before the first step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.config.experiment import DataConfig, Experiment, experiment_from
from pipeline.data.shards import Dataset
from pipeline.errors import UsageError
from pipeline.ingest.ingest import ensure_ingested
from pipeline.training.models import build_model, load_weights, weights_of
from pipeline.training.team import Team
from pipeline.training.trained import Trained
from tests.kit import trainer
from tests.kit.forks import run_team
from tests.pipeline.worker.steps import experiment, train

NETWORKS = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3, padding=1)
        self.second = nn.Conv2d(1, 1, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x, t):
        return self.second(self.first(x).tanh())

class Computes(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = float(torch.linspace(0, 1, 5).max().item())
        self.net = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.net(x) * self.scale

class Unused(Computes):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(3, 3)

class Wrapped(Computes):
    def forward(self, x, t):
        return {"sample": super().forward(x, t)}

class Flat(Computes):
    def forward(self, x, t):
        return super().forward(x, t).flatten(1)

class Takes(Computes):
    def forward(self, x):
        return super().forward(x, None)
"""


@pytest.fixture
def own(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (home / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(home)
    yield home
    sys.modules.pop("own_networks", None)


def model_named(name: str) -> dict[str, str]:
    return {"type": f"own_networks:{name}"}


def own_experiment(name: str) -> Experiment:
    return experiment_from(experiment().to_dict() | {"model": model_named(name)})


def test_tied_weights_stay_tied_and_are_stored_once(own: Path):
    run = trainer.make_run(own, model=model_named("Tied"), training={"steps": 5, "batch_size": 16, "ema_decay": 0.5})
    trainer.train(str(run.folder))
    trained = Trained.from_run(run).model
    raw = Trained.from_run(run, weights="raw").model
    assert trained.second.weight is trained.first.weight
    # the average of the shared tensor, not the raw weights that its second name would bring
    assert not torch.equal(trained.second.weight, raw.second.weight)
    assert set(weights_of(trained)) == {"first.weight", "first.bias", "second.bias"}


def test_a_tied_network_comes_back_from_its_stored_weights(own: Path):
    chosen = own_experiment("Tied")
    one, other = (build_model(chosen, (1, 8, 8)) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    load_weights(other, weights_of(one))
    x, t = torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(one(x, t), other(x, t))


def test_a_constructor_may_compute(own: Path):
    run = trainer.make_run(own, model=model_named("Computes"), training={"steps": 2, "batch_size": 16})
    assert trainer.train(str(run.folder)) == "finished"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Wrapped", r"returned dict, expected one tensor \[1, 1, 8, 8\]"),
        ("Flat", r"returned a tensor \[1, 64\], expected \[1, 1, 8, 8\]"),
        ("Takes", r"failed for x_t \[1, 1, 8, 8\] float32 and t \[1\] int64 \(TypeError: .*; it must take both"),
    ],
)
def test_what_is_not_a_prediction_is_refused_before_the_first_step(own: Path, name: str, said: str):
    run = trainer.make_run(own, model=model_named(name))
    with pytest.raises(UsageError, match=f"model.type: own_networks:{name} {said}"):
        trainer.train(str(run.folder))


def learn_with_unused_parameters(rank: int, folder: str, data: str) -> None:
    sys.path.append(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    losses, _, train_state = train(Dataset.open(data), own_experiment("Unused"), Team.join(60))
    torch.save({"losses": losses, "ema": train_state.ema.shadow}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_unused_parameters_do_not_stop_two_workers(own: Path):
    dataset = ensure_ingested(DataConfig(), own / "datasets")
    run_team(learn_with_unused_parameters, (str(own), str(dataset.folder)), 2)
    alone, _, _ = train(dataset, own_experiment("Unused"), Team())
    parts = [torch.load(own / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for step, losses in enumerate(alone):
        together = torch.cat([part["losses"][step] for part in parts]).mean()
        torch.testing.assert_close(together, losses.mean(), rtol=1e-5, atol=0)
