"""The doctor's checks: each gathers facts about the cluster that this process has joined, and has them judged (`checks`)."""

from __future__ import annotations

import os
import secrets
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.nodes import on_each
from pipeline.cluster.session import require_resources
from pipeline.cluster.worker_group import Group
from pipeline.doctor import node_checks
from pipeline.doctor import verdicts as checks
from pipeline.doctor.examination import Examination
from pipeline.doctor.limited_checks import red_of
from pipeline.doctor.verdicts import Finding
from pipeline.errors import ClusterError
from pipeline.planning.plan import BYTES_PER_PARAMETER
from pipeline.settings.cluster_profile import Profile
from pipeline.settings.config import Experiment
from pipeline.training.models import Shape

if TYPE_CHECKING:
    from pipeline.planning.probe import AllReduce, Probe
    from pipeline.training.team import Team

READ_S, STEP_S = 4.0, 3.0


def versions(examination: Examination) -> Finding:
    """Compare what each node runs with what this process runs."""
    here = node_checks.facts("here", ()).versions
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
    """Ask each node for its time, one after another: an answer lies between the question and its receipt."""
    skews: dict[str, float] = {}
    for node in examination.nodes:
        before = time.time()
        answer = on_each([node.id], node_checks.clock, examination.left(5.0))
        after = time.time()
        if node.id not in answer:
            raise ClusterError(f"no answer from {examination.names[node.id]}")
        there = answer[node.id]
        skews[examination.names[node.id]] = there - min(max(there, before), after)
    return checks.judge_clocks(skews)


def disk(examination: Examination) -> Finding:
    """Look at the free space of every place that fills."""
    checkpoint = examination.num_parameters * BYTES_PER_PARAMETER * 4
    return checks.judge_disk(examination.facts, checkpoint, examination.experiment.checkpoint.keep)


def storage(examination: Examination) -> Finding:
    """Each node writes a file, then reads those of all."""
    folder = f".doctor-{secrets.token_hex(4)}"
    place, names = examination.place, examination.names
    files = {node: f"{folder}/{node[:12]}" for node in names}
    here = Path(place)
    was_there = "://" in place or here.is_dir()
    try:
        written = examination.ask({n: partial(node_checks.write_test, place, f) for n, f in files.items()})
        problems = {names[n]: f"cannot be written ({t.problem})" for n, t in written.items() if t.problem}
        reads = {}
        if not problems:
            digests = {files[n]: t.digest for n, t in written.items()}
            reads = examination.ask({n: partial(node_checks.read_tests, place, digests) for n in files})
            problems = {names[n]: f"cannot be read ({t.problem})" for n, t in reads.items() if t.problem}
    finally:
        node_checks.remove_tests(place, folder)
        if not was_there and here.is_dir() and not any(here.iterdir()):
            here.rmdir()
    slowest_write = max((t.seconds for t in written.values()), default=0.0) or 1e-9
    slowest_read = max((t.seconds for t in reads.values()), default=0.0) or 1e-9
    num_bytes = node_checks.TEST_BYTES
    return checks.judge_storage(
        place, problems, len(names), num_bytes / slowest_write, len(files) * num_bytes / slowest_read
    )


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
    from pipeline.tracking.check import check_store, sqlite_file
    from pipeline.tracking.tracker import TrackingSettings

    settings = TrackingSettings.of_profile(examination.profile.home(), examination.profile)
    address = public_uri(settings.uri)
    file = sqlite_file(settings)
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
    from pipeline.planning.probe import probe_training
    from pipeline.training.models import allow_modules_in

    allow_modules_in(code_folder)
    return probe_training(experiment, shape, profile, count, team=team, budget_s=STEP_S)
