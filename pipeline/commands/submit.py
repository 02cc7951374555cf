"""Where a command runs: `--cluster` and `--detach` for commands that train, sample or score, and `ddpm-pipe jobs` for what was sent."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from pipeline.commands.options import cluster_option, example, json_option, print_json, print_table

F = TypeVar("F", bound=Callable[..., Any])


def runs_on_cluster(
    *, files: Sequence[str] = (), outputs: Sequence[str] = (), plans_here: bool = False
) -> Callable[[F], F]:
    """Add `--cluster` and `--detach`: with a profile of kind job, the command is sent there instead of being run here.

    `files` name the parameters whose values may be files (they are sent along); of these `data` may be a folder, too (it must be seen by
    every node). `outputs` are those that name where results go. With `plans_here`, `--dry-run --no-probe` needs nothing of a cluster.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def here_or_there(*, cluster: str | None, detach: bool, **given: Any) -> Any:
            from pipeline.config.cluster_profile import load_profile
            from pipeline.errors import UsageError
            from pipeline.storage.provenance import JOB_VARIABLE

            profile = load_profile(cluster)
            plans_only = plans_here and given["dry_run"] and not given["probe"]
            if profile.kind == "job" and JOB_VARIABLE not in os.environ and not plans_only:
                context = click.get_current_context()
                context.exit(_send(context, profile, str(cluster), [*files, "cluster"], outputs, detach=detach))
            if detach and plans_only:
                raise UsageError(
                    "--detach leaves a job to a cluster; --dry-run --no-probe needs none, and answers at once"
                )
            if detach and profile.kind != "job":
                raise UsageError(
                    f"--detach leaves a job to a cluster; profile {profile.name!r} is of kind {profile.kind}, and the work runs here"
                )
            return command(cluster=cluster, **given)

        detach = click.option(
            "--detach", is_flag=True, help="With a profile of kind job: send it, and don't wait for its end."
        )
        return cluster_option(detach(here_or_there))  # type: ignore[return-value]

    return decorate


def _send(
    context: click.Context, profile: Any, reference: str, files: Sequence[str], outputs: Sequence[str], *, detach: bool
) -> int:
    """Send the command of a context as a job, and follow it unless told not to; return the exit code."""
    from pipeline.console import Console
    from pipeline.errors import UsageError
    from pipeline.jobs.submit import Jobs
    from pipeline.storage.remote import is_remote

    given = {name: context.params[name] for name in files if context.params.get(name) is not None}
    for name in outputs:
        value = context.params.get(name)
        if value is not None and not Path(str(value)).is_absolute():
            shared = None if is_remote(profile.storage) else f"{str(profile.storage).rstrip('/')}/{value}"
            remedy = f", such as {shared}" if shared else ""
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: the job writes on another machine; give an absolute folder that every node and you "
                f"see{remedy}, or leave it out: then the profile's storage gets it"
            )
    sources = [path for value in given.values() for path in map(_path, _words(value)) if path.is_file()]
    module = _own_module(context)
    console = Console()
    jobs = Jobs(profile, reference, console)

    def arguments_of(names: Mapping[Path, str]) -> list[str]:
        changed: dict[str, Any] = {}
        for name, value in given.items():
            path = _path(value)
            if name == "data" and path.is_dir():  # elsewhere a word is a name, though a folder here may be called so
                changed[name] = str(path.absolute())
                console.say(f"{path.absolute()} is named, not sent: every node must see it")
            elif any(_path(word) in names for word in _words(value)):
                there = tuple(names.get(_path(word), word) for word in _words(value))
                changed[name] = there if isinstance(value, tuple) else there[0]
        return command_line(context, changed)

    job = jobs.submit(arguments_of, sources, module)
    if detach:
        click.echo(job)
        console.say(jobs.detach_hint(job))
        return 0
    return _follow(jobs, job)


def _follow(jobs: Any, job: str) -> int:
    try:
        code: int = jobs.follow(job, click.echo, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo(f"\n{jobs.detach_hint(job)}", err=True)
        return 130
    return code


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


def command_line(context: click.Context, changed: Mapping[str, Any]) -> list[str]:
    """Return the arguments as typed, but for changed values and `--detach`; options first, so that `--` can guard the words after them."""
    path = context.command_path.split()[1:]
    typed, _, order = context.command.make_parser(context).parse_args(sys.argv[1 + len(path) :])
    options: list[str] = []
    words: list[str] = []
    for parameter in dict.fromkeys(order):
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = changed.get(name, typed[name])
        if isinstance(parameter, click.Argument):
            words += [str(each) for each in (value if isinstance(value, tuple | list) else [value])]
        elif isinstance(parameter, click.Option) and name != "detach":
            options += _option(parameter, value)
    return [*path, *options, *(["--"] if words else []), *words]


def _option(option: click.Option, value: Any) -> list[str]:
    long = next((name for name in option.opts if name.startswith("--")), option.opts[0])
    if option.is_flag:
        return [long] if value else list(option.secondary_opts[:1])
    each = value if option.multiple and isinstance(value, list) else [value]
    if option.nargs != 1:
        return [word for words in each for word in (long, *map(str, words))]
    return [f"{long}={item}" if long.startswith("--") else f"{long}{item}" for item in each]


def _jobs_of(cluster: str) -> Any:
    from pipeline.config.cluster_profile import load_profile
    from pipeline.console import Console
    from pipeline.errors import UsageError
    from pipeline.jobs.submit import Jobs

    profile = load_profile(cluster)
    if profile.kind != "job":
        raise UsageError(f"profile {profile.name!r} is of kind {profile.kind}: it has no jobs; name one of kind job")
    return Jobs(profile, cluster, Console())


where = click.option(
    "--cluster", metavar="PROFILE", required=True, help="The profile whose cluster is asked: of kind job."
)


@click.group(
    epilog=example("""
ddpm-pipe jobs list --cluster kuberay
ddpm-pipe jobs follow k7m2 --cluster kuberay
ddpm-pipe jobs stop k7m2 --cluster kuberay
""")
)
def jobs() -> None:
    """List, follow and stop what was sent to a cluster. JOB is an id, a unique prefix of one, or `latest`."""


@jobs.command(
    "list",
    epilog=example("""
ddpm-pipe jobs list --cluster kuberay
ddpm-pipe jobs list --cluster kuberay --json
"""),
)
@where
@json_option
def list_jobs(cluster: str, as_json: bool) -> None:
    """List the jobs that were sent to a cluster, newest first."""
    rows = _jobs_of(cluster).listed()
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows, ["job", "status", "exit", "started", "took", "command"])
    else:
        click.echo("no jobs there yet; send one with: ddpm-pipe train --cluster " + cluster)


@jobs.command(
    "follow",
    epilog=example("""
ddpm-pipe jobs follow latest --cluster kuberay
"""),
)
@click.argument("job")
@where
def follow_job(job: str, cluster: str) -> None:
    """Show JOB's log from its beginning until it ends, and exit with its exit code. Ctrl-C leaves the job alone."""
    found = _jobs_of(cluster)
    click.get_current_context().exit(_follow(found, found.find(job)))


@jobs.command(
    "stop",
    epilog=example("""
ddpm-pipe jobs stop k7m2 --cluster kuberay
"""),
)
@click.argument("job")
@where
def stop_job(job: str, cluster: str) -> None:
    """Ask JOB to stop: a training saves first. Says what came of it."""
    found = _jobs_of(cluster)
    click.echo(found.stop(found.find(job)))
