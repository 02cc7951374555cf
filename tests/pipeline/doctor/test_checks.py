"""The doctor's judgements, by table: facts in, verdict out."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.join import store_address
from pipeline.config.cluster_profile import Cache, Profile
from pipeline.config.experiment import experiment_from
from pipeline.config.yaml_files import validate
from pipeline.data.manifest import Manifest
from pipeline.doctor import checks as doctor_checks
from pipeline.doctor import doctor, node_checks
from pipeline.doctor import verdicts as checks
from pipeline.doctor.checks import Examination
from pipeline.doctor.doctor import begin, require_healthy
from pipeline.doctor.node_checks import read_dataset, read_tests, write_test
from pipeline.doctor.verdicts import NodeFacts, Reading, Verdict
from pipeline.errors import ClusterError, RefusedError
from pipeline.ingest.ingest import ingest
from pipeline.planning.capacity import Node

HERE = {"ddpm-pipe": "0.1.0", "python": "3.11.7", "ray": "2.60.0", "torch": "2.14.1", "pillow": "13.0.0"}
GB = 10**9


def facts(name: str = "a", *, memory: int = 64 * GB, load: float = 0.1, **versions: str) -> NodeFacts:
    return NodeFacts(name, HERE | versions, memory, load)


def node(name: str, cpus: float, *, free: float | None = None, gpus: float = 0) -> Node:
    total = {"CPU": cpus, "GPU": gpus}
    return Node(name * 8, name, total, total if free is None else {"CPU": free, "GPU": gpus})


def profile(workers: Any, cpus: float = 2, *, gpus: float = 0, placement: str = "pack") -> Profile:
    content = {
        "kind": "connect",
        "address": "auto",
        "storage": "/mnt/ddpm",
        "workers": workers,
        "placement": placement,
        "resources_per_worker": {"CPU": cpus, "GPU": gpus},
    }
    return validate(Profile, content, "profile")


@pytest.mark.parametrize(
    ("versions", "verdict", "told"),
    [
        ({}, Verdict.GREEN, "the same on 2 nodes"),
        ({"torch": "2.13.0"}, Verdict.RED, "torch 2.13.0 on b, 2.14.1 here"),
        ({"python": "3.11.6"}, Verdict.RED, "python 3.11.6 on b, 3.11.7 here"),
        ({"ray": "2.59.0"}, Verdict.RED, "ray 2.59.0 on b"),
        ({"ddpm_pipe": "x"}, Verdict.YELLOW, "ddpm_pipe x on b, missing here"),
        ({"pillow": "12.3.0"}, Verdict.YELLOW, "pillow 12.3.0 on b, 13.0.0 here"),
    ],
)
def test_versions(versions, verdict, told):
    finding = checks.judge_versions(HERE, [facts("a"), facts("b", **versions)])
    assert finding.verdict is verdict
    assert told in finding.says
    assert bool(finding.remedy) == (verdict is not Verdict.GREEN)


def test_a_package_that_a_node_lacks_is_red():
    lacking = NodeFacts("b", {k: v for k, v in HERE.items() if k != "torch"}, GB)
    assert "torch missing on b" in checks.judge_versions(HERE, [lacking]).says


@pytest.mark.parametrize(
    ("asked", "nodes", "verdict", "told"),
    [
        (profile(2), [node("a", 4)], Verdict.GREEN, "1 node holds 2 of 2 workers"),
        (profile(4), [node("a", 4), node("b", 4)], Verdict.GREEN, "2 nodes hold 4 of 4"),
        (profile(3), [node("a", 4)], Verdict.RED, "which holds 2"),
        (
            profile(3),
            [node("a", 3), node("b", 3)],
            Verdict.RED,
            "which holds 2",
        ),  # six CPUs, but two to a worker on each node
        (profile(2), [node("a", 4, free=2)], Verdict.YELLOW, "others use the rest"),
        (profile(2, placement="strict_spread"), [node("a", 8)], Verdict.RED, "each on a node of its own"),
        (profile(2, placement="strict_spread"), [node("a", 2), node("b", 2)], Verdict.GREEN, "hold 2 of 2"),
        (profile({"min": 1, "max": 8}), [node("a", 4)], Verdict.GREEN, "holds 2 of 8"),  # elastic
        (profile(1, gpus=1), [node("a", 4)], Verdict.RED, "GPU"),
        (profile(1, gpus=1), [node("a", 4, gpus=1)], Verdict.GREEN, "1 GPU"),
    ],
)
def test_resources(asked, nodes, verdict, told):
    finding = checks.judge_resources(asked, nodes, [facts(n.name) for n in nodes])
    assert (finding.verdict, told in finding.says) == (verdict, True), finding
    assert bool(finding.remedy) == (verdict is not Verdict.GREEN)


def test_a_cluster_that_may_grow_is_given_time():
    growing = profile(2).model_copy(update={"wait_for_resources_s": 900.0})
    finding = checks.judge_resources(growing, [node("a", 1)], [facts()])
    assert (finding.verdict, "waits 900 s" in finding.says) == (Verdict.YELLOW, True)
    assert "about 1 other node alone" in finding.says  # as of a cluster scaled to zero, whose head holds no worker
    assert "train --dry-run" in finding.remedy
    some = checks.judge_resources(growing, [node("a", 2)], [facts()])
    assert (some.verdict, "alone" in some.says) == (Verdict.YELLOW, False)


def test_little_memory_and_busy_machines_are_yellow():
    little = checks.judge_resources(profile(2), [node("a", 4)], [facts(memory=GB)])
    assert (little.verdict, "1.0 GB of memory free" in little.says) == (Verdict.YELLOW, True)
    busy = checks.judge_resources(profile(2), [node("a", 4)], [facts(load=3.0)])
    assert (busy.verdict, "busy" in busy.says) == (Verdict.YELLOW, True)


@pytest.mark.parametrize(
    ("skews", "verdict", "told"),
    [
        ({"a": 0.0, "b": 0.4}, Verdict.GREEN, "within 0.4 s"),
        ({"a": 0.0, "b": 5.0}, Verdict.YELLOW, "b is 5 s ahead"),
        ({"a": -300.0, "b": 5.0}, Verdict.RED, "a is 300 s behind"),
    ],
)
def test_clocks(skews, verdict, told):
    finding = checks.judge_clocks(skews)
    assert (finding.verdict, told in finding.says) == (verdict, True), finding


@pytest.mark.parametrize(
    ("free", "checkpoint", "verdict"),
    [
        (100 * GB, GB // 100, Verdict.GREEN),
        (5 * GB, GB // 100, Verdict.YELLOW),
        (GB, GB // 100, Verdict.RED),
        (100 * GB, 30 * GB, Verdict.RED),  # two kept, one being written, one to spare: 120 GB
        (200 * GB, 30 * GB, Verdict.YELLOW),
    ],
)
def test_disk(free, checkpoint, verdict):
    finding = checks.judge_disk({"a": {"/tmp": 1000 * GB}, "b": {"/tmp": free}}, checkpoint, keep=2)
    assert finding.verdict is verdict
    assert "on b" in finding.says


def test_storage():
    good = checks.judge_storage("/mnt/ddpm", {}, 2, 100e6, 500e6)
    assert (good.verdict, "2 nodes, 100 MB/s and 500 MB/s" in good.says) == (Verdict.GREEN, True)
    bad = checks.judge_storage("/mnt/ddpm", {"b": "cannot be written (Read-only file system)"}, 2, 1.0, 1.0)
    assert bad.verdict is Verdict.RED
    assert bad.says == "/mnt/ddpm: cannot be written (Read-only file system) on b"


def test_dataset():
    good = checks.judge_dataset("data", {"a": Reading(1000, 400, 2.0), "b": Reading(1000, 500, 5.0)})
    assert good.verdict is Verdict.GREEN
    assert "90% of 1,000 images read and checked, 100 images/s on b (the slowest)" in good.says
    bad = checks.judge_dataset("data", {"a": Reading(1000, 400, 2.0), "b": Reading(problem="x.parquet is damaged")})
    assert (bad.verdict, bad.says) == (Verdict.RED, "x.parquet is damaged (seen on b)")


def test_a_store_that_ignores_conditional_writes_is_named(bucket, object_store):
    assert write_test(bucket, ".doctor-1/driver").problem == ""
    object_store.ignores_conditions = True
    assert "ignores conditional writes" in write_test(bucket, ".doctor-1/driver").problem


def test_a_node_beyond_the_row_groups_reads_one_of_them_too(tmp_path):
    ingest("digits", tmp_path / "digits")
    groups = Manifest.load(tmp_path / "digits").row_groups
    reading = read_dataset(str(tmp_path / "digits"), Cache(), len(groups) + 1, len(groups) + 2, seconds=0.0)
    assert (reading.problem, reading.num_rows, reading.num_images) == ("", 1797, groups[1 % len(groups)])


def test_a_place_that_a_node_has_for_itself_is_reported_and_nothing_is_left_there(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"  # the same path on two machines, as it were
    own.mkdir()
    assert write_test(str(shared), ".doctor-1/driver", make_folder=True).problem == ""
    written = write_test(str(shared), ".doctor-1/b")
    assert read_tests(str(shared), {".doctor-1/b": written.digest}).problem == ""
    for place in (own, tmp_path / "absent"):
        assert "that another machine made is not there" in write_test(str(place), ".doctor-1/b").problem
    assert list(own.iterdir()) == []
    assert not (tmp_path / "absent").exists()
    assert "is read back differently" in read_tests(str(shared), {".doctor-1/b": "0" * 64}).problem


@pytest.mark.parametrize(
    ("right", "backend", "seconds", "verdict"),
    [
        (True, "gloo", 1.0, Verdict.GREEN),  # whatever a CPU's network gives
        (True, "nccl", 0.001, Verdict.GREEN),
        (True, "nccl", 1.0, Verdict.YELLOW),
        (False, "nccl", 0.001, Verdict.RED),
    ],
)
def test_all_reduce(right, backend, seconds, verdict):
    finding = checks.judge_all_reduce(4, 10**8, seconds, right=right, backend=backend)
    assert finding.verdict is verdict
    if right:
        assert finding.figures["bytes_per_s"] == pytest.approx(
            2 * 3 / 4 * 10**8 / seconds
        )  # nccl-tests, doc/PERFORMANCE.md


def test_a_check_that_hangs_or_fails_is_red():
    never = threading.Event()
    asked = Examination(profile(1), experiment_from({}), (1, 8, 8), 0)
    hanging = begin("x", lambda asked: checks.green("x", str(never.wait())), 1.0, asked)()
    never.set()
    assert (hanging.verdict, "no answer within" in hanging.says) == (Verdict.RED, True)

    def fail(asked: Examination) -> checks.Finding:
        raise ClusterError("node b is gone; start it again")

    finding = begin("x", fail, 5.0, asked)()
    assert (finding.verdict, finding.says, finding.remedy) == (Verdict.RED, "node b is gone", "start it again")
    assert begin("x", lambda asked: 1 / 0, 5.0, asked)().says == "ZeroDivisionError: division by zero"  # type: ignore[arg-type, return-value]


def test_looks_at_a_storage_that_hangs_hold_nothing_up(tmp_path, monkeypatch):
    dead, never = tmp_path / "dead", threading.Event()

    def hanging(look):
        return lambda path: never.wait() if Path(path).is_relative_to(dead) else look(path)

    dead.mkdir()
    monkeypatch.setenv("DDPM_PIPE_HOME", str(dead))
    monkeypatch.setattr(doctor, "LOOK_S", 0.3)
    monkeypatch.setattr(doctor_checks, "REMOVE_S", 0.3)
    for place, name in ((os.path, "isdir"), (Path, "is_file"), (Path, "is_dir")):
        monkeypatch.setattr(place, name, hanging(getattr(place, name)))
    try:
        examination = doctor.examination_of(Profile(), str(dead / "data"), "digits")
        assert examination.shape == doctor.USUAL_SHAPE  # since that of the images was not to be had
        with doctor_checks.storage_left_as_it_was(examination):
            examination.storage_is_tried = True
        assert node_checks.facts("here").free_memory_bytes > 0
    finally:
        never.set()
    assert dead.exists()  # where it is not known what was there before, nothing is taken away


def test_free_space_is_told_of_each_place_by_the_nearest_folder_that_is_there(tmp_path):
    wanted = str(tmp_path / "not" / "there")
    assert node_checks.free_bytes((wanted,)).keys() == {wanted, tempfile.gettempdir()}


def test_only_red_is_refused():
    calm = [checks.green("a", ""), checks.yellow("b", "", "r"), checks.skipped("c", "")]
    require_healthy(calm)
    with pytest.raises(RefusedError, match=r"1 of 4 checks are red \(d\)") as refused:
        require_healthy([*calm, checks.red("d", "x", "y")])
    assert refused.value.exit_code == 10


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (["RAY_TMPDIR"], "RAY_TMPDIR"),
        (["RAY_TMPDIR", "TMPDIR"], "RAY_TMPDIR"),
        pytest.param(
            ["TMPDIR"],
            "TMPDIR",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Ray reads it on Linux alone"),
        ),
    ],
)
def test_the_cluster_of_this_machine_is_looked_for_where_ray_would_have_told_of_it(
    variables: list[str], place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, str(tmp_path / name))
    told = tmp_path / place / "ray" / "ray_current_cluster"
    with pytest.raises(ClusterError, match=re.escape(f"no {told}, no RAY_ADDRESS")):
        store_address(profile(1))
    told.parent.mkdir(parents=True)
    told.write_text("10.0.0.4:6379\n")
    assert store_address(profile(1)) == "10.0.0.4:6379"
