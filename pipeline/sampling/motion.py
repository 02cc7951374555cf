"""Pictures of how images come about: denoising strips, animations, and the way from one image to another through the noise behind them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ddpm import ddim, ddim_invert, slerp, timestep_subset
from pipeline.data.images import crop_and_resize, decode_image, to_float, to_uint8
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.pictures.pictures import save_animation, save_grid, save_strip
from pipeline.sampling.generation import Denoiser, Shape

STRIP_FRAMES, ANIMATION_FRAMES = 10, 40
LEAST_SIGNAL = 0.02  # sqrt(abar) of the last step that inversion goes to (docs/modes.md has the measurement)
MOST_ERROR = 10.0  # of the ends of a passage, in grey levels
T = TypeVar("T")


Progress = Callable[[int], None]  # called with the number of steps done


def draw_strip(denoiser: Denoiser, path: Path, num_images: int = 8, progress: Progress | None = None) -> None:
    """Draw how images come out of noise: rows are images, columns are times."""
    frames, labels = trajectory(denoiser, num_images, STRIP_FRAMES, progress)
    save_strip(frames, path, labels)


def draw_animation(denoiser: Denoiser, path: Path, num_images: int = 16, progress: Progress | None = None) -> None:
    """Draw how images come out of noise as an animated GIF: all of them at once, resting on the last."""
    frames, _ = trajectory(denoiser, num_images, ANIMATION_FRAMES, progress)
    save_animation(frames, path)


def trajectory(
    denoiser: Denoiser, num_images: int, num_frames: int, progress: Progress | None = None
) -> tuple[list[Tensor], list[str]]:
    """Return about `num_frames` uint8 frames [n, C, H, W] from noise to image, equally spaced over the steps, and their labels."""
    kept = denoiser.timesteps
    last = len(kept) - 1
    picks = {round(i * last / (num_frames - 1)) for i in range(num_frames)}
    states = enumerate(_reporting(denoiser.denoise(range(num_images)), progress))
    # the step from t leads to the next timestep, and the last one to the image
    drawn = [
        (to_uint8(x).cpu(), f"t = {kept[last - i - 1]}" if i < last else "image") for i, (_, x) in states if i in picks
    ]
    return [frame for frame, _ in drawn], [label for _, label in drawn]


@dataclass(frozen=True)
class Passage:
    """The way from one image to another: uint8 frames [n, C, H, W], and how far the ends are from what was asked for."""

    ends: Tensor  # uint8 [2, C, H, W], the images that were given
    frames: Tensor
    error: float  # root mean square over the ends' pixels, in grey levels of 255


def interpolate(denoiser: Denoiser, ends: Tensor, num_frames: int, progress: Progress | None = None) -> Passage:
    """Go from one image to another along the sphere of the noise behind them (Song, Meng & Ermon 2021, section 5.3).

    DDIM is run backwards from each of the two `ends`, uint8 [2, C, H, W], to its noise; noises in between are denoised by DDIM
    without noise (eta 0) over the same steps, in float32. x0 is not clipped on the way, so that the first and the last frame are the ends
    again, in the limit of many steps. Both stop at the last step with a signal of `LEAST_SIGNAL`: beyond it, x0 from x_t is the network's
    error, divided by about nothing. All frames have one label, or none; guidance cannot be run backwards.
    """
    assert denoiser.sampling.guidance_scale == 1
    diffusion = replace(denoiser.diffusion, clip_x0=False)
    with_signal = max(1, int((diffusion.schedule.alphas_cumprod.sqrt() >= LEAST_SIGNAL).sum()))
    # linspace begins beside the clean image
    timesteps = timestep_subset(with_signal, denoiser.sampling.num_steps(with_signal), "linspace")
    denoiser.model.eval()
    x0 = denoiser.compute.send(to_float(ends))
    inverted = ddim_invert(diffusion, denoiser.network(range(2), exact=True), x0, timesteps=timesteps)
    _, noise = deque(_reporting(inverted, progress), maxlen=1).pop()
    weights = torch.linspace(0, 1, num_frames).tolist()
    between = torch.cat([slerp(noise[:1], noise[1:], weight) for weight in weights])
    network = denoiser.network(range(num_frames), exact=True)
    denoised = ddim(diffusion, network, between, timesteps=timesteps)
    _, x = deque(_reporting(denoised, progress, len(timesteps)), maxlen=1).pop()
    frames = to_uint8(x).cpu()
    error = float((frames[[0, -1]].float() - ends.float()).square().mean().sqrt())
    return Passage(ends, frames, error)


def draw_passage(passage: Passage, path: Path) -> None:
    """Draw the two images that were given, at either side of what lies between them, and how far its ends are from them."""
    pictures = torch.cat([passage.ends[:1], passage.frames, passage.ends[1:]])
    apart = f"off by {passage.error:.1f}"
    captions = ["given", apart, *("" for _ in passage.frames[2:]), apart, "given"]
    save_grid(pictures, path, columns=len(pictures), captions=captions)


def read_end(reference: str, shape: Shape, dataset: Dataset | None) -> Tensor:
    """Return an image of a shape, uint8 [C, H, W]: a row of the dataset by number, or a PNG or JPEG file, cropped and resized."""
    path, (channels, height, width) = Path(reference), shape
    if reference.isdecimal() and not path.exists():
        if dataset is None:
            raise DataError(
                f"--interpolate: no image {reference}: this run was imported without images; give two image files"
            )
        row = int(reference)
        if row >= len(dataset):
            raise UsageError(f"--interpolate: no image {row}; {dataset.manifest.name} has rows 0 .. {len(dataset) - 1}")
        return torch.from_numpy(dataset.read([row])[0])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"--interpolate: {reference} cannot be read ({error.strerror}); give the number of a row, or an image file"
        ) from None
    pixels = decode_image(data, mode="L" if channels == 1 else "RGB", where=reference)
    if pixels.shape[:2] != (height, width):
        pixels = crop_and_resize(pixels, (height, width))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _reporting(steps: Iterable[T], progress: Progress | None, before: int = 0) -> Iterator[T]:
    """Yield the steps, and report after each how many there were, with those of a part before."""
    for count, step in enumerate(steps, before + 1):
        yield step
        if progress is not None:
            progress(count)
