"""The end of a training: scores, pictures, the logged model, and the summary that the user reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.console import Bar, Console
from pipeline.errors import DataError, RefusedError, UsageError
from pipeline.pictures.pictures import save_grid
from pipeline.runs.choose_scorer import choose_scorer
from pipeline.runs.evaluate import ScoreRequest, evaluate_model, sample_metrics
from pipeline.runs.evaluation import Evaluation, record, write_evaluation
from pipeline.runs.goodput import goodput_line, goodput_of
from pipeline.runs.report import REPORT_FILE, write_report
from pipeline.runs.runs_table import with_newest
from pipeline.runs.sample import LoadedRun
from pipeline.sampling.generated import PREVIEW_IMAGES
from pipeline.sampling.generation import Denoiser
from pipeline.sampling.motion import draw_strip
from pipeline.storage.next_command import typeable
from pipeline.storage.runs import Run
from pipeline.tracking.text import describe
from pipeline.tracking.tracker import Tracker, TrackingSettings
from pipeline.training.trained import best_step


@dataclass(frozen=True)
class Outcome:
    """What came of a run: where its pictures are, and its scores, or why there are none."""

    run_id: str
    name: str
    step: int
    training_s: float
    pictures: dict[str, Path]
    report: Path
    goodput: dict[str, float]
    found: Evaluation | None = None
    skipped: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "run": self.run_id,
            "name": self.name,
            "step": self.step,
            "training_s": round(self.training_s, 3),
            **{name: round(value, 3) for name, value in self.goodput.items()},
            "pictures": {name: str(path) for name, path in self.pictures.items()},
            "report": str(self.report),
            "scores": None if self.found is None else self.found.to_json(),
            "skipped": self.skipped,
        }


def conclude(run: Run, profile: Profile, settings: TrackingSettings, console: Console) -> Outcome:
    """End a training: score its averaged weights and draw pictures, unless that is turned off; log the model, close the tracked run."""
    request = ScoreRequest()
    loaded = LoadedRun.load(run, request, profile, console)
    trained, generator = loaded.trained, loaded.sampler(request)
    found, skipped = _evaluate(loaded, request)
    pictures = {}
    if trained.experiment.evaluation.enabled:
        folder = run.folder / "pictures"
        folder.mkdir(exist_ok=True)
        pictures["samples"] = folder / "samples.png"
        if found is None or found.scored is None:
            images, _ = loaded.cache().images(generator, PREVIEW_IMAGES)
        else:
            images = found.scored.preview
        save_grid(images, pictures["samples"])
        if isinstance(generator, Denoiser):  # others draw an image in one step, which leaves no way to look at
            pictures["strip"] = folder / "denoising.png"
            bar = Bar(console, "denoising", len(generator.timesteps), "steps")
            draw_strip(generator, pictures["strip"], progress=bar)
    tracker = Tracker(run.folder, settings)
    summary = {} if found is None else record(tracker, found, write_evaluation(found, run.folder / "evaluations"))
    goodput = goodput_of(run)
    run.update(summary=with_newest(run.state().summary, summary), goodput=goodput)
    for path in pictures.values():
        tracker.artifact(path, "pictures")
    tracker.model(trained.save(run.folder / "model"), trained.step)
    tracker.metrics(trained.step, {"training_s": trained.training_s, **goodput}, "system")
    report = write_report([run], run.folder / REPORT_FILE)
    tracker.artifact(report)
    tracker.describe(describe(run, summary, trained.step))
    tracker.finish("FINISHED")
    delivered = tracker.close()
    notes = [] if delivered else [f"tracking: {tracker.problem}; deliver it later with: {typeable(f'sync {run.id}')}"]
    if goodput["restarts"]:
        notes.append(goodput_line(goodput))
    notes += best_lines(run, trained.experiment)
    return Outcome(
        run.id, run.record.name, trained.step, trained.training_s, pictures, report, goodput, found, skipped, notes
    )


def best_lines(run: Run, experiment: Experiment) -> list[str]:
    """Return a line on the best checkpoint, with the command that scores it; nothing if none is kept."""
    if experiment.checkpoint.keep_best is None:
        return []
    try:
        step, how = best_step(run, experiment)
    except UsageError as error:
        return [str(error)]
    return [f"step {step} is the {how}; score it with: {typeable(f'evaluate {run.id} --checkpoint best')}"]


def _evaluate(loaded: LoadedRun, request: ScoreRequest) -> tuple[Evaluation | None, str]:
    """Evaluate as the experiment says; return what was found, and one line on what was left out, why, and how to add it."""
    run, asked = loaded.run, loaded.trained.experiment.evaluation
    if not asked.enabled:
        return (
            None,
            f"not scored, nothing drawn (evaluation.enabled is false); score it with: {typeable(f'evaluate {run.id}')}",
        )
    scorer, skipped = None, ""
    if sample_metrics(asked):
        try:
            scorer = choose_scorer(run, asked, loaded.profile, loaded.console, download=False)
        except (DataError, RefusedError) as error:
            skipped = (
                f"the evaluation with extractor {asked.extractor!r} was skipped: {error}; add it with: "
                f"{typeable(f'evaluate {run.id} --extractor inception --inception-weights PATH')}"
            )
    try:
        found = evaluate_model(loaded, scorer, request)
    except RefusedError as error:
        skipped = f"no images were scored: {error}; by other metrics: {typeable(f'evaluate {run.id} --metrics fid')}"
        found = evaluate_model(loaded, None, request)  # bits/dim, if asked for
    return (None if found.scored is None and found.measured is None else found), skipped
