"""Runs ranked by one metric, like with like: values are compared only where nothing but the model differs.

Every evaluation of a run left its values in `evaluations/*/scores.json`, each with its identity. Those whose identities differ by chance
alone (seed, chunk) form a group, and each group is a ranking.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.context import Context
from pipeline.errors import RefusedError, UsageError, nearest
from pipeline.metrics.metric_identity import LUCK, OF_THE_MODEL, differing, flat_identity
from pipeline.metrics.ranking import MetricValue, Ranking, rank
from pipeline.metrics.scores import SCORES_FILE, Spread
from pipeline.storage.next_command import typeable
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
    named = [Run.find(context.home, reference, context.store, _not_evaluated) for reference in references]
    runs = list({run.id: run for run in named}.values()) or [
        run for run in Run.all(context.home, context.store) if entries_of(run)
    ]
    if not runs:
        raise UsageError(f"no run in {context.home} has been evaluated; {typeable('evaluate RUN')}")
    return Comparison(compare(runs, metric, across))


def _not_evaluated(run: Run) -> str:
    return "" if entries_of(run) else "not evaluated"


def compare(runs: Sequence[Run], metric: str | None = None, across: Collection[str] = ()) -> list[Ranking]:
    """Return a ranking for each group of like values: those of the most runs first, of several the one that an own setting is in.

    Args:
        runs: at least one; of one run its checkpoints are compared.
        metric: "fid", or a whole name such as "fid_classifier_n559"; the first of FID, bits/dim and KID that most runs have if None.
        across: fields of the identity that may differ, such as "sampler"; the table shows them.

    With a metric or a field, all runs are asked to be in one ranking, and groups that lack a run are left out.

    Raises:
        UsageError: a run that is not evaluated or lacks the metric that was asked for, or no such field.
        RefusedError: a ranking of all runs was asked for, and they have no like values; the message names what differs.
    """
    entries = {run.id: entries_of(run) for run in runs}
    for run, found in entries.items():
        if not found:
            raise UsageError(f"run {run} has not been evaluated; {typeable(f'evaluate {run}')}")
    wanted = metric or _preferred(entries)
    chosen = {run: [e for e in found if wanted in (e.metric, e.key)] for run, found in entries.items()}
    for run, found in chosen.items():
        if not found and metric is not None:
            raise UsageError(_missing(run, wanted, entries[run]))
    fields = _fields(across, [e for found in chosen.values() for e in found])
    groups: dict[str, list[MetricValue]] = {}
    for entry in itertools.chain.from_iterable(chosen.values()):
        alike = {k: v for k, v in flat_identity(entry.identity).items() if k not in _apart(fields)}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(entry)
    rankings = [rank(_one_each(group, fields), json.loads(alike), fields) for alike, group in groups.items()]
    if len(runs) > 1 and (metric is not None or across):
        rankings = [ranking for ranking in rankings if ranking.runs == set(chosen)]
        if not rankings:
            raise RefusedError(_refusal(chosen, wanted, fields))
    own = {found[0].folder for found in chosen.values() if found}  # by the evaluation at the end of the training
    return sorted(rankings, key=lambda r: (-len(r.runs), not any(place.entry.folder in own for place in r.ranks)))


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
    """Return the metric to compare by if none is named: one that the most runs have."""
    counts = Counter(metric for found in entries.values() for metric in {e.metric for e in found})
    order = [*PREFERRED, *sorted(counts)]
    return max(counts, key=lambda metric: (counts[metric], -order.index(metric)))


def _missing(run: str, wanted: str, found: list[MetricValue]) -> str:
    known = list(dict.fromkeys(name for e in found for name in (e.metric, e.key)))
    there = f"; it has: {', '.join(dict.fromkeys(e.metric for e in found))}" if known else ""
    return f"run {run} has no {wanted!r}{nearest(wanted, known)}{there}; see: ddpm-pipe evaluate {run} --help"


def _refusal(chosen: dict[str, list[MetricValue]], wanted: str, fields: list[str]) -> str:
    """Name what differs between those values of two runs that are most alike."""
    worst: tuple[list[str], str] | None = None
    for (one, left), (two, right) in itertools.combinations(chosen.items(), 2):
        apart = min((differing(a.identity, b.identity, _apart(fields)) for a in left for b in right), key=len)
        if worst is None or len(apart) > len(worst[0]):
            what = "; ".join(apart) if apart else "any two of the runs have one, all of them have none"
            worst = apart, f"runs {one} and {two} have no {wanted!r} of the same kind ({what})"
    assert worst is not None, "one run alone is always a group"
    names = [line.partition(":")[0] for line in worst[0]]
    may_differ = names and all(name.startswith("generation.") or name == "selection" for name in names)
    across = ",".join(name.removeprefix("generation.") for name in names)
    return f"{worst[1]}; evaluate them alike" + (f", or compare them with --across {across}" if may_differ else "")
