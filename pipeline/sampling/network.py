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
from pipeline.errors import UsageError
from pipeline.sampling.memory import require_memory
from pipeline.training.device import BF16_FROM, Capabilities, Compute

WIDE = 64  # channels of a network's first level from which convolutions gain more by channels_last than its norms lose on a CPU


def settled(sampling: SamplingConfig, *, on_gpu: bool) -> SamplingConfig:
    """Return the settings with `mixed` replaced by what it is on the machines that generate: bf16 where they compute it, else fp32.

    A process without a GPU that prepares the work of GPUs takes them for Ampere or newer; older ones refuse bf16 when they start.
    """
    if sampling.precision != "mixed":
        return sampling
    found = Capabilities.of_this_machine()
    able = (not found.num_gpus or found.gpu_version >= BF16_FROM) if on_gpu else found.cpu_bf16
    return sampling.model_copy(update={"precision": "bf16" if able else "fp32"})


class SamplingNetwork:
    """A trained network, called as (x_t [B,C,H,W], t [B], y [B] or None) -> float32 prediction; the t of a batch are all equal.

    The copy in the arithmetic of sampling is made at the first call, and again on another device; it does not travel to other processes.
    """

    def __init__(self, model: nn.Module, num_timesteps: int, sampling: SamplingConfig, compute: Compute) -> None:
        self._model, self._num_timesteps, self._sampling, self._compute = model, num_timesteps, sampling, compute
        self._prepared: tuple[Callable[..., Tensor], nn.Module] | None = None
        self._same_rows: dict[tuple[int, int], bool] = {}
        self._most_images = 0  # that are known to fit into memory

    def __call__(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        """Return the network's output in float32."""
        if self._prepared is None:
            self._prepared = self._prepare()
        call, network = self._prepared
        if len(x) > self._most_images:
            require_memory(network, x.to(self._dtype), *labels)
            self._most_images = len(x)
        return call(x, t, *labels)

    def same_alone(self, first: int, last: int, compare: Callable[[], bool]) -> bool:
        """Return whether rows `first` .. `last` of a chunk have the same bytes in a batch of their own; `compare` is asked once."""
        if (first, last) not in self._same_rows:
            self._same_rows[first, last] = compare()
        return self._same_rows[first, last]

    def __getstate__(self) -> dict[str, Any]:
        """What other processes get: the network as it was trained."""
        return self.__dict__ | {"_prepared": None, "_same_rows": {}, "_most_images": 0}

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._sampling.precision == "bf16" else torch.float32

    def _prepare(self) -> tuple[Callable[..., Tensor], nn.Module]:
        if self._dtype == torch.bfloat16 and self._compute.on_gpu:
            _require_bf16()
        if isinstance(self._model, UNet):
            return self._prepare_unet(self._model)
        device, call = self._compute.device.type, self._compiled(self._model)

        def own(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
                return call(x, t, *labels).float()

        return own, self._model

    @torch.no_grad()
    def _prepare_unet(self, model: UNet) -> tuple[Callable[..., Tensor], nn.Module]:
        """Cast the weights once; an embedding that is the same for a whole batch is one row."""
        dtype = self._dtype
        fast = dtype != torch.float32 and (self._compute.on_gpu or model.conv_in.out_channels >= WIDE)
        layout = torch.channels_last if fast else torch.contiguous_format
        network: nn.Module = copy.deepcopy(model).requires_grad_(False)
        steps = torch.arange(self._num_timesteps, device=self._compute.device)
        network.embedding = _EmbeddingTable(model.embedding(steps))
        network.to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        call = self._compiled(network)

        def unet(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
            out: Tensor = call(x.to(dtype, memory_format=layout), t[:1], *labels)
            return out.to(torch.float32, memory_format=torch.contiguous_format)

        return unet, network

    def _compiled(self, network: nn.Module) -> Callable[..., Tensor]:
        return torch.compile(network, dynamic=False) if self._sampling.compile else network


class _EmbeddingTable(nn.Module):
    """The time embedding of each step, computed in float32."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, t: Tensor) -> Tensor:
        return self.table[t]


def _require_bf16() -> None:
    version = Capabilities.of_this_machine().gpu_version
    if version < BF16_FROM:
        raise UsageError(
            f"sampling.precision: got bf16, expected fp32: this GPU has compute capability {version[0]}.{version[1]}, and "
            f"computes bf16 from {BF16_FROM[0]}.{BF16_FROM[1]} on. Use --precision fp32."
        )
