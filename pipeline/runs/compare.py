"""Runs ranked by one metric, like with like: values are compared only where nothing but the model differs.

Every evaluation of a run left its values in `evaluations/*/scores.json`, each with its identity. Those whose identities differ by chance
alone (seed, chunk) form a group; a group that has a value of every run is a ranking. Where there is none, what differs is named.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.context import Context
from pipeline.errors import RefusedError, UsageError, nearest
from pipeline.metrics.metric_identity import LUCK, OF_THE_MODEL, differing, flat_identity
from pipeline.metrics.ranking import MetricValue, Ranking, rank
from pipeline.metrics.scores import SCORES_FILE, Spread
from pipeline.storage.runs import Run

_GO_WITH = {
    "generation.sampler": ("generation.eta", "generation.spacing")
}  # which have a meaning for some samplers alone
PREFERRED = ("fid", "bits_per_dim", "kid")  # what is compared where no metric is named, the first that every run has


def entries_of(run: Run) -> list[MetricValue]:
    """Return every value of a run's evaluations, oldest first; folders without readable scores are passed over."""
    run.fetch_files("evaluations")
    files = [path for path in (run.folder / "evaluations").glob(f"*/{SCORES_FILE}") if path.is_file()]
    found = []
    for path in sorted(files, key=lambda path: (path.stat().st_mtime, path)):
        try:
            data = json.loads(path.read_bytes())
            spreads = {key: Spread.from_json(spread) for key, spread in data["spreads"].items()}
            found += [
                MetricValue(
                    run.id,
                    run.record.name,
                    data["model"]["step"],
                    key,
                    value,
                    spreads.get(key),
                    data["identities"][key],
                    path.parent,
                )
                for key, value in data["values"].items()
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


@dataclass(frozen=True)
class Comparison:
    """A ranking for each group of like values."""

    rankings: list[Ranking]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"rankings": [ranking.to_json() for ranking in self.rankings]}


def compare_runs(
    context: Context, references: Sequence[str], metric: str | None, across: Collection[str]
) -> Comparison:
    """Rank runs by a metric; without references all that have been evaluated."""
    named = [Run.find(context.home, reference, context.store) for reference in references]
    runs = list({run.id: run for run in named}.values()) or [
        run for run in Run.all(context.home, context.store) if entries_of(run)
    ]
    if not runs:
        raise UsageError(f"no run in {context.home} has been evaluated; ddpm-pipe evaluate RUN")
    return Comparison(compare(runs, metric, across))


def compare(runs: Sequence[Run], metric: str | None = None, across: Collection[str] = ()) -> list[Ranking]:
    """Return a ranking for each group of like values that every run has a part in.

    Args:
        runs: at least one; of one run its checkpoints are compared.
        metric: "fid", or a whole name such as "fid_classifier_n559"; FID, bits/dim or KID where none is named.
        across: fields of the identity that may differ, such as "sampler"; they stand in the table.

    Raises:
        UsageError: a run without a value of the metric, or no such field.
        RefusedError: the runs have no like values; the message names what differs.
    """
    entries = {run.id: entries_of(run) for run in runs}
    wanted = metric or _preferred(entries)
    chosen = {run: [e for e in found if wanted in (e.metric, e.key)] for run, found in entries.items()}
    for run, found in chosen.items():
        if not found:
            raise UsageError(_missing(run, wanted, entries[run]))
    fields = _fields(across, [e for found in chosen.values() for e in found])
    groups: dict[str, list[MetricValue]] = {}
    for entry in itertools.chain.from_iterable(chosen.values()):
        alike = {k: v for k, v in flat_identity(entry.identity).items() if k not in _apart(fields)}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(entry)
    whole = {alike: group for alike, group in groups.items() if {e.run for e in group} == set(chosen)}
    if not whole:
        raise RefusedError(_refusal(chosen, wanted, fields))
    rankings = [rank(_one_each(group, fields), json.loads(alike), fields) for alike, group in whole.items()]
    several = [ranking for ranking in rankings if len(ranking.ranks) > 1]
    if not several and len(rankings) > 1:  # one run, each of its values of a kind of its own
        apart = [name for name in rankings[0].common if len({str(r.common.get(name)) for r in rankings}) > 1]
        short = ",".join(name.removeprefix("generation.") for name in apart)
        raise RefusedError(
            f"run {runs[0].id} has {len(rankings)} values of {wanted!r}, no two of one kind (they differ in {', '.join(apart)}); "
            f"name another run, or compare them with --across {short}"
        )
    return several or rankings


def _apart(fields: Collection[str]) -> set[str]:
    """Return the fields that need not be equal."""
    return {*LUCK, *OF_THE_MODEL, *fields}


def _fields(across: Collection[str], entries: list[MetricValue]) -> list[str]:
    """Return the whole names of the fields that may differ."""
    known = list(dict.fromkeys(name for entry in entries for name in flat_identity(entry.identity)))
    short = {name.rpartition(".")[2]: name for name in known}
    found = []
    for name in across:
        whole = name if name in known else short.get(name)
        if whole is None or whole == "metric":
            raise UsageError(f"--across: no field {name!r}{nearest(name, list(short))}; there are: {', '.join(short)}")
        found += [whole, *_GO_WITH.get(whole, ())]
    return list(dict.fromkeys(found))


def _one_each(group: list[MetricValue], fields: list[str]) -> list[MetricValue]:
    """Return one entry for each model: that over the most seeds, of several the newest."""
    best: dict[tuple[Any, ...], MetricValue] = {}
    for entry in group:
        flat = flat_identity(entry.identity)
        model = (entry.run, entry.step, *(flat.get(field) for field in fields))
        if model not in best or _num_seeds(entry) >= _num_seeds(best[model]):
            best[model] = entry
    return list(best.values())


def _num_seeds(entry: MetricValue) -> int:
    return int(entry.identity.get("generation", {}).get("num_seeds", 1))


def _preferred(entries: dict[str, list[MetricValue]]) -> str:
    """Return the metric to compare by where none is named."""
    metrics = [{e.metric for e in found} for found in entries.values()]
    for run, found in zip(entries, metrics, strict=True):
        if not found:
            raise UsageError(f"run {run} has not been evaluated; ddpm-pipe evaluate {run}")
    shared = set.intersection(*metrics)
    for name in (*PREFERRED, *sorted(shared)):
        if name in shared:
            return name
    names = "; ".join(f"{run}: {', '.join(sorted(found))}" for run, found in zip(entries, metrics, strict=True))
    raise RefusedError(f"the runs have no metric in common ({names}); evaluate them alike")


def _missing(run: str, wanted: str, found: list[MetricValue]) -> str:
    known = list(dict.fromkeys(name for e in found for name in (e.metric, e.key)))
    there = f"; it has: {', '.join(dict.fromkeys(e.metric for e in found))}" if known else ""
    return f"run {run} has no {wanted!r}{nearest(wanted, known)}{there}; see: ddpm-pipe evaluate {run} --help"


def _refusal(chosen: dict[str, list[MetricValue]], wanted: str, fields: list[str]) -> str:
    """Name what differs between those values of two runs that are most alike."""
    worst: tuple[int, str] | None = None
    for (one, left), (two, right) in itertools.combinations(chosen.items(), 2):
        pairs = [(differing(a.identity, b.identity, _apart(fields)), a, b) for a in left for b in right]
        apart, _, _ = min(pairs, key=lambda pair: len(pair[0]))
        if worst is None or len(apart) > worst[0]:
            what = "; ".join(apart) if apart else "no two of the runs differ, but not all three meet in one setting"
            worst = (len(apart), f"runs {one} and {two} have no {wanted!r} of the same kind ({what})")
    assert worst is not None, "one run alone is always a group"
    return f"{worst[1]}; evaluate them alike, or allow a field to differ with --across FIELD"
