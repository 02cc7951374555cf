"""Where a command runs: `--cluster` and `--detach` for commands that train, sample or score, and `ddpm-pipe jobs` for what was sent."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from pipeline.commands import completion, options
from pipeline.commands.output import print_json, print_table
from pipeline.signals import in_slurm_job
from pipeline.storage.next_command import typeable

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.jobs.sent_jobs import SentJobs

F = TypeVar("F", bound=Callable[..., Any])


def runs_on_cluster(
    *,
    files: Sequence[str] = (),
    outputs: Sequence[str] = (),
    plans_here: bool = False,
    first: Callable[[Context, dict[str, Any]], None] | None = None,
) -> Callable[[F], F]:
    """Add `--cluster` and `--detach`: with a profile of kind job or slurm, the command is sent there instead of being run here.

    `files` name the parameters whose values may be files (they are sent along); of these `data` may be a folder, too (it must be seen by
    every node). `outputs` are those that name where results go. With `plans_here`, `--dry-run --no-probe` needs nothing of a cluster.
    `first` is called before the command is sent.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def here_or_there(*, context: Context, detach: bool, **given: Any) -> Any:
            from pipeline.errors import UsageError
            from pipeline.storage.provenance import JOB_VARIABLE

            profile = context.profile
            by_slurm = profile.kind == "slurm" and not in_slurm_job()
            plans_only = plans_here and given["dry_run"] and not given["probe"]
            if profile.kind == "job" and JOB_VARIABLE not in os.environ and not plans_only:
                if first is not None:
                    first(context, given)
                click.get_current_context().exit(_send(context, [*files, "cluster"], outputs, detach=detach))
            if by_slurm and not plans_only:
                click.get_current_context().exit(_send_to_slurm(context, given, detach=detach))
            if detach and plans_only:
                raise UsageError(
                    "--detach leaves a job to a cluster; --dry-run --no-probe needs none, and answers at once"
                )
            if detach and profile.kind != "job" and not by_slurm:
                raise UsageError(
                    f"--detach leaves a job to a cluster; profile {profile.name!r} is of kind {profile.kind}, and the work runs here"
                )
            return command(context=context, **given)

        detach = click.option(
            "--detach", is_flag=True, help="With a profile of kind job or slurm: send it, and don't wait for its end."
        )
        return options.cluster(detach(here_or_there))  # type: ignore[return-value]

    return decorate


def _send(context: Context, files: Sequence[str], outputs: Sequence[str], *, detach: bool) -> int:
    """Send the command that click runs as a job, and follow it unless `detach`; return the exit code."""
    from pipeline.jobs.submit import Jobs

    asked = click.get_current_context()
    given = {name: asked.params[name] for name in files if asked.params.get(name) is not None}
    for name in outputs:
        _require_shared(name, asked.params.get(name), context)
    sources = [path for value in given.values() for path in map(_path, _words(value)) if path.is_file()]
    jobs = Jobs(context.profile, context.console)

    def parameters_of(names: Mapping[Path, str]) -> dict[str, Any]:
        """Return the values that were typed; files are named as they are in the job."""
        typed = typed_parameters(asked)
        for name, value in given.items():
            path = _path(value)
            if name == "data" and path.is_dir():  # any other word is a name, even where a folder here is called so
                typed[name] = str(path.absolute())
                context.console.say(f"{path.absolute()} is named, not sent: every node must see it")
            elif any(_path(word) in names for word in _words(value)):
                there = tuple(names.get(_path(word), word) for word in _words(value))
                typed[name] = there if isinstance(value, tuple) else there[0]
        return typed

    job = jobs.submit(str(asked.info_name), parameters_of, context.command[1:], sources, _own_module(asked))
    return _follow_unless(detach, jobs, job)


def _send_to_slurm(context: Context, given: Mapping[str, Any], *, detach: bool) -> int:
    """Submit the command that click runs to Slurm, and follow it unless `detach`; with `--dry-run` print the script."""
    from pipeline.config.cluster_profile import forwarded
    from pipeline.jobs.sent_jobs import PREFIX
    from pipeline.jobs.slurm import SlurmJobs
    from pipeline.jobs.slurm_script import script_of
    from pipeline.storage.folder import new_id

    asked = click.get_current_context()
    _own_module(asked)  # refuses a wrong experiment here, before it waits in the queue
    forwarded(context.profile)  # Slurm takes the environment along
    words = [word for word in context.command[1:] if word not in ("--detach", "--dry-run")]
    known = _folder_meant(context, asked)
    if known is not None:
        words = [known.name if word in (given.get("run"), given.get("extend")) else word for word in words]
    makes = new_id() if known is None or given.get("fork") else ""
    folder = known or context.home / ("sweeps" if asked.info_name == "sweep" else "runs") / makes
    job = f"{PREFIX}{new_id() if known else makes}"
    programs = Path(sys.executable).parent
    script = script_of(context.profile, job, words, folder, context.home, Path.cwd(), programs, makes)
    if given.get("dry_run"):
        click.echo(script, nl=False)
        context.console.say(f"save it and submit it with: mkdir -p {shlex.quote(str(folder))}; sbatch FILE")
        return 0
    jobs = SlurmJobs(context.profile, context.console)
    jobs.submit(job, folder, script)
    return _follow_unless(detach, jobs, job)


def _folder_meant(context: Context, asked: click.Context) -> Path | None:
    """Return the folder of the run or sweep that a command is about, None if it makes one. UsageError if there is none."""
    from pipeline.storage.folder import RunStatus
    from pipeline.storage.runs import Run
    from pipeline.sweeps.commands import sweep_meant

    reference = asked.params.get("run") or asked.params.get("extend")
    if reference is None:
        return None
    resumes = asked.info_name == "resume" and not asked.params["overrides"]

    def why_not(run: Run) -> str:
        return "finished" if resumes and run.state().status is RunStatus.FINISHED else ""

    sweep = sweep_meant(context, reference) if asked.info_name in ("resume", "sweep") else None
    return (sweep or Run.find(context.home, reference, context.store, why_not)).folder


def _require_shared(name: str, value: object, context: Context) -> None:
    """Refuse a relative path for results: a job writes on another machine (UsageError)."""
    from pipeline.errors import UsageError
    from pipeline.storage.remote import is_remote

    if value is None or Path(str(value)).is_absolute():
        return
    storage = str(context.store)
    remedy = "" if is_remote(storage) else f", such as {storage.rstrip('/')}/{value}"
    raise UsageError(
        f"--{name.replace('_', '-')} {value}: the job writes on another machine; give an absolute folder that every node and you "
        f"see{remedy}, or leave it out: then the profile's storage gets it"
    )


def typed_parameters(asked: click.Context) -> dict[str, Any]:
    """Return the parsed values of what is on the command line, without `--detach`; the job has the same defaults."""
    source = asked.get_parameter_source
    return {
        name: value
        for name, value in asked.params.items()
        if name != "detach" and source(name) is ParameterSource.COMMANDLINE
    }


def _follow_unless(detach: bool, jobs: SentJobs, job: str) -> int:
    if not detach:
        return _follow(jobs, job)
    click.echo(job)
    click.echo(jobs.detach_hint(job), err=True)
    return 0


def _follow(jobs: SentJobs, job: str) -> int:
    try:
        return jobs.follow(job, click.echo, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo(f"\n{jobs.detach_hint(job)}", err=True)
        return 130


def _words(value: object) -> tuple[str, ...]:
    """Return the words that were typed for a parameter: several for an option that takes several."""
    return tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)


def _path(value: object) -> Path:
    return Path(str(value)).expanduser()


def _own_module(context: click.Context) -> str | None:
    """Return the module of the network that the command's experiment names, where it is not one of ours; a wrong experiment stays here."""
    if not {"experiment", "preset", "overrides"} <= context.params.keys():
        return None
    from pipeline.config import presets
    from pipeline.config.experiment import DEFAULT_PRESET, load_experiment

    given = context.params
    path = presets.find("experiments", given["experiment"] or given["preset"] or DEFAULT_PRESET)
    module, colon, _ = load_experiment(path, given["overrides"], given.get("data")).model.type.partition(":")
    return module if colon else None


def _jobs_of(cluster: str) -> SentJobs:
    from pipeline.config.context import Context
    from pipeline.errors import UsageError
    from pipeline.jobs.slurm import SlurmJobs
    from pipeline.jobs.submit import Jobs

    context = Context.load(cluster)
    if context.profile.kind == "slurm":
        return SlurmJobs(context.profile, context.console)
    if context.profile.kind != "job":
        raise UsageError(
            f"profile {context.profile.name!r} is of kind {context.profile.kind}: it has no jobs; name one of kind job or slurm"
        )
    return Jobs(context.profile, context.console)


where = click.option(
    "--cluster",
    metavar="PROFILE",
    required=True,
    shell_complete=completion.shipped("cluster"),
    help="The profile whose cluster is asked: of kind job or slurm.",
)


@click.group(
    epilog=options.example("""
ddpm-pipe jobs list --cluster kuberay
ddpm-pipe jobs follow k7m2 --cluster kuberay
ddpm-pipe jobs stop k7m2 --cluster kuberay
""")
)
def jobs() -> None:
    """List, follow and stop what was sent to a cluster. JOB is an id, a unique prefix of one, or `latest`."""


@jobs.command(
    "list",
    epilog=options.example("""
ddpm-pipe jobs list --cluster kuberay
ddpm-pipe jobs list --cluster kuberay --json
"""),
)
@where
@options.json
def list_jobs(cluster: str, as_json: bool) -> None:
    """List the jobs that were sent to a cluster, newest first."""
    rows = _jobs_of(cluster).listed()
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows, ["job", "status", "exit", "started", "took", "command"])
    else:
        click.echo(f"no jobs there yet; send one with: {typeable('train')}")


@jobs.command(
    "follow",
    epilog=options.example("""
ddpm-pipe jobs follow latest --cluster kuberay
"""),
)
@click.argument("job")
@where
def follow_job(job: str, cluster: str) -> None:
    """Show JOB's log until it ends, and exit with its exit code.

    The log is shown from its beginning. Ctrl-C leaves the job alone.
    """
    found = _jobs_of(cluster)
    click.get_current_context().exit(_follow(found, found.find(job)))


@jobs.command(
    "stop",
    epilog=options.example("""
ddpm-pipe jobs stop k7m2 --cluster kuberay
"""),
)
@click.argument("job")
@where
def stop_job(job: str, cluster: str) -> None:
    """Ask JOB to stop: a training saves first. Says what came of it."""
    found = _jobs_of(cluster)
    click.echo(found.stop(found.find(job)))
