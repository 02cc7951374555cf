"""`ddpm-pipe doctor`: is this cluster ready for what a profile asks? Checks in under a minute, each with a limit of its own.

A check is a function that returns a `Finding` (`checks`). It gathers facts on every node (`node_checks`), and functions of the facts alone
judge them (`verdicts`). Each runs in a daemon thread: a check that hangs or fails is red, and does not stop the others.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.cluster.probe_workers import LEAVE_S
from pipeline.cluster.session import ray_of
from pipeline.cluster.token import admission, probe_dashboard
from pipeline.config import presets
from pipeline.config.cluster_profile import Profile, forwarded
from pipeline.config.experiment import DEFAULT_PRESET, load_experiment
from pipeline.data.manifest import Manifest
from pipeline.doctor import checks
from pipeline.doctor.checks import Examination
from pipeline.doctor.verdicts import Finding, Verdict, green, red, skipped, yellow
from pipeline.errors import DataError, PipelineError, RefusedError, UsageError
from pipeline.ingest.ingest import availability
from pipeline.limits import in_thread
from pipeline.planning.capacity import held_here
from pipeline.storage.home import datasets_dir
from pipeline.storage.remote import is_remote
from pipeline.training.models import build_model, num_parameters

T = TypeVar("T")
# After the cluster is joined, by stages: the checks of one run at the same time; the name, the check, its limit in seconds.
STAGES: tuple[tuple[tuple[str, Callable[[Examination], Finding], float], ...], ...] = (
    (("versions", checks.versions, 20.0),),
    (("resources", checks.resources, 5.0),),
    (
        ("clocks", checks.clocks, checks.ASK_S),
        ("disk", checks.disk, checks.ASK_S),
        ("storage", checks.storage, 2 * checks.STORAGE_S + 3),
        ("dataset", checks.dataset, checks.ASK_S),
    ),
    (("all-reduce", checks.all_reduce, checks.WORKERS_S),),
    (("step", checks.step, 1.0),),
)
LOOK_S = 5.0  # a library may have to be read first
NUM_CLASSES = 10  # of a class-conditional network whose dataset is not looked at
USUAL_SHAPE = (3, 32, 32)  # of images that are not known before they are ingested


def examination_of(profile: Profile, data: str | None, preset: str | None) -> Examination:
    """Read experiment and dataset; UsageError if they are wrong. A damaged dataset is a finding, not an error."""
    begun = time.monotonic()
    experiment = load_experiment(presets.find("experiments", preset or DEFAULT_PRESET))
    datasets = datasets_dir(profile.home())
    shape = _look(lambda: availability(experiment.data, datasets).shape)
    if data is not None and not is_remote(data):
        folder = Path(data).absolute()
        if _look(lambda: os.path.isdir(folder)) is False:
            raise UsageError(
                f"--data: got {data}, which is no folder; give one that `ddpm-pipe ingest SOURCE DEST` wrote, or its s3:// address"
            )
        data = str(folder)
        with contextlib.suppress(DataError):  # which the check itself reports
            shape = (_look(lambda: Manifest.load(folder).shape) if preset else None) or shape
    shape = shape or USUAL_SHAPE
    classes = NUM_CLASSES if experiment.model.class_conditional else None
    model = build_model(experiment, shape, device="meta", num_classes=classes)
    return Examination(profile, experiment, shape, num_parameters(model), data, forwarded(profile), begun=begun)


def _look(look: Callable[[], T]) -> T | None:
    """Return what a look at a storage shows; None if it hangs, which a check reports."""
    return in_thread(look, "doctor-look")(LOOK_S)


def examine(examination: Examination, report: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Run all checks, and report each finding as soon as it and those before it are known."""
    findings: list[Finding] = []

    def note(finding: Finding) -> None:
        findings.append(finding)
        examination.found[finding.check] = finding
        report(finding)

    with checks.storage_left_as_it_was(examination), ExitStack() as stack:
        tracking = begin("mlflow", checks.mlflow, checks.ASK_S, examination)
        note(_join(examination, stack))
        why_not = "the cluster cannot be reached" if findings[0].verdict is Verdict.RED else ""
        for stage in STAGES:
            waiting = [
                partial(skipped, check[0], why_not) if why_not else begin(*check, examination) for check in stage
            ]
            for wait in waiting:
                note(wait())
            last = findings[-1]
            if last.check == "versions" and last.verdict is Verdict.RED and not last.figures:
                why_not = "the nodes do not answer"
        note(tracking())
    return findings


def _wait_for_late_checks() -> None:
    """Wait a while for checks that are over their limits: Ray ends a process that shuts it down while a thread is inside it."""
    names = {f"doctor-{name}" for stage in STAGES for name, _, _ in stage}
    deadline = time.monotonic() + LEAVE_S
    for thread in threading.enumerate():
        if thread.name in names:
            thread.join(max(0.0, deadline - time.monotonic()))


def begin(
    name: str, check: Callable[[Examination], Finding], limit_s: float, examination: Examination
) -> Callable[[], Finding]:
    """Start a check in a thread. The returned function waits for its finding; red if it fails or is not done within the limit."""
    limit_s = examination.left(limit_s)
    wait, deadline = in_thread(lambda: check(examination), f"doctor-{name}"), time.monotonic() + limit_s

    def finding() -> Finding:
        try:
            found = wait(max(0.0, deadline - time.monotonic()))
        except PipelineError as error:
            return red_of(name, error)
        except Exception as error:  # a check's own failure is a finding too
            return red(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "see the message")
        return found or red(
            name, f"no answer within {limit_s:.0f} s", "something hangs there: look at the network and the file system"
        )

    return finding


def _join(examination: Examination, stack: ExitStack) -> Finding:
    """Start or join the cluster, in this thread: Ray wants the main one."""
    profile = examination.profile
    most, before = profile.most_workers, time.perf_counter()
    # on this machine never for more workers than it holds, or Ray would believe in them
    count = most if profile.is_remote else max(held_here(range(1, most + 1), profile), default=1)
    try:
        stack.enter_context(ray_of(profile, count))
        stack.callback(_wait_for_late_checks)
    except PipelineError as error:
        return red_of("cluster", error)
    took = time.perf_counter() - before
    place = "the nodes of this job" if profile.is_remote else "this machine"
    where = f"{profile.address} joined" if profile.address else f"Ray started on {place}, for itself"
    if profile.is_remote and profile.insecure:
        return yellow(
            "cluster", f"{where} in {took:.1f} s; its profile allows a cluster without a token",
            "set RAY_AUTH_MODE=token on every node, and take `insecure` out of the profile", seconds=took,
        )  # fmt: skip
    return green("cluster", f"{where} in {took:.1f} s, with a token", seconds=took)


def auth_findings(profile: Profile) -> list[Finding]:
    """Return [] if the cluster of a job profile admits us, else all findings: the error, and the other checks as skipped."""
    address = str(profile.address)
    try:
        admission(profile, address, probe_dashboard)
    except PipelineError as error:
        names = [name for stage in STAGES for name, _, _ in stage] + ["mlflow"]
        return [red_of("cluster", error), *(skipped(name, "the cluster cannot be reached") for name in names)]
    return []


def require_healthy(findings: Sequence[Finding]) -> None:
    """Raise RefusedError, which ends the command with code 10, if a finding is red."""
    names = [finding.check for finding in findings if finding.verdict is Verdict.RED]
    if names:
        raise RefusedError(
            f"{len(names)} of {len(findings)} checks are red ({', '.join(names)}); do what their lines say"
        )


def red_of(name: str, error: PipelineError) -> Finding:
    """Return a finding from one of our errors, whose last part is what to do."""
    said, _, remedy = str(error).rpartition("; ")
    return red(name, said or str(error), remedy if said else "see the message")
