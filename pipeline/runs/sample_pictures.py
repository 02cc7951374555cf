"""Pictures of how a run's images come about, written beside what they are: strips, animations, the way from one image to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from pipeline.config.cluster_profile import Profile
from pipeline.console import Bar, Console
from pipeline.data.labels import BALANCED, NONE, ClassNames, own_word
from pipeline.data.shards import Dataset
from pipeline.errors import RefusedError, UsageError
from pipeline.runs.sample import LoadedRun, SampleRequest, Written, new_folder, write_about
from pipeline.sampling.motion import MOST_ERROR, draw_animation, draw_passage, draw_strip, interpolate, read_end
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.training.models import build_diffusion
from pipeline.training.trained import experiment_of

Picture = Literal["strip", "gif"]
MOST_IMAGES = 64  # all of them are held, and drawn, at every step


def check_picture(request: SampleRequest) -> None:
    """Refuse more images than a picture holds (UsageError)."""
    if request.num_images > MOST_IMAGES:
        raise UsageError(f"--num-images: got {request.num_images}; a strip or an animation holds at most {MOST_IMAGES}")


def picture_from(
    run: Run, request: SampleRequest, profile: Profile, console: Console, form: Picture, out: Path
) -> Written:
    """Draw how a run's images come out of noise; return their identity and the paths written."""
    loaded = LoadedRun.load(run, request, profile, console)
    denoiser = loaded.denoiser(request)
    with new_folder(out):
        path = out / f"denoising.{'png' if form == 'strip' else 'gif'}"
        draw = draw_strip if form == "strip" else draw_animation
        draw(denoiser, path, request.num_images, Bar(console, "denoising", len(denoiser.timesteps), "steps"))
        identity = loaded.identity(denoiser, request.num_images)
        return identity, [path, write_about(identity, out)]


def passage_request(run: Run, request: SampleRequest) -> SampleRequest:
    """Return the request as DDIM can be run backwards: unguided, and with one label for all frames; UsageError where it cannot be."""
    experiment, labels = experiment_of(run), request.labels or ""
    build_diffusion(experiment)  # refuses a model without a diffusion process
    if request.guidance_scale not in (None, 1.0):
        raise UsageError("--guidance: a guided model cannot be run backwards; leave it out with --interpolate")
    if request.sampler not in (None, "ddim") or request.eta:
        raise UsageError(
            "--interpolate: DDIM without noise is what can be run backwards; leave --sampler and --eta out"
        )
    if request.spacing not in (None, "linspace"):
        raise UsageError(
            "--interpolate: running backwards begins beside the clean image, which is spacing linspace; leave --spacing out"
        )
    if request.num_images < 2 or request.num_images > MOST_IMAGES:
        raise UsageError(f"--num-images: got {request.num_images}; from one image to another take 2 .. {MOST_IMAGES}")
    if experiment.model.class_conditional and not labels:
        if experiment.training.label_dropout == 0:
            raise UsageError(
                "--interpolate: this model was trained with labels alone (training.label_dropout 0), and has to be told of which "
                "class the images are; give --label CLASS"
            )
        labels = NONE
    names = ClassNames.from_state(RunCheckpoints(run).newest_state())
    if own_word(labels, names) == BALANCED:
        raise UsageError(
            f"--label: got {labels!r}, but all images of --interpolate have one label; give a class, or {NONE!r}"
        )
    return replace(request, sampler="ddim", eta=0.0, spacing="linspace", guidance_scale=1.0, labels=labels or None)


def passage_between(
    run: Run, request: SampleRequest, profile: Profile, console: Console, ends: tuple[str, str], out: Path
) -> Written:
    """Draw the way between two images, rows of the run's dataset or files; return what it is and the paths written."""
    loaded = LoadedRun.load(run, request, profile, console)
    denoiser = loaded.denoiser(request)
    images = run.record.dataset["path"]
    dataset = Dataset.open(images, profile.cache) if images else None
    given = torch.stack([read_end(end, loaded.trained.shape, dataset) for end in ends])
    bar = Bar(console, "interpolating", 2 * denoiser.sampling.num_steps(denoiser.diffusion.num_timesteps), "steps")
    passage = interpolate(denoiser, given, request.num_images, bar)
    bar.close()
    if passage.error > MOST_ERROR:
        raise RefusedError(
            f"--interpolate: got ends {passage.error:.0f} grey levels (of 255, root mean square) from the given images, expected at "
            f"most {MOST_ERROR:g}. Use more --steps than {len(denoiser.timesteps)}, or train the model for longer."
        )
    with new_folder(out):
        path = out / "interpolation.png"
        draw_passage(passage, path)
        identity = loaded.identity(denoiser, request.num_images)
        del identity["seed"]  # the noise is that behind the images
        about = identity | {
            "between": list(ends),
            "error_of_the_ends": round(passage.error, 3),
            "precision": "fp32",
            "compile": False,
        }
        return about, [path, write_about(about, out)]
