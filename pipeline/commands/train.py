"""Commands that train."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands import completion, options
from pipeline.commands.output import next_lines, print_result, print_table
from pipeline.commands.submit import runs_on_cluster
from pipeline.config import presets
from pipeline.errors import UsageError
from pipeline.storage.next_command import typeable

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.runs.conclude import Outcome


def _list_presets(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print the name of each shipped experiment, and what it is."""
    if not wanted:
        return
    names = presets.names("experiments")
    print_table(
        [{"preset": name, "what it is": presets.about("experiments", name)} for name in names], ["preset", "what it is"]
    )
    context.exit()


@click.command(
    epilog=options.example("""
ddpm-pipe train
ddpm-pipe train --preset mnist
ddpm-pipe train experiments/ddpm-cifar10.yaml --cluster gpu -s training.steps=200000
ddpm-pipe train --preset mnist --data ~/images/mnist --dry-run
ddpm-pipe train --from k7m2
""")
)
@click.argument(
    "experiment", required=False, metavar="[EXPERIMENT.yaml]", shell_complete=completion.shipped("experiments")
)
@click.option(
    "--preset",
    metavar="NAME",
    shell_complete=completion.shipped("experiments"),
    help="A shipped experiment: digits (the default), mnist, ddpm-cifar10, ...",
)
@click.option(
    "--list-presets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_presets,
    help="List the shipped experiments, and stop.",
)
@click.option(
    "--from",
    "origin",
    metavar="SWEEP",
    shell_complete=completion.folders("sweeps"),
    help="The best point of a sweep, at the full length of its base.",
)
@click.option(
    "--data",
    metavar="DATA",
    shell_complete=completion.files,
    help="An ingested dataset, or a source that `ddpm-pipe ingest` takes.",
)
@runs_on_cluster(files=["experiment", "data"], plans_here=True)
@options.overrides
@options.isolated
@options.dry_run
@click.option("--probe/--no-probe", default=True, help="With --dry-run: whether to time a few training steps.")
@options.json
def train(
    experiment: str | None,
    preset: str | None,
    origin: str | None,
    data: str | None,
    context: Context,
    overrides: tuple[str, ...],
    isolated: bool,
    dry_run: bool,
    probe: bool,
    as_json: bool,
) -> None:
    """Train a model, and end with samples and scores.

    Results do not depend on the number of workers. Ctrl-C saves and stops; `ddpm-pipe resume` continues.
    """
    if origin is None:
        from pipeline.runs.train import train_request

        request = train_request(context, experiment, preset, data, overrides)
    else:
        from pipeline.sweeps.commands import request_of_winner

        if other := experiment or preset or data:
            raise UsageError(f"got both {other} and --from {origin}; the sweep says what to train")
        request = request_of_winner(context, origin, overrides)
    if isolated:
        request = replace(request, profile=request.profile.isolating())
    if dry_run:
        from pipeline.commands.plan_text import dry_run_lines
        from pipeline.runs.dry_run import dry_run as rehearse

        found = rehearse(request, measure=probe)
        print_result(found, as_json, lambda: dry_run_lines(found))
        return
    from pipeline.runs.train import start_training

    outcome = start_training(context, request)
    print_result(outcome, as_json, lambda: summary(outcome))


@click.command(
    epilog=options.example("""
ddpm-pipe init
ddpm-pipe init mnist
""")
)
@click.argument("preset", required=False, shell_complete=completion.shipped("experiments"))
def init(preset: str | None) -> None:
    """Write a preset's experiment file, every setting explained.

    The file gets the preset's name, in this folder; an existing file is left alone.
    """
    from pipeline.config.experiment import DEFAULT_PRESET
    from pipeline.config.settings_page import write_experiment

    path = write_experiment(preset or DEFAULT_PRESET, Path.cwd())
    click.echo(path)
    click.echo(f"next: {typeable(f'train {shlex.quote(path.name)} --dry-run')}")


@click.command(
    epilog=options.example("""
ddpm-pipe resume latest
ddpm-pipe resume k7m2 -s training.steps=20000
ddpm-pipe resume k7m2 --fork -s training.learning_rate=1e-4
ddpm-pipe resume k7m2 --fork --data data/other-images -s training.steps=5000
""")
)
@click.argument("run", shell_complete=completion.folders("runs", "sweeps"))
@runs_on_cluster(files=["data"])
@options.overrides
@options.isolated
@click.option("--fork", is_flag=True, help="Start a new run from this run's averaged weights, with changed settings.")
@click.option(
    "--data",
    metavar="DATA",
    shell_complete=completion.files,
    help="With --fork: other images, an ingested dataset or a source.",
)
@options.max_concurrent
@options.json
def resume(
    run: str,
    context: Context,
    overrides: tuple[str, ...],
    isolated: bool,
    fork: bool,
    data: str | None,
    max_concurrent: int | None,
    as_json: bool,
) -> None:
    """Resume RUN from its newest checkpoint, bit for bit.

    Checkpoints that do not verify are skipped. RUN is a run id, MLflow's, a unique prefix of either, or `latest`; or a sweep's id, whose
    remaining trials are then run. Settings that decide the weights cannot change, unless the run is forked.
    """
    from pipeline.commands.sweep import show
    from pipeline.runs.resume import ResumeRequest, resume_training
    from pipeline.sweeps.commands import resume_sweep, sweep_meant

    folder = sweep_meant(context, run)
    if folder is not None:
        if overrides or fork or data or isolated:
            raise UsageError(
                f"{run} is a sweep: it is resumed with its own settings; change it with: {typeable(f'sweep --extend {run}')}"
            )
        show(resume_sweep(context, folder, max_concurrent), as_json=as_json)
        return
    if max_concurrent is not None:
        raise UsageError(f"--max-concurrent: got {max_concurrent}, but {run} is no sweep; leave it out")
    outcome = resume_training(context, run, ResumeRequest(overrides, fork, data, isolated))
    print_result(outcome, as_json, lambda: summary(outcome))


def summary(outcome: Outcome) -> Iterator[str]:
    """Yield the lines that end a training: scores beside their yardsticks, pictures, and what to type next."""
    from pipeline.commands.evaluate import evaluation_lines
    from pipeline.console import duration

    yield f"run {outcome.run_id}  {outcome.name}  {outcome.step} steps, trained for {duration(outcome.training_s)}"
    yield ""
    if outcome.found is not None:
        yield from evaluation_lines(outcome.found)
    if outcome.skipped:
        yield outcome.skipped
    yield ""
    for name, path in {**outcome.pictures, "report": outcome.report}.items():
        yield f"{name + ':':<9}{path}"
    yield from outcome.notes
    yield ""
    scored = {f"evaluate {outcome.run_id} --steps 100": "another sampler setting, scored"}
    yield from next_lines(
        {
            "ui": "browse this run in MLflow's pages",
            f"sample {outcome.run_id} -n 16": "more images",
            **(scored if "strip" in outcome.pictures else {}),
            f"resume {outcome.run_id} -s training.steps={2 * outcome.step}": "train longer",
        }
    )
