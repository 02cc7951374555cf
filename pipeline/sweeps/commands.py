"""What `ddpm-pipe sweep` does: plan, record, run what the ledger lacks, and report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.cluster_profile import Profile, forwarded, home_of, load_profile, storage_of
from pipeline.config.experiment import with_overrides
from pipeline.console import Console
from pipeline.data.shards import Dataset
from pipeline.errors import FailedTrialsError, PipelineError, UsageError
from pipeline.import_path import allow_modules_in
from pipeline.ingest.ingest import availability, ensure_ingested, ingest_options
from pipeline.metrics.scorer import scorer_of
from pipeline.runs import training_run
from pipeline.runs.choose_scorer import progress_on
from pipeline.runs.record import trial_of
from pipeline.storage.runs import Run, RunStatus, normalise_name
from pipeline.sweeps.config import Sweep, axis_of, base_experiment, load_sweep, plain_base, sweep_from, with_settings
from pipeline.sweeps.driver import run_missing
from pipeline.sweeps.entry import JudgedBy
from pipeline.sweeps.folder import SECONDS, SweepFolder
from pipeline.sweeps.plan import SweepPlan, SweepRequest, make_sweep_plan, trial_profile
from pipeline.sweeps.points import Checked, completed, title
from pipeline.sweeps.publish import SweepTracking, publish
from pipeline.sweeps.report import REPORT_FILE
from pipeline.sweeps.result import Result, result_of
from pipeline.sweeps.trial import ForTrials


def sweep_request(
    reference: str | None,
    over: Sequence[str],
    options: dict[str, Any],
    overrides: Sequence[str],
    cluster: str | None,
    max_concurrent: int | None,
) -> SweepRequest:
    """Read sweep, base experiment and profile; UsageError where they are wrong."""
    allow_modules_in(os.getcwd())
    sweep = load_sweep(reference, over, options, overrides)
    return SweepRequest(sweep, base_experiment(sweep), load_profile(cluster), max_concurrent)


def plan_sweep(asked: SweepRequest) -> SweepPlan:
    """Plan and check a sweep without downloading, ingesting or writing anything."""
    data = asked.base.data
    found = availability(data.source, ingest_options(data), asked.profile.datasets())
    return make_sweep_plan(asked, found.text, found.num_rows, found.shape, found.num_classes)


def start_sweep(asked: SweepRequest, command: Sequence[str], console: Console | None = None) -> Result:
    """Run a new sweep to its end and report it; trials that failed are in the result."""
    console = console or Console()
    make_sweep_plan(asked, "", None, None)  # what can be refused without the images is refused before they are fetched
    dataset = _ingested(asked, console)
    manifest = dataset.manifest
    checked = make_sweep_plan(asked, dataset.location, manifest.num_rows, manifest.shape)
    about = {"path": dataset.location, "fingerprint": manifest.fingerprint, "name": manifest.name}
    folder = SweepFolder.create(
        asked.profile.home(),
        asked.sweep,
        asked.base,
        plain_base(asked.sweep),
        about,
        asked.profile.to_dict(),
        list(command),
    )
    with folder.lock():
        return _carry_out(folder, asked, checked, dataset, console)


def resume_sweep(
    folder: SweepFolder,
    cluster: str | None,
    max_concurrent: int | None = None,
    changes: Callable[[Sweep], Sweep] | None = None,
    command: Sequence[str] = (),
    console: Console | None = None,
) -> Result:
    """Go on with a sweep: run what its ledger lacks. `changes` adds points or seeds to what was asked for."""
    console = console or Console()
    allow_modules_in(os.getcwd())
    with folder.lock():  # two who extend one sweep would each lose what the other added
        sweep = folder.sweep if changes is None else changes(folder.sweep)
        asked = SweepRequest(sweep, folder.base, folder.profile(cluster), max_concurrent)
        dataset = Dataset.open(folder.record.dataset["path"], asked.profile.cache)
        manifest = dataset.manifest
        if manifest.fingerprint != folder.record.dataset["fingerprint"]:
            raise UsageError(
                f"sweep {folder.id} was run on other images: restore them in {dataset.location}, or start a new sweep"
            )
        checked = make_sweep_plan(asked, dataset.location, manifest.num_rows, manifest.shape)
        if changes is not None:
            folder.extend(sweep, list(command))
        return _carry_out(folder, asked, checked, dataset, console)


def extend(
    reference: str,
    over: Sequence[str],
    options: dict[str, Any],
    cluster: str | None,
    max_concurrent: int | None,
    command: Sequence[str],
) -> Result:
    """Add values, seeds or points to a sweep, and run what its ledger lacks."""
    folder = SweepFolder.find(home_of(cluster), reference, storage_of(cluster))
    return resume_sweep(folder, cluster, max_concurrent, lambda sweep: extended(sweep, over, options), command)


def extended(sweep: Sweep, over: Sequence[str], options: dict[str, Any]) -> Sweep:
    """Return the sweep with more values of its settings, further settings, or other options, such as more seeds."""
    content = sweep.to_dict()
    for assignment in over:
        key, axis = axis_of(assignment)
        known = content["space"].get(key)
        content["space"][key] = axis if known is None else _with_more_values(key, known, axis)
    for name in ("seeds", "num_points"):
        asked, had = options.get(name), getattr(sweep, name)
        if asked is not None and had is not None and asked < had:
            raise UsageError(
                f"--{name.replace('_', '-')}: got {asked}, but the sweep has {had}, and --extend takes nothing away: give more, or leave"
                " it out"
            )
    return sweep_from(content | {key: value for key, value in options.items() if value is not None}, "--extend")


def _with_more_values(key: str, known: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    kind = "choice" if "choice" in known else "grid"
    if kind not in known:
        raise UsageError(f"--over {key}: this sweep draws it from a range; add points with --num-points")
    values = more.get("grid") or more.get("choice")
    if values is None or len(more) > 1:
        raise UsageError(f"--over {key}: this sweep lists its values; give more of them, such as --over {key}=a,b")
    return {**known, kind: [*known[kind], *(value for value in values if value not in known[kind])]}


def request_of_winner(
    reference: str, other: str | None, cluster: str | None, overrides: Sequence[str]
) -> training_run.TrainRequest:
    """Return the best point of a sweep as a training at its base's full length; `other` is what else was asked for, in vain."""
    if other is not None:
        raise UsageError(f"got both {other} and --from {reference}; the sweep says what to train")
    allow_modules_in(os.getcwd())
    folder = SweepFolder.find(home_of(cluster), reference, storage_of(cluster))
    folder.fetch()
    best = _result(folder).best
    if best is None:
        raise UsageError(f"sweep {folder.id} has no trial with a value yet; ddpm-pipe resume {folder.id}")
    name = normalise_name(f"{folder.base.name}-{best.title}".replace(" = ", "").replace(", ", "-"))
    sweep = folder.sweep
    # a sweep's thrift in pictures and log lines is not the winner's
    kept = {key: value for key, value in sweep.overrides.items() if not key.startswith(("logging.", "checkpoint."))}
    experiment = with_settings(folder.plain_base, {**kept, **best.point, "name": name}, f"sweep {folder.id}")
    origin = training_run.origin_of(f"sweep {folder.id}", f"with {best.title}, the best point of", folder.mlflow_run_id)
    return training_run.TrainRequest(with_overrides(experiment, overrides), folder.profile(cluster), origin)


# -- parts


def require_all_finished(result: Result) -> None:
    """Raise FailedTrialsError, for the exit code, where trials failed."""
    if result.failed:
        lost = result.failed[0]
        raise FailedTrialsError(
            f"sweep {result.sweep_id}: {len(result.failed)} of its trials failed, the first ({lost.title}, seed {lost.seed}) with: "
            f"{lost.reason}; try them again with: ddpm-pipe resume {result.sweep_id}"
        )


def _ingested(asked: SweepRequest, console: Console) -> Dataset:
    data = asked.base.data
    return ensure_ingested(
        data.source, ingest_options(data), asked.profile.datasets(), console.say, cache=asked.profile.cache
    )


def _carry_out(folder: SweepFolder, asked: SweepRequest, plan: SweepPlan, dataset: Dataset, console: Console) -> Result:
    """Run what the ledger lacks, and report, whatever happened. The caller holds the sweep's lock."""
    folder.begin()
    profile = trial_profile(asked.profile, plan.trial.num_workers, plan.max_concurrent)
    folder.update(status=RunStatus.RUNNING, reason="")
    console.say(
        f"sweep {folder.id}: {plan.num_trials} trials at most, {plan.max_concurrent} at once, in {folder.folder}"
    )
    tracking = SweepTracking(folder, asked.profile, dataset)
    tracking.start()
    try:
        for_trials = ForTrials(
            asked.sweep.metric,
            _judged_by(asked, dataset, profile, console),
            asked.sweep.more_network_calls if asked.sweep.metric != "bpd" else (),
            tracking.for_trials,
            os.getcwd(),
            forwarded(profile),
            profile,
        )
        run_missing(folder, asked, plan, dataset, tracking.mlflow_run_id, for_trials, console)
    except PipelineError as error:
        interrupted = getattr(error, "exit_code", 0) in (75, 130, 143)
        folder.tick()
        folder.update(status=RunStatus.INTERRUPTED if interrupted else RunStatus.FAILED, reason=str(error))
        tracking.close("KILLED" if interrupted else "FAILED")
        raise
    report = str(folder.report / REPORT_FILE)
    result = replace(_result(folder, plan.checked), seconds=folder.seconds, report=report)
    publish(folder, result, tracking, console)
    folder.update(status=RunStatus.FINISHED, reason="", summary={**_summary(result), SECONDS: folder.seconds})
    return result


def _judged_by(asked: SweepRequest, dataset: Dataset, profile: Profile, console: Console) -> JudgedBy:
    """Find extractor and reference once, before the trials do: what cannot be scored is told before anything is spent.

    Bits/dim need neither, unless trials are judged on the way, by KID.
    """
    if asked.sweep.metric == "bpd" and asked.sweep.early_stopping is None:
        return {}
    scorer = scorer_of(dataset, asked.base.evaluation, profile.home(), progress=progress_on(console))
    extractor = scorer.extractor
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "num_images": scorer.reference.num_images,
    }


def _result(folder: SweepFolder, checked: Checked | None = None) -> Result:
    """Return what the ledger says."""
    sweep, base = folder.sweep, folder.base
    entries = []
    for entry in folder.ledger.entries().values():
        point = completed(sweep, base, entry.point)
        entries.append(replace(entry, point=point, title=title(point)))
    refused, warnings = (checked.refused, checked.warnings) if checked is not None else ([], {})
    listed = {key: axis.values for key, axis in sweep.space.items() if axis.values is not None}
    return result_of(folder.id, folder.record.name, sweep.metric, entries, refused, warnings, listed=listed)


def _summary(result: Result) -> dict[str, float]:
    best = result.best
    return {} if best is None or best.mean is None else {f"best_{result.metric_name}": best.mean}


def sweep_meant(reference: str, cluster: str | None) -> SweepFolder | None:
    """Return the sweep that a reference given to `resume` means, None where it means a run; UsageError where it fits several of either.

    `latest` means the sweep whose trial the latest run is, while that sweep is not finished.
    """
    home, storage = home_of(cluster), storage_of(cluster)
    sweeps = SweepFolder.all(home, storage)
    if reference != "latest":
        found = [sweep for sweep in sweeps if sweep.is_called(reference)]
        return _only(reference, found, Run.all(home, storage)) if found else None
    runs = Run.all(home, storage)
    trial = trial_of(runs[-1].record) if runs else None
    of_latest = [sweep for sweep in sweeps if trial is not None and sweep.id == trial.sweep]
    return of_latest[0] if of_latest and of_latest[0].state().status is not RunStatus.FINISHED else None


def _only(reference: str, sweeps: Sequence[SweepFolder], runs: Sequence[Run]) -> SweepFolder | None:
    """Return which of the sweeps that a reference fits is meant, None where a run is: a whole id decides."""
    known: list[SweepFolder | Run] = [*sweeps, *runs]
    whole = [each for each in known if reference in (each.id, each.mlflow_run_id)]
    beginning = [run for run in runs if any(i.startswith(reference) for i in (run.id, run.mlflow_run_id or ""))]
    found = whole or [*sweeps, *beginning]
    if len(found) == 1:
        return found[0] if isinstance(found[0], SweepFolder) else None
    fits = [f"{'sweep' if isinstance(each, SweepFolder) else 'run'} {each.id} ({each.record.name})" for each in found]
    listing = ", ".join(fits[:5]) + (f" and {len(fits) - 5} more" if len(fits) > 5 else "")
    raise UsageError(f"{reference!r} is ambiguous: it fits {listing}; give more characters of the id")
