"""`ddpm-pipe doctor`: is this cluster ready for what a profile asks? Checks in under a minute, each with a limit of its own.

A check is a function that returns a `Finding`. Facts are gathered on every node (`node_checks`, by `checks`) and judged by functions of
the facts alone (`verdicts`); what hangs or fails is red (`limited_checks`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

from pipeline.cluster.session import ray_of
from pipeline.cluster.token import admission, probe_dashboard
from pipeline.cluster.worker_group import Group, worker_group
from pipeline.config.cluster_profile import Profile
from pipeline.doctor import checks as doctor_checks
from pipeline.doctor import verdicts as checks
from pipeline.doctor.examination import ASK_S, Examination
from pipeline.doctor.limited_checks import begin, limited, red_of
from pipeline.doctor.verdicts import Finding, Verdict
from pipeline.errors import PipelineError, RefusedError
from pipeline.planning.capacity import held_here, largest

GROUP_S = 30.0
SKIPPED_WITHOUT_CLUSTER = ("versions", "resources", "clocks", "disk", "storage", "dataset", "all-reduce", "step")


def examine(examination: Examination, tell: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Run all checks, and tell each finding as soon as it and those before it are known."""
    findings: list[Finding] = []

    def note(finding: Finding) -> bool:
        findings.append(finding)
        tell(finding)
        return finding.verdict is not Verdict.RED

    with doctor_checks.storage_left_as_it_was(examination), ExitStack() as stack:
        store = begin("mlflow", partial(doctor_checks.mlflow, examination), examination.left(ASK_S))
        if note(_join(examination, stack)):
            for finding in _in_the_cluster(examination):
                note(finding)
        else:
            for name in SKIPPED_WITHOUT_CLUSTER:
                note(checks.skipped(name, "the cluster cannot be reached"))
        note(store())
    return findings


def auth_findings(profile: Profile) -> list[Finding]:
    """Return nothing where a cluster that jobs are sent to lets us in, else all findings: what is wrong there, and the rest skipped."""
    address = str(profile.address)
    try:
        admission(profile, address, probe_dashboard(address))
    except PipelineError as error:
        rest = [checks.skipped(name, "the cluster cannot be reached") for name in (*SKIPPED_WITHOUT_CLUSTER, "mlflow")]
        return [red_of("cluster", error), *rest]
    return []


def require_healthy(findings: Sequence[Finding]) -> None:
    """Raise RefusedError, which ends the command with code 10, if something is red."""
    names = [finding.check for finding in findings if finding.verdict is Verdict.RED]
    if names:
        raise RefusedError(
            f"{len(names)} of {len(findings)} checks are red ({', '.join(names)}); do what their lines say"
        )


def _in_the_cluster(examination: Examination) -> Iterator[Finding]:
    """Yield what is found once the cluster answers; what does not disturb the others runs at the same time."""
    yield (versions := limited("versions", partial(doctor_checks.versions, examination), examination.left(20.0)))
    if versions.verdict is Verdict.RED and not versions.figures:  # the nodes did not answer
        for name in SKIPPED_WITHOUT_CLUSTER[1:]:
            yield checks.skipped(name, "the nodes do not answer")
        return
    yield (resources := limited("resources", partial(doctor_checks.resources, examination), 5.0))
    together = {
        "clocks": (doctor_checks.clocks, ASK_S),
        "disk": (doctor_checks.disk, ASK_S),
        "storage": (doctor_checks.storage, 2 * doctor_checks.STORAGE_S + 3),
        "dataset": (doctor_checks.dataset, ASK_S),
    }
    waiting = [begin(name, partial(check, examination), examination.left(s)) for name, (check, s) in together.items()]
    for finding in waiting:
        yield finding()
    if resources.verdict is Verdict.RED:
        yield checks.skipped("all-reduce", "the cluster does not hold the workers")
        yield checks.skipped("step", "the cluster does not hold the workers")
        return
    yield from _in_workers(examination)


def _join(examination: Examination, stack: ExitStack) -> Finding:
    """Start or join the cluster, in this thread: Ray wants the main one."""
    profile = examination.profile
    before = time.perf_counter()
    try:
        stack.enter_context(ray_of(profile, _count_to_start(profile)))
    except PipelineError as error:
        return red_of("cluster", error)
    took = time.perf_counter() - before
    where = "Ray started on this machine, for itself" if not profile.is_remote else f"{profile.address} joined"
    open_to_all = profile.is_remote and profile.insecure
    if open_to_all:
        return checks.yellow(
            "cluster", f"{where} in {took:.1f} s; its profile allows a cluster without a token",
            "set RAY_AUTH_MODE=token on every node, and take `insecure` out of the profile", seconds=took,
        )  # fmt: skip
    return checks.green("cluster", f"{where} in {took:.1f} s, with a token", seconds=took)


def _count_to_start(profile: Profile) -> int:
    """Return the workers that Ray is started for on this machine: never more than it holds, or Ray would believe in them."""
    most = profile.most_workers
    return most if profile.is_remote else max(held_here(range(1, most + 1), profile), default=1)


def _in_workers(examination: Examination) -> Iterator[Finding]:
    """Start the profile's workers once, for the all-reduce and for the step."""
    profile = examination.profile
    counts = range(profile.most_workers, profile.least_workers - 1, -1)
    count = largest(counts, examination.nodes, profile) if profile.is_remote else held_here(counts, profile)[0]
    if count is None:
        why = "the workers find no room at the moment"
        if profile.wait_for_resources_s:
            why += ": nodes that the cluster adds later were not looked at; ask again while some are up"
        yield checks.skipped("all-reduce", why)
        yield checks.skipped("step", why)
        return
    with ExitStack() as stack:
        group: list[Group] = []

        def start() -> Finding:
            group.append(stack.enter_context(worker_group(profile, count, examination.left(GROUP_S))))
            return checks.green("all-reduce", "the workers are up")

        started = limited("all-reduce", start, examination.left(GROUP_S + 2))
        if started.verdict is Verdict.RED:
            yield started
            yield checks.skipped("step", "the workers did not start")
            return
        yield limited(
            "all-reduce", partial(doctor_checks.all_reduce, examination, group[0], count), examination.left(20.0)
        )
        yield limited("step", partial(doctor_checks.step, examination, group[0], count), examination.left(25.0))
