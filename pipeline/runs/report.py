"""The report of runs as one page: scores, curves, samples by step, settings, data, schedule, cost, and the commands that repeat them.

Everything comes from the runs' folders, so that it needs neither tracking store nor network. A training ends with one; `ddpm-pipe report`
makes it of any runs, side by side.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.context import Context
from pipeline.config.experiment import Experiment
from pipeline.console import duration
from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.errors import PipelineError
from pipeline.metrics.metric_identity import flat_identity
from pipeline.metrics.ranking import MetricValue
from pipeline.metrics.score_table import YARDSTICK_NAMES, with_spread
from pipeline.metrics.scores import SCORES_FILE
from pipeline.pictures.line_chart import Line, line_chart
from pipeline.pictures.page import details, lines, page, picture, section, table, text
from pipeline.pictures.pictures import as_png, card_lines, dataset_card, grid_preview
from pipeline.runs.compare import compare, entries_of
from pipeline.runs.runs_table import headline
from pipeline.storage.durable import write_atomically
from pipeline.storage.runs import Run
from pipeline.tracking.curves import Point, recorded
from pipeline.tracking.text import repeat_command
from pipeline.training.trained import experiment_of

REPORT_FILE = "report.html"
PREVIEWS, PREVIEW_IMAGES, PREVIEW_PIXELS = 8, 16, 520  # steps of a run, images of a step, pixels at most
CHART_GROUPS = ("score", "val", "train")
_SPREAD = re.compile(r"_(std|se|error)(?=_|$)")  # in the name of the spread of another metric
_NUMBERED = re.compile(r"(.+)_(\d+)$")  # one part of a range, such as a quartile of t


@dataclass(frozen=True)
class Report:
    """Where the report of runs is."""

    runs: list[str]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"runs": self.runs, "report": str(self.path)}


def make_report(context: Context, references: Sequence[str], out: Path | None, several: Path) -> Report:
    """Write the report of runs to `out`: by default of one run into its folder, of several to the path for these."""
    found = [Run.find(context.home, reference, context.store) for reference in references]
    runs = list({run.id: run for run in found}.values())
    for run in runs:
        if not run.is_locked():
            run.fetch_files()
    path = out or (several if len(runs) > 1 else runs[0].folder / REPORT_FILE)
    return Report([run.id for run in runs], write_report(runs, path))


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Write the report of runs, at least one, to a file; raises StorageError if that fails."""
    contents = [_Content.of(run) for run in runs]
    write_atomically(path, page(_title(contents), _about(contents), _parts(contents)))
    return path


@dataclass(frozen=True)
class _Content:
    """What the report shows of a run, read from its folder; `manifest` is None if its images are not there any more."""

    run: Run
    experiment: Experiment
    points: list[Point]
    scores: list[MetricValue]
    manifest: Manifest | None

    @classmethod
    def of(cls, run: Run) -> _Content:
        manifest, place = None, run.record.dataset["path"]
        with suppress(PipelineError):
            manifest = Dataset.open(place).manifest if place else None
        return cls(run, experiment_of(run), recorded(run), entries_of(run), manifest)

    @property
    def name(self) -> str:
        return f"{self.run.record.name} {self.run.id}"

    @property
    def step(self) -> int:
        return max([self.run.state().step, *(point.step for point in self.points)])

    def values(self, metric: str) -> list[float]:
        """Return the recorded values of a metric, in order."""
        return [point.value for point in self.points if point.metric == metric]


def _title(contents: Sequence[_Content]) -> str:
    return (
        contents[0].name if len(contents) == 1 else f"{len(contents)} runs: {', '.join(each.name for each in contents)}"
    )


def _about(contents: Sequence[_Content]) -> str:
    each = [
        f"{one.run.id}: {one.step:,} of {one.experiment.training.steps:,} steps on {one.run.record.dataset['name']}"
        for one in contents
    ]
    return f"Run {'; '.join(each)}." if len(contents) == 1 else f"{'; '.join(each)}."


def _parts(contents: Sequence[_Content]) -> list[str]:
    verdict, comparison = _compared(contents)
    return [
        f"<div class=answer>{text(verdict)}</div>",
        section("Comparison, best first", *comparison),
        section("Scores", _scores(contents)),
        section("Curves", _many(_charts(contents))),
        section("Samples by step, each from equal noise", *_samples(contents)),
        section(
            "Settings that differ" + (" from the defaults" if len(contents) == 1 else ""),
            table(_settings(contents)),
        ),
        section("Images trained on", *_cards(contents)),
        section("Noise schedule", *_schedules(contents)),
        section("Cost", table(_cost(contents))),
        section("Repeat it", *map(_repeated, contents)),
    ]


# -- scores


def _compared(contents: Sequence[_Content]) -> tuple[str, list[str]]:
    """Return the verdict in a sentence or two, and for several runs the rankings that it rests on."""
    scored = [each for each in contents if each.scores]
    if not scored:
        return "Not scored yet.", []
    if len(contents) == 1:
        summary = contents[0].run.state().summary
        name = headline(summary)
        return ("Scored; its figures are below." if name is None else f"{name}: {summary[name]:.4g}"), []
    rankings = compare([each.run for each in scored])
    lacking = [each.run.id for each in contents if not each.scores]
    verdict = rankings[0].statement + (f". Not scored: {', '.join(lacking)}" if lacking else "")
    return verdict, [table(ranking.rows()) + lines(ranking.notes()) for ranking in rankings]


def _scores(contents: Sequence[_Content]) -> str:
    rows = [["run", "score", "of this model", *YARDSTICK_NAMES.values(), "step", "images by"]]
    for entry in itertools.chain.from_iterable(each.scores for each in contents):
        beside = _yardsticks(entry)
        made = flat_identity(entry.identity)
        words = [f"{made[f'generation.{key}']}" for key in ("sampler", "steps") if f"generation.{key}" in made]
        seed = f", seed {made['generation.seed']}" if "generation.seed" in made else ""
        rows.append(
            [
                entry.run, entry.key, with_spread(entry.value, entry.spread),
                *(f"{beside[name]:.4g}" if name in beside else "" for name in YARDSTICK_NAMES),
                f"{entry.step:,}", " ".join(words) + seed,
            ]
        )  # fmt: skip
    over = dict.fromkeys(e.spread.over for each in contents for e in each.scores if e.spread is not None)
    return table(rows) + (f"<p>&plusmn;: over {text(', '.join(over))}.</p>" if over else "")


def _yardsticks(entry: MetricValue) -> dict[str, float]:
    """Return the same measurement of images that were not generated, by the yardstick's name."""
    found = json.loads((entry.folder / SCORES_FILE).read_bytes()).get("yardsticks", {})
    return {name: values[entry.metric] for name, values in found.items() if entry.metric in values}


# -- curves


def _charts(contents: Sequence[_Content]) -> list[str]:
    """Return a chart for each recorded curve; of one run those that belong together share a chart."""
    curves: dict[str, dict[str, list[Point]]] = {}
    for each in contents:
        for point in each.points:
            curves.setdefault(point.metric, {}).setdefault(each.run.id, []).append(point)
    spreads = {
        partner: name for name in curves if (partner := _SPREAD.sub("", name, count=1)) in curves and partner != name
    }
    shown = [
        name
        for name, by_run in curves.items()
        if name.partition("/")[0] in CHART_GROUPS
        and name not in spreads.values()
        and any(len({point.step for point in points}) > 1 for points in by_run.values())
    ]
    charts: dict[str, list[Line]] = {}
    for name in sorted(shown, key=_order):
        chart, label = _place(name) if len(contents) == 1 else (name, "")
        drawn = charts.setdefault(chart, [])
        for number, each in enumerate(contents):
            points = curves[name].get(each.run.id, [])
            errors = {point.step: point.value for point in curves.get(spreads.get(name, ""), {}).get(each.run.id, [])}
            drawn.append(
                Line(
                    label or each.name,
                    [point.step for point in points],
                    [point.value for point in points],
                    [errors.get(point.step, 0.0) for point in points] if errors else (),
                    len(drawn) if label else number,
                )
            )
    return [line_chart(name, drawn) for name, drawn in charts.items()]


def _place(name: str) -> tuple[str, str]:
    """Return the chart that a curve of one run is drawn in, and what it is called there: what belongs together shares one."""
    if numbered := _NUMBERED.match(name):
        return numbered[1], numbered[2]
    if name.startswith("val/"):
        of_training = name.startswith("val/train_")
        return name.replace("/train_", "/"), "training images" if of_training else "validation images"
    return name, "last"


def _order(name: str) -> tuple[Any, ...]:
    """Put groups in the order of `CHART_GROUPS`, losses first within each, and numbers in their order."""
    group, _, rest = name.partition("/")
    words = [int(word) if word.isdigit() else word for word in rest.split("_")]
    return CHART_GROUPS.index(group), words[0] != "loss", [(isinstance(word, int), word) for word in words]


# -- pictures


def _samples(contents: Sequence[_Content]) -> list[str]:
    parts = []
    for each in contents:
        stored = sorted((each.run.folder / "pictures").glob("samples-step-*.png"))
        if stored:
            last = len(stored) - 1
            chosen = dict.fromkeys(round(i * last / (PREVIEWS - 1)) for i in range(PREVIEWS))
            figures = [_preview(stored[i], each.manifest) for i in chosen]
            parts += [f"<h3>{text(each.name)}</h3>" * (len(contents) > 1), f"<div class=steps>{''.join(figures)}</div>"]
    return parts


def _preview(path: Path, manifest: Manifest | None) -> str:
    step = int(path.stem.rpartition("-")[2])
    try:
        sheet = grid_preview(path, None if manifest is None else manifest.shape, PREVIEW_IMAGES, PREVIEW_PIXELS)
    except (OSError, ValueError):  # a damaged picture must not take the rest away
        return ""
    return picture(as_png(sheet), f"samples of step {step}", f"step {step:,}")


def _schedules(contents: Sequence[_Content]) -> list[str]:
    by_schedule: dict[str, list[_Content]] = {}
    for each in contents:
        if (each.run.folder / "pictures" / "schedule.png").is_file():
            settings = json.dumps(each.experiment.diffusion.model_dump(mode="json"))
            by_schedule.setdefault(settings, []).append(each)
    return [
        picture(
            (alike[0].run.folder / "pictures" / "schedule.png").read_bytes(),
            "noise schedule",
            ", ".join(each.name for each in alike) if len(contents) > 1 else "",
        )
        for alike in by_schedule.values()
    ]


# -- settings, data, cost


def _settings(contents: Sequence[_Content]) -> list[list[object]]:
    """Return the settings that differ between runs; of one run those that differ from the defaults."""
    columns = [each.experiment.flat() for each in contents]
    head: list[object] = ["setting", *(each.name for each in contents)]
    if len(contents) == 1:
        columns, head = [*columns, Experiment().flat()], ["setting", "this run", "default"]
    rows: list[list[object]] = [head]
    for key in dict.fromkeys(itertools.chain.from_iterable(columns)):
        values = [column.get(key) for column in columns]
        if any(value != values[0] for value in values):
            rows.append([key, *("" if value is None else value for value in values)])
    return rows


def _cards(contents: Sequence[_Content]) -> Iterable[str]:
    """Yield the card of each dataset; its name and fingerprint if its folder is gone."""
    datasets = {each.run.record.dataset["fingerprint"]: each for each in contents}
    for fingerprint, each in datasets.items():
        if each.manifest is not None:
            yield lines(card_lines(dataset_card(each.manifest)))
        elif fingerprint:
            yield lines([f"dataset      {each.run.record.dataset['name']}", f"fingerprint  {fingerprint}"])


def _cost(contents: Sequence[_Content]) -> list[list[str]]:
    facts = [_facts(each) for each in contents]
    names = dict.fromkeys(name for fact in facts for name in fact)
    head = ["", *(each.name for each in contents)]
    return [head, *([name, *(fact.get(name, "") for fact in facts)] for name in names)]


def _facts(content: _Content) -> dict[str, str]:
    """Return what a training took, as far as the machine measures it."""
    images = content.step * content.experiment.training.batch_size
    epochs = f" ({images / content.manifest.num_rows:,.1f} epochs)" if content.manifest is not None else ""
    facts = {"images seen": f"{images:,}{epochs}"}
    seconds = content.values("system/training_s")
    if seconds:
        facts["training time"] = duration(seconds[-1])
    if goodput := content.values("system/goodput"):
        facts["time spent in steps that lasted"] = f"{goodput[-1]:.1%}"
    if speed := content.values("system/images_per_s"):
        facts["images/s (median)"] = f"{statistics.median(speed):,.0f}"
    power = [p.value for p in content.points if re.fullmatch(r"system/gpu_\d+_power_usage_watts", p.metric)]
    if power and seconds:
        mean = statistics.fmean(power)
        facts["energy of worker 0's GPU"] = (
            f"{mean * seconds[-1] / 3600:,.3g} Wh (mean of {len(power)} readings: {mean:.0f} W)"
        )
    return facts | {"profile": str(content.run.record.profile.get("name", ""))}


def _repeated(content: _Content) -> str:
    record = content.run.record
    libraries = ", ".join(f"{name} {version}" for name, version in record.libraries.items())
    return lines([repeat_command(content.run)]) + details(
        f"What run {content.run.id} was made with",
        lines(
            [
                f"code {record.code_version}", f"libraries {libraries}", f"settings {record.config_hash}",
                f"dataset fingerprint {record.dataset['fingerprint']}", f"created {record.created}",
            ]
        ),
        lines([json.dumps(content.experiment.to_dict(), indent=1)]),
    )  # fmt: skip


def _many(charts: Iterable[str]) -> str:
    joined = "".join(charts)
    return f"<div class=many>{joined}</div>" if joined else ""
