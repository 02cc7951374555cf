"""What the commands about finished runs do: find the run, act, and return plain results."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import home_of, load_profile, storage_of
from pipeline.console import Console
from pipeline.errors import InterruptedRunError, UsageError
from pipeline.exchange.export import Format as ExportFormat
from pipeline.exchange.export import export_run
from pipeline.import_path import allow_modules_in
from pipeline.redaction import public_uri
from pipeline.runs.compare import compare as rank
from pipeline.runs.compare import entries_of
from pipeline.runs.evaluate import ScoreRequest, evaluate_run, sample_metrics
from pipeline.runs.evaluate_grid import evaluate_grid
from pipeline.runs.grid import parse_grid
from pipeline.runs.sample import Format, SampleRequest, generate_from, write_samples
from pipeline.runs.sample_pictures import Picture, check_picture, passage_between, passage_request, picture_from
from pipeline.signals import Terminated
from pipeline.storage.provenance import JOB_VARIABLE
from pipeline.storage.runs import Run
from pipeline.sweeps.folder import SweepFolder
from pipeline.tracking.opened import Opened
from pipeline.tracking.tracker import TrackingSettings
from pipeline.tracking.tracker import sync as deliver
from pipeline.training.trained import experiment_of, profile_of


def sample(
    reference: str,
    request: SampleRequest,
    out: Path | None,
    form: Format | Picture,
    cluster: str | None,
    *,
    dry_run: bool,
    between: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Generate images of a run, or pictures of how they come about, and write them; return their identity and where they are.

    Without `out` they stand in the run's folder; in its object store where a job made them, whose own folder goes with it.
    """
    if out is not None and re.match(r"\w[\w+.-]*:/", str(out)):
        raise UsageError(
            f"--out {str(out).replace(':/', '://', 1)}: images are written into a folder, not to an address; give a folder (a job whose "
            "storage is an object store leaves them there by itself, without --out)"
        )
    run, profile = _found(reference, cluster), load_profile(cluster)
    if between is not None:
        request = passage_request(run, request)
    elif form in ("strip", "gif"):
        check_picture(request)
    experiment = experiment_of(run)
    sampling, seed = request.settings(experiment)
    _warn(request.warnings(experiment))
    store = run.remote if out is None and JOB_VARIABLE in os.environ else None
    folder = (out or _fresh(run.folder / "samples", () if store is None else store.samples())).absolute()
    place = str(folder) if store is None else f"{store.folder}/samples/{folder.name}"
    if dry_run:
        return {
            "run": run.id,
            **sampling.model_dump(),
            "seed": seed,
            "num_images": request.num_images,
            "would write": place,
        }
    opened = Opened.of(TrackingSettings.of_profile(home_of(cluster), profile))
    if between is not None:
        about, paths = passage_between(run, request, profile, between, folder)
    elif form == "strip" or form == "gif":
        about, paths = picture_from(run, request, profile, form, folder)
    else:
        with _kept_when_stopped():
            samples = generate_from(run, request, profile, Console())
        about, paths = samples.identity(), write_samples(samples, folder, form)
    _copy(opened, run, {}, [folder])
    if store is not None:
        store.send_samples(folder)
    written = [f"{place}/{path.name}" for path in paths]
    shown = written if len(paths) <= 3 else [f"{written[0]} ... ({len(paths) - 1} images)"]
    return {"run": run.id, **about, "written": shown}


def evaluate(reference: str, request: ScoreRequest, cluster: str | None, *, dry_run: bool) -> dict[str, Any]:
    """Score a run; return the scores with their identities and where they are."""
    run, profile = _found(reference, cluster), load_profile(cluster)
    experiment = experiment_of(run)
    sampling, seed = request.settings(experiment)
    asked = request.evaluation(experiment)
    if sample_metrics(asked):
        _warn(request.warnings(experiment))
    if dry_run:
        return {
            "run": run.id,
            **sampling.model_dump(),
            "seeds": list(range(seed, seed + request.num_seeds)),
            "metrics": ", ".join(asked.metrics),
            "extractor": asked.extractor,
            "at most images": asked.num_images,
            **({"compared with": _real_images(request)} if sample_metrics(asked) else {}),
            **({"bits/dim of": _images_of_bound(request)} if "bpd" in asked.metrics else {}),
        }
    settings = TrackingSettings.of_profile(home_of(cluster), profile_of(run, cluster))
    opened = Opened.of(settings)
    with _kept_when_stopped():
        found, paths = evaluate_run(run, request, profile, settings, Console())
    result = found.to_json()
    _copy(opened, run, result["values"], paths)
    return {"run": run.id, **result, "written": [str(path) for path in paths], "table": found.lines}


def grid(reference: str, request: ScoreRequest, text: str, cluster: str | None, *, dry_run: bool) -> dict[str, Any]:
    """Score a run at every point of a grid; return the rows and where table and picture are."""
    run, profile = _found(reference, cluster), load_profile(cluster)
    experiment = experiment_of(run)
    keys, points = parse_grid(text, request)
    for point in points:  # all of it is checked before any of it is computed
        point.settings(experiment)
        point.evaluation(experiment)
    named = [", ".join(f"{key} {getattr(point, key)}" for key in keys) for point in points]
    asked = request.evaluation(experiment)
    if sample_metrics(asked):
        for name, point in zip(named, points, strict=True):
            _warn([f"{name}: {warning}" for warning in point.warnings(experiment)])
    if dry_run:
        return {"run": run.id, "metrics": ", ".join(asked.metrics), "at most images": asked.num_images, "points": named}
    settings = TrackingSettings.of_profile(home_of(cluster), profile_of(run, cluster))
    with _kept_when_stopped():
        found, paths = evaluate_grid(run, keys, points, profile, settings, Console())
    written = [str(path) for path in paths]
    return {
        "run": run.id,
        "rows": found.rows(),
        "yardsticks": found.yardsticks,
        "written": written,
        "table": found.lines(),
    }


def compare(
    references: Sequence[str], metric: str | None, across: Sequence[str], cluster: str | None
) -> dict[str, Any]:
    """Rank runs by a metric; without any named, all that have been evaluated."""
    named = [_found(reference, cluster) for reference in references]
    runs = list({run.id: run for run in named}.values()) or [
        r for r in Run.all(home_of(cluster), storage_of(cluster)) if entries_of(r)
    ]
    if not runs:
        raise UsageError(f"no run in {home_of(cluster)} has been evaluated; ddpm-pipe evaluate RUN")
    rankings = rank(runs, metric, across)
    lines = [line for ranking in rankings for line in ["", *ranking.lines()]][1:]
    return {"rankings": [ranking.to_json() for ranking in rankings], "table": lines}


def _images_of_bound(request: ScoreRequest) -> str:
    count = "every image" if request.num_images is None else f"at most {request.num_images} images"
    return f"{count} of {_real_images(request)}"


def _real_images(request: ScoreRequest) -> str:
    return "the images trained on" if request.split is None else f"split {request.split!r}"


def export(
    reference: str, folder: Path, form: ExportFormat, step: int | None, weights: str, cluster: str | None
) -> dict[str, Any]:
    """Write a run's model into a new folder for other programs; return what was written."""
    return export_run(_found(reference, cluster), folder, form, step, weights)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        Console().say(f"warning: {warning}")


def _copy(opened: Opened | None, run: Run, figures: dict[str, float], files: list[Path]) -> None:
    """Give what was made to the run that `mlflow run` opened for this command, if it did."""
    trouble = None if opened is None else opened.record(run, figures, files)
    if trouble is not None:
        Console().say(f"warning: {trouble}")


def sync(reference: str, cluster: str | None) -> str:
    """Deliver a run's undelivered records to the tracking store, or a sweep's; return one line on what was done."""
    sweep = None if reference == "latest" else SweepFolder.of(home_of(cluster), reference, storage_of(cluster))
    if sweep is not None:
        settings = TrackingSettings.of_profile(home_of(cluster), sweep.profile(cluster))
        with sweep.lock():
            count = deliver(sweep.folder, settings)
        return f"sweep {sweep.id}: delivered {count} records to {public_uri(settings.uri)}"
    run = _found(reference, cluster)
    settings = TrackingSettings.of_profile(home_of(cluster), profile_of(run, cluster))
    with run.lock():
        count = deliver(run.folder, settings)
    return f"run {run.id}: delivered {count} records to {public_uri(settings.uri)}"


def to_text(result: dict[str, Any]) -> str:
    """Return a result as lines for people."""
    if "table" in result:
        head = [f"run {result['run']}", ""] if "run" in result else []
        return "\n".join([*head, *result["table"], *(["", *result["written"]] if "written" in result else [])])
    lines = []
    for name, value in result.items():
        shown = value if isinstance(value, list) else [value]
        lines += [f"{name + ':' if i == 0 else '':<17}{item}" for i, item in enumerate(shown)]
    return "\n".join(lines)


@contextmanager
def _kept_when_stopped() -> Iterator[None]:
    """Tell whoever presses Ctrl-C or sends SIGTERM that nothing is lost."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        raise InterruptedRunError(
            "stopped; what was computed so far is kept: the same command goes on from there",
            130 if isinstance(stop, KeyboardInterrupt) else 75,
        ) from None


def _found(reference: str, cluster: str | None) -> Run:
    allow_modules_in(os.getcwd())
    return Run.find(home_of(cluster), reference, storage_of(cluster))


def _fresh(folder: Path, taken: Collection[str]) -> Path:
    """Return the first of folder/1, folder/2, ... that is neither there yet nor taken elsewhere."""
    number = 1
    while (folder / str(number)).exists() or str(number) in taken:
        number += 1
    return folder / str(number)
