"""System metrics, sampled when training metrics are logged; takes well under a millisecond."""

from __future__ import annotations

import contextlib
import sys
from typing import ClassVar

import psutil

MIB = 2**20


class SystemMonitor:
    """Load of this machine and process, with the names of MLflow's "System metrics" tab (`system/...`)."""

    _before: ClassVar[tuple[float, float] | None] = None  # busy and idle CPU seconds of the machine at the last call

    @classmethod
    def sample(cls) -> dict[str, float]:
        """Return CPU, memory and, if this process uses one, GPU utilisation.

        `cpu_percent` is the mean since the last call; the first call omits it.
        """
        figures = {
            "system/memory_percent": psutil.virtual_memory().percent,
            "system/process_memory_mib": psutil.Process().memory_info().rss / MIB,
        }
        before, now = cls._before, _cpu_seconds()
        cls._before = now
        if before is not None and sum(now) > sum(before):
            figures["system/cpu_percent"] = 100.0 * (now[0] - before[0]) / (sum(now) - sum(before))
        return figures | _gpu()


def _cpu_seconds() -> tuple[float, float]:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # guest time is counted in user time already
    return sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0), idle


def _gpu() -> dict[str, float]:
    torch = sys.modules.get("torch")  # without torch this process uses no GPU
    if torch is None or not torch.cuda.is_initialized():
        return {}
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    figures = {
        f"system/gpu_{index}_memory_mib": (total - free) / MIB,
        f"system/gpu_{index}_memory_percent": 100.0 * (total - free) / total,
    }
    with contextlib.suppress(ImportError, RuntimeError):  # it needs NVIDIA's management library
        figures[f"system/gpu_{index}_percent"] = float(torch.cuda.utilization(index))
    return figures
