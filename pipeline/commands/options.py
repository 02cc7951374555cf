"""Options that several commands share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from pipeline.commands import completion

F = TypeVar("F", bound=Callable[..., Any])


def example(text: str) -> str:
    """Return the last part of a command's help: examples, kept line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in text.strip().splitlines())


run = click.argument("run", shell_complete=completion.folders("runs"))
runs = click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=completion.folders("runs"))


def cluster(command: F) -> F:
    """Add `--cluster`, and pass the command its Context."""

    @functools.wraps(command)
    def with_context(*, cluster: str | None, **given: Any) -> Any:
        from pipeline.config.context import Context

        return command(context=Context.load(cluster, ["ddpm-pipe", *sys.argv[1:]]), **given)

    return click.option(
        "--cluster",
        metavar="PROFILE",
        shell_complete=completion.shipped("cluster"),
        help="Where to run: a profile's name or YAML file. Default: local (this machine).",
    )(with_context)  # type: ignore[return-value]


overrides = click.option(
    "-s",
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    shell_complete=completion.keys,
    help="Override one setting, such as training.steps=1000.",
)
isolated = click.option("--isolated", is_flag=True, help="Train in a process of its own, restarted if it dies.")


def _which(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    """Read a step, `latest` or `best`."""
    from pipeline.storage.retention import read_which

    try:
        return None if value is None else read_which(value)
    except ValueError:
        raise click.BadParameter(f"got {value!r}, expected a step, latest or best") from None


checkpoint = click.option(
    "--checkpoint",
    callback=_which,
    metavar="STEP|latest|best",
    help="`best` by the scores while training. Default: latest.",
)
json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
max_concurrent = click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    help="Trials of a sweep at once. Default: as many as there is room for.",
)


def sampling(command: F) -> F:
    """Add the options that change how images are generated; the run's experiment decides what is not given."""
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
        checkpoint,
    )
    for option in reversed(options):
        command = option(command)
    return command
