"""The workers of one training: who this one is, and the few things they must agree on. Torch only; alone, nothing is sent."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm import UNet
from pipeline.training.device import Compute
from pipeline.training.vae import Vae


@dataclass(frozen=True)
class Team:
    """One worker's view of its group. Decisions travel over gloo from the CPU, so that a GPU never waits for them."""

    rank: int = 0
    size: int = 1
    _control: Any = field(default=None, repr=False)

    @classmethod
    def join(cls, timeout_s: float) -> Team:
        """Return this process's place in torch's process group, or a team of one where there is no group.

        A decision that takes longer than `timeout_s` fails; where the group itself speaks gloo, its own limit holds.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        control = dist.group.WORLD
        if dist.get_backend() != "gloo":
            control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))  # type: ignore[assignment]
        return cls(dist.get_rank(), dist.get_world_size(), control)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone saves, draws pictures and speaks to the tracking store."""
        return self.rank == 0

    def decide(self, *questions: bool) -> list[bool]:
        """Return rank 0's answers, on every worker."""
        if self.size == 1:
            return list(questions)
        answers = torch.tensor(questions, dtype=torch.uint8)
        dist.broadcast(answers, src=0, group=self._control)
        return [bool(answer) for answer in answers]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value (anything that pickles, made by this program), on every worker."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers of a CPU tensor."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self._control)
        return total

    def all_gather(self, rows: Tensor, num_streams: int) -> Tensor:
        """Return the rows of all workers, a CPU tensor, in the order of their streams: the same for any number of workers."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous(), group=self._control)
        # worker r of R holds the streams r, r + R, ...
        by_stream = torch.stack([part.view(num_streams // self.size, -1, *rows.shape[1:]) for part in parts], 1)
        return by_stream.flatten(0, 2)

    def share_gradients(self, model: nn.Module, compute: Compute) -> nn.Module:
        """Return the network whose backward pass averages gradients over the workers."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=compute.ddp_devices,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            # a network of the user's own may have parameters that it does not use
            find_unused_parameters=not isinstance(model, UNet | Vae),
        )


_listeners: list[socket.socket] = []


def listen(host: str) -> tuple[str, int]:
    """Open rank 0's port for the process group, on this address alone, and return both; `init_process_group` then uses it.

    Without a listener of ours torch's store listens on every interface, and it asks nobody for a password.
    """
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    _listeners.append(listener)
    return host, listener.getsockname()[1]


def init_process_group(rank: int, size: int, master: tuple[str, int], backend: str, timeout_s: float) -> None:
    """Make this process one of a process group; every member calls this, with the address that `listen` returned to rank 0."""
    timeout = timedelta(seconds=timeout_s)
    descriptor = _listeners.pop().detach() if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *master, size, is_master=rank == 0, timeout=timeout, master_listen_fd=descriptor
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def leave_process_group() -> None:
    """End this process's membership, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()
