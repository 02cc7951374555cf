"""The description of a run on MLflow's pages: settings, results, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.experiment import experiment_from, with_overrides
from pipeline.storage.runs import Run, RunRecord

YARDSTICK = "yardstick_"
_SPACE = "&nbsp;" * 4


def describe(run: Run, summary: Mapping[str, Any], steps: int = 0) -> str:
    """Return Markdown for a reader who has only this page: the current settings, the scores of `summary`, and the command.

    `steps` is the number of training steps taken, 0 if unknown; for a trial with a time limit the settings do not say.
    """
    record, changed = run.record, _changed(run.state().overrides)
    if changed:
        experiment = with_overrides(experiment_from(record.experiment), run.state().overrides)
        record = replace(record, experiment=experiment.to_dict(), command=[*record.command, *changed])
    parts = [
        _opening(record, steps),
        _settings(record),
        *([_changes(changed)] if changed else []),
        "### Results",
        _results(summary),
        "### Repeat it",
        _again(record),
    ]
    return "\n\n".join(parts) + "\n"


def _changed(overrides: Sequence[str]) -> list[str]:
    """Return `-s key=value` words for what resumes have changed, the last value of each key."""
    last = {assignment.partition("=")[0]: assignment for assignment in overrides}
    return [word for assignment in last.values() for word in ("-s", assignment)]


def _changes(changed: Sequence[str]) -> str:
    settings = ", ".join(f"`{assignment}`" for assignment in changed[1::2])
    return (
        f"Changed by `resume`: {settings}. The table shows the current settings. MLflow cannot change parameters: they show the settings "
        "at the start, and the tags `current.*` those that have changed."
    )


def _opening(record: RunRecord, steps: int) -> str:
    kind = "variational autoencoder" if _is_vae(record) else "denoising diffusion model"
    if record.imported_from:
        return f"**{record.name}**: a {kind} that was trained elsewhere, imported from `{record.imported_from}`."
    training = record.experiment.get("training", {})
    origin = record.origin
    comes_from = f", {origin['words']} {origin['what']}" if origin else ""
    return (
        f"**{record.name}**: a {kind} of the images of `{_dataset(record)}`, "
        f"{_length(record, steps)} at a batch of {_get(training, 'batch_size')}{comes_from}."
    )


def _length(record: RunRecord, steps: int) -> str:
    seconds = record.seconds_allowed
    if seconds is None:
        return f"{_get(record.experiment.get('training', {}), 'steps')} steps"
    return f"{seconds / 60:g} minutes of training" + (f" ({steps:,} steps)" if steps else "")


def _settings(record: RunRecord) -> str:
    model, diffusion, training, sampling = (
        record.experiment.get(section, {}) for section in ("model", "diffusion", "training", "sampling")
    )
    network = _get(model, "type")
    if network == "unet":
        multipliers = ", ".join(str(m) for m in model.get("channel_multipliers", []))
        network = f"U-Net, {_get(model, 'channels')} channels x ({multipliers}), dropout {_get(model, 'dropout')}"
    if _is_vae(record):
        network = f"VAE, {_get(model, 'channels')} channels, a code of {_get(model, 'latent_dim')} numbers"
    rows = {
        "dataset": f"`{_dataset(record)}`, fingerprint `{str(record.dataset.get('fingerprint', ''))[:16]}`",
        "network": network,
        "schedule": f"{_get(diffusion, 'schedule')}, T = {_get(diffusion, 'num_timesteps')}",
        "predicts": f"{_get(diffusion, 'prediction')}; variance {_get(diffusion, 'variance')}",
        "minimises": f"{training.get('objective', 'simple')}, timesteps {training.get('timestep_sampling', 'uniform')}",
        "training": f"learning rate {_get(training, 'learning_rate')}, EMA {_get(training, 'ema_decay')}, "
        f"{_get(training, 'precision')}, seed {_get(record.experiment, 'seed')}",
        "sampling": f"{_get(sampling, 'sampler')}, {_get(sampling, 'steps')} steps",
    }
    if _is_vae(record):
        rows = {
            name: text for name, text in rows.items() if name not in ("schedule", "predicts", "minimises", "sampling")
        }
    return markdown_table([("setting", "value"), *rows.items()])


def _is_vae(record: RunRecord) -> bool:
    return _get(record.experiment.get("model", {}), "type") == "vae"


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
            f"`{name}`",
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


def _again(record: RunRecord) -> str:
    words = list(record.command)
    if words and not words[0].endswith("ddpm-pipe"):
        words.insert(0, "ddpm-pipe")
    libraries = ", ".join(f"{name} {record.libraries[name]}" for name in ("torch", "ray") if name in record.libraries)
    return (
        f"```\n{shlex.join(words)}\n```\n\n"
        f"Code {record.code_version}; {libraries}; settings `{record.config_hash}`. "
        f"More: `ddpm-pipe sample {record.id}`, `ddpm-pipe evaluate {record.id}`, `ddpm-pipe resume {record.id}`."
    )


def _dataset(record: RunRecord) -> str:
    return str(record.dataset.get("name") or record.dataset.get("path", "?"))


def _get(section: Any, key: str) -> str:
    value = section.get(key) if isinstance(section, Mapping) else None
    return "all" if key == "steps" and value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first row its head. Spaces end its cells, because MLflow's page draws them without any distance."""
    cells = [[f"{text.replace('|', '/')}{_SPACE}" for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]])
