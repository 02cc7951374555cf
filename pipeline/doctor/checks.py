"""The doctor's checks: each gathers facts about the cluster that this process has joined; `verdicts` judges them."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster.nodes import answers, nodes
from pipeline.cluster.probe_workers import on_workers
from pipeline.cluster.session import require_resources
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.console import plural
from pipeline.doctor import node_checks, verdicts
from pipeline.doctor.verdicts import Finding, NodeFacts, Verdict, green, red, skipped
from pipeline.errors import ClusterError, PipelineError
from pipeline.limits import in_thread
from pipeline.planning.capacity import held_here, largest
from pipeline.planning.plan import BYTES_PER_PARAMETER
from pipeline.redaction import one_line
from pipeline.storage.remote import is_remote
from pipeline.training.models import Shape

if TYPE_CHECKING:
    from pipeline.planning.capacity import Node
    from pipeline.planning.probe import AllReduce, Probe
    from pipeline.training.team import Team

T = TypeVar("T")
WHOLE_S = 57.0  # all checks together
ASK_S = 15.0
READ_S, STEP_S = 4.0, 3.0
CLOCKS_S = 10.0
DISK_S = 13.0
STORAGE_S = 11.0  # for writing, and for reading
REMOVE_S = 5.0
WORKERS_S = 50.0  # to start, to add up numbers, and to train for some steps


@dataclass(frozen=True)
class Measured:
    """What the workers measured: the all-reduce (None with one worker), and the step, or its error."""

    num_workers: int
    all_reduce: AllReduce | None
    step: Probe | str


@dataclass
class Examination:
    """What is examined: a profile, an experiment whose step is timed, and a dataset if one is given.

    `environment` are the variables that the profile forwards, which are secret; `test_folder` holds the files that test the storage;
    `found` are the findings so far, `measured` is what the workers measured.
    """

    profile: Profile
    experiment: Experiment
    shape: Shape
    num_parameters: int
    dataset: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    test_folder: str = field(default_factory=lambda: f".doctor-{secrets.token_hex(4)}")
    storage_is_tried: bool = False
    found: dict[str, Finding] = field(default_factory=dict)
    measured: Measured | None = None
    begun: float = field(default_factory=time.monotonic)

    def left(self, limit_s: float) -> float:
        """Return the time that a check may take, so that all checks end in time."""
        return max(1.0, min(limit_s, self.begun + WHOLE_S - time.monotonic()))

    @property
    def place(self) -> str:
        """Where runs are kept: a folder, or an address in an object store."""
        return str(self.profile.storage if is_remote(self.profile.storage) else self.profile.home())

    @cached_property
    def nodes(self) -> list[Node]:
        return nodes()

    @cached_property
    def names(self) -> dict[str, str]:
        """Names for people, by node; several nodes of one machine get different names."""
        seen: dict[str, int] = {}
        for node in self.nodes:
            seen[node.name] = seen.get(node.name, 0) + 1
        return {n.id: n.name if seen[n.name] == 1 else f"{n.name} ({n.id[:6]})" for n in self.nodes}

    def ask(self, questions: Mapping[str, Callable[[], T]], limit_s: float = ASK_S) -> dict[str, T]:
        """Call a function on each node, all at once; return the answers by node. ClusterError names the nodes that do not answer."""
        found: dict[str, T] = dict(answers(questions, self.left(limit_s), self.environment))
        self.require_all(found)
        return found

    def require_all(self, answered: Mapping[str, Any]) -> None:
        """Raise ClusterError, which names the nodes that have not answered, if there are any."""
        silent = [self.names[node.id] for node in self.nodes if node.id not in answered]
        if silent:
            raise ClusterError(
                f"no answer in time from {', '.join(silent)}; is that machine up, and does this package import there?"
            )

    @cached_property
    def facts(self) -> list[NodeFacts]:
        answered = self.ask(
            {node.id: partial(node_checks.facts, self.names[node.id]) for node in self.nodes}, limit_s=20.0
        )
        return [answered[node.id] for node in self.nodes]


def versions(examination: Examination) -> Finding:
    """Compare what each node runs with what this process runs."""
    here = node_checks.facts("here").versions
    return verdicts.judge_versions(here, examination.facts)


def resources(examination: Examination) -> Finding:
    """Check that the workers fit; on this machine by its real CPUs, not by the number that Ray was started with."""
    profile = examination.profile
    if not profile.is_remote:
        require_resources(profile, profile.least_workers)
    return verdicts.judge_resources(profile, examination.nodes, examination.facts)


def clocks(examination: Examination) -> Finding:
    """Ask all nodes for their time, which lies between the question and the answer."""
    skews: dict[str, float] = {}
    before = time.time()
    for node, there in answers(dict.fromkeys(examination.names, node_checks.clock), examination.left(CLOCKS_S)):
        skews[node] = there - min(max(there, before), time.time())
    examination.require_all(skews)
    return verdicts.judge_clocks({examination.names[node]: skew for node, skew in skews.items()})


def disk(examination: Examination) -> Finding:
    """Ask every node for the free space of each place that fills up."""
    places = () if is_remote(examination.place) else (examination.place,)
    free = examination.ask({node: partial(node_checks.free_bytes, places) for node in examination.names}, DISK_S)
    by_name = {examination.names[node]: there for node, there in free.items()}
    checkpoint = examination.num_parameters * BYTES_PER_PARAMETER * 4
    return verdicts.judge_disk(by_name, checkpoint, examination.experiment.checkpoint.retention.most)


def storage(examination: Examination) -> Finding:
    """This process and each node write a file; each node reads this process's and its neighbour's file, and this process the first node's.

    Reading in a ring finds a place that only some nodes share as surely as reading all files does, with two files for each node.
    """
    place, names = examination.place, examination.names
    here, files = f"{examination.test_folder}/driver", {n: f"{examination.test_folder}/{n[:12]}" for n in names}
    examination.storage_is_tried = True
    mine = node_checks.write_test(place, here, make_folder=True)
    if mine.problem:
        return verdicts.judge_storage(
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
    return verdicts.judge_storage(place, problems, len(names), num_bytes / slowest_write, 2 * num_bytes / slowest_read)


@contextlib.contextmanager
def storage_left_as_it_was(examination: Examination) -> Iterator[None]:
    """Remove the files that tested the storage, in any case. Leave the cluster first: no node may still write."""
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
        return skipped("dataset", "none given (--data)")
    cache = examination.profile.cache
    readings = examination.ask(
        {
            node.id: partial(node_checks.read_dataset, location, cache, part, count, READ_S)
            for part, node in enumerate(examination.nodes)
        }
    )
    return verdicts.judge_dataset(location, {examination.names[node]: reading for node, reading in readings.items()})


def mlflow(examination: Examination) -> Finding:
    """Write to the tracking store from here; a SQLite file that does not exist yet is not created."""
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
            return red("mlflow", f"{address}: {there} is not writable", "make it writable, or set DDPM_PIPE_HOME")
        return green("mlflow", f"{address}: not there yet, the first run makes it")
    try:
        seconds = check_store(settings)
    except Exception as error:  # MLflow raises many kinds
        return red(
            "mlflow", f"{address}: {one_line(error)}",
            "start the server, correct mlflow.tracking_uri in the profile (or MLFLOW_TRACKING_URI), or its credentials",
        )  # fmt: skip
    return green("mlflow", f"{address}: a run written, read back and deleted in {seconds:.1f} s", seconds=seconds)


def all_reduce(examination: Examination) -> Finding:
    """Start the profile's workers once, for the all-reduce and for the step."""
    from pipeline.training.device import backend_of

    profile = examination.profile
    if examination.found["resources"].verdict is Verdict.RED:
        return skipped("all-reduce", "the cluster does not hold the workers")
    counts = range(profile.most_workers, profile.least_workers - 1, -1)
    count = largest(counts, examination.nodes, profile) if profile.is_remote else held_here(counts, profile)[0]
    if count is None:
        why = "the workers find no room at the moment"
        if profile.wait_for_resources_s:
            why += ": nodes that the cluster adds later were not looked at; ask again while some are up"
        return skipped("all-reduce", why)
    arguments = (examination.experiment, examination.shape, profile)
    examination.measured = on_workers(measure, arguments, profile, count, examination.left(WORKERS_S - 2))
    seen = examination.measured.all_reduce
    if seen is None:
        return green("all-reduce", "one worker: nothing is exchanged")
    return verdicts.judge_all_reduce(count, seen.num_bytes, seen.seconds, right=seen.right, backend=backend_of(profile))


def measure(team: Team, experiment: Experiment, shape: Shape, profile: Profile) -> Measured:
    """Add numbers up over the workers, then time training steps of a batch that they can share."""
    from pipeline.planning.probe import probe_all_reduce, probe_training

    batch = -(-experiment.training.batch_size // team.size) * team.size
    training = experiment.training.model_copy(update={"batch_size": batch})
    experiment = experiment.model_copy(update={"training": training})
    reduced = probe_all_reduce(profile, team) if team.size > 1 else None
    try:
        step = probe_training(experiment, shape, profile, team.size, team=team, budget_s=STEP_S)
    except (PipelineError, RuntimeError) as error:
        return Measured(team.size, reduced, f"{type(error).__name__}: {one_line(error)}")
    return Measured(team.size, reduced, step)


def step(examination: Examination) -> Finding:
    """Report the training steps that the workers timed."""
    measured, before = examination.measured, examination.found["all-reduce"]
    if measured is None:
        return skipped("step", before.says if before.verdict is Verdict.SKIPPED else "the workers did not start")
    if isinstance(measured.step, str):
        return red("step", measured.step, "see the message")
    count, seen = measured.num_workers, measured.step
    batch = seen.batch * count
    return green(
        "step",
        f"{examination.experiment.name}: {seen.step_s:.2g} s for {batch} images on {plural(count, 'worker')} "
        f"({batch / seen.step_s:,.3g} images/s; {seen.device})",
        **asdict(seen),
    )
