"""The network as sampling calls it: in the arithmetic that was chosen, with the time embedding of every step computed once.

x_t, the schedule's tables and the sampler's update stay float32; only what happens inside the network is cheaper. Bits/dim, validation and
inversion call the network itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import UNet
from pipeline.config.experiment import SamplingConfig
from pipeline.sampling.memory import fits, require_memory
from pipeline.training.device import Compute
from pipeline.training.threads import leave_if_ended


class SamplingNetwork:
    """A trained network, called as (x_t [B,C,H,W], t [B], y [B] or None) -> float32 prediction; the t of a batch are all equal.

    The copy in the arithmetic of sampling is made at the first call, and again on another device; it does not travel to other processes.
    """

    def __init__(self, model: nn.Module, num_timesteps: int, sampling: SamplingConfig, compute: Compute) -> None:
        self._model, self._num_timesteps = model, num_timesteps
        channels = model.conv_in.out_channels if isinstance(model, UNet) else 0
        self._compute = compute.for_sampling(sampling.precision, compiled=sampling.compile, channels=channels)
        self._dtype = self._compute.autocast_dtype or torch.float32
        self._prepared: tuple[Callable[..., Tensor], nn.Module] | None = None
        self._same: dict[tuple[int, ...], bool] = {}  # what was found by trying
        self._most_images = 0  # that are known to fit into memory

    def __call__(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        """Return the network's output in float32."""
        leave_if_ended()
        call, network = self._ready()
        if len(x) > self._most_images:
            require_memory(self._compute.free_bytes(), network, x.to(self._dtype), *labels)
            self._most_images = len(x)
        return call(x, t, *labels)

    def fits(self, x: Tensor, *labels: Tensor) -> bool:
        """Whether there is memory for a call with a batch like x."""
        return fits(self._compute.free_bytes(), self._ready()[1], x.to(self._dtype), *labels)

    def same_alone(self, first: int, last: int, compare: Callable[[], bool]) -> bool:
        """Return whether rows `first` .. `last` of a chunk have the same bytes in a batch of their own; `compare` is asked once."""
        return self._tried((torch.get_num_threads(), first, last), compare)

    def same_with(self, threads: int, compare: Callable[[], bool]) -> bool:
        """Return whether a chunk has the same bytes with another number of threads; `compare` is asked once."""
        return self._tried((torch.get_num_threads(), threads), compare)

    def _tried(self, what: tuple[int, ...], compare: Callable[[], bool]) -> bool:
        if what not in self._same:
            self._same[what] = compare()
        return self._same[what]

    def _ready(self) -> tuple[Callable[..., Tensor], nn.Module]:
        if self._prepared is None:
            self._prepared = self._prepare()
        return self._prepared

    def __getstate__(self) -> dict[str, Any]:
        """What other processes get: the network as it was trained."""
        return self.__dict__ | {"_prepared": None, "_same": {}, "_most_images": 0}

    def _prepare(self) -> tuple[Callable[..., Tensor], nn.Module]:
        if isinstance(self._model, UNet):
            return self._prepare_unet(self._model)
        compute, call = self._compute, self._compute.compiled(self._model)

        def own(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
            with compute.autocast():
                out: Tensor = call(x, t, *labels)
            return out.float()

        return own, self._model

    @torch.no_grad()
    def _prepare_unet(self, model: UNet) -> tuple[Callable[..., Tensor], nn.Module]:
        """Cast the weights once; an embedding that is the same for a whole batch is one row."""
        dtype = self._dtype
        layout = torch.channels_last if self._compute.channels_last else torch.contiguous_format
        network: nn.Module = copy.deepcopy(model).requires_grad_(False)
        steps = torch.arange(self._num_timesteps, device=self._compute.device)
        network.embedding = _EmbeddingTable(model.embedding(steps))
        network = self._compute.place(network.to(dtype))
        call = self._compute.compiled(network)

        def unet(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
            out: Tensor = call(x.to(dtype, memory_format=layout), t[:1], *labels)
            return out.to(torch.float32, memory_format=torch.contiguous_format)

        return unet, network


class _EmbeddingTable(nn.Module):
    """The time embedding of each step, computed in float32."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, t: Tensor) -> Tensor:
        return self.table[t]
