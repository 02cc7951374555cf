"""The one place that decides device, backend, precision, compilation and the like; nothing else in the code asks.

What changes a result is the experiment's to say (`training.precision`, `micro_batch_size`, `tf32`, `channels_last`, `compile`,
`deterministic`); what a machine permits is the profile's (`precisions`, `compile`, `cuda_graphs`); what it can do, torch is asked once
(`Capabilities`). `training_compute` makes one `Compute` of the three. The GPU's path has the shape of the CPU's: the same
calls, other values. What an experiment leaves open is decided for the device, and kept by the run from then on (`Compute.arithmetic`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, Precision
from pipeline.cpus import free_memory_bytes, usable_cpus
from pipeline.errors import ClusterError, UsageError
from pipeline.gpus import usable_gpus
from pipeline.training.threads import THREADS, spread

T = TypeVar("T")
R = TypeVar("R")
Shape = tuple[int, int, int]

# Ampere; torch emulates bf16 on older GPUs, as on CPUs without instructions for it: up to 30 times slower than fp32
BF16_FROM = (8, 0)
COMPILER_FROM = (7, 0)  # Triton, which torch.compile writes GPU code with
# an estimate, not measured: compiling takes a minute or two, which is little beside so many steps
WORTH_COMPILING_STEPS = 20_000
LossScaler = torch.amp.GradScaler
CACHED_ELEMENTS = 2**22
"""Elements of the first level's activations that a micro-batch has on a CPU: 32 images of 32x32 with 128 channels, 8 MiB in bf16.

Larger ones run out of the cache: the paper's network trained 16.9 images/s in micro-batches of 32, 15.3 in those of 16 or 64, 11.6 in
one of 128."""
# channels of the first level from which channels_last pays in bf16 on a CPU: in narrower networks torch's GroupNorm loses what
# convolutions gain
WIDE_IN_TRAINING, WIDE_IN_SAMPLING = 128, 64
AUTOCAST = {Precision.FP32: None, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True)
class Capabilities:
    """What a machine can do, as one of its workers finds it: GPUs, their compute capability, NCCL, bf16 instructions of its CPU."""

    num_gpus: int = 0
    gpu_version: tuple[int, int] = (0, 0)  # of the least capable one; (9, 0) is an H100
    nccl: bool = False
    cpu_bf16: bool = False
    c_compiler: bool = False  # with Python's headers: Triton builds with them what starts its kernels

    def fast_precisions(self, on_gpu: bool) -> list[Precision]:
        """Return the arithmetic that the GPU or the CPU has instructions for, the fastest first."""
        if on_gpu:
            return ([Precision.BF16] if self.gpu_version >= BF16_FROM else []) + [Precision.FP16, Precision.FP32]
        return ([Precision.BF16] if self.cpu_bf16 else []) + [Precision.FP32]

    @classmethod
    def of_this_machine(cls) -> Capabilities:
        """Ask torch."""
        count = usable_gpus()
        versions = [torch.cuda.get_device_capability(index) for index in range(count)]
        cpu_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # AMX always has it
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        c_compiler = headers and any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))
        nccl = torch.distributed.is_nccl_available()
        return cls(count, min(versions, default=(0, 0)), nccl, cpu_bf16, c_compiler)


@dataclass(frozen=True)
class Compute:
    """How the arithmetic of one worker is done."""

    device: torch.device
    backend: str  # of torch.distributed
    threads: int
    precision: Precision = Precision.FP32
    compile: bool = False
    channels_last: bool = False
    tf32: bool = False
    deterministic: bool = False
    cuda_graphs: bool = False
    micro_batch_size: int | None = None  # at most so many images at once; None: a worker's whole part of the batch

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What the bytes of a training depend on besides its experiment and its number of workers, as plain data."""
        names = ("precision", "micro_batch_size", "threads", "channels_last", "compile")
        return {name: getattr(self, name) for name in names}

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that autocast computes in; None without autocast."""
        return AUTOCAST[self.precision]

    def start(self) -> None:
        """Set what torch keeps per process: threads, what float32 means, and whether kernels must repeat.

        UsageError where the environment has OpenMP take fewer threads than are recorded.
        """
        _require_threads(self.threads)
        torch.set_num_threads(self.threads)
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.allow_tf32 = self.tf32
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            # the fastest convolution is found by trying, which can end differently in each process
            torch.backends.cudnn.benchmark = not self.deterministic
            torch.backends.cudnn.deterministic = self.deterministic
            if self.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            # a network of one's own may use an operation that has no other form: it is warned of, not stopped
            torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
            # which the fused kernels of attention take for leave not to repeat; the plain product does repeat
            for fused in ("flash", "mem_efficient", "cudnn"):
                getattr(torch.backends.cuda, f"enable_{fused}_sdp")(not self.deterministic)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, in the memory format chosen."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]

    def for_sampling(self, precision: str, *, compiled: bool, channels: int) -> Compute:
        """Return how a network is called to generate images; `channels` are those of a U-Net's first level, 0 for other networks.

        UsageError for bf16 on a GPU that does not compute it.
        """
        half = precision == Precision.BF16
        if half and self.on_gpu:
            _require_bf16(Capabilities.of_this_machine(), "sampling", instead=Precision.FP32)
        layout = half and (self.on_gpu or channels >= WIDE_IN_SAMPLING)
        return replace(self, precision=Precision(precision), compile=compiled, channels_last=layout, cuda_graphs=False)

    def free_bytes(self) -> int:
        """Return the memory of the device that is free."""
        if self.on_gpu:
            return int(torch.cuda.mem_get_info(self.device)[0])
        return free_memory_bytes()

    def forget_peak(self) -> None:
        """Let `peak_bytes` count from here on, where the system can do that."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # Linux alone
                Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int | None:
        """Return the most memory that this process has taken on the device; None where the system does not tell."""
        if self.on_gpu:
            return torch.cuda.max_memory_reserved(self.device)
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)

    def send(self, tensor: Tensor) -> Tensor:
        """Copy a host tensor to the device without waiting where that is possible (from pinned memory)."""
        return tensor.to(self.device, non_blocking=self.on_gpu)

    def wait(self) -> None:
        """Wait until the device has done what it was given: before looking at a clock."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @property
    def name(self) -> str:
        """The device as people call it: "NVIDIA H100", or "CPU, 2 threads"."""
        if self.on_gpu:
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def pin_memory(self) -> bool:
        """Whether batches are prepared in page-locked memory, from which a GPU copies by itself."""
        return self.on_gpu

    @property
    def ddp_devices(self) -> list[torch.device] | None:
        """`device_ids` of DistributedDataParallel."""
        return [self.device] if self.on_gpu else None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the network is called."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def no_autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which gradients are computed, inside that of the network."""
        return torch.autocast(self.device.type, enabled=False)

    def loss_scaler(self) -> LossScaler:
        """Return what keeps small fp16 gradients from vanishing; it does nothing in other precisions."""
        return LossScaler(self.device.type, enabled=self.precision is Precision.FP16)

    def split_threads(self, num_parts: int) -> tuple[int, int]:
        """Return how many parts of some work could be computed at a time, and with how many threads each; one by one on a GPU."""
        threads = torch.get_num_threads()
        at_once = 1 if self.on_gpu else max(1, min(threads, num_parts))
        return at_once, threads // at_once

    def mark(self) -> Any:
        """Return a mark in the device's time, which a GPU reaches once it has done what was asked of it so far."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds_between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks."""
        return float(begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin)

    def compiled(self, network: nn.Module) -> nn.Module:
        """Return the network as it is to be called: compiled where asked, its kernels replayed as CUDA graphs where permitted."""
        if not self.compile:
            return network
        return torch.compile(network, mode="reduce-overhead" if self.cuda_graphs else None)  # type: ignore[return-value]

    def begin_step(self) -> None:
        """Say that what the network returned in earlier steps is no longer needed: CUDA graphs write over it."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def require_permission(experiment: Experiment, profile: Profile) -> None:
    """Refuse what the profile forbids, whatever the machine can do (UsageError). Looks at no hardware."""
    training = experiment.training
    if training.precision is not Precision.MIXED and training.precision not in profile.precisions:
        allowed = ", ".join(profile.precisions)
        raise UsageError(
            f"training.precision: got {training.precision}, but profile {profile.name!r} allows {allowed}; "
            f"choose another profile or -s training.precision={profile.precisions[0]}"
        )
    if training.compile and not profile.compile:
        raise _compile_forbidden(profile)


def training_compute(
    experiment: Experiment,
    profile: Profile,
    num_workers: int,
    shape: Shape | None,
    gpu: int = 0,
    found: Capabilities | None = None,
) -> Compute:
    """Decide for one training worker of `num_workers`, which was given the GPU of that index if the profile gives it one.

    `shape` (C, H, W) is that of an image, None if it is not known yet: then `micro_batch_size` is left undecided. `found` is what the
    machine can do; None asks torch. Raises UsageError where profile or hardware forbid what the experiment asks, ClusterError where a
    GPU is asked for and absent.
    """
    require_permission(experiment, profile)
    training = experiment.training
    found = found or Capabilities.of_this_machine()
    device = _device(found, profile, gpu)
    on_gpu = device.type == "cuda"
    precision = _precision(found, training.precision, profile, on_gpu=on_gpu)
    compiled = _compile(found, experiment, profile, on_gpu=on_gpu)
    micro_batch_size = training.micro_batch_size or _micro_batch_size(experiment, shape, on_gpu=on_gpu)
    whole = micro_batch_size is None or micro_batch_size * num_workers >= training.batch_size
    channels_last = training.channels_last
    if channels_last is None:
        # a network of the user's own may expect its memory in order
        likes_it = experiment.model.type == "unet" and (on_gpu or experiment.model.channels >= WIDE_IN_TRAINING)
        channels_last = precision is not Precision.FP32 and likes_it
    return Compute(
        device=device,
        backend=backend_of(profile) if found.nccl else "gloo",
        threads=profile.threads(num_workers),
        precision=precision,
        compile=compiled,
        channels_last=channels_last,
        tf32=on_gpu and training.tf32,
        deterministic=on_gpu and training.deterministic,
        # gradients of several micro-batches add up in memory that a replayed graph would write over
        cuda_graphs=on_gpu and compiled and profile.cuda_graphs and whole,
        micro_batch_size=micro_batch_size,
    )


def _compile(found: Capabilities, experiment: Experiment, profile: Profile, *, on_gpu: bool) -> bool:
    """Whether to compile the network; UsageError where device or profile forbid it.

    Left open, a U-Net is compiled on a GPU, in trainings that are long enough to earn the minutes that it takes.
    """
    training, able = experiment.training, not on_gpu or found.gpu_version >= COMPILER_FROM
    if training.compile and not able:
        raise UsageError(
            f"training.compile: this GPU has compute capability {_dotted(found.gpu_version)}, the compiler needs "
            f"{_dotted(COMPILER_FROM)}; use -s training.compile=false"
        )
    if training.compile is not None:
        return training.compile
    long = experiment.model.type == "unet" and training.steps >= WORTH_COMPILING_STEPS
    chosen = on_gpu and able and found.c_compiler and long
    if chosen and not profile.compile:
        raise _compile_forbidden(profile)
    return chosen


def _compile_forbidden(profile: Profile) -> UsageError:
    return UsageError(f"training.compile: profile {profile.name!r} does not allow it; use -s training.compile=false")


def _micro_batch_size(experiment: Experiment, shape: Shape | None, *, on_gpu: bool) -> int | None:
    """Return how many images of a U-Net's batch stay in a CPU's cache, None for all."""
    if on_gpu or shape is None or experiment.model.type != "unet":
        return None
    images = CACHED_ELEMENTS // (experiment.model.channels * shape[1] * shape[2])
    return max(1, images) if images < experiment.training.batch_size else None


def kept_arithmetic(
    compute: Compute, before: Mapping[str, Any], experiment: Experiment, *, named: Container[str] = (), whose: str
) -> Compute:
    """Return the compute with what was decided before, by `whose` machine; what the experiment or `named` names stays.

    ClusterError if this machine has no instructions for the precision.
    """
    training = experiment.training
    own = {
        "precision": training.precision is not Precision.MIXED,
        "micro_batch_size": training.micro_batch_size is not None,
        "channels_last": training.channels_last is not None,
        "compile": training.compile is not None,
    }
    kept = {name: value for name, value in before.items() if not own.get(name, name in named)}
    able = Capabilities.of_this_machine().fast_precisions(compute.on_gpu)
    if "precision" in kept and kept["precision"] not in able:
        raise ClusterError(
            f"training.precision: got {kept['precision']} for mixed on {whose}, expected one that this machine computes itself "
            f"({', '.join(able)}). Train on machines of one kind, or name it: -s training.precision={Precision.FP32}."
        )
    if "precision" in kept:
        kept["precision"] = Precision(kept["precision"])
    return replace(compute, **kept)


def sampling_compute(profile: Profile, num_workers: int = 1, *, here: bool = True) -> Compute:
    """Decide for generating images: float32 throughout; `Compute.for_sampling` then says how the network is called.

    In one of `num_workers` workers; with `here=False` for a process that prepares and sums up, whose machine may be without a GPU.
    """
    found = Capabilities.of_this_machine()
    device = _device(found, profile, 0) if here or found.num_gpus else torch.device("cpu")
    return Compute(device, backend_of(profile), profile.threads(num_workers), deterministic=device.type == "cuda")


def sampling_precision(asked: str, where: Compute | Profile) -> str:
    """Return the arithmetic of sampling, of which `mixed` leaves the choice: bf16 where it is computed in hardware, else fp32.

    A process without a GPU that prepares the work of GPUs takes them for Ampere or newer.
    """
    if asked != Precision.MIXED:
        return asked
    found, on_gpu = Capabilities.of_this_machine(), where.use_gpu if isinstance(where, Profile) else where.on_gpu
    able = Precision.BF16 in found.fast_precisions(on_gpu) or (on_gpu and not found.num_gpus)
    return (Precision.BF16 if able else Precision.FP32).value


def serving_compute() -> Compute:
    """Decide for a model that is served, where there is no profile: the GPU if there is one, else a thread for each CPU.

    In a process of somebody else's it is not started: torch's settings there are that process's own.
    """
    device = torch.device("cuda" if usable_gpus() else "cpu")
    return Compute(device, "gloo", usable_cpus())


def arithmetic_of(profile: Profile) -> dict[str, Any]:
    """Return what the last bits of images and bits/dim depend on besides the model and how it is used, as it is recorded with them."""
    return shared_arithmetic(workers_device(profile)) | {"threads": profile.threads(profile.most_workers)}


def shared_arithmetic(device: torch.device) -> dict[str, Any]:
    """Return the same of what is kept for several profiles, whose threads are always one: a part of its key."""
    return {"device": device.type, "threads": THREADS, "torch": torch.__version__}


def workers_device(profile: Profile) -> torch.device:
    """Return the kind of device that a profile's workers compute on; this process may have another."""
    return torch.device("cuda" if profile.use_gpu else "cpu")


def backend_of(profile: Profile) -> str:
    """Return what the workers of a profile talk over: NCCL needs a whole GPU for each, gloo anything."""
    return "nccl" if profile.gpus_per_worker >= 1 else "gloo"


def release_memory() -> None:
    """Free what a training of this process left: tensors in reference cycles, compiled networks, and the GPU memory that torch keeps."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


@contextlib.contextmanager
def exact_inference(device: torch.device) -> Iterator[Callable[[Callable[[T], R], Iterable[T]], Iterable[R]]]:
    """Run a network without gradients, and float32 as float32: TF32 would shift the features that GPUs compute.

    Given is what calls a function with each of several batches: on a CPU with some at once, each on one thread.
    """
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield spread if device.type == "cpu" else map
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def _require_threads(threads: int) -> None:
    """Raise UsageError where OpenMP, which read these variables as it was loaded, would silently take fewer threads."""
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and int(limit) < threads:
        raise UsageError(
            f"OMP_THREAD_LIMIT: got {limit}, expected at least {threads}, the threads of each worker, which results depend on. "
            "Unset it, or set threads_per_worker in the profile."
        )
    if threads > 1 and os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        raise UsageError(
            f"OMP_DYNAMIC: got true, expected it unset: results depend on the threads of each worker, which are {threads}. Unset it."
        )


def _device(capabilities: Capabilities, profile: Profile, index: int) -> torch.device:
    """Return the CPU, or a GPU of this process; or say that there is none and which profile to use instead."""
    if not profile.use_gpu:
        return torch.device("cpu")
    if index >= capabilities.num_gpus:
        have = f"{capabilities.num_gpus} GPUs" if capabilities.num_gpus else "none"
        raise ClusterError(
            f"profile {profile.name!r} asks for GPUs, but this machine has {have}; use --cluster local to train on its CPUs"
        )
    return torch.device("cuda", index)


def _precision(capabilities: Capabilities, asked: Precision, profile: Profile, *, on_gpu: bool) -> Precision:
    """Return the arithmetic of training, of which `mixed` leaves the choice; UsageError where device or profile do not have it."""
    if asked is Precision.BF16 and on_gpu:
        _require_bf16(capabilities, "training", instead=Precision.FP16)
    if asked is not Precision.MIXED:
        return asked
    fastest = capabilities.fast_precisions(on_gpu)[0]
    if fastest in profile.precisions:
        return fastest
    raise UsageError(
        f"training.precision: got mixed, which is {fastest} on this machine, but profile {profile.name!r} allows "
        f"{', '.join(profile.precisions)}; name one with -s training.precision={profile.precisions[0]}, or choose another profile"
    )


def _require_bf16(capabilities: Capabilities, section: str, *, instead: Precision) -> None:
    if capabilities.gpu_version < BF16_FROM:
        raise UsageError(
            f"{section}.precision: got bf16, which this GPU (compute capability {_dotted(capabilities.gpu_version)}) does not "
            f"compute; use -s {section}.precision={instead}, or mixed to leave the choice to the GPU"
        )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
