"""The one place that decides device, precision, backend and compilation; nothing else in the code asks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.cluster_profile import Profile
from pipeline.config import Experiment, Precision
from pipeline.errors import ClusterError, UsageError


@dataclass(frozen=True)
class Compute:
    """How the arithmetic of one worker is done."""

    device: torch.device
    backend: str  # of torch.distributed
    autocast_dtype: torch.dtype | None
    compile: bool
    channels_last: bool
    threads: int

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the network is called."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, in the memory format chosen."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]

    def send(self, tensor: Tensor) -> Tensor:
        """Copy a host tensor to the device without waiting where that is possible."""
        return tensor.to(self.device, non_blocking=self.on_gpu)

    def start(self) -> None:
        """Set what torch keeps per process: threads, and full float32 in float32 convolutions."""
        torch.set_num_threads(self.threads)
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            # float32 means float32 unless asked otherwise: TF32 would change results silently
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False


def training_compute(experiment: Experiment, profile: Profile, num_workers: int, local_rank: int = 0) -> Compute:
    """Decide for one training worker.

    Raises UsageError where the profile forbids what the experiment asks, ClusterError where a GPU is asked for and absent.
    """
    training = experiment.training
    if training.precision not in profile.precisions:
        allowed = ", ".join(profile.precisions)
        raise UsageError(
            f"training.precision: got {training.precision}, but profile {profile.name!r} allows {allowed}; "
            f"choose another profile or -s training.precision={profile.precisions[0]}"
        )
    if training.compile and not profile.compile:
        raise UsageError(f"training.compile: profile {profile.name!r} does not allow it; use -s training.compile=false")
    device = _gpu(profile, local_rank) if profile.use_gpu else torch.device("cpu")
    return Compute(
        device=device,
        backend="nccl" if device.type == "cuda" else "gloo",
        autocast_dtype=torch.bfloat16 if training.precision is Precision.BF16 else None,
        compile=training.compile,
        channels_last=training.channels_last,
        threads=profile.threads(num_workers),
    )


def sampling_compute(profile: Profile) -> Compute:
    """Decide for generating images in this process: full float32, so that files repeat."""
    device = _gpu(profile, 0) if profile.use_gpu else torch.device("cpu")
    return Compute(device, "gloo", None, compile=False, channels_last=False, threads=profile.threads(1))


def _gpu(profile: Profile, index: int) -> torch.device:
    """Return a GPU of this process, or say that there is none and which profile to use instead."""
    if not torch.cuda.is_available():
        raise ClusterError(
            f"profile {profile.name!r} asks for GPUs, but this machine has none; use --cluster local to train on its CPUs"
        )
    return torch.device("cuda", index)
