"""The CPUs that this process may use, and the free memory: threads, workers, pools and batches are sized by them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Return the CPUs of this process's affinity mask (taskset, cpusets), or fewer by its control group's quota or by Slurm; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_slurm = os.environ.get("SLURM_CPUS_ON_NODE", "")
    granted = [int(by_slurm)] if by_slurm.isdigit() else []
    return max(1, min([allowed, *granted, *(int(quota) for quota in _quotas())]))


def free_memory_bytes() -> int:
    """Return the memory of this machine that is free or can be freed, or less by a control group's limit."""
    return int(min([psutil.virtual_memory().available, *map(_free_of_group, _groups("memory"))]))


def _quotas() -> Iterator[float]:
    """Yield the CPUs that each control group above this process grants; version 2 (`cpu.max`) and 1 (`cpu.cfs_quota_us`)."""
    for folder in _groups("cpu"):
        yield from _quota(folder)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups above this process that limit something; of version 2 and 1."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            top = CGROUPS / controllers if controllers else CGROUPS
            own = top / path.lstrip("/")
            # a container sees its own group as the root, whatever its path is
            yield from [own, *(above for above in own.parents if above.is_relative_to(top))]


def _free_of_group(folder: Path) -> float:
    """Return the bytes that a group has left, with those of files that it can drop; infinity without a limit."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most = float((folder / limit).read_text().replace("max", "inf"))
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return max(0.0, most - used + int(stat.get("inactive_file", 0)))
    return math.inf


def _quota(folder: Path) -> Iterator[float]:
    """Yield the quota of one group in CPUs, if it has one."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return
