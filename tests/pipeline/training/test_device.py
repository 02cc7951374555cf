"""What device, precision and the rest are decided to be, by table: the decision is a function of hardware, experiment and profile."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import presets
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, Precision, experiment_from, load_experiment
from pipeline.config.yaml_files import validate
from pipeline.errors import ClusterError, UsageError
from pipeline.training import device
from pipeline.training.device import Capabilities, Compute, training_compute

CPU = Capabilities()
CPU_WITH_BF16 = Capabilities(cpu_bf16=True)
T4 = Capabilities(num_gpus=1, gpu_version=(7, 5), nccl=True)
P100 = Capabilities(num_gpus=1, gpu_version=(6, 0), nccl=True)
A100S = Capabilities(num_gpus=8, gpu_version=(8, 0), nccl=True)
ON_GPU = {"resources_per_worker": {"CPU": 4, "GPU": 1}}


def experiment(**training: Any) -> Experiment:
    return experiment_from({"training": training, "model": {"channels": 128}})


def profile(**settings: Any) -> Profile:
    return validate(Profile, {"name": "here", "threads_per_worker": 2} | settings, "profile")


def compute(name: str, **settings: Any) -> Compute:
    """The plain decision on the CPU or GPU 0, changed in `settings`."""
    plain: dict[str, Any] = {"threads": 2}
    gpu: dict[str, Any] = {"backend": "nccl", "deterministic": True} if name != "cpu" else {"backend": "gloo"}
    return Compute(torch.device(name), **plain | gpu | settings)


@pytest.mark.promise("P6")
@pytest.mark.parametrize(
    ("hardware", "training", "settings", "gpu", "wanted"),
    [
        (CPU, {}, {}, 0, compute("cpu")),
        (CPU, {"precision": "bf16"}, {}, 0, compute("cpu", precision=Precision.BF16, channels_last=True)),
        (CPU, {"precision": "mixed"}, {}, 0, compute("cpu")),  # bf16 would be emulated, and slow
        (CPU_WITH_BF16, {"precision": "mixed"}, {}, 0, compute("cpu", precision=Precision.BF16, channels_last=True)),
        (CPU_WITH_BF16, {"precision": "mixed", "channels_last": False}, {}, 0, compute("cpu", precision=Precision.BF16)),
        (CPU, {"compile": True, "channels_last": True}, {"cuda_graphs": True}, 0,
         compute("cpu", compile=True, channels_last=True)),
        (CPU, {"tf32": True}, {}, 0, compute("cpu")),  # there is no such thing on a CPU, and float32 repeats anyway
        (A100S, {}, {}, 0, compute("cpu")),  # a GPU that the profile does not give stays unused
        (A100S, {}, ON_GPU, 0, compute("cuda:0")),
        (A100S, {"precision": "mixed"}, ON_GPU, 3, compute("cuda:3", precision=Precision.BF16, channels_last=True)),
        (A100S, {"precision": "fp16"}, ON_GPU, 0, compute("cuda:0", precision=Precision.FP16, channels_last=True)),
        (T4, {"precision": "mixed"}, ON_GPU, 0, compute("cuda:0", precision=Precision.FP16, channels_last=True)),
        (A100S, {"tf32": True, "deterministic": False}, ON_GPU, 0, compute("cuda:0", tf32=True, deterministic=False)),
        (A100S, {"compile": True}, ON_GPU, 0, compute("cuda:0", compile=True)),
        (A100S, {"compile": True}, ON_GPU | {"cuda_graphs": True}, 0, compute("cuda:0", compile=True, cuda_graphs=True)),
        (A100S, {}, ON_GPU | {"cuda_graphs": True}, 0, compute("cuda:0")),
        # the gradients of micro-batches would be written over
        (A100S, {"compile": True, "micro_batch_size": 8}, ON_GPU | {"cuda_graphs": True}, 0,
         compute("cuda:0", compile=True, micro_batch_size=8)),
        # NCCL refuses two workers on one GPU
        (A100S, {}, {"resources_per_worker": {"CPU": 1, "GPU": 0.5}}, 0, compute("cuda:0", backend="gloo")),
    ],
)  # fmt: skip
def test_the_decision(
    hardware: Capabilities, training: dict[str, Any], settings: dict[str, Any], gpu: int, wanted: Compute
) -> None:
    assert training_compute(experiment(**training), profile(**settings), 1, None, gpu, hardware) == wanted


@pytest.mark.parametrize(
    ("hardware", "training", "settings", "error", "words"),
    [
        (CPU, {}, ON_GPU, ClusterError, "this machine has none; use --cluster local"),
        (T4, {"precision": "bf16"}, ON_GPU, UsageError, r"compute capability 7.5.*training.precision=fp16, or mixed"),
        (
            T4,
            {"precision": "mixed"},
            ON_GPU | {"precisions": ["bf16"]},
            UsageError,
            "mixed, which is fp16 .* allows bf16; name one",
        ),
        (
            CPU_WITH_BF16,
            {"precision": "mixed"},
            {"precisions": ["fp32"]},
            UsageError,
            "mixed, which is bf16 .* allows fp32",
        ),
        (
            CPU,
            {"precision": "mixed"},
            {"precisions": ["fp16"]},
            UsageError,
            "mixed, which is fp32 on this machine, but profile 'here' allows fp16",
        ),
        (CPU, {"precision": "bf16"}, {"precisions": ["fp32"]}, UsageError, "'here' allows fp32;.*precision=fp32"),
        (CPU, {"compile": True}, {"compile": False}, UsageError, "training.compile=false"),
        (P100, {"compile": True}, ON_GPU, UsageError, r"compute capability 6.0, the compiler needs 7.0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(
    hardware: Capabilities,
    training: dict[str, Any],
    settings: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        training_compute(experiment(**training), profile(**settings), 1, None, found=hardware)


@pytest.mark.promise("P6")
@pytest.mark.parametrize(
    ("model", "shape", "training", "wanted"),
    [
        ({"channels": 128}, (3, 32, 32), {}, 32),
        ({"channels": 128}, (3, 32, 32), {"batch_size": 32}, None),  # all of them stay in the cache
        ({"channels": 128}, (3, 32, 32), {"micro_batch_size": 5}, 5),
        ({"channels": 128}, (3, 256, 256), {}, 1),
        ({"channels": 32}, (1, 28, 28), {}, None),
        ({"channels": 128}, None, {}, None),
        ({"type": "mine:Network", "arguments": {}}, (3, 64, 64), {}, None),
    ],
)
def test_a_large_batch_is_cut_into_what_a_cpu_keeps_in_its_cache(
    model: dict[str, Any], shape: tuple[int, int, int] | None, training: dict[str, Any], wanted: int | None
) -> None:
    chosen = experiment_from({"model": model, "training": training})
    assert training_compute(chosen, profile(), 1, shape, found=CPU).micro_batch_size == wanted
    if not training:
        assert training_compute(chosen, profile(**ON_GPU), 1, shape, found=A100S).micro_batch_size is None


@pytest.mark.promise("P6")
def test_compile_left_open_is_taken_by_long_trainings_on_gpus_that_can() -> None:
    with_compiler = replace(A100S, c_compiler=True)

    def compiles(hardware: Capabilities, steps: int, settings: dict[str, Any], **model: Any) -> bool:
        chosen = experiment_from({"training": {"compile": None, "steps": steps}, "model": model})
        return training_compute(chosen, profile(**settings), 1, None, found=hardware).compile

    assert compiles(with_compiler, 20_000, ON_GPU)
    assert not compiles(with_compiler, 19_999, ON_GPU)  # as in a sweep
    assert not compiles(A100S, 20_000, ON_GPU)  # without a C compiler
    assert not compiles(replace(P100, c_compiler=True), 20_000, ON_GPU)
    assert not compiles(with_compiler, 20_000, {})  # on the CPU of that machine
    assert not compiles(with_compiler, 20_000, ON_GPU, type="mine:Network", arguments={})
    with pytest.raises(UsageError, match=r"'here' does not allow it; use -s training\.compile=false"):
        compiles(with_compiler, 20_000, ON_GPU | {"compile": False})
    assert not compiles(with_compiler, 19_999, ON_GPU | {"compile": False})


@pytest.mark.parametrize(
    "preset", ["ddpm-cifar10", "ddpm-lsun-256", "ddpm-celebahq-256", "iddpm-cifar10-hybrid", "iddpm-cifar10-vlb"]
)
def test_the_papers_presets_take_the_fast_path_of_a_gpu_and_repeat(preset: str) -> None:
    chosen = load_experiment(presets.find("experiments", preset))
    found = replace(A100S, c_compiler=True)
    fast = {"precision": Precision.BF16, "channels_last": True, "compile": True}
    assert training_compute(chosen, profile(**ON_GPU), 1, None, found=found) == compute("cuda:0", **fast)


def test_narrow_networks_stay_in_order_on_a_cpu() -> None:
    narrow = experiment_from({"training": {"precision": "mixed"}, "model": {"channels": 64}})
    assert not training_compute(narrow, profile(), 1, None, found=CPU_WITH_BF16).channels_last
    assert training_compute(narrow, profile(**ON_GPU), 1, None, found=A100S).channels_last


@pytest.mark.promise("P6")
def test_what_was_decided_elsewhere_is_kept_unless_it_is_named_or_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compute("cpu", precision=Precision.BF16, channels_last=True, micro_batch_size=8, threads=4).arithmetic
    assert before == {
        "precision": "bf16", "channels_last": True, "micro_batch_size": 8, "threads": 4, "compile": False
    }  # fmt: skip
    mixed = experiment(precision="mixed")
    able, unable = CPU_WITH_BF16, CPU
    monkeypatch.setattr(Capabilities, "of_this_machine", classmethod(lambda cls: able))
    here = training_compute(mixed, profile(), 1, (3, 32, 32), found=able)
    assert device.kept_arithmetic(here, before, mixed, whose="another").arithmetic == before
    assert device.kept_arithmetic(here, before, mixed, named={"threads"}, whose="another").threads == 2
    named = experiment(precision="fp32", channels_last=False, micro_batch_size=16)
    there = training_compute(named, profile(), 1, (3, 32, 32), found=able)
    assert device.kept_arithmetic(there, before, named, named={"threads"}, whose="another") == there
    monkeypatch.setattr(Capabilities, "of_this_machine", classmethod(lambda cls: unable))
    with pytest.raises(ClusterError, match=r"got bf16 for mixed on another, expected .*\(fp32\).*precision=fp32"):
        device.kept_arithmetic(
            training_compute(mixed, profile(), 1, None, found=unable), before, mixed, whose="another"
        )


def test_mixed_is_not_something_a_profile_permits() -> None:
    with pytest.raises(UsageError, match="precisions"):
        profile(precisions=["mixed"])


def test_the_loss_is_scaled_in_fp16_alone() -> None:
    for precision in device.AUTOCAST:
        chosen = compute("cpu", precision=precision)
        assert chosen.loss_scaler().is_enabled() == (precision == "fp16")


DECIDED_HERE = {"cuda", "backends", "compile", "autocast", "amp", "compiler", "use_deterministic_algorithms"}


def questions_about_hardware(path: Path) -> list[str]:
    """Return where a file reads `torch.cuda` and the like, or branches on a device's type."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in DECIDED_HERE
        of_device = node.attr == "type" and isinstance(node.value, ast.Attribute) and node.value.attr == "device"
        if of_torch or of_device or node.attr == "on_gpu":
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_else_asks_what_the_hardware_is() -> None:
    here = Path(device.__file__)
    folder = here.parent.parent
    assert questions_about_hardware(here)
    # the monitor reads a GPU's load, and `gpus` counts them: they decide nothing
    but = (here, folder / "tracking" / "monitor.py", folder / "gpus.py")
    others = [path for path in sorted(folder.rglob("*.py")) if path not in but]
    assert [line for path in others for line in questions_about_hardware(path)] == []
