"""System metrics, sampled when training metrics are logged; takes well under a millisecond."""

from __future__ import annotations

import contextlib
import sys

import psutil

MB = 1e6


def sample_system() -> dict[str, float]:
    """Return CPU, memory and, if this process uses one, GPU utilisation and power, with the names of MLflow's own monitor.

    `cpu_utilization_percentage` is the mean since this thread's last call.
    """
    figures = {
        "system_memory_usage_percentage": psutil.virtual_memory().percent,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / MB,
    }
    # 0 where psutil has no earlier call to compare with
    if (cpu_percent := psutil.cpu_percent()) > 0:
        figures["cpu_utilization_percentage"] = cpu_percent
    return figures | _gpu()


def _gpu() -> dict[str, float]:
    torch = sys.modules.get("torch")  # without torch this process uses no GPU
    if torch is None or not torch.cuda.is_initialized():
        return {}
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    figures = {
        f"gpu_{index}_memory_usage_megabytes": (total - free) / MB,
        f"gpu_{index}_memory_usage_percentage": 100.0 * (total - free) / total,
    }
    # NVIDIA's management library may be missing, and some GPUs do not measure (its errors have no base but Exception)
    with contextlib.suppress(Exception):
        figures[f"gpu_{index}_power_usage_watts"] = torch.cuda.power_draw(index) / 1000
        figures[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
    return figures
