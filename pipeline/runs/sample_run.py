"""`ddpm-pipe sample`: images of a run, or pictures of how they come about, written where the user finds them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.context import Context
from pipeline.errors import UsageError
from pipeline.runs.sample import Format, RequestPlan, SampleRequest, write_samples
from pipeline.runs.sample_pictures import Picture, check_picture, passage_between, passage_request, picture_from
from pipeline.storage.provenance import JOB_VARIABLE
from pipeline.storage.remote_run import RemoteRun
from pipeline.storage.runs import Run
from pipeline.tracking.opened import copy_to_opened
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.models import has_process
from pipeline.training.trained import experiment_of, not_trained


@dataclass(frozen=True)
class SampleTarget:
    """What is written, and into which folder: by default one in the run's own. `between` are two images to interpolate."""

    out: Path | None = None
    form: Format | Picture = "grid"
    between: tuple[str, str] | None = None


@dataclass(frozen=True)
class SampleResult:
    """What makes the images these, and the paths or addresses of what was written."""

    run: str
    identity: dict[str, Any]
    written: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"run": self.run, **self.identity, "written": self.written}


@dataclass(frozen=True)
class _Checked:
    """A request that fits its run. `store` is given where the folder of a job is copied to an object store."""

    run: Run
    request: SampleRequest
    settings: dict[str, Any]
    folder: Path
    store: RemoteRun | None

    @property
    def place(self) -> str:
        """The folder as the user finds it."""
        return str(self.folder) if self.store is None else f"{self.store.folder}/samples/{self.folder.name}"


def plan_samples(context: Context, reference: str, request: SampleRequest, target: SampleTarget) -> RequestPlan:
    """Check a request without generating anything."""
    checked = _check(context, reference, request, target)
    return RequestPlan(checked.run.id, {**checked.settings, "would write": checked.place})


def sample_run(context: Context, reference: str, request: SampleRequest, target: SampleTarget) -> SampleResult:
    """Generate images of a run and write them.

    Without `target.out` they are in the run's folder; in its object store where a job made them, whose own folder is removed with it.
    """
    checked = _check(context, reference, request, target)
    run, folder, profile, console = checked.run, checked.folder, context.profile, context.console
    settings = TrackingSettings.of_profile(context.home, profile)
    if target.between is not None:
        identity, paths = passage_between(run, checked.request, profile, console, target.between, folder)
    elif target.form == "strip" or target.form == "gif":
        identity, paths = picture_from(run, checked.request, profile, console, target.form, folder)
    else:
        identity, paths = write_samples(run, checked.request, profile, console, target.form, folder)
    copy_to_opened(settings, run, {}, [folder], console)
    if checked.store is not None:
        checked.store.send_samples(folder)
    return SampleResult(run.id, identity, [f"{checked.place}/{path.name}" for path in paths])


def _check(context: Context, reference: str, request: SampleRequest, target: SampleTarget) -> _Checked:
    if target.out is not None and re.match(r"\w[\w+.-]*:/", str(target.out)):
        raise UsageError(
            f"--out {str(target.out).replace(':/', '://', 1)}: images are written into a folder, not to an address; give a folder (a job "
            "whose storage is an object store leaves them there by itself, without --out)"
        )
    moving = target.between is not None or target.form in ("strip", "gif")
    run = Run.find(context.home, reference, context.store, _draws_no_way if moving else not_trained)
    if target.between is not None:
        request = passage_request(run, request)
    elif target.form in ("strip", "gif"):
        check_picture(request)
    experiment = experiment_of(run)
    sampling, seed = request.settings(experiment)
    for warning in request.warnings(experiment):
        context.console.say(f"warning: {warning}")
    store = run.remote if target.out is None and JOB_VARIABLE in os.environ else None
    folder = target.out or _fresh(run.folder / "samples", () if store is None else store.samples())
    settings = {**sampling.model_dump(), "seed": seed, "num_images": request.num_images}
    return _Checked(run, request, settings, folder.absolute(), store)


def _draws_no_way(run: Run) -> str:
    return not_trained(run) or ("" if has_process(experiment_of(run)) else "no diffusion model")


def _fresh(folder: Path, taken: Collection[str]) -> Path:
    """Return the first of folder/1, folder/2, ... that is neither there yet nor taken elsewhere."""
    number = 1
    while (folder / str(number)).exists() or str(number) in taken:
        number += 1
    return folder / str(number)
