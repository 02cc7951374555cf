"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from pipeline.commands import completion

F = TypeVar("F", bound=Callable[..., Any])


class Result(Protocol):
    """What a command found or made."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data: what `--json` prints."""


def example(text: str) -> str:
    """Return the last part of a command's help: examples, kept line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in text.strip().splitlines())


run_argument = click.argument("run", shell_complete=completion.folders("runs"))


def cluster_option(command: F) -> F:
    """Add `--cluster`, and pass the command its Context."""

    @functools.wraps(command)
    def with_context(*, cluster: str | None, **given: Any) -> Any:
        from pipeline.config.context import Context

        return command(context=Context.load(cluster, command_line()), **given)

    return click.option(
        "--cluster",
        metavar="PROFILE",
        shell_complete=completion.shipped("cluster"),
        help="Where to run: a profile's name or YAML file. Default: local (this machine).",
    )(with_context)  # type: ignore[return-value]


def set_option(command: F) -> F:
    """Add `-s key=value`."""
    return click.option(
        "-s",
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        shell_complete=completion.keys,
        help="Override one setting, such as training.steps=1000.",
    )(command)


def isolated_option(command: F) -> F:
    """Add `--isolated`."""
    return click.option("--isolated", is_flag=True, help="Train in a process of its own, restarted if it dies.")(
        command
    )


def json_option(command: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def dry_run_option(command: F) -> F:
    """Add `--dry-run`."""
    return click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")(command)


def max_concurrent_option(command: F) -> F:
    """Add `--max-concurrent`."""
    return click.option(
        "--max-concurrent",
        type=click.IntRange(min=1),
        help="Trials of a sweep at once. Default: as many as there is room for.",
    )(command)


def sampling_options(command: F) -> F:
    """Add the options that change how images are generated; what is not given is as the run's experiment says."""
    options = (
        click.option(
            "--sampler",
            type=click.Choice(["ddim", "ancestral", "dpm_solver"]),
            help="Default: as the run's experiment says.",
        ),
        click.option("--steps", type=click.IntRange(min=1), help="Timesteps along one image."),
        click.option(
            "--spacing",
            type=click.Choice(["trailing", "linspace", "leading", "quad"]),
            help="Which timesteps these are.",
        ),
        click.option("--eta", type=click.FloatRange(0, 1), help="DDIM's noise: 0 is none, 1 is ancestral."),
        click.option(
            "--guidance",
            "guidance_scale",
            type=click.FloatRange(min=0),
            metavar="S",
            help="Classifier-free guidance, S = 1 + w: 1 is none, 2 to 5 is usual. Classes only.",
        ),
        click.option(
            "--label",
            "labels",
            metavar="CLASS",
            help="A class by name, or by number as `--label=#3`; `#balanced`, `#none`. Classes only.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            metavar="N",
            help="Images that the network sees at once.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["mixed", "bf16", "fp32"]),
            help="Of the network; `mixed` is bf16 where the hardware has it.",
        ),
        click.option("--compile/--no-compile", default=None, help="Compile the network first: for many images."),
        click.option(
            "--seed", type=click.IntRange(min=0), help="Image i is a function of this and i. Default: the experiment's."
        ),
        click.option(
            "--weights",
            metavar="WHICH",
            default="ema",
            show_default=True,
            help="`ema`, `ema:DECAY`, `raw`, or `posthoc:WIDTH` from stored snapshots.",
        ),
        click.option("--checkpoint", type=click.IntRange(min=0), metavar="STEP", help="Default: the newest."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def command_line() -> list[str]:
    """Return the command as typed, by its name rather than its path."""
    return ["ddpm-pipe", *sys.argv[1:]]


def unused(path: Path) -> Path:
    """Return the path, or where something stands there already, the first of NAME-2, NAME-3, ... that is free."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def print_json(value: object) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_result(result: Result, as_json: bool, text: Callable[[], Iterable[str]]) -> None:
    """Print a command's result on stdout: its data, or lines for people."""
    if as_json:
        print_json(result.to_json())
    else:
        for line in text():
            click.echo(line)


def named_lines(fields: Mapping[str, object]) -> list[str]:
    """Return one aligned line for each field; each further item of a list has a line of its own."""
    lines = []
    for name, value in fields.items():
        items = value if isinstance(value, list) else [value]
        lines += [f"{name + ':' if i == 0 else '':<17}{item}" for i, item in enumerate(items)]
    return lines


def print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Print rows as an aligned table; a missing value is a dash."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(list(columns), *cells, strict=True)]
    for line in [list(columns), *cells]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
