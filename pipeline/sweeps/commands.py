"""What `ddpm-pipe sweep` does: plan, record, run what the ledger lacks, and report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.cluster_profile import Profile, forwarded
from pipeline.config.context import Context
from pipeline.config.experiment import with_overrides
from pipeline.console import Console
from pipeline.data.shards import Dataset
from pipeline.errors import FailedTrialsError, PipelineError, UsageError
from pipeline.ingest.ingest import availability, ensure_ingested
from pipeline.metrics.scoring import scorer_of
from pipeline.redaction import public_uri
from pipeline.runs.choose_scorer import progress_on
from pipeline.runs.record import origin_of, trial_of
from pipeline.runs.train import TrainRequest
from pipeline.storage.folder import RunStatus, fitting
from pipeline.storage.next_command import typeable
from pipeline.storage.runs import Run, normalise_name
from pipeline.sweeps.config import Sweep, axis_of, base_experiment, load_sweep, plain_base, sweep_from, with_settings
from pipeline.sweeps.driver import SweepDriver
from pipeline.sweeps.entry import JudgedBy
from pipeline.sweeps.folder import SECONDS, SweepFolder
from pipeline.sweeps.plan import SweepPlan, SweepRequest, make_sweep_plan, trial_profile
from pipeline.sweeps.points import Checker, completed, title
from pipeline.sweeps.publish import SweepTracking, publish
from pipeline.sweeps.report import REPORT_FILE
from pipeline.sweeps.result import Result, result_of
from pipeline.sweeps.trial import ForTrials
from pipeline.sweeps.tune import run_missing
from pipeline.tracking.notices import notify, send_pending
from pipeline.tracking.tracker import TrackingSettings
from pipeline.tracking.tracker import sync as deliver
from pipeline.training.trained import profile_of


def sweep_request(
    context: Context,
    reference: str | None,
    over: Sequence[str],
    options: dict[str, Any],
    overrides: Sequence[str],
    max_concurrent: int | None,
) -> SweepRequest:
    """Read sweep and base experiment; UsageError where they are wrong."""
    sweep = load_sweep(reference, over, options, overrides)
    return SweepRequest(sweep, base_experiment(sweep), context.profile, max_concurrent)


def plan_sweep(asked: SweepRequest) -> SweepPlan:
    """Plan and check a sweep without downloading, ingesting or writing anything."""
    found = availability(asked.base.data, asked.profile.datasets(), asked.base.validation.holdout)
    return make_sweep_plan(asked, found.text, found.num_rows, found.shape, found.num_classes)


def start_sweep(context: Context, asked: SweepRequest) -> Result:
    """Run a new sweep to its end and report it; resume that of $DDPM_PIPE_RUN if a job of Slurm has begun it.

    The result lists the trials that failed.
    """
    begun = SweepFolder.begun(asked.profile.home(), asked.profile.storage)
    if begun is not None:
        return resume_sweep(context, begun, asked.max_concurrent)
    make_sweep_plan(asked, "", None, None)  # what can be refused without the images is refused before they are fetched
    dataset = _ingested(asked, context.console)
    manifest = dataset.manifest
    checked = make_sweep_plan(asked, dataset.location, manifest.num_rows, manifest.shape)
    about = {"path": dataset.location, "fingerprint": manifest.fingerprint, "name": manifest.name}
    home, profile, plain = asked.profile.home(), asked.profile.to_dict(), plain_base(asked.sweep)
    folder = SweepFolder.create(home, asked.sweep, asked.base, plain, about, profile, list(context.command))
    with folder.lock():
        return _carry_out(folder, asked, checked, dataset, context.console)


def resume_sweep(
    context: Context,
    folder: SweepFolder,
    max_concurrent: int | None = None,
    changes: Callable[[Sweep], Sweep] | None = None,
) -> Result:
    """Resume a sweep: run the trials that its ledger lacks. `changes` adds points or seeds to the sweep."""
    with folder.lock():  # two who extend one sweep would each lose what the other added
        sweep = folder.sweep if changes is None else changes(folder.sweep)
        asked = SweepRequest(sweep, folder.base, folder.profile(context.named), max_concurrent)
        dataset = Dataset.open(folder.record.dataset["path"], asked.profile.cache)
        manifest = dataset.manifest
        if manifest.fingerprint != folder.record.dataset["fingerprint"]:
            raise UsageError(
                f"sweep {folder.id} was run on other images: restore them in {dataset.location}, or start a new sweep"
            )
        checked = make_sweep_plan(asked, dataset.location, manifest.num_rows, manifest.shape)
        if changes is not None:
            folder.extend(sweep, list(context.command))
        return _carry_out(folder, asked, checked, dataset, context.console)


def extend(
    context: Context, reference: str, over: Sequence[str], options: dict[str, Any], max_concurrent: int | None
) -> Result:
    """Add values, seeds or points to a sweep, and run what its ledger lacks."""
    folder = SweepFolder.find(context.home, reference, context.store)
    return resume_sweep(context, folder, max_concurrent, lambda sweep: extended(sweep, over, options))


def extended(sweep: Sweep, over: Sequence[str], options: dict[str, Any]) -> Sweep:
    """Return the sweep with more values of its settings, further settings, or changed options, such as more seeds."""
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


def request_of_winner(context: Context, reference: str, overrides: Sequence[str]) -> TrainRequest:
    """Return the request to train a sweep's best point at its base's full length; `other` is a conflicting argument."""
    folder = SweepFolder.find(context.home, reference, context.store)
    folder.fetch_files()
    best = _result(folder).best
    if best is None:
        raise UsageError(f"sweep {folder.id} has no trial with a value yet; {typeable(f'resume {folder.id}')}")
    name = normalise_name(f"{folder.base.name}-{best.title}".replace(" = ", "").replace(", ", "-"))
    sweep = folder.sweep
    # a sweep's thrift in pictures and log lines is not the winner's
    kept = {key: value for key, value in sweep.overrides.items() if not key.startswith(("logging.", "checkpoint."))}
    experiment = with_settings(folder.plain_base, {**kept, **best.point, "name": name}, f"sweep {folder.id}")
    origin = origin_of(f"sweep {folder.id}", f"with {best.title}, the best point of", folder.mlflow_run_id)
    return TrainRequest(with_overrides(experiment, overrides), folder.profile(context.named), origin)


# -- parts


def require_all_finished(result: Result) -> None:
    """Raise FailedTrialsError, which sets the exit code, if trials failed."""
    if result.failed:
        lost = result.failed[0]
        raise FailedTrialsError(
            f"sweep {result.sweep_id}: {len(result.failed)} of its trials failed, the first ({lost.title}, seed {lost.seed}) with: "
            f"{lost.reason}; try them again with: {typeable(f'resume {result.sweep_id}')}"
        )


def _ingested(asked: SweepRequest, console: Console) -> Dataset:
    data, holdout, profile = asked.base.data, asked.base.validation.holdout, asked.profile
    return ensure_ingested(data, profile.datasets(), console.say, holdout=holdout, cache=profile.cache)


def _carry_out(folder: SweepFolder, asked: SweepRequest, plan: SweepPlan, dataset: Dataset, console: Console) -> Result:
    """Run the trials that the ledger lacks, and report in any case. The caller holds the sweep's lock."""
    folder.begin()
    profile = trial_profile(asked.profile, plan.trial.num_workers, plan.max_concurrent)
    folder.update(status=RunStatus.RUNNING, reason="")
    console.say(
        f"sweep {folder.id}: {plan.num_trials} trials at most, {plan.max_concurrent} at once, in {folder.folder}"
    )
    tracking = SweepTracking(folder, asked.profile, dataset)
    tracking.start()
    try:
        judged_by = _judged_by(asked, dataset, profile, console)
        more_calls = asked.sweep.more_network_calls if asked.sweep.metric != "bpd" else ()
        store, secrets = tracking.for_trials, forwarded(profile)
        for_trials = ForTrials(asked.sweep.metric, judged_by, more_calls, store, os.getcwd(), secrets, profile)
        driver = SweepDriver(folder, asked, plan, for_trials, tracking.mlflow_run_id, console)
        run_missing(driver, plan.trial.num_workers)
    except PipelineError as error:
        interrupted = getattr(error, "exit_code", 0) in (75, 130, 143)
        folder.tick()
        folder.update(status=RunStatus.INTERRUPTED if interrupted else RunStatus.FAILED, reason=str(error))
        notify(folder, asked.profile, "interrupted" if interrupted else "failed", str(error))
        tracking.close("KILLED" if interrupted else "FAILED")
        raise
    result = replace(_result(folder, plan.checked), seconds=folder.seconds, report=str(folder.report / REPORT_FILE))
    publish(folder, result, tracking, console)
    best = {} if result.best is None or result.best.mean is None else {f"best_{result.metric_name}": result.best.mean}
    folder.update(status=RunStatus.FINISHED, reason="", summary={**best, SECONDS: folder.seconds})
    notify(folder, asked.profile, "finished", summary=best)
    return result


def _judged_by(asked: SweepRequest, dataset: Dataset, profile: Profile, console: Console) -> JudgedBy:
    """Find extractor and reference once, before the trials: what cannot be scored is refused before anything is spent.

    Bits/dim need neither, unless early stopping measures KID during the trials.
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


def _result(folder: SweepFolder, checked: Checker | None = None) -> Result:
    sweep, base = folder.sweep, folder.base
    entries = []
    for entry in folder.ledger.entries().values():
        point = completed(sweep, base, entry.point)
        entries.append(replace(entry, point=point, title=title(point)))
    refused, warnings = ([], {}) if checked is None else (checked.refused, checked.warnings)
    listed = {key: axis.values for key, axis in sweep.space.items() if axis.values is not None}
    return result_of(folder.id, folder.record.name, sweep.metric, entries, refused, warnings, listed)


def sweep_meant(context: Context, reference: str) -> SweepFolder | None:
    """Return the sweep that a reference given to `resume` means, None if it means a run; UsageError if it is ambiguous.

    `latest` means the sweep of the latest run, if that run is a trial of a sweep that is not finished.
    """
    sweeps, runs = SweepFolder.all(context.home, context.store), Run.all(context.home, context.store)
    if reference == "latest":
        trial = trial_of(runs[-1].record) if runs else None
        found = [sweep for sweep in sweeps if trial is not None and sweep.id == trial.sweep]
        return found[0] if found and found[0].state().status is not RunStatus.FINISHED else None
    known: list[SweepFolder | Run] = [*sweeps, *runs]
    fits = fitting(reference, known)
    if not any(isinstance(each, SweepFolder) for each in fits):
        return None
    if len(fits) > 1:
        named = [f"{each.KIND} {each.id} ({each.record.name})" for each in fits]
        listing = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
        raise UsageError(f"{reference!r} is ambiguous: it fits {listing}; give more characters of the id")
    return fits[0] if isinstance(fits[0], SweepFolder) else None


@dataclass(frozen=True)
class SyncResult:
    """How many records were delivered, of which run or sweep, and to which store."""

    what: str
    num_records: int
    uri: str


def sync(context: Context, reference: str) -> SyncResult:
    """Deliver the undelivered records of a run, or of a sweep, to the tracking store."""
    folder: SweepFolder | Run
    sweep = None if reference == "latest" else SweepFolder.of(context.home, reference, context.store)
    if sweep is not None:
        folder, profile = sweep, sweep.profile(context.named)
    else:
        folder = Run.find(context.home, reference, context.store, lambda run: "running" if run.is_locked() else "")
        profile = profile_of(folder, context.named)
    settings = TrackingSettings.of_profile(context.home, profile)
    with folder.lock():
        num_records = deliver(folder.folder, settings)
    send_pending(folder.folder, profile)
    return SyncResult(f"{folder.KIND} {folder.id}", num_records, public_uri(settings.uri))
