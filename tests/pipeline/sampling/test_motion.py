"""Pictures of how images come about: the way back through the noise, and what strips, animations and passages show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm import BetaSchedule, GaussianDiffusion
from pipeline.config.experiment import DataConfig, SamplingConfig
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.ingest.ingest import ensure_ingested
from pipeline.sampling import motion
from pipeline.sampling.generation import Denoiser
from pipeline.sampling.motion import draw_animation, draw_passage, draw_strip, interpolate, read_end, trajectory
from tests.kit.drawings import pixels_of, place_of
from tests.pipeline.worker.steps import CPU


class Gaussians(nn.Module):
    """The optimal eps of N(0, s^2) data: sqrt(1 - abar) x_t / (abar s^2 + 1 - abar)."""

    def __init__(self, schedule: BetaSchedule, s: float) -> None:
        super().__init__()
        self.abar, self.s = schedule.alphas_cumprod.float(), s

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.abar[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * x / (abar * self.s**2 + 1 - abar)


def denoiser(steps: int = 50, **sampling: object) -> Denoiser:
    schedule = BetaSchedule.named("linear", 1000)
    settings = SamplingConfig.model_validate({"steps": steps, "batch_size": 4, **sampling})
    return Denoiser(GaussianDiffusion(schedule), Gaussians(schedule, 0.4), (1, 8, 8), settings, 0, CPU)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ensure_ingested(DataConfig(), tmp_path_factory.mktemp("datasets"))


def test_there_and_back_again_gives_the_same_images_in_the_limit_of_many_steps(digits):
    ends = torch.from_numpy(digits.read([3, 700]))
    errors = [interpolate(denoiser(steps), ends, 5).error for steps in (10, 50, 250, 1000)]
    assert errors[0] > errors[1]
    # a method of first order: five times as many steps, about a fifth of the error
    assert errors[1] / errors[2] == pytest.approx(5, rel=0.4)
    assert errors[3] < 1  # of 255


class Imperfect(Gaussians):
    """A network with a small error of its own at every step, as a trained one has."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + 0.02 * torch.sin(5 * x)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_way_back_ends_where_signal_is_left(digits, schedule, monkeypatch):
    schedule = BetaSchedule.named(schedule, 1000)
    network, settings = Imperfect(schedule, 0.4), SamplingConfig(sampler="ddim", steps=250, precision="fp32")
    made = Denoiser(GaussianDiffusion(schedule), network, (1, 8, 8), settings, 0, CPU)
    ends = torch.from_numpy(digits.read([3, 700]))
    assert interpolate(made, ends, 5).error < 10
    monkeypatch.setattr(motion, "LEAST_SIGNAL", 0.0)
    if schedule.name == "cosine":  # whose last step holds 5e-5 of it
        assert interpolate(made, ends, 5).error > 10


def test_what_lies_between_equal_images_is_that_image(digits):
    ends = torch.from_numpy(digits.read([3, 3]))
    frames = interpolate(denoiser(100), ends, 4).frames
    assert frames.shape == (4, 1, 8, 8)
    assert all(torch.equal(frame, frames[0]) for frame in frames)


def test_the_middle_of_the_way_belongs_to_both_ends(digits):
    """On Gaussian data DDIM is linear, so that the middle frame is the spherical mean of the ends: as far from one as from the other."""
    ends = torch.from_numpy(digits.read([3, 700]))
    first, *_, middle, _, last = interpolate(denoiser(100), ends, 7).frames[[0, 1, 3, 5, 6]].float()
    assert float((middle - first).norm()) == pytest.approx(float((middle - last).norm()), rel=0.05)


@pytest.mark.parametrize(("steps", "spacing"), [(50, "trailing"), (7, "trailing"), (3, "leading"), (20, "quad")])
def test_a_strip_is_labelled_by_the_times_of_its_columns_and_ends_with_the_image(steps, spacing):
    chosen = denoiser(steps, spacing=spacing)
    frames, labels = trajectory(chosen, 3, 10)
    kept = chosen.timesteps
    assert len(frames) == len(labels) == min(10, len(kept))
    assert (labels[0], labels[-1]) == (f"t = {kept[-2]}", "image")  # the first step leads from kept[-1] to kept[-2]
    assert torch.equal(frames[-1], chosen.images(range(3)))


def test_pictures_are_written(tmp_path: Path, digits):
    draw_strip(denoiser(20), tmp_path / "strip.png", 3)
    draw_animation(denoiser(20), tmp_path / "motion.gif", 5)
    draw_passage(interpolate(denoiser(20), torch.from_numpy(digits.read([3, 700])), 5), tmp_path / "passage.png")
    with Image.open(tmp_path / "motion.gif") as motion:
        assert motion.n_frames == 20
        durations = []
        for frame in range(motion.n_frames):
            motion.seek(frame)
            durations.append(motion.info["duration"])
        assert durations == [80] * 19 + [2000]
        assert motion.info["loop"] == 0  # for ever
        last = np.asarray(motion.convert("L"))
    # the last frame shows the images: 3 columns of 8 x 8 pixels, each drawn 8 times as large, 2 apart
    shown = last[2 : 2 + 64 : 8, 2 : 2 + 64 : 8]
    image = denoiser(20).images(range(4))[0, 0].numpy()
    assert np.abs(shown.astype(int) - image.astype(int)).max() <= 3  # a GIF has 256 colours
    strip = pixels_of(tmp_path / "strip.png")
    frames, labels = trajectory(denoiser(20), 3, strip.shape[1] // 66)
    tops = [place_of(image.numpy(), strip, 8)[0] for image in frames[-1]]
    assert np.diff(tops).tolist() == [66, 66]
    for column, frame in enumerate(frames):
        for image, top in zip(frame, tops, strict=True):
            left = 2 + 66 * column
            np.testing.assert_array_equal(strip[top : top + 64 : 8, left : left + 64 : 8, 0], image[0])
    assert len(frames) == len(labels) == (strip.shape[1] - 2) / 66
    drawn, (first, last_end) = pixels_of(tmp_path / "passage.png"), digits.read([3, 700])
    between = interpolate(denoiser(20), torch.from_numpy(digits.read([3, 700])), 5).frames.numpy()
    pictures = [first, *between, last_end]
    assert [place_of(image, drawn, 8) for image in pictures] == [(2, 2 + 66 * i) for i in range(7)]


def test_an_end_is_a_row_or_a_file(tmp_path: Path, digits, monkeypatch):
    assert torch.equal(read_end("17", (1, 8, 8), digits), torch.from_numpy(digits.read([17])[0]))
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    end = read_end(str(tmp_path / "wide.png"), (1, 8, 8), None)  # made gray, and its centred square made 8 x 8
    assert end.shape == (1, 8, 8)
    assert (int(end[0, 0, 0]), int(end[0, 0, 7])) == (0, 255)
    with pytest.raises(UsageError, match=r"rows 0 \.\. 1796"):
        read_end("1797", (1, 8, 8), digits)
    with pytest.raises(DataError, match="cannot be read"):
        read_end(str(tmp_path / "none.png"), (1, 8, 8), digits)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="expected a PNG or JPEG"):
        read_end(str(tmp_path / "text.png"), (1, 8, 8), None)


def test_without_a_dataset_a_row_is_refused_by_what_to_give_instead() -> None:
    with pytest.raises(DataError, match="give two image files"):
        read_end("3", (1, 8, 8), None)
