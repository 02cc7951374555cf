"""System metrics, sampled when training metrics are logged; takes well under a millisecond."""

from __future__ import annotations

import contextlib
import sys

import psutil

MIB = 2**20


def sample_system() -> dict[str, float]:
    """Return CPU, memory and, if this process uses one, GPU utilisation, with the names of MLflow's "System metrics" tab.

    `cpu_percent` is the mean since this thread's last call.
    """
    figures = {
        "system/memory_percent": psutil.virtual_memory().percent,
        "system/process_memory_mib": psutil.Process().memory_info().rss / MIB,
    }
    # 0 where psutil has no earlier call to compare with
    if (cpu_percent := psutil.cpu_percent()) > 0:
        figures["system/cpu_percent"] = cpu_percent
    return figures | _gpu()


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
