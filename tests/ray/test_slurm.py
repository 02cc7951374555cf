"""Trainings of several nodes that a real Slurm starts: Ray over the nodes of an allocation."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.slurm import slurm_cluster
from tests.kit.trainer import final_digests, only_run
from tests.kit.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.all, pytest.mark.slow, pytest.mark.timeout(1200)]


def folders_of_ray() -> set[Path]:
    return set(Path("/tmp").glob("ddpm-ray-*"))


def test_two_trainings_of_two_nodes_share_them_and_leave_nothing(home, shell):
    """Each ends as a training by two workers of one machine does."""
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 6}))
    content = {"kind": "slurm", "workers": 2, "threads_per_worker": 1, "resources_per_worker": {"CPU": 1}}
    content |= {"timeouts": {"start_s": 200.0}, "slurm": {"time": "30", "nodes": 2}}
    before = folders_of_ray()
    names = ("one", "other")
    for name in names:
        write_yaml(home / f"{name}.yaml", content | {"storage": str(home / name)})
    with slurm_cluster(cpus=2) as slurm:
        shell.environment |= slurm.environment
        trainings = [shell.start("train", "tiny.yaml", "--cluster", f"{name}.yaml") for name in names]
        trainings[0].wait_for(lambda: slurm.say("squeue", "--noheader", "--format=%T").split() == ["RUNNING"] * 2)
        for training in trainings:
            code, _, stderr = training.end()
            assert code == 0, stderr + slurm.log()
        wait_for(lambda: not slurm.say("squeue", "--noheader").strip(), 60, explain=slurm.log)
        assert folders_of_ray() == before
        assert not [p for p in psutil.process_iter() if p.name() in {"raylet", "gcs_server"}]
    write_yaml(home / "here.yaml", {"workers": 2, "threads_per_worker": 1, "storage": str(home / "here")})
    assert shell.run("train", "tiny.yaml", "--cluster", "here.yaml").code == 0
    expected = final_digests(only_run(home / "here"))
    assert [final_digests(only_run(home / name)) for name in names] == [expected, expected]
