"""`ddpm-pipe rm` and `ddpm-pipe prune`: what would go, why something stays, and its removal, step by step.

Nothing goes that something else depends on. A removal begins with MLflow's entries, then the run disappears (pipeline/storage/removal.py),
and its files go last. So whatever is listed is whole, except for what MLflow has of it, and the same command removes it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.config.context import Context
from pipeline.data.shards_files import cached_shards
from pipeline.errors import RefusedError, RunLockedError, UsageError
from pipeline.runs.record import trial_of
from pipeline.storage.durable import storage_errors
from pipeline.storage.folder import Folder, fitting
from pipeline.storage.home import datasets_dir, features_dir
from pipeline.storage.judgements import FILE
from pipeline.storage.next_command import typeable
from pipeline.storage.remote_run import own_folder
from pipeline.storage.removal import Remains, hide, left_over, num_bytes
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.tracking.removal import TrackedRun, tracked_run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.trained import experiment_of, profile_of

IDLE_S = 3600.0  # what was written to since may be in use
CHUNKS = ("features", "generated")  # folders of a run; `pipeline.sampling.generated` computes them again


@dataclass(frozen=True)
class Item:
    """Something that is removed: what it is, where, and its bytes."""

    what: str
    place: str
    num_bytes: int


@dataclass
class Removal:
    """What goes, and what stays though it was chosen, with the reason. `steps` removes it."""

    items: list[Item] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    is_done: bool = False
    _folders: list[tuple[Folder, TrackedRun | None]] = field(default_factory=list)  # sweeps before their trials
    _remains: list[Remains] = field(default_factory=list)
    _others: list[Callable[[], None]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "removed": self.is_done,
            "bytes": self.num_bytes,
            "items": [{"what": item.what, "place": item.place, "bytes": item.num_bytes} for item in self.items],
            "kept": [{"what": what, "why": why} for what, why in self.kept],
        }

    def steps(self) -> Iterator[None]:
        """Remove it, and yield after each step; a kill between two steps leaves a home that every command reads."""
        remains = list(self._remains)
        for folder, tracked in self._folders:
            with folder.lock(copies=False):
                if tracked is not None:
                    tracked.remove()
                    yield
                remains.append(hide(folder))
                yield
        # what is left of a sweep says that its trials are to go: it goes last
        for each in sorted(remains, key=lambda each: each.kind != Run.KIND):
            each.erase()
            yield
        for remove in self._others:
            remove()
            yield
        self.is_done = True

    # -- planning

    def add_folder(self, folder: Folder, tracked: TrackedRun | None) -> None:
        """Add a run or sweep, with what MLflow has of it."""
        what = _words(folder)
        if tracked is None and folder.mlflow_run_id is not None:
            why = "this MLflow has no such run; it may be recorded in another (MLFLOW_TRACKING_URI)"
            self.kept.append((f"MLflow run {folder.mlflow_run_id} of {folder.KIND} {folder.id}", why))
        self.items.append(Item(what, str(folder.folder), num_bytes(folder.folder)))
        if folder.remote is not None:
            stored = sum(entry.num_bytes for entry in folder.remote.folder.objects())
            self.items.append(Item(what, str(folder.remote.folder), stored))
        for place in () if tracked is None else tracked.folders:
            self.items.append(Item(f"artifacts of {folder.KIND} {folder.id}", str(place), num_bytes(place)))
        self._folders.append((folder, tracked))

    def add_remains(self, remains: Remains) -> None:
        """Add what a removal that was killed has left."""
        self.items += [Item(f"left of {remains.kind} {remains.id}", *place) for place in remains.places()]
        self._remains.append(remains)

    def add(self, what: str, place: Path | str, num_bytes: int, remove: Callable[[], None]) -> None:
        """Add anything else."""
        self.items.append(Item(what, str(place), num_bytes))
        self._others.append(remove)


def plan_removal(context: Context, references: Sequence[str], sweeps: type[Folder]) -> Removal:
    """Return what goes with runs and sweeps of a home: a sweep's trials go with it. `sweeps` is the class of sweep folders.

    Raises:
        UsageError: no such run or sweep.
        RunLockedError: a process works on one of them.
        RefusedError: something that stays depends on one of them.
        TrackingError: MLflow's store does not answer.
    """
    there = _There(context, sweeps)
    going = there.with_trials([there.meant(reference) for reference in references])
    found = Removal()
    for folder in going:
        if folder.is_locked():
            with folder.lock(copies=False):  # raises the error that names the holder
                pass
        if why := there.dependent(folder, {each.id for each in going}):
            raise RefusedError(f"{folder.KIND} {folder.id}: {why}")
    for folder in going:
        tracked = there.tracked(folder)
        if why := _registered(tracked):
            raise RefusedError(f"{folder.KIND} {folder.id}: {why}")
        found.add_folder(folder, tracked)
    return found


def plan_prune(
    context: Context,
    sweeps: type[Folder],
    statuses: Collection[str] = (),
    older_than_days: float = 0.0,
    keep_checkpoints: int | None = None,
) -> Removal:
    """Return what can be computed or fetched again, and what killed removals left.

    With `statuses`, the runs on their own (no trials) of these, unchanged for so many days, go, too; with `keep_checkpoints`, all but so
    many of each run's checkpoints.
    """
    there, found = _There(context, sweeps), Removal()
    left = [each for kind in (Run, sweeps) for each in left_over(kind, context.home, context.store)]
    orphans = {each.id for each in left if each.kind != Run.KIND}
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    going: list[Folder] = []
    for run in there.runs:
        trial, state = trial_of(run.record), run.state()
        old = datetime.fromisoformat(state.updated or run.record.created) <= before
        if trial.sweep in orphans if trial is not None else state.status in statuses and old:
            going.append(run)
    for folder, why in there.drop_needed(going):
        found.kept.append((_words(folder), why))
    for folder in going:
        tracked = there.tracked(folder)
        if why := _registered(tracked):
            found.kept.append((_words(folder), why))
        else:
            found.add_folder(folder, tracked)
    for each in left:
        found.add_remains(each)
    staying = [run for run in there.runs if run not in going and not run.is_locked()]
    for run in staying:
        _add_caches_of(run, found)
        if keep_checkpoints is not None:
            _add_checkpoints(run, keep_checkpoints, there.pinned(run), found)
    _add_caches(context, found)
    return found


class _There:
    """The runs and sweeps of a home and its store."""

    def __init__(self, context: Context, sweeps: type[Folder]) -> None:
        self._context = context
        self.runs = Run.all(context.home, context.store)
        self.sweeps = sweeps.all(context.home, context.store)

    def meant(self, reference: str) -> Folder:
        known: list[Folder] = [*self.sweeps, *self.runs]
        if reference == "latest" and self.runs:
            return self.runs[-1]
        found = fitting(reference, known)
        if len(found) == 1:
            return found[0]
        if not found:
            raise UsageError(
                f"{reference!r}: no such run or sweep in {self._context.home}; `{typeable('runs')}` lists the runs"
            )
        fits = ", ".join(_words(each) for each in found[:5])
        raise UsageError(f"{reference!r} is ambiguous: it fits {fits}; give more characters of the id")

    def with_trials(self, asked: Sequence[Folder]) -> list[Folder]:
        """Return each once, sweeps first, with the runs of their trials."""
        sweeps = {each.id: each for each in asked if not isinstance(each, Run)}
        trials = [(run, trial_of(run.record)) for run in self.runs]
        runs = [run for run, trial in trials if run in asked or (trial is not None and trial.sweep in sweeps)]
        return [*sweeps.values(), *runs]

    def dependent(self, folder: Folder, going: Collection[str]) -> str:
        """Return what depends on a run and stays, in words; "" if nothing does."""
        if not isinstance(folder, Run):
            return ""
        trial = trial_of(folder.record)
        for sweep in self.sweeps:
            if trial is not None and trial.sweep == sweep.id not in going:
                remedy = typeable(f"rm {sweep.id}")
                return f"sweep {sweep.id} ({sweep.record.name}) has it as a trial; remove the whole sweep: {remedy}"
        for run in self.runs:
            if run.id not in going and _origin_of(run)[0] == folder.id:
                remedy = typeable(f"rm {folder.id} {run.id}")
                return f"run {run.id} ({run.record.name}) was forked from it; remove both: {remedy}"
        return ""

    def drop_needed(self, going: list[Folder]) -> Iterator[tuple[Folder, str]]:
        """Take those out that a process works on or something else depends on; yield each with the reason."""
        needed = True
        while needed:
            ids, needed = {each.id for each in going}, False
            for each in list(going):
                why = "a process works on it" if each.is_locked() else self.dependent(each, ids)
                if why:
                    going.remove(each)
                    needed = True
                    yield each, why

    def tracked(self, folder: Folder) -> TrackedRun | None:
        """Return what MLflow has of a run or sweep."""
        if folder.mlflow_run_id is None:
            return None
        settings = TrackingSettings.of_profile(folder.home, profile_of(folder, self._context.named))
        return tracked_run(settings, folder.mlflow_run_id)

    def pinned(self, run: Run) -> list[str]:
        """Return the names of a run's checkpoints that forks start from, and of those that its experiment keeps beside the newest."""
        run.fetch_files(FILE)
        own = experiment_of(run).checkpoint.retention.pinned(run.folder, run.current_attempt())
        return [*own, *(name for origin, name in map(_origin_of, self.runs) if origin == run.id)]


def _origin_of(run: Run) -> tuple[str, str]:
    """Return the id of the run and the name of the checkpoint that a fork starts from; ("", "") of a run that is none."""
    place = Path((run.record.initial_weights or "").partition("?")[0])  # .../<id>/checkpoints/<name>
    return place.parent.parent.name, place.name


def _registered(tracked: TrackedRun | None) -> str:
    if tracked is None or not tracked.versions:
        return ""
    return f"MLflow's registry has its model as {tracked.versions[0]}; delete that version there: {typeable('ui')}"


def _words(folder: Folder) -> str:
    return f"{folder.KIND} {folder.id} ({folder.record.name})"


# -- checkpoints and caches


def _add_checkpoints(run: Run, keep: int, pinned: Collection[str], found: Removal) -> None:
    saved = RunCheckpoints(run)
    unneeded = saved.unneeded(keep, pinned)

    def remove() -> None:
        with run.lock(copies=False):
            saved.prune(keep, pinned)

    if unneeded:
        place = run.checkpoints if run.remote is None else run.remote.folder.child("checkpoints")
        names = ", ".join(sorted(unneeded))
        found.add(f"checkpoints of {_words(run)}", f"{place} ({names})", sum(unneeded.values()), remove)


def _add_caches_of(run: Run, found: Removal) -> None:
    for name in CHUNKS:
        folder = run.folder / name

        def remove(folder: Path = folder) -> None:
            with suppress(RunLockedError), run.lock():  # the copy in an object store goes, too
                shutil.rmtree(folder, ignore_errors=True)

        if _is_idle(folder):
            found.add(f"computed {name} of {_words(run)}", folder, num_bytes(folder), remove)
    if run.remote is not None:
        committed = {checkpoint.folder for checkpoint in RunCheckpoints(run).committed()}
        for folder in sorted(committed):
            if _is_idle(folder):
                found.add(f"copy of a checkpoint of {_words(run)}", folder, num_bytes(folder), _remover(folder))


def _add_caches(context: Context, found: Removal) -> None:
    """Add what all runs of a home, or all of this user's processes on this machine, share."""
    features, datasets = features_dir(context.home), datasets_dir(context.home)
    shared = {
        "statistics of real images": [*features.glob("reference-*.safetensors"), features / "parts"],
        "an ingest that was killed": datasets.glob(".*.partial"),
        "a measurement that was killed": context.home.glob(".ddpm-probe-*"),
        "copies of checkpoints": own_folder("origins").glob("*"),
    }
    for what, places in shared.items():
        for place in sorted(places):
            if _is_idle(place):
                found.add(what, place, num_bytes(place), _remover(place))
    shards = cached_shards(context.profile.cache)
    if unused := shards.unused(IDLE_S):
        found.add("copies of remote shards", shards.folder, sum(unused.values()), lambda: shards.remove(unused))


def _is_idle(place: Path) -> bool:
    """Whether a file or folder is there, and nothing in it was written in the last hour."""
    try:
        newest = max(path.stat().st_mtime for path in (place, *place.rglob("*")))
    except OSError:  # it is not there, or is being changed
        return False
    return time.time() - newest > IDLE_S


def _remover(place: Path) -> Callable[[], None]:
    def remove() -> None:
        with storage_errors(place):
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)

    return remove
