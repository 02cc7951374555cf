"""Commands that free disk space: they list what goes, ask, and remove it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from pipeline.commands import completion, options
from pipeline.commands.output import print_json, print_table
from pipeline.console import plural, size

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.runs.remove import Removal

STATUSES = ("created", "failed", "finished", "interrupted", "killed")
yes = click.option("--yes", "-y", is_flag=True, help="Remove without asking.")


@click.command(
    epilog=options.example("""
ddpm-pipe rm k7m2 --dry-run
ddpm-pipe rm k7m2 w3n4 --yes
""")
)
@click.argument(
    "references", metavar="RUN...", nargs=-1, required=True, shell_complete=completion.folders("runs", "sweeps")
)
@options.cluster
@yes
@options.dry_run
@options.json
def rm(references: tuple[str, ...], context: Context, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove runs, or sweeps with their trials, for good.

    Their folders go, in the home and in the profile's object store, and what MLflow has of them: the entry (`mlflow gc` erases the rest of
    it) and, in a local store, its artifacts. A run stays if a process works on it, if another run was forked from it, if it is a trial of a
    sweep, or if its model is registered in MLflow: one line names what depends on it.
    """
    from pipeline.runs.remove import plan_removal
    from pipeline.sweeps.folder import SweepFolder

    _carry_out(plan_removal(context, references, SweepFolder), yes=yes, dry_run=dry_run, as_json=as_json)


@click.command(
    epilog=options.example("""
ddpm-pipe prune --dry-run
ddpm-pipe prune --checkpoints 1
ddpm-pipe prune --runs failed --runs interrupted --older-than 30
""")
)
@click.option(
    "--runs",
    "statuses",
    type=click.Choice(STATUSES),
    multiple=True,
    help="Remove runs of this status, too; trials go with their sweep alone (`ddpm-pipe rm`).",
)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="DAYS",
    help="Of these runs, those alone that have not changed for so long.",
)
@click.option(
    "--checkpoints",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep each run's newest N checkpoints, its best, its milestones, and those that forks start from; remove the others.",
)
@options.cluster
@yes
@options.dry_run
@options.json
def prune(
    statuses: tuple[str, ...],
    older_than: float,
    checkpoints: int | None,
    context: Context,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove caches; with options also old runs and checkpoints.

    Without options nothing is lost: what goes is computed or fetched again when it is needed, which takes its time. These are the features
    and images that evaluations of a run computed (its scores stay), statistics of real images, this machine's copies of what an object
    store has, and what was left by processes that were killed. What was written or used in the last hour stays, and so does every run that
    a process works on. Datasets, downloads and classifiers are never removed.
    """
    from pipeline.errors import UsageError
    from pipeline.runs.remove import plan_prune
    from pipeline.sweeps.folder import SweepFolder

    if older_than and not statuses:
        raise UsageError("--older-than: got no --runs, expected the status of the runs to remove")
    chosen = [status.upper() for status in statuses]
    found = plan_prune(context, SweepFolder, chosen, older_than, checkpoints)
    _carry_out(found, yes=yes, dry_run=dry_run, as_json=as_json)


def _carry_out(found: Removal, *, yes: bool, dry_run: bool, as_json: bool) -> None:
    """List what goes, ask, remove it, and print the result."""
    if not as_json:
        rows = [{"what": item.what, "place": item.place, "size": size(item.num_bytes)} for item in found.items]
        if rows:
            print_table(rows)
        for what, why in found.kept:
            click.echo(f"kept: {what}: {why}")
    if found.items and not dry_run and (yes or _agreed(found)):
        for _ in found.steps():
            pass
    if as_json:
        print_json(found.to_json())
    elif not found.items:
        click.echo("nothing to remove")
    elif found.is_done:
        click.echo(f"removed {size(found.num_bytes)}")
    else:
        click.echo(f"nothing was removed; it would free {size(found.num_bytes)}")


def _agreed(found: Removal) -> bool:
    """Ask on the terminal. Raises UsageError if nobody can answer."""
    from pipeline.errors import UsageError

    try:
        return click.confirm(f"remove {plural(len(found.items), 'item')}, {size(found.num_bytes)}?", err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise UsageError(
            "nothing was removed: got no answer on stdin, expected y or n. Remove without asking with --yes."
        ) from None
