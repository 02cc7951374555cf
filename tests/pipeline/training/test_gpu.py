"""What a CUDA GPU computes: the CPU's numbers to rounding, and its own bit for bit, through a kill too. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddpm import bits_per_dim
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.config.yaml_files import validate
from pipeline.data.images import to_float
from pipeline.data.shards import Dataset
from pipeline.metrics import scoring
from pipeline.sampling.generation import Denoiser
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.training.averages import make_averages
from pipeline.training.batches import training_batches
from pipeline.training.device import Compute, sampling_compute, training_compute
from pipeline.training.loop import TrainState
from pipeline.training.models import build_diffusion, build_model
from pipeline.training.randomness import image_generators
from pipeline.training.team import Team
from tests.kit import trainer
from tests.kit.experiments import TINY
from tests.pipeline.runs.test_resume import killed_after, to_the_end
from tests.pipeline.worker.steps import (
    CPU,
    STEPS,
    STREAMS,
    be_a_worker,
    experiment,
    gathered,
    order_of,
    overflow_until_it_stops,
    train,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

ONE_GPU: dict[str, Any] = {"name": "one-gpu", "threads_per_worker": 1, "resources_per_worker": {"CPU": 1, "GPU": 1}}


def profile(**changes: Any) -> Profile:
    return validate(Profile, ONE_GPU | changes, "profile")


def gpu(chosen: Experiment, **changes: Any) -> Compute:
    """What a worker on this machine's GPU would decide, started."""
    compute = training_compute(chosen, profile(**changes), 1, None)
    assert compute.on_gpu
    compute.start()
    return compute


@pytest.fixture(scope="module")
def on_cpu(dataset: Dataset) -> tuple[list[torch.Tensor], Any, TrainState]:
    return train(dataset, experiment(), Team())


def means(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([step.mean() for step in losses])


@pytest.mark.parametrize(
    ("training", "of_profile", "rtol"),
    [
        ({}, {}, 1e-4),
        ({"deterministic": False}, {}, 1e-4),
        ({"channels_last": True}, {}, 1e-4),
        ({"tf32": True}, {}, 5e-3),
        ({"precision": "bf16"}, {}, 5e-2),
        ({"precision": "fp16"}, {}, 2e-2),
        ({"compile": True}, {}, 1e-3),
        ({"compile": True}, {"cuda_graphs": True}, 1e-3),
        ({"compile": True, "precision": "bf16", "channels_last": True}, {"cuda_graphs": True}, 5e-2),
        ({"micro_batch_size": 5}, {}, 1e-4),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain" if isinstance(value, dict) else str(value),
)
# the compiler's own, on its import, and its advice where float32 is float32 as asked for
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_a_gpu_learns_what_the_cpu_does(
    dataset: Dataset, on_cpu: Any, training: dict[str, Any], of_profile: dict[str, Any], rtol: float
) -> None:
    """The same rows, timesteps, noise and flips at each of 20 steps: the losses agree to the arithmetic's rounding."""
    chosen = experiment(**training)
    losses, _, train_state = train(dataset, chosen, Team(), gpu(chosen, **of_profile))
    assert all(p.is_cuda for p in train_state.model.parameters())
    torch.testing.assert_close(means(losses), means(on_cpu[0]), rtol=rtol, atol=0)


RESUMED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16_channels_last": {"training": {"precision": "bf16", "channels_last": True}},
    "fp16": {"training": {"precision": "fp16"}},
    "tf32": {"training": {"tf32": True}},
    "loss_aware_learned_variance": {
        "training": {"timestep_sampling": "loss_aware", "objective": "vlb"},
        "diffusion": {"schedule": "cosine", "num_timesteps": 5, "variance": "learned_range"},
    },
    "labels": {"model": {"class_conditional": True}, "training": {"label_dropout": 0.3, "weight_decay": 0.1}},
    "compiled": {"training": {"compile": True}},
}


@pytest.mark.fault(1)
@pytest.mark.oracle(11)
@pytest.mark.promise("P1", "P2")
@pytest.mark.parametrize("mode", RESUMED)
def test_oracle_11_killed_on_a_gpu_and_resumed_ends_with_the_same_bytes(tmp_path: Path, mode: str) -> None:
    sections = {name: TINY.get(name, {}) | changes for name, changes in RESUMED[mode].items()}
    calm, struck = (trainer.make_run(tmp_path, profile=profile(), **sections) for _ in range(2))
    to_the_end(calm)
    killed_after(struck, 10)
    to_the_end(struck)
    assert trainer.final_digests(struck) == trainer.final_digests(calm)
    assert trainer.logged_losses(struck) == trainer.logged_losses(calm)
    ends = [
        CheckpointStore(run.checkpoints).newest_verified().checkpoint.state()["loss_scale"] for run in (calm, struck)
    ]
    assert ends[0] == ends[1]


@pytest.mark.promise("P6")
def test_a_run_of_the_cpu_resumes_on_a_gpu(tmp_path: Path) -> None:
    """Another device rounds differently, and says nothing of it being the same run bit for bit; but it goes on."""
    run = trainer.make_run(tmp_path)
    to_the_end(run, stop_after=7)
    record = (run.folder / "run.json").read_text()
    assert '"GPU": 0.0' in record
    (run.folder / "run.json").write_text(record.replace('"GPU": 0.0', '"GPU": 1.0'))
    to_the_end(run)
    calm = trainer.make_run(tmp_path)
    to_the_end(calm)
    here, there = trainer.logged_losses(run), trainer.logged_losses(calm)
    assert here.keys() == there.keys()
    for step, loss in there.items():
        assert here[step] == pytest.approx(loss, rel=0.1)  # dropout is on, whose masks differ


@pytest.mark.fault(16)
def test_fp16_stops_when_its_scale_collapses(dataset: Dataset) -> None:
    overflow_until_it_stops(dataset, gpu(experiment(precision="fp16", warmup_steps=0)))


def test_batches_travel_from_page_locked_memory(dataset: Dataset) -> None:
    chosen = experiment()
    assert gpu(chosen).pin_memory
    batch = next(iter(training_batches(dataset, order_of(dataset, chosen), range(STREAMS), 0, 0))).pin()
    assert batch.images.is_pinned()
    assert batch.draws.eps.is_pinned()


@pytest.mark.parametrize("size", [2, 4])
def test_workers_that_share_a_gpu_learn_what_one_does(tmp_path: Path, dataset: Dataset, size: int) -> None:
    """Shares of a GPU talk over gloo: NCCL refuses two workers on one."""
    alone, _, _ = train(dataset, experiment(), Team(), gpu(experiment()))
    compute = gpu(experiment(), resources_per_worker={"CPU": 1, "GPU": 1 / size})
    assert compute.backend == "gloo"
    torch.multiprocessing.spawn(be_a_worker, args=(size, str(tmp_path), str(dataset.folder), compute), nprocs=size)
    workers = gathered(tmp_path, size)
    together = [torch.cat([w["losses"][step] for w in workers]) for step in range(STEPS)]
    torch.testing.assert_close(means(together), means(alone), rtol=1e-4, atol=0)
    for name, value in workers[0]["ema"].items():
        assert all(torch.equal(w["ema"][name], value) for w in workers)


def test_gradients_travel_over_nccl(dataset: Dataset, on_cpu: Any, tmp_path: Path) -> None:
    """A group of one, which is what one GPU can hold: the same losses through NCCL and DDP as without."""
    chosen = experiment()
    compute = gpu(chosen)
    assert compute.backend == "nccl"

    class Wrapped(Team):
        def share_gradients(self, model: torch.nn.Module, compute: Compute) -> torch.nn.Module:
            return DistributedDataParallel(
                model, device_ids=compute.ddp_devices, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    dist.init_process_group(compute.backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        losses, _, _ = train(dataset, chosen, Wrapped(), compute)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(means(losses), means(on_cpu[0]), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def denoiser(dataset: Dataset, on_cpu: Any) -> Denoiser:
    """Twenty steps of training, on the CPU."""
    chosen = experiment()
    model = build_model(chosen, dataset.manifest.shape)
    on_cpu[2].ema.copy_to(model)
    sampling = chosen.sampling.model_copy(update={"sampler": "ancestral", "steps": 50, "batch_size": 32})
    return Denoiser(build_diffusion(chosen), model, dataset.manifest.shape, sampling, 0, CPU)


def test_generated_images_repeat_on_a_gpu_and_are_those_of_the_cpu(denoiser: Denoiser) -> None:
    here = torch.cat(list(denoiser.generate(70)))
    there = denoiser.on(sampling_compute(profile()))
    there.compute.start()
    first, again = (torch.cat(list(there.generate(70))) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.cat(list(there.generate(33)))[:33], first[:33])
    near = (first.int() - here.int()).abs() <= 1
    assert near.float().mean() >= 0.999
    denoiser.on(CPU)


def test_bits_per_dim_and_features_are_those_of_the_cpu(dataset: Dataset, denoiser: Denoiser, tmp_path: Path) -> None:
    rows = np.arange(32)
    x0 = to_float(torch.from_numpy(dataset.read(rows)))
    compute = sampling_compute(profile())
    compute.start()

    def bits(place: Compute) -> torch.Tensor:
        generators = image_generators(0, range(32), "likelihood")
        network = place.place(denoiser.model).eval()
        return bits_per_dim(denoiser.diffusion, network, place.send(x0), generator=generators).total.double().cpu()

    torch.testing.assert_close(bits(compute), bits(CPU), rtol=1e-4, atol=1e-4)
    extractor = scoring.choose_extractor(dataset, tmp_path, kind="classifier")
    images = dataset.read(np.arange(200))
    extractor.to(CPU.device)
    here = extractor(images).features
    extractor.to(compute.device)
    np.testing.assert_allclose(extractor(images).features, here, rtol=1e-4, atol=1e-4)


def test_averages_stay_on_the_device_in_float32(dataset: Dataset) -> None:
    chosen = experiment(ema_decay=[0.9, 0.99], ema_widths=[0.05, 0.1], ema_snapshot_every_steps=5)
    model = gpu(chosen).place(build_model(chosen, dataset.manifest.shape))
    for average in make_averages(model, chosen.training).values():
        assert {(t.dtype, t.device.type) for t in average.shadow.values()} == {(torch.float32, "cuda")}


def test_float32_is_float32_unless_tf32_is_asked_for() -> None:
    """A product of ones and small numbers that TF32, of 10 bits, cannot hold."""
    a = torch.full((64, 64), 1 + 2.0**-14, device="cuda")
    for tf32, exact in ((False, True), (True, False)):
        replace(gpu(experiment()), tf32=tf32).start()
        assert bool(((a @ torch.eye(64, device="cuda")) == a).all()) is exact
    gpu(experiment())
