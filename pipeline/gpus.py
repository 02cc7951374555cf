"""The GPUs that this process may use."""

from __future__ import annotations


def usable_gpus() -> int:
    """Return the number of CUDA GPUs that this process sees; 0 if torch was not built for one that is as old as the oldest."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = [int(name[3:]) for name in torch.cuda.get_arch_list() if name[:3] == "sm_" and name[3:].isdigit()]
    versions = [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(count))]
    return 0 if min(versions, default=0) < min(built, default=0) else count
