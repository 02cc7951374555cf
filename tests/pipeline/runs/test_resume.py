"""Oracle 11: training, stopped or killed anywhere and gone on with, ends with the bytes of an undisturbed training. Dropout is on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.cluster_profile import Profile, Resources
from pipeline.config.experiment import experiment_from, with_overrides
from pipeline.errors import CheckpointError, ClusterError
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.training.device import Capabilities
from pipeline.training.team import Team
from pipeline.training.trained import Trained
from pipeline.worker.worker import Worker
from tests.kit import trainer
from tests.kit.experiments import TINY
from tests.kit.forks import PROCESSES


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, str], dict[int, float]]:
    run = trainer.make_run(tmp_path_factory.mktemp("undisturbed"))
    to_the_end(run)
    return trainer.final_digests(run), trainer.logged_losses(run)


def to_the_end(run: Run, stop_after: int | None = None) -> None:
    process = PROCESSES.Process(target=trainer.train, args=(str(run.folder), None, stop_after))
    process.start()
    process.join()
    assert process.exitcode == 0


def killed_after(run: Run, steps: int) -> None:
    """Start a training in another process and kill it once it has told of so many steps: those since the newest checkpoint are lost."""
    begin = trainer.verified_step(run)
    mine, its = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=trainer.train, args=(str(run.folder), its))
    process.start()
    its.close()
    while (made := mine.recv()) < steps:
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with contextlib.suppress(EOFError):
        while True:
            made = mine.recv()  # what it did before the kill arrived
    assert 0 <= begin + made - trainer.verified_step(run) <= TINY["checkpoint"]["every_steps"]


@pytest.mark.fault(1)
@pytest.mark.oracle(11)
@pytest.mark.promise("P1", "P2")
@pytest.mark.slow
@pytest.mark.parametrize("trial", [*range(3), *(pytest.param(n, marks=pytest.mark.all) for n in range(3, 20))])
def test_oracle_11_killed_at_a_random_step_and_resumed_ends_with_the_same_bytes(tmp_path, undisturbed, trial):
    run = trainer.make_run(tmp_path)
    killed_after(run, random.Random(trial).randint(6, 29))
    to_the_end(run)
    assert (trainer.final_digests(run), trainer.logged_losses(run)) == undisturbed


@pytest.mark.fault(1)
@pytest.mark.oracle(11)
@pytest.mark.promise("P1")
@pytest.mark.slow
def test_oracle_11_killed_again_and_again_still_ends_with_the_same_bytes(tmp_path, undisturbed):
    run = trainer.make_run(tmp_path)
    for steps in (3, 6, 1, 9, 5):
        killed_after(run, steps)
    to_the_end(run)
    assert (trainer.final_digests(run), trainer.logged_losses(run)) == undisturbed


@pytest.mark.fault(20)
@pytest.mark.oracle(11)
@pytest.mark.promise("P2")
def test_oracle_11_asked_to_stop_loses_no_step(tmp_path, undisturbed):
    run = trainer.make_run(tmp_path)
    to_the_end(run, stop_after=7)
    assert trainer.verified_step(run) == 7
    to_the_end(run)
    assert (trainer.final_digests(run), trainer.logged_losses(run)) == undisturbed


@pytest.mark.fault(26)
@pytest.mark.promise("P1")
def test_a_damaged_newest_checkpoint_is_skipped_and_the_end_is_the_same(tmp_path, undisturbed):
    run = trainer.make_run(tmp_path)
    killed_after(run, 15)
    newest = max(run.checkpoints.iterdir())
    model = newest / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    to_the_end(run)
    assert trainer.final_digests(run) == undisturbed[0]
    assert "model.safetensors is damaged" in run.log_path.read_text()


@pytest.mark.fault(22)
def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path):
    run = trainer.make_run(tmp_path)
    to_the_end(run, stop_after=4)
    other = trainer.make_run(tmp_path, seed=1)
    run.checkpoints.rename(other.checkpoints)
    with pytest.raises(CheckpointError, match="other settings"):
        trainer.train(str(other.folder))


def on(run: Run, profile: Profile, stop_after: int | None = None) -> list[int]:
    """Work on a run's next attempt as a profile says, in this process; return the threads that its newest checkpoint was made with."""
    before = torch.get_num_threads()
    job = replace(trainer.job_of(run), profile=profile.to_dict())
    try:
        Worker(job, Team(), trainer.Alone(stop_after=stop_after)).work()
        computed_with = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    checkpoint = RunCheckpoints(run).newest_verified().checkpoint
    assert checkpoint is not None
    return [checkpoint.state()["arithmetic"]["threads"], computed_with]


@pytest.mark.promise("P6")
def test_a_run_keeps_its_threads_on_a_machine_with_other_cores_unless_a_profile_names_others(tmp_path):
    two_cores, one_core = (Profile(resources_per_worker=Resources(CPU=cpus)) for cpus in (2, 1))
    calm, moved, renamed = (trainer.make_run(tmp_path, profile=two_cores) for _ in range(3))
    assert on(calm, two_cores) == [2, 2]
    for run in (moved, renamed):
        assert on(run, two_cores, stop_after=7) == [2, 2]
    assert on(moved, one_core) == [2, 2]
    assert trainer.final_digests(moved) == trainer.final_digests(calm)
    assert on(renamed, Profile(threads_per_worker=3)) == [3, 3]
    assert "threads: 2 until step 7, 3 from there on" in renamed.log_path.read_text()
    assert "until step" not in moved.log_path.read_text()


@pytest.mark.promise("P6")
def test_a_run_keeps_what_mixed_came_to_and_records_what_is_named_later(tmp_path, monkeypatch):
    """On a machine that would choose otherwise it goes on as before; one that cannot refuses, and a named precision is taken."""
    mixed = TINY["training"] | {"precision": "mixed"}
    plain, able = Capabilities(), Capabilities(cpu_bf16=True)

    def be(machine):
        monkeypatch.setattr(Capabilities, "of_this_machine", classmethod(lambda cls: machine))

    be(plain)
    calm, moved = (trainer.make_run(tmp_path, training=mixed) for _ in range(2))
    trainer.train(str(calm.folder))
    trainer.train(str(moved.folder), stop_after=7)
    be(able)
    trainer.train(str(moved.folder))
    assert trainer.final_digests(moved) == trainer.final_digests(calm)
    assert "arithmetic: precision fp32" in moved.log_path.read_text()

    struck = trainer.make_run(tmp_path, training=mixed)
    trainer.train(str(struck.folder), stop_after=7)
    assert RunCheckpoints(struck).newest_verified().checkpoint.state()["arithmetic"]["precision"] == "bf16"
    be(plain)
    with pytest.raises(
        ClusterError, match=r"got bf16 for mixed on this run's machine so far.*-s training.precision=fp32"
    ):
        trainer.train(str(struck.folder))
    job = trainer.job_of(struck)
    named = with_overrides(experiment_from(job.experiment), ["training.precision=fp32"])
    Worker(replace(job, experiment=named.to_dict()), Team(), trainer.Alone()).work()
    assert "precision: bf16 until step 7, fp32 from there on" in struck.log_path.read_text()


def test_without_a_kill_the_seed_decides(tmp_path, undisturbed):
    # the comparison above would mean nothing if every training ended alike
    run = trainer.make_run(tmp_path, seed=1)
    to_the_end(run)
    assert trainer.final_digests(run) != undisturbed[0]


@pytest.mark.fault(1)
@pytest.mark.promise("P1")
@pytest.mark.slow
def test_a_fork_starts_from_its_origin_even_if_it_was_killed_before_its_first_checkpoint(tmp_path, undisturbed):
    origin = trainer.make_run(tmp_path)
    to_the_end(origin)
    folder = str(max(origin.checkpoints.iterdir()))
    calm, struck = (trainer.make_run(tmp_path, initial_weights=folder) for _ in range(2))
    to_the_end(calm)
    killed_after(struck, 2)
    assert list(struck.checkpoints.glob("*/MANIFEST.json")) == []
    to_the_end(struck)
    assert trainer.final_digests(struck) == trainer.final_digests(calm)
    assert trainer.final_digests(calm) != undisturbed[0]


OWN_NETWORK = """
from torch import nn

class Own(nn.Module):
    def __init__(self, depth=1):
        super().__init__()
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t):
        return self.layers(x)
"""


def worker_of_own_network(home: Path, initial_weights: str | None = None, depth: int = 1) -> Worker:
    """Return the worker of a training of three steps, of a network that has buffers; it draws a picture at the begin and the end."""
    (home / "own_network.py").write_text(OWN_NETWORK)
    run = trainer.make_run(
        home,
        initial_weights,
        model={"type": "own_network:Own", "arguments": {"depth": depth}},
        training={"steps": 3, "batch_size": 16},
        sampling={"steps": 2},
        logging={"grid_every_steps": 1000, "grid_images": 2},
    )
    return Worker(trainer.job_of(run), Team(), trainer.Alone())


def test_pictures_are_drawn_with_the_buffers_that_training_has_come_to(tmp_path):
    worker = worker_of_own_network(tmp_path)
    worker.work()
    assert worker.preview is not None
    assert worker.preview.model is not None
    drawn, trained = (dict(model.named_buffers()) for model in (worker.preview.model, worker.train_state.model))
    assert int(trained["layers.1.num_batches_tracked"]) == 3
    torch.testing.assert_close(drawn, trained, rtol=0, atol=0)


def test_a_fork_begins_with_all_that_its_origin_samples_with_or_not_at_all(tmp_path):
    origin = worker_of_own_network(tmp_path)
    origin.work()
    folder = str(max(origin.run.checkpoints.iterdir()))
    fork = worker_of_own_network(tmp_path, folder)
    fork._restore()
    assert fork.saver is not None
    fork.saver.close()
    own = Trained.from_run(origin.run).model.state_dict()
    torch.testing.assert_close(dict(fork.train_state.model.state_dict()), dict(own), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"the weights have no layers\.2\.weight\); keep the settings"):
        worker_of_own_network(tmp_path, folder, depth=2).work()
    deep = worker_of_own_network(tmp_path, depth=2)
    deep.work()
    with pytest.raises(CheckpointError, match=r"the network has no layers\.2\.bias"):
        worker_of_own_network(tmp_path, str(max(deep.run.checkpoints.iterdir()))).work()


MODES = {
    "loss_aware": {
        "training": {"timestep_sampling": "loss_aware", "objective": "vlb"},
        "diffusion": {"schedule": "cosine", "num_timesteps": 5, "variance": "learned_range"},
    },
    "several_averages": {
        "training": {"ema_decay": [0.9, 0.99], "ema_widths": [0.05, 0.1], "ema_snapshot_every_steps": 5},
        "diffusion": {"prediction": "v"},
    },
    "labels": {"model": {"class_conditional": True}, "training": {"label_dropout": 0.3, "weight_decay": 0.1}},
}


@pytest.mark.oracle(11)
@pytest.mark.promise("P1")
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_oracle_11_every_mode_that_has_a_state_ends_with_the_same_bytes(tmp_path, undisturbed, mode):
    sections = {name: TINY.get(name, {}) | changes for name, changes in MODES[mode].items()}
    calm, struck = (trainer.make_run(tmp_path, **sections) for _ in range(2))
    to_the_end(calm)
    for steps in (3, 9, 5):
        killed_after(struck, steps)
    to_the_end(struck)
    ends = [trainer.final_digests(run) for run in (calm, struck)]
    assert ends[0] == ends[1]
    assert trainer.logged_losses(calm) == trainer.logged_losses(struck)
    assert set(undisturbed[0]) <= set(ends[0])
    state = CheckpointStore(struck.checkpoints).newest_verified().checkpoint.tensors()
    if mode == "loss_aware":
        # the history has decided draws: every step has its ten losses, and they are not alike
        assert int(state["timesteps"]["seen"].min()) >= 10
        assert int(state["timesteps"]["seen"].sum()) == 30 * 16
    if mode == "several_averages":
        assert {"ema", "ema-0.99", "power-0.05", "power-0.1"} <= set(ends[0])
        stored = [
            [c.step for c in reversed(CheckpointStore(r.folder / "snapshots").committed())] for r in (calm, struck)
        ]
        assert stored == [[5, 10, 15, 20, 25, 30]] * 2
        snapshots = [CheckpointStore(r.folder / "snapshots").committed()[-1].tensors() for r in (calm, struck)]
        for group, tensors in snapshots[0].items():
            assert all(torch.equal(tensor, snapshots[1][group][name]) for name, tensor in tensors.items())


@pytest.mark.oracle(11)
@pytest.mark.slow
def test_oracle_11_moments_come_back_in_the_weights_memory_format(tmp_path):
    """The fused optimizer walks through memory: a moment in another order than its weight's belongs to other weights."""
    training = TINY["training"] | {"channels_last": True}
    calm, struck = (trainer.make_run(tmp_path, training=training) for _ in range(2))
    to_the_end(calm)
    killed_after(struck, 10)
    to_the_end(struck)
    assert trainer.final_digests(struck) == trainer.final_digests(calm)


@pytest.mark.oracle(11)
@pytest.mark.slow
def test_oracle_11_fp16_takes_its_loss_scale_along(tmp_path):
    """The scale doubles after 2000 steps without an overflow: a resume that began to count anew would double it later."""
    training = TINY["training"] | {"precision": "fp16", "steps": 14}  # CPUs only emulate it
    calm, struck = (trainer.make_run(tmp_path, training=training) for _ in range(2))
    to_the_end(calm)
    killed_after(struck, 10)
    to_the_end(struck)
    assert trainer.final_digests(struck) == trainer.final_digests(calm)
    ends = [
        CheckpointStore(run.checkpoints).newest_verified().checkpoint.state()["loss_scale"] for run in (calm, struck)
    ]
    assert ends[0] == ends[1]
    assert ends[0]["_growth_tracker"] == 14
