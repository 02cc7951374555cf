"""Whether the system killed processes of this machine because memory ran out: a driver only sees that such a worker has died."""

from __future__ import annotations

import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# what torch, Python and CUDA say when an allocation fails
SAID = re.compile(r"out of memory|can't allocate memory|MemoryError|cannot allocate memory", re.IGNORECASE)
REMEDY = (
    "lower training.micro_batch_size, raise training.activation_checkpointing, give the machine fewer workers, "
    "or use one with more memory"
)


def oom_kills() -> int:
    """Return the kernel's count of OOM kills: of this process's control group if that is counted, else of the machine."""
    for path in _counters():
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0


def _counters() -> list[Path]:
    """Return the files that may hold the count, the most specific first: control groups of version 2 and 1, the machine."""
    groups: dict[str, str] = {}
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups[controllers] = path.lstrip("/")
    except OSError:  # not Linux
        return []
    files = [CGROUPS / path / "memory.events" for name, path in groups.items() if name == ""]
    # in a container its own group is the root of what it sees, whatever its path says
    files += [CGROUPS / "memory.events"] if "" in groups else []
    if "memory" in groups:
        files += [
            CGROUPS / "memory" / groups["memory"] / "memory.oom_control",
            CGROUPS / "memory" / "memory.oom_control",
        ]
    return [*files, Path("/proc/vmstat")]
