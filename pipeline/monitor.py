"""How busy the machine is, sampled where the figures of training are logged; costs well under a millisecond."""

from __future__ import annotations

import contextlib
import sys

import psutil

MIB = 2**20


class SystemMonitor:
    """Load of this machine and of this process, named as MLflow's "System metrics" tab expects (`system/...`)."""

    @staticmethod
    def sample() -> dict[str, float]:
        """Return CPU and memory use, and the GPU's where this process uses one. CPU percent is the mean since the last call."""
        memory = psutil.virtual_memory()
        figures = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": memory.percent,
            "system/process_memory_mib": psutil.Process().memory_info().rss / MIB,
        }
        return figures | _gpu()


def _gpu() -> dict[str, float]:
    torch = sys.modules.get("torch")  # a process that has not loaded torch uses no GPU
    if torch is None or not torch.cuda.is_initialized():
        return {}
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    figures = {
        f"system/gpu_{index}_memory_mib": (total - free) / MIB,
        f"system/gpu_{index}_memory_percent": 100.0 * (total - free) / total,
    }
    with contextlib.suppress(ImportError, RuntimeError):  # it asks NVIDIA's management library, which need not be there
        figures[f"system/gpu_{index}_percent"] = float(torch.cuda.utilization(index))
    return figures
