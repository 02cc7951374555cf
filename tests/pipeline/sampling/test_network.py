"""The network as sampling calls it: an image's bytes whatever is asked for beside it, in each precision; memory; exact inversion."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm import BetaSchedule, GaussianDiffusion, UNet
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import SamplingConfig
from pipeline.errors import UsageError
from pipeline.sampling import memory
from pipeline.sampling.generated import GenerateTask
from pipeline.sampling.generation import Denoiser
from pipeline.sampling.motion import interpolate
from pipeline.storage.tensor_file import Arrays
from pipeline.training import device, threads
from pipeline.training.chunks import ChunkStore, Task, as_it_stands, chunks_of, compute
from pipeline.training.device import Capabilities, sampling_precision
from pipeline.training.threads import num_threads
from tests.kit.forks import run_team
from tests.pipeline.worker.steps import CPU

PRECISIONS = ("bf16", "fp32")
SHAPE = (1, 8, 8)


def a_unet(num_classes: int | None = None) -> UNet:
    torch.manual_seed(0)
    network = UNet(
        1,
        image_size=8,
        channels=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        norm_groups=4,
        num_classes=num_classes,
    )
    for parameter in network.parameters():  # the layers that begin at zero hide the others
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def denoiser(network: nn.Module, names: tuple[str, ...] = (), **sampling: object) -> Denoiser:
    settings = SamplingConfig.model_validate({"sampler": "ancestral", "steps": 6, "batch_size": 8, **sampling})
    return Denoiser(GaussianDiffusion(BetaSchedule.named("cosine", 20)), network, SHAPE, settings, 3, CPU, names)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_image_has_the_same_bytes_whatever_is_asked_for_beside_it(precision, guided):
    names = ("a", "b", "c") if guided else ()
    scale = 2.0 if guided else 1.0
    made = denoiser(a_unet(len(names) or None), names, precision=precision, guidance_scale=scale)
    chunks = torch.cat([made.images(range(8)), made.images(range(8, 16))])
    for count in (1, 3, 8, 11):
        assert torch.equal(torch.cat(list(made.generate(count))), chunks[:count])
    for index in (0, 5, 7, 14):
        assert torch.equal(made.images(range(index, index + 1)), chunks[index : index + 1])


IMAGES, CHUNK = 22, 4  # the last chunk is not whole


def images(made: Denoiser, store: ChunkStore, runner: Callable[..., Iterator[tuple[int, Arrays]]]) -> bytes:
    parts = compute(GenerateTask(made, IMAGES, None), IMAGES, CHUNK, store, runner)
    found = np.concatenate([part["images"] for part in parts])
    assert len(found) == IMAGES
    return found.tobytes()


def be_a_sampling_worker(rank: int, num_workers: int, sent: bytes, folder: str) -> None:
    """Compute this worker's chunks, the last one first, with a copy of the task."""
    made = pickle.loads(sent)  # noqa: S301
    task, store = GenerateTask(made, IMAGES, None), ChunkStore(Path(folder), {})
    CPU.start()
    task.start(CPU)
    for number, indices in list(enumerate(chunks_of(IMAGES, CHUNK)))[rank::num_workers][::-1]:
        store.put(number, len(indices), task(indices))


def nothing_is_missing(task: Task, chunks: Mapping[int, range]) -> Iterator[tuple[int, Arrays]]:
    assert not chunks
    return iter(())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_two_and_four_workers_make_the_same_images(tmp_path, precision):
    made = denoiser(a_unet(), precision=precision, batch_size=CHUNK)
    alone = images(made, ChunkStore(tmp_path / "alone", {}), as_it_stands)
    assert len({alone[i : i + 64] for i in range(0, len(alone), 64)}) == IMAGES
    for num_workers in (2, 4):
        folder = tmp_path / str(num_workers)
        run_team(be_a_sampling_worker, (num_workers, pickle.dumps(made), str(folder)), num_workers)
        assert images(made, ChunkStore(folder, {}), nothing_is_missing) == alone


@pytest.mark.parametrize("precision", PRECISIONS)
def test_images_that_were_stopped_half_way_end_as_the_others(tmp_path, precision):
    made = denoiser(a_unet(), precision=precision, batch_size=CHUNK)
    alone = images(made, ChunkStore(tmp_path / "alone", {}), as_it_stands)
    computed: list[int] = []

    def stopped_after(most: int) -> Callable[..., Iterator[tuple[int, Arrays]]]:
        def run(task: Task, chunks: Mapping[int, range]) -> Iterator[tuple[int, Arrays]]:
            for number, arrays in as_it_stands(task, chunks):
                if len(computed) == most:
                    raise KeyboardInterrupt
                computed.append(number)
                yield number, arrays

        return run

    with pytest.raises(KeyboardInterrupt):
        images(made, ChunkStore(tmp_path / "stopped", {}), stopped_after(3))
    resumed = pickle.loads(pickle.dumps(made))  # noqa: S301 - as another process would load it
    assert images(resumed, ChunkStore(tmp_path / "stopped", {}), stopped_after(6)) == alone
    assert computed == [0, 1, 2, 3, 4, 5]


class OfTheBatch(nn.Module):
    """A network whose last bits depend on the size of the batch, as those of some kernels do."""

    def __init__(self, odd: int) -> None:
        super().__init__()
        self.odd, self.seen = odd, set[int]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add(len(x))
        return x * (1 + 1e-6 * (len(x) < self.odd))


@pytest.mark.parametrize(("odd", "seen"), [(0, 1), (3, 4), (8, 8)])
def test_the_smallest_batch_is_computed_whose_rows_are_those_of_the_whole_chunk(odd, seen):
    network = OfTheBatch(odd)
    made = denoiser(network, precision="fp32")
    whole = made.images(range(8))
    assert torch.equal(made.images(range(6, 7)), whole[6:7])
    network.seen.clear()
    made.images(range(6, 7))  # what was found out is known
    assert network.seen == {seen}


def module(forward: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    made = nn.Module()
    made.forward = forward  # type: ignore[method-assign]
    return made


class OfTheThreads(nn.Module):
    """A network whose last bits depend on the number of threads, if `odd`; it records them, and waits for others at chunks of noise."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.odd, self.threads, self.meeting = odd, list[int](), threading.Barrier(2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        count = torch.get_num_threads()
        self.threads.append(count)
        if threading.current_thread() is not threading.main_thread() and not self.meeting.broken:
            self.meeting.wait(timeout=60)  # broken unless two compute at once
        return x * (1 + 1e-6 * self.odd * count)


@pytest.mark.parametrize("odd", [False, True])
def test_chunks_are_computed_side_by_side_where_no_byte_depends_on_the_threads(odd):
    network = OfTheThreads(odd)
    made = denoiser(network, precision="fp32", steps=20)
    with num_threads(2):
        one_by_one = torch.cat([made.images(range(begin, begin + 8)) for begin in range(0, 48, 8)])
        assert set(network.threads) == {2}
        assert torch.equal(torch.cat(list(made.generate(48))), one_by_one)
        assert torch.get_num_threads() == 2
        assert network.threads[-1] == (2 if odd else 1)
        assert made.split_threads(6) == ((1, 2) if odd else (2, 1))
        assert made.split_threads(1) == (1, 2)


def test_chunks_whose_images_nobody_waits_for_are_given_up_at_the_next_step():
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            calls.append(int(t[0]))
            if len(calls) > 60:
                threads._this_thread.ended.wait(60)
        return x

    made = denoiser(module(network), precision="fp32", steps=20)
    with num_threads(2):
        images = made.generate(80)
        next(images)
        images.close()
    assert len(calls) <= 62  # of 80: each of the two threads ends the call that it is in


def test_an_index_of_another_chunk_is_refused():
    with pytest.raises(ValueError, match="one chunk of 8"):
        denoiser(a_unet()).images(range(6, 9))


def test_only_the_network_is_in_bf16_and_its_embedding_is_computed_once():
    network, dtypes, calls = a_unet(), set(), []
    network.embedding.register_forward_hook(lambda *_: calls.append(1))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    exact, cheap = (denoiser(network, precision=precision) for precision in ("fp32", "bf16"))
    states = [x for _, x in cheap.denoise(range(4))]
    assert {x.dtype for x in states} == {torch.float32}
    assert dtypes == {torch.bfloat16}
    assert len(calls) == 1
    x, t = torch.randn(4, *SHAPE), torch.full((4,), 7)
    apart = cheap.network(range(4))(x, t) - exact.network(range(4))(x, t)
    assert 0 < float(apart.norm() / exact.network(range(4))(x, t).norm()) < 0.02
    # in fp32 it is the network itself, but for the last bits of an embedding of one row
    torch.testing.assert_close(exact.network(range(4))(x, t), network(x, t).detach(), rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_network_of_ones_own_is_called_under_autocast():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            found: Tensor = self.conv(x)
            assert found.dtype == torch.bfloat16
            return found + torch.zeros(1)  # which a network in bf16 throughout could not add

    assert (
        denoiser(Own(), precision="bf16").network(range(2))(torch.randn(2, *SHAPE), torch.zeros(2)).dtype
        == torch.float32
    )


def test_what_goes_to_a_worker_is_the_trained_network_once():
    made = denoiser(a_unet(), precision="bf16")
    before = len(pickle.dumps(made))
    images = made.images(range(8))
    sent = pickle.dumps(made)
    assert len(sent) == before
    assert torch.equal(pickle.loads(sent).on(CPU).images(range(8)), images)  # noqa: S301


def test_the_way_back_through_the_noise_is_exact_whatever_the_precision():
    ends = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
    found = [
        interpolate(denoiser(a_unet(), sampler="ddim", steps=10, precision=precision), ends, 3)
        for precision in PRECISIONS
    ]
    assert torch.equal(found[0].frames, found[1].frames)


@pytest.mark.parametrize(
    ("found", "on_gpu", "expected"),
    [
        (Capabilities(cpu_bf16=True), False, "bf16"),
        (Capabilities(cpu_bf16=False), False, "fp32"),
        (Capabilities(num_gpus=1, gpu_version=(8, 0)), True, "bf16"),
        (Capabilities(num_gpus=1, gpu_version=(7, 0), cpu_bf16=True), True, "fp32"),
        (Capabilities(cpu_bf16=False), True, "bf16"),  # the driver of workers that have the GPUs
    ],
)
def test_mixed_is_bf16_where_the_hardware_computes_it(monkeypatch, found, on_gpu, expected):
    monkeypatch.setattr(Capabilities, "of_this_machine", classmethod(lambda _: found))
    profile = Profile.model_validate({"resources_per_worker": {"GPU": 1 if on_gpu else 0}})
    assert sampling_precision("mixed", profile) == expected
    assert {sampling_precision(asked, profile) for asked in PRECISIONS} == set(PRECISIONS)
    if not on_gpu:
        made = denoiser(a_unet())
        assert made.identity("ema").precision == expected
        assert "mixed" not in repr(replace(made, seed=4).identity("ema"))


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
    made = denoiser(a_unet(), precision="fp32", batch_size=64)
    prepared = a_unet()
    prepared.embedding = nn.Embedding(20, 64)
    need = {
        n: memory.OVERHEAD * (memory.call_bytes(prepared, torch.randn(n, *SHAPE)) or math.nan) for n in (16, 32, 64)
    }
    assert need[64] / need[32] == pytest.approx(2, rel=0.01)
    monkeypatch.setattr(device, "free_memory_bytes", lambda: int(1.01 * need[16]))
    with pytest.raises(UsageError, match=r"sampling.batch_size: got 64, .* Use --batch-size 16"):
        made.images(range(64))
    smaller = denoiser(a_unet(), precision="fp32", batch_size=16)
    assert len(smaller.images(range(16))) == 16
