"""The description of a run on MLflow's pages: settings, results, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.experiment import Experiment, experiment_from, with_overrides
from pipeline.storage.runs import Run, RunRecord
from pipeline.tracking.names import metric_name

YARDSTICK = "yardstick_"
_SPACE = "&nbsp;" * 4


def describe(run: Run, summary: Mapping[str, Any], steps: int = 0) -> str:
    """Return Markdown for a reader who has only this page: the current settings, the scores of `summary`, and the command.

    `steps` is the number of training steps taken, 0 if unknown; for a trial with a time limit the settings do not say.
    """
    record, changed = run.record, _changed(run)
    experiment = with_overrides(experiment_from(record.experiment), changed)
    parts = [
        _opening(record, experiment, steps),
        _settings(record, experiment),
        *([_changes(changed)] if changed else []),
        "### Results",
        _results(summary),
        "### Repeat it",
        _again(run),
    ]
    return "\n\n".join(parts) + "\n"


def _changes(changed: Sequence[str]) -> str:
    settings = ", ".join(f"`{assignment}`" for assignment in changed)
    return (
        f"Changed by `resume`: {settings}. The table shows the current settings. MLflow cannot change parameters: they show the settings "
        "at the start, and the tags `current.*` those that have changed."
    )


def _opening(record: RunRecord, experiment: Experiment, steps: int) -> str:
    kind = "variational autoencoder" if experiment.model.type == "vae" else "denoising diffusion model"
    if record.imported_from:
        return f"**{record.name}**: a {kind} that was trained elsewhere, imported from `{record.imported_from}`."
    training, seconds = experiment.training, record.seconds_allowed
    length = f"{training.steps:,} steps"
    if seconds is not None:
        length = f"{seconds / 60:g} minutes of training" + (f" ({steps:,} steps)" if steps else "")
    comes_from = f", {record.origin['words']} {record.origin['what']}" if record.origin else ""
    return (
        f"**{record.name}**: a {kind} of the images of `{record.dataset['name']}`, "
        f"{length} at a batch of {training.batch_size:,}{comes_from}."
    )


def _settings(record: RunRecord, experiment: Experiment) -> str:
    model, diffusion, training, sampling = (
        experiment.model,
        experiment.diffusion,
        experiment.training,
        experiment.sampling,
    )
    averages = ", ".join(map(str, training.ema_decays))
    fitted = f"learning rate {training.learning_rate}, EMA {averages}, {training.precision}, seed {experiment.seed:,}"
    rows = {"dataset": f"`{record.dataset['name']}`, fingerprint `{record.dataset['fingerprint'][:16]}`"}
    if model.type == "vae":
        network = f"VAE, {model.channels:,} channels, a code of {model.latent_dim:,} numbers"
        rows |= {"network": network, "training": fitted}
    else:
        multipliers = ", ".join(map(str, model.channel_multipliers))
        unet = f"U-Net, {model.channels:,} channels x ({multipliers}), dropout {model.dropout}"
        rows |= {
            "network": unet if model.type == "unet" else model.type,
            "schedule": f"{diffusion.schedule}, T = {diffusion.num_timesteps:,}",
            "predicts": f"{diffusion.prediction}; variance {diffusion.variance}",
            "minimises": f"{training.objective}, timesteps {training.timestep_sampling}",
            "training": fitted,
            "sampling": f"{sampling.sampler}, {'all' if sampling.steps is None else f'{sampling.steps:,}'} steps",
        }
    return markdown_table([("setting", "value"), *rows.items()])


def _results(summary: Mapping[str, Any]) -> str:
    """Return a table of the figures with their yardsticks (`yardstick_<kind>_<figure>`)."""
    if not summary:
        return "Not scored yet."
    figures = [name for name in summary if not name.startswith(YARDSTICK)]
    yardsticks = {name: value for name, value in summary.items() if name.startswith(YARDSTICK)}
    kinds = list(dict.fromkeys(kind for name in yardsticks for kind in [_kind(name, figures)] if kind))
    head = ["figure", "this model", *(kind.replace("_", " ") for kind in kinds)]
    rows = [
        [
            f"`{metric_name('score', name)}`",
            _figure(summary[name]),
            *(_figure(yardsticks.get(f"{YARDSTICK}{kind}_{name}", "")) for kind in kinds),
        ]
        for name in figures
    ]
    return f"{markdown_table([head, *rows])}\n\nYardsticks are the same measurement of images that were not generated."


def _kind(name: str, figures: list[str]) -> str:
    """Return the kind of a yardstick, such as `real_half` of `yardstick_real_half_fid_classifier_n559`; "" if the figure is unknown."""
    fits = [figure for figure in figures if name.endswith(f"_{figure}")]
    return name.removeprefix(YARDSTICK).removesuffix(f"_{max(fits, key=len)}") if fits else ""


def repeat_command(run: Run) -> str:
    """Return the command that trains a run as it is now."""
    words = [*run.record.command, *(word for assignment in _changed(run) for word in ("-s", assignment))]
    if words and not words[0].endswith("ddpm-pipe"):
        words.insert(0, "ddpm-pipe")
    return shlex.join(words)


def _changed(run: Run) -> list[str]:
    """Return the settings that resumes have changed, of each key the last value."""
    return list({assignment.partition("=")[0]: assignment for assignment in run.state().overrides}.values())


def _again(run: Run) -> str:
    record = run.record
    libraries = ", ".join(f"{name} {record.libraries[name]}" for name in ("torch", "ray") if name in record.libraries)
    return (
        f"```\n{repeat_command(run)}\n```\n\n"
        f"Code {record.code_version}; {libraries}; settings `{record.config_hash}`. "
        f"More: `ddpm-pipe sample {record.id}`, `ddpm-pipe evaluate {record.id}`, `ddpm-pipe resume {record.id}`."
    )


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first row its head. Spaces end its cells, because MLflow's page draws them without any distance."""
    cells = [[f"{text.replace('|', '/')}{_SPACE}" for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]])
