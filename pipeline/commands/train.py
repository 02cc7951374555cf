"""Commands that train."""

from __future__ import annotations

from dataclasses import replace

import click

from pipeline.commands.options import (
    command_line,
    dry_run_option,
    example,
    isolated_option,
    json_option,
    max_concurrent_option,
    print_json,
    set_option,
)
from pipeline.commands.submit import runs_on_cluster
from pipeline.errors import UsageError


@click.command(
    epilog=example("""
ddpm-pipe train
ddpm-pipe train --preset mnist
ddpm-pipe train experiments/ddpm-cifar10.yaml --cluster gpu -s training.steps=200000
ddpm-pipe train --preset mnist --data ~/images/mnist --dry-run
ddpm-pipe train --from k7m2
""")
)
@click.argument("experiment", required=False, metavar="[EXPERIMENT.yaml]")
@click.option("--preset", metavar="NAME", help="A shipped experiment: digits (the default), mnist, ddpm-cifar10, ...")
@click.option("--from", "origin", metavar="SWEEP", help="The best point of a sweep, at the full length of its base.")
@click.option("--data", metavar="DATA", help="An ingested dataset, or a source that `ddpm-pipe ingest` takes.")
@runs_on_cluster(files=["experiment", "data"], plans_here=True)
@set_option
@isolated_option
@dry_run_option
@click.option("--probe/--no-probe", default=True, help="With --dry-run: whether to time a few training steps.")
@json_option
def train(
    experiment: str | None,
    preset: str | None,
    origin: str | None,
    data: str | None,
    cluster: str | None,
    overrides: tuple[str, ...],
    isolated: bool,
    dry_run: bool,
    probe: bool,
    as_json: bool,
) -> None:
    """Train a model, and end with samples and scores.

    Results do not depend on the number of workers. Ctrl-C saves and stops; `ddpm-pipe resume` goes on from there.
    """
    from pipeline.runs import training_run
    from pipeline.sweeps import commands as sweep_commands

    if origin is not None:
        request = sweep_commands.request_of_winner(origin, experiment or preset or data, cluster, overrides)
    else:
        request = training_run.train_request(experiment, preset, data, cluster, overrides)
    if isolated:
        request = replace(request, profile=request.profile.isolating())
    if dry_run:
        from pipeline.runs.dry_run import dry_run as rehearse

        told = rehearse(request, measure=probe)
        print_json(told.to_dict()) if as_json else click.echo(told.to_text())
        return
    result = training_run.start_training(request, command=command_line())
    print_json(result.to_dict()) if as_json else click.echo(result.to_text())


@click.command(
    epilog=example("""
ddpm-pipe resume latest
ddpm-pipe resume k7m2 -s training.steps=20000
ddpm-pipe resume k7m2 --fork -s training.learning_rate=1e-4
ddpm-pipe resume k7m2 --fork --data data/other-images -s training.steps=5000
""")
)
@click.argument("run")
@runs_on_cluster(files=["data"])
@set_option
@isolated_option
@click.option("--fork", is_flag=True, help="Start a new run from this run's averaged weights, with changed settings.")
@click.option("--data", metavar="DATA", help="With --fork: other images, an ingested dataset or a source.")
@max_concurrent_option
@json_option
def resume(
    run: str,
    cluster: str | None,
    overrides: tuple[str, ...],
    isolated: bool,
    fork: bool,
    data: str | None,
    max_concurrent: int | None,
    as_json: bool,
) -> None:
    """Go on with RUN from its newest checkpoint that verifies, bit for bit, or with what is left of a sweep.

    RUN is a run id, MLflow's, a unique prefix of either, or `latest`; or a sweep's. Settings that decide the weights cannot change,
    unless the run is forked.
    """
    from pipeline.commands.sweep import show
    from pipeline.runs import training_run
    from pipeline.sweeps import commands as sweep_commands

    folder = sweep_commands.sweep_meant(run, cluster)
    if folder is not None:
        if overrides or fork or data or isolated:
            raise UsageError(
                f"{run} is a sweep: it goes on as it was asked for; change it with: ddpm-pipe sweep --extend {run}"
            )
        show(sweep_commands.resume_sweep(folder, cluster, max_concurrent), as_json=as_json)
        return
    if max_concurrent is not None:
        raise UsageError(f"--max-concurrent: got {max_concurrent}, but {run} is no sweep; leave it out")
    result = training_run.resume_training(
        run, cluster, overrides, fork=fork, command=command_line(), data=data, isolated=isolated
    )
    print_json(result.to_dict()) if as_json else click.echo(result.to_text())
