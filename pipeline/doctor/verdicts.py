"""The doctor's findings, and how facts are judged: each verdict is a function of facts that other modules gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.console import plural, size
from pipeline.planning.capacity import Node, needs, room, shortage

SAME_EVERYWHERE = ("ddpm-pipe", "python", "ray", "torch")  # the others may differ, with a warning: results may, too
CLOCK_YELLOW_S, CLOCK_RED_S = 2.0, 60.0  # object stores refuse requests that are 15 minutes off; logs mislead sooner
DISK_RED_BYTES, DISK_YELLOW_BYTES = 2 * 10**9, 10 * 10**9
WORKER_BYTES = 1_000_000_000  # torch and Ray in one process, before the network
BUSY = 1.5
SLOW_GPU_LINK = 5e9  # bytes/s of an all-reduce: half of one 100 Gb/s card


class Verdict(StrEnum):
    """Green: as it must be. Yellow: works, with a drawback. Red: training would fail or mislead. Skipped: not checked, and why."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was checked, the result, and what to do."""

    check: str
    verdict: Verdict
    says: str
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def green(check: str, says: str, **figures: Any) -> Finding:
    return Finding(check, Verdict.GREEN, says, "", figures)


def yellow(check: str, says: str, remedy: str, **figures: Any) -> Finding:
    return Finding(check, Verdict.YELLOW, says, remedy, figures)


def red(check: str, says: str, remedy: str, **figures: Any) -> Finding:
    return Finding(check, Verdict.RED, says, remedy, figures)


def skipped(check: str, says: str) -> Finding:
    return Finding(check, Verdict.SKIPPED, says)


@dataclass(frozen=True)
class NodeFacts:
    """The facts of a node: versions by package (including python and ddpm-pipe), free memory, load."""

    name: str
    versions: Mapping[str, str]
    free_memory_bytes: int
    load_per_cpu: float = 0.0  # processes that want a CPU, over the last minute


def judge_versions(here: Mapping[str, str], nodes: Sequence[NodeFacts]) -> Finding:
    """Every node must run what this machine runs: Ray refuses another Python late, and another torch gives other numbers."""
    differing: dict[str, str] = {}
    for node in nodes:
        for package in sorted(here.keys() | node.versions.keys()):
            there, ours = node.versions.get(package, "missing"), here.get(package, "missing")
            if there != ours:
                differing.setdefault(package, f"{package} {there} on {node.name}, {ours} here")
    serious = [differing[package] for package in SAME_EVERYWHERE if package in differing]
    versions = ", ".join(f"{package} {_short(here[package])}" for package in SAME_EVERYWHERE if package in here)
    if differing:
        verdict, shown = (red, serious) if serious else (yellow, list(differing.values()))
        return verdict(
            "versions", "; ".join(shown), "install the same lock file (or image) on every node", here=dict(here)
        )
    return green("versions", f"{versions}, the same on {plural(len(nodes), 'node')}", here=dict(here))


def judge_resources(profile: Profile, nodes: Sequence[Node], facts: Sequence[NodeFacts]) -> Finding:
    """The cluster must have room for the profile's workers, now or after what else runs there has ended."""
    least, most = profile.least_workers, profile.most_workers
    need = needs(profile, most)
    free, all_in_all = room(nodes, need, profile.placement), room(nodes, need, profile.placement, of_all=True)
    each = ", ".join(plural(amount, name) for name, amount in need.items())
    figures = {"workers_that_fit": all_in_all, "workers_that_fit_now": free, "wanted": most}
    finding = partial(Finding, "resources", figures=figures)
    if all_in_all < least and profile.wait_for_resources_s:
        says = f"{shortage(least, nodes, profile)}; its profile waits {profile.wait_for_resources_s:g} s for a cluster that grows"
        remedy = "if it does not grow: add nodes, or ask less"
        if not all_in_all:  # scaled to zero: what trains has not been looked at
            says += f"; no machine that trains is up: the lines here are about {plural(len(nodes), 'other node')} alone"
            remedy = (
                "have some started by `ddpm-pipe train --dry-run` with this profile, and ask again before they are idle for long; "
                + remedy
            )
        return finding(Verdict.YELLOW, says, remedy)
    if all_in_all < least:
        fewer = f"set workers to {all_in_all}" if all_in_all else "ask less of each (resources_per_worker)"
        return finding(Verdict.RED, shortage(least, nodes, profile), f"add nodes, or {fewer}")
    if free < least:
        return finding(
            Verdict.YELLOW,
            f"{shortage(least, nodes, profile)} at the moment: others use the rest",
            "wait for them (`ray status` shows who), or set wait_for_resources_s in the profile",
        )
    for node in facts:
        if node.free_memory_bytes < WORKER_BYTES * max(1, most // max(1, len(facts))):
            return finding(
                Verdict.YELLOW,
                f"{node.name} has {size(node.free_memory_bytes)} of memory free; a worker takes {size(WORKER_BYTES)} and its network",
                "run fewer workers on a node, or free some memory",
            )
    for node in facts:
        if node.load_per_cpu > BUSY:
            return finding(
                Verdict.YELLOW,
                f"{node.name} is busy: {node.load_per_cpu:.1f} processes want each of its CPUs",
                "wait for them, or expect less speed than the machine has",
            )
    now = "" if free >= most else f", {free} of them now"
    return finding(
        Verdict.GREEN,
        f"{plural(len(nodes), 'node')} {'hold' if len(nodes) > 1 else 'holds'} {min(all_in_all, most)} of {most} workers with "
        f"{each} each{now}",
    )


def judge_clocks(skews_s: Mapping[str, float]) -> Finding:
    """Clocks must agree, since signatures of stores, leases and logs compare them. `skews_s`: by how much each node differs at least."""
    worst = max(skews_s, key=lambda node: abs(skews_s[node]))
    skew = skews_s[worst]
    figures = {"skew_s": dict(skews_s)}
    if abs(skew) < CLOCK_YELLOW_S:
        return green("clocks", f"within {max(0.1, abs(skew)):.1f} s of this machine's", **figures)
    says = f"{worst} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
    verdict = red if abs(skew) >= CLOCK_RED_S else yellow
    return verdict("clocks", says, "synchronise the nodes' clocks (chrony, systemd-timesyncd)", **figures)


def judge_disk(free_bytes: Mapping[str, Mapping[str, int]], checkpoint_bytes: int, keep: int) -> Finding:
    """Each place must have room for the checkpoints of a run, including the one being written, and for what Ray spills."""
    need = max(DISK_RED_BYTES, (keep + 2) * checkpoint_bytes)
    free, place, name = min((free, place, node) for node, there in free_bytes.items() for place, free in there.items())
    says = f"{size(free)} free in {place} on {name}"
    figures = {"free_bytes": free, "needed_bytes": need}
    if free < need:
        return red(
            "disk",
            f"{says}, {size(need)} needed",
            "free some space, or put storage and temporary files elsewhere",
            **figures,
        )
    if free < max(DISK_YELLOW_BYTES, 2 * need):
        return yellow("disk", f"{says}: little for more than one run", "free some space", **figures)
    return green("disk", f"at least {says}", **figures)


def judge_storage(
    place: str, problems: Mapping[str, str], num_nodes: int, write_rate: float, read_rate: float
) -> Finding:
    """Every node must write to the storage and read what the others wrote; `problems` are by node."""
    if problems:
        node, problem = next(iter(problems.items()))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return red(
            "storage",
            f"{place}: {problem} on {node}{more}",
            "give a place that every node can write to, and that is the same for all (storage in the profile)",
            problems=dict(problems),
        )
    return green(
        "storage",
        f"{place}: written and read back on {plural(num_nodes, 'node')}, {size(write_rate)}/s and {size(read_rate)}/s",
        write_bytes_per_s=write_rate,
        read_bytes_per_s=read_rate,
    )


@dataclass(frozen=True)
class Reading:
    """What a node read of a dataset of `num_rows` in its time: images and seconds, or the problem."""

    num_rows: int = 0
    num_images: int = 0
    seconds: float = 0.0
    problem: str = ""


def judge_dataset(source: str, readings: Mapping[str, Reading]) -> Finding:
    problems = {node: reading.problem for node, reading in readings.items() if reading.problem}
    if problems:
        node, problem = next(iter(problems.items()))
        return red(
            "dataset", f"{problem} (seen on {node})", f"restore it, or ingest it again; see: ddpm-pipe inspect {source} --verify",
            problems=problems,
        )  # fmt: skip
    rates = {node: reading.num_images / max(reading.seconds, 1e-9) for node, reading in readings.items()}
    slowest, num_rows = min(rates, key=lambda node: rates[node]), max(r.num_rows for r in readings.values())
    read = min(1.0, sum(reading.num_images for reading in readings.values()) / max(num_rows, 1))
    return green(
        "dataset",
        f"{source}: {read:.0%} of {num_rows:,} images read and checked, {rates[slowest]:,.0f} images/s on "
        f"{slowest if len(rates) > 1 else 'the node'}{' (the slowest)' if len(rates) > 1 else ''}",
        images_per_s=rates,
        share_read=read,
    )


def judge_all_reduce(num_workers: int, num_bytes: int, seconds: float, *, right: bool, backend: str) -> Finding:
    """All workers must get the same sum, and fast; the bandwidth is the bus bandwidth of nccl-tests."""
    if not right:
        return red(
            "all-reduce",
            f"{num_workers} workers added up numbers and got other sums",
            "look for a faulty card or link (dmesg, nccl-tests); do not train on this",
        )
    bandwidth = 2 * (num_workers - 1) / num_workers * num_bytes / seconds
    says = f"{num_workers} workers, {backend}: {size(bandwidth)}/s (bus), {size(num_bytes)} in {seconds * 1e3:.1f} ms"
    figures = {"bytes_per_s": bandwidth, "seconds": seconds, "num_bytes": num_bytes, "backend": backend}
    if backend == "nccl" and bandwidth < SLOW_GPU_LINK:
        return yellow(
            "all-reduce", says,
            "slow for GPUs: check that NCCL uses the fast network (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, EFA or InfiniBand)",
            **figures,
        )  # fmt: skip
    return green("all-reduce", says, **figures)


def _short(version: str) -> str:
    name, plus, commit = version.partition("+")
    return f"{name}{plus}{commit[:7]}{'-dirty' if version.endswith('-dirty') else ''}" if len(commit) > 12 else version
