"""How Ray Train's workers become torch's process group: rank 0 listens on its node's own address, and on no other interface."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from pipeline.training.team import init_process_group, leave_process_group, listen

SHUTDOWN_S = 30.0


@dataclass
class Rendezvous(TorchConfig):  # type: ignore[misc]
    """Ray's settings of a process group that is made as above."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup


class _ProcessGroup(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Rendezvous) -> None:
        master = worker_group.execute_single(0, _listen_on_node)
        size, backend, timeout_s = len(worker_group), backend_config.backend, backend_config.timeout_s
        ray.get(
            [
                worker_group.execute_single_async(rank, init_process_group, rank, size, master, backend, timeout_s)
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Rendezvous) -> None:
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(leave_process_group), timeout=SHUTDOWN_S)


def _listen_on_node() -> tuple[str, int]:
    return listen(ray.util.get_node_ip_address())
