"""What `train --dry-run` works out from measured steps, by hand-worked cases; and the measuring itself, on a network of known speed."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.commands.plan_text import describe_forecast, dry_run_lines
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import experiment_from
from pipeline.config.yaml_files import validate
from pipeline.planning import probe as probes
from pipeline.planning.forecast import early_scores, forecast
from pipeline.planning.plan import Plan
from pipeline.planning.probe import Probe, _line, probe_all_reduce, probe_training
from pipeline.runs.dry_run import DryRun, _large_window
from pipeline.training.team import Team

CIFAR_PARAMETERS = 35_746_307
SHAPE = (3, 32, 32)


def plan(
    profile: dict[str, Any] | None = None,
    *,
    num_workers: int = 1,
    shape=SHAPE,
    num_rows=50_000,
    parameters=CIFAR_PARAMETERS,
    **sections: Any,
) -> Plan:
    experiment = experiment_from(sections)
    place = validate(Profile, {"workers": num_workers} | (profile or {}), "profile")
    return Plan(experiment, place, num_workers, 16, "data", num_rows, shape, parameters)


def probe(image_s: float = 0.01, *, batch: int = 128, fixed_s: float = 0.0, checkpoint_s: float | None = 2.0) -> Probe:
    return Probe(image_s, fixed_s, fixed_s + batch * image_s, batch, batch, checkpoint_s, "CPU, 1 thread")


def gpus(workers: int, price: float = 0.0, placement: str = "pack") -> dict[str, Any]:
    return {
        "kind": "connect",
        "address": "auto",
        "workers": workers,
        "placement": placement,
        "resources_per_worker": {"CPU": 4, "GPU": 1},
        "storage": "/mnt/ddpm",
        "price": {"per_worker_hour": price, "currency": "EUR"},
    }


def test_time_cost_and_checkpoints_follow_from_the_step():
    asked = plan(
        gpus(4, price=2.5),
        num_workers=4,
        training={"steps": 10_000, "batch_size": 128},
        checkpoint={"every_minutes": 10.0, "keep": 2},
        evaluation={"enabled": False},
    )
    seen = forecast(asked, probe(batch=32, image_s=0.01))
    assert seen.images_per_s == pytest.approx(128 / 0.32)
    assert seen.training_s == pytest.approx(3200.0)
    saving = seen.checkpoints
    assert saving is not None
    assert saving.count == 6  # 3200 s at one every 600 s, the last step's among them
    assert saving.written_bytes == 6 * 16 * CIFAR_PARAMETERS
    assert saving.kept_bytes == 2 * 16 * CIFAR_PARAMETERS
    assert seen.total_s == pytest.approx(3200 + 6 * 2)
    assert (seen.cost, seen.currency) == (pytest.approx(4 * 2.5 * seen.total_s / 3600), "EUR")
    assert f"{seen.cost:,.2f} EUR" in describe_forecast(asked, probe(), seen)["cost"]


def test_validation_takes_its_network_calls():
    """Ten validations of 2 x 100 images, 13 forward passes each, which take a third of an image's step; four workers share them."""
    sections = {"training": {"steps": 10_000, "batch_size": 128}, "evaluation": {"enabled": False}}
    seen, without = (
        forecast(plan(gpus(4), num_workers=4, **sections, **validation), probe(batch=32, image_s=0.01)).total_s
        for validation in ({"validation": {"split": "test", "every_steps": 1000, "num_images": 100}}, {})
    )
    assert seen - without == pytest.approx(10 * 2 * 100 * 13 * 0.01 / 3 / 4)


@pytest.mark.parametrize(
    ("profile", "num_workers", "step_s", "advised"),
    [
        ({}, 1, 3.7, True),
        ({}, 1, 3.5, False),
        ({"isolated": True}, 1, 3.7, False),
        ({}, 2, 7.4, False),
        (gpus(1), 1, 3.7, False),
    ],
)
def test_a_training_of_more_than_an_hour_in_the_commands_process_is_better_isolated(
    profile, num_workers, step_s, advised
):
    asked = plan(profile, num_workers=num_workers, training={"steps": 1000, "batch_size": 100})
    seen = forecast(asked, probe(image_s=step_s / 100, batch=100))
    assert any("--isolated" in warning for warning in seen.warnings) is advised
    assert ("this process" in asked.place) is (num_workers == 1 and profile == {})


def test_the_sooner_of_steps_and_minutes_saves():
    asked = plan(training={"steps": 1000}, checkpoint={"every_minutes": 10.0, "every_steps": 100})
    saving = forecast(asked, probe()).checkpoints
    assert saving is not None
    assert saving.interval_s == pytest.approx(128.0)  # 100 steps of 1.28 s
    never = plan(training={"steps": 1000}, checkpoint={"every_minutes": None})
    saving = forecast(never, probe()).checkpoints
    assert saving is not None
    assert (saving.count, saving.interval_s) == (1, pytest.approx(1280.0))  # the last step always


def test_scoring_is_counted_in_by_what_is_scored():
    """10,000 images of 50 calls, a third of a training step's arithmetic each, on 4 workers; guidance calls the network twice.

    For bits/dim no image is generated, but each of 50,000 is measured at each of T = 1000.
    """
    plain = forecast(plan(gpus(4), num_workers=4), probe()).scoring_s
    assert plain == pytest.approx(10_000 * 50 * 0.01 / 3 / 4)
    guided = plan(gpus(4), num_workers=4, sampling={"guidance_scale": 2.0}, model={"class_conditional": True},
                  training={"label_dropout": 0.1})  # fmt: skip
    assert forecast(guided, probe()).scoring_s == pytest.approx(2 * plain)
    assert forecast(plan(evaluation={"enabled": False}), probe()).scoring_s == 0
    for metrics, generated in ((["bpd"], 0), (["fid", "bpd"], 10_000 * 50)):
        asked = plan(evaluation={"metrics": metrics})
        assert forecast(asked, probe()).scoring_s == pytest.approx((generated + 50_000 * 1000) * 0.01 / 3)


@pytest.mark.parametrize(
    ("workers", "batch", "image_s", "parameters", "helps"),
    [
        (
            8,
            128,
            1 / 5400,
            CIFAR_PARAMETERS,
            False,
        ),  # the paper's batch at 32x32: 1.5 ms saved, 5.7 ms to exchange 143 MB
        (8, 4096, 1 / 5400, CIFAR_PARAMETERS, True),  # 47 ms saved
        (8, 64, 1 / 133, 113_700_000, True),  # 256x256 at the paper's 64: 30 ms saved, 18 ms to exchange
        (16, 64, 1 / 133, 113_700_000, False),  # 15 ms saved
        (8, 12, 1.0, CIFAR_PARAMETERS, False),  # 16 workers cannot share 12 images
    ],
)
def test_the_forecast_says_where_more_nodes_will_not_help(workers, batch, image_s, parameters, helps):
    asked = plan(gpus(workers), num_workers=workers, parameters=parameters, training={"batch_size": batch})
    measured = probe(image_s, batch=batch // workers)
    seen = forecast(asked, measured)
    assert seen.more_nodes_help is helps
    assert ("more nodes" in describe_forecast(asked, measured, seen)) is not helps


@pytest.mark.parametrize(
    ("shape", "num_rows", "window", "workers", "suggested"),
    [
        ((3, 32, 32), 50_000, 65_536, 1, None),  # 154 MB: in memory whatever the window
        (
            (3, 256, 256),
            1_000_000,
            65_536,
            1,
            512,
        ),  # 16 x 62,500 x 197 kB; 2 GiB / 16 / 196,608 = 682, of which 512 is the power of two
        ((3, 256, 256), 1_000_000, 512, 1, None),
        ((3, 256, 256), 1_000_000, 65_536, 16, 8192),  # each worker has one stream
    ],
)
def test_a_window_that_fills_the_memory_is_warned_of(shape, num_rows, window, workers, suggested):
    found = _large_window(
        plan(gpus(workers), num_workers=workers, shape=shape, num_rows=num_rows, data={"shuffle_window": window})
    )
    assert (found is None) == (suggested is None)
    assert suggested is None or str(found).endswith(f"data.shuffle_window={suggested}")


@pytest.mark.parametrize(
    ("one_s", "large", "large_s", "expected"),
    [
        (1.1, 11, 2.1, (0.1, 1.0)),  # a second, and a tenth for each image
        (0.5, 1, 0.5, (0.5, 0.0)),  # only one batch size: all of it is the images'
        (2.0, 8, 1.6, (0.2, 0.0)),  # noise: more images in less time
        (0.1, 10, 2.0, (0.2, 0.0)),  # noise: below the origin
    ],
)
def test_two_batch_sizes_tell_the_fixed_part_from_the_images(one_s, large, large_s, expected):
    assert _line(one_s, large, large_s) == pytest.approx(expected)


# a network that takes 100 ms and 20 ms for each image, by a clock that it moves itself
TIMED = """
import torch
from torch import nn

now = 0.0

class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        global now
        now += 0.1 + 0.02 * len(x)
        return self.net(x)
"""


def test_the_probe_times_real_steps_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "timed_network.py").write_text(TIMED)
    monkeypatch.syspath_prepend(str(tmp_path))
    experiment = experiment_from(
        {"model": {"type": "timed_network:Timed"}, "training": {"batch_size": 64}, "evaluation": {"enabled": False}}
    )
    storage = tmp_path / "storage"
    threads = torch.get_num_threads()
    network = importlib.import_module("timed_network")
    there = storage / "not" / "there"
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: network.now + 1e-9 * next(ticks))
    monkeypatch.setattr(probes, "time", clock)
    seen = probe_training(experiment, (1, 4, 4), Profile(), 1, budget_s=2.4, folder=there)
    # 16 images take more than a sixth of the time, so that no larger batch is tried
    assert (seen.batch, seen.measured_batch) == (64, 16)
    assert (seen.image_s, seen.fixed_s, seen.step_s) == pytest.approx((0.02, 0.1, 0.1 + 64 * 0.02))
    assert network.now == pytest.approx(
        0.12 + 2 * 0.12 + 0.18 + 0.42 + 2 * 0.42
    )  # warm-up, 1, 4 and 16 images, and 16 again
    assert seen.checkpoint_s is not None
    assert seen.checkpoint_s > 0
    assert torch.get_num_threads() == threads
    assert not storage.exists()


def test_the_probe_writes_its_checkpoint_where_the_node_can(tmp_path, monkeypatch):
    (tmp_path / "quick_network.py").write_text(TIMED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = Path("/proc/home")  # the driver's: no folder can be made on this node
    experiment = experiment_from(
        {"model": {"type": "quick_network:Timed"}, "training": {"batch_size": 2}, "evaluation": {"enabled": False}}
    )
    for storage, measured in (("s3://bucket/ddpm", True), ("/proc/home", False)):
        profile = Profile(kind="connect", address="auto", storage=storage, resources_per_worker={"CPU": 1})
        seen = probe_training(experiment, (1, 4, 4), profile, 1, budget_s=0.2, folder=elsewhere)
        assert (seen.checkpoint_s is not None) == measured
    assert not list(tmp_path.glob("ddpm-pipe-*/runs/.ddpm-probe-*"))


def test_a_dry_run_without_a_probe_says_so():
    told = DryRun(plan(), None, None, "--no-probe was given", ("careful",))
    assert list(dry_run_lines(told))[-2:] == ["measured:        no: --no-probe was given", "warning: careful"]
    assert told.to_json()["forecast"] is None


def test_an_all_reduce_is_timed_with_the_threads_that_a_worker_of_the_profile_has(tmp_path, monkeypatch):
    """Without `threads_per_worker` they are a worker's share of this machine."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        seen = probe_all_reduce(Profile(workers=2), Team(0, 1))
        assert torch.get_num_threads() == Profile().threads(1)
    finally:
        torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)
    assert seen.right
    assert seen.seconds > 0


def test_scores_while_training_cost_their_network_calls():
    few = plan(
        training={"steps": 1000, "batch_size": 100},
        sampling={"sampler": "ancestral", "steps": 1000},
        evaluation={"every_steps": 300, "early_images": 30, "enabled": False},
    )
    found = early_scores(few)
    assert found is not None
    assert found.times == 4  # 300, 600, 900 and the last step
    assert found.calls == 30 * 50  # by DDIM instead of a thousand steps
    assert found.share == pytest.approx(4 * 1500 / (1000 * 100 * 3))
    assert forecast(few, probe(0.03)).scoring_s == pytest.approx(4 * 1500 * 0.01)
    text = "\n".join(dry_run_lines(DryRun(few, None, None, "not asked for", ())))
    assert (
        "every 300 steps, 4 in all, by 30 images each, against those trained on: 6,000 network calls, 2.00% of the training's"
        in text
    )
    assert early_scores(plan()) is None
