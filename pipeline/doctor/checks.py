"""The doctor's checks: each gathers facts about the cluster that this process has joined, and has them judged (`checks`)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.nodes import answers
from pipeline.cluster.session import require_resources
from pipeline.cluster.worker_group import Group
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.doctor import node_checks
from pipeline.doctor import verdicts as checks
from pipeline.doctor.examination import Examination
from pipeline.doctor.limited_checks import in_thread, red_of
from pipeline.doctor.verdicts import Finding
from pipeline.errors import ClusterError
from pipeline.planning.plan import BYTES_PER_PARAMETER
from pipeline.storage.remote import is_remote
from pipeline.training.models import Shape

if TYPE_CHECKING:
    from pipeline.planning.probe import AllReduce, Probe
    from pipeline.training.team import Team

READ_S, STEP_S = 4.0, 3.0
CLOCKS_S = 10.0
DISK_S = 13.0
STORAGE_S = 11.0  # for writing, and for reading
REMOVE_S = 5.0


def versions(examination: Examination) -> Finding:
    """Compare what each node runs with what this process runs."""
    here = node_checks.facts("here").versions
    return checks.judge_versions(here, examination.facts)


def resources(examination: Examination) -> Finding:
    """Place the workers in thought; on this machine by the CPUs that it has, not by those that Ray was told of."""
    profile = examination.profile
    if not profile.is_remote:
        try:
            require_resources(profile, profile.least_workers)
        except ClusterError as error:
            return red_of("resources", error)
    return checks.judge_resources(profile, examination.nodes, examination.facts)


def clocks(examination: Examination) -> Finding:
    """Ask all nodes for their time: an answer lies between the question and its receipt."""
    skews: dict[str, float] = {}
    before = time.time()
    for node, there in answers(dict.fromkeys(examination.names, node_checks.clock), examination.left(CLOCKS_S)):
        skews[node] = there - min(max(there, before), time.time())
    examination.require_all(skews)
    return checks.judge_clocks({examination.names[node]: skew for node, skew in skews.items()})


def disk(examination: Examination) -> Finding:
    """Ask every node for the free space of each place that fills."""
    places = () if is_remote(examination.place) else (examination.place,)
    free = examination.ask({node: partial(node_checks.free_bytes, places) for node in examination.names}, DISK_S)
    by_name = {examination.names[node]: there for node, there in free.items()}
    checkpoint = examination.num_parameters * BYTES_PER_PARAMETER * 4
    return checks.judge_disk(by_name, checkpoint, examination.experiment.checkpoint.keep)


def storage(examination: Examination) -> Finding:
    """This process and each node write a file, then each node reads this process's and its neighbour's, and this process the first one's.

    In a ring, places that only some of the nodes share are found out as surely as by reading the files of all, with two files to a node.
    """
    place, names = examination.place, examination.names
    here, files = f"{examination.test_folder}/driver", {n: f"{examination.test_folder}/{n[:12]}" for n in names}
    examination.storage_is_tried = True
    mine = node_checks.write_test(place, here, make_folder=True)
    if mine.problem:
        return checks.judge_storage(
            place, {"this machine": f"cannot be written ({mine.problem})"}, len(names), 1.0, 1.0
        )
    written = examination.ask({n: partial(node_checks.write_test, place, f) for n, f in files.items()}, STORAGE_S)
    problems = {names[n]: f"cannot be written ({t.problem})" for n, t in written.items() if t.problem}
    reads: list[node_checks.WriteTest] = []
    if not problems:
        nodes = list(files)
        neighbours = dict(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
        tests = {
            n: {here: mine.digest, files[next_one]: written[next_one].digest} for n, next_one in neighbours.items()
        }
        there = examination.ask({n: partial(node_checks.read_tests, place, t) for n, t in tests.items()}, STORAGE_S)
        back = node_checks.read_tests(place, {files[nodes[0]]: written[nodes[0]].digest})
        problems = {names[n]: f"cannot be read ({t.problem})" for n, t in there.items() if t.problem}
        problems |= {"this machine": f"cannot be read ({back.problem})"} if back.problem else {}
        reads = list(there.values())
    slowest_write = max((t.seconds for t in written.values()), default=0.0) or 1e-9
    slowest_read = max((t.seconds for t in reads), default=0.0) or 1e-9
    num_bytes = node_checks.TEST_BYTES
    return checks.judge_storage(place, problems, len(names), num_bytes / slowest_write, 2 * num_bytes / slowest_read)


@contextlib.contextmanager
def storage_left_as_it_was(examination: Examination) -> Iterator[None]:
    """Remove what the storage was tried with, whatever became of that. No node may still be writing: leave the cluster before."""
    place = examination.place
    folder = Path(place)
    look = in_thread(lambda: is_remote(place) or os.path.isdir(place), "doctor-look")  # which hangs on a dead mount

    def remove() -> None:
        node_checks.remove_tests(place, examination.test_folder)
        if look(0.0) is False and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    try:
        yield
    finally:
        if examination.storage_is_tried:
            in_thread(remove, "doctor-remove")(REMOVE_S)  # of a place that hangs nothing can be removed


def dataset(examination: Examination) -> Finding:
    """Let each node read a part of the dataset."""
    location, count = examination.dataset, len(examination.nodes)
    if location is None:
        return checks.skipped("dataset", "none given (--data)")
    cache = examination.profile.cache
    readings = examination.ask(
        {
            node.id: partial(node_checks.read_dataset, location, cache, part, count, READ_S)
            for part, node in enumerate(examination.nodes)
        }
    )
    return checks.judge_dataset(location, {examination.names[node]: reading for node, reading in readings.items()})


def mlflow(examination: Examination) -> Finding:
    """Write to the tracking store from here; a SQLite file that is not there yet is not made."""
    from pipeline.redaction import one_line, public_uri
    from pipeline.tracking.check import check_store
    from pipeline.tracking.run import sqlite_file
    from pipeline.tracking.tracker import TrackingSettings

    settings = TrackingSettings.of_profile(examination.profile.home(), examination.profile)
    address = public_uri(settings.uri)
    file = sqlite_file(settings.uri)
    if file is not None and not file.exists():
        there = node_checks.existing(file.parent)
        if not os.access(there, os.W_OK):
            return checks.red(
                "mlflow", f"{address}: {there} is not writable", "make it writable, or set DDPM_PIPE_HOME"
            )
        return checks.green("mlflow", f"{address}: not there yet, the first run makes it")
    try:
        seconds = check_store(settings)
    except Exception as error:  # MLflow raises many kinds
        return checks.red(
            "mlflow", f"{address}: {one_line(error)}",
            "start the server, correct mlflow.tracking_uri in the profile (or MLFLOW_TRACKING_URI), or its credentials",
        )  # fmt: skip
    return checks.green(
        "mlflow", f"{address}: a run written, read back and deleted in {seconds:.1f} s", seconds=seconds
    )


def all_reduce(examination: Examination, group: Group, count: int) -> Finding:
    """Add numbers up over the workers."""
    from pipeline.training.device import backend_of

    if count == 1:
        return checks.green("all-reduce", "one worker: nothing is exchanged")
    seen = group.run(_reduce_in_worker, examination.profile, timeout_s=examination.left(18.0))
    return checks.judge_all_reduce(
        count, seen[0].num_bytes, max(s.seconds for s in seen), right=all(s.right for s in seen),
        backend=backend_of(examination.profile),
    )  # fmt: skip


def _reduce_in_worker(team: Team, profile: Profile) -> AllReduce:
    from pipeline.planning.probe import probe_all_reduce

    return probe_all_reduce(profile, team)


def step(examination: Examination, group: Group, count: int) -> Finding:
    """Time training steps on the workers."""
    experiment = examination.experiment
    if experiment.training.batch_size % count:
        batch = -(-experiment.training.batch_size // count) * count
        experiment = experiment.model_copy(
            update={"training": experiment.training.model_copy(update={"batch_size": batch})}
        )
    seen: Probe = group.run(
        _step_in_worker,
        experiment,
        examination.shape,
        examination.profile,
        count,
        os.getcwd(),
        timeout_s=examination.left(24.0),
    )[0]
    images = experiment.training.batch_size / seen.step_s
    return checks.green(
        "step",
        f"{experiment.name}: {seen.step_s:.2g} s for {experiment.training.batch_size} images on {count} "
        f"worker{'s' * (count > 1)} ({images:,.3g} images/s; {seen.device})",
        **seen.to_dict(),
    )


def _step_in_worker(
    team: Team, experiment: Experiment, shape: Shape, profile: Profile, count: int, code_folder: str
) -> Probe:
    from pipeline.import_path import allow_modules_in
    from pipeline.planning.probe import probe_training

    allow_modules_in(code_folder)
    return probe_training(experiment, shape, profile, count, team=team, budget_s=STEP_S)
