"""Commands around many trainings: compare settings, and put a trained model to use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline.commands import completion, options
from pipeline.commands.output import next_lines, print_json, print_result, print_table
from pipeline.commands.submit import runs_on_cluster
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.storage.retention import Which
    from pipeline.sweeps.result import Result


@click.command(
    epilog=options.example("""
ddpm-pipe sweep
ddpm-pipe sweep experiments/sweep-schedules.yaml --metric kid --dry-run
ddpm-pipe sweep --over diffusion.schedule=linear,cosine,sigmoid --over diffusion.num_timesteps=100,250,1000 --steps 300
ddpm-pipe sweep --over training.learning_rate=1e-3,2e-3,4e-3 --seeds 2 --early-stopping --cluster gpu
ddpm-pipe sweep --over 'training.learning_rate={log: [1e-4, 1e-2]}' --search random --num-points 12 --minutes 5
ddpm-pipe sweep --extend k7m2 --over diffusion.num_timesteps=500 --seeds 4
""")
)
@click.argument("sweep", required=False, metavar="[SWEEP.yaml]", shell_complete=completion.shipped("sweeps"))
@click.option(
    "--over",
    multiple=True,
    metavar="KEY=A,B,C",
    shell_complete=completion.keys,
    help="Vary a setting over these values, or, as a file has it, over 'KEY={log: [1e-4, 1e-2]}', {uniform: [0, 0.3]} or "
    "{integer: [16, 64], step: 16}, and with 'when' only where other settings have given values; without SWEEP.yaml alone.",
)
@click.option(
    "--base",
    metavar="EXPERIMENT",
    shell_complete=completion.shipped("experiments"),
    help="What trials vary: a preset or an experiment file.",
)
@click.option(
    "--metric", metavar="[kid|fid|bpd]", help="Rank by this, lower being better. Default: as the file says, else fid."
)
@click.option(
    "--search",
    type=click.Choice(["grid", "random", "tpe"]),
    help="All points, drawn ones, or those Optuna's TPE proposes.",
)
@click.option("--num-points", type=click.IntRange(min=1), help="How many points random search or TPE tries.")
@click.option("--steps", type=click.IntRange(min=1), help="Budget of each trial, in steps.")
@click.option("--images", type=click.IntRange(min=1), help="Budget of each trial, in images trained on.")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Budget of each trial, in minutes of training."
)
@click.option("--seeds", type=click.IntRange(min=1), help="Repetitions of each point, for its error bar.")
@click.option("--early-stopping", is_flag=True, help="Stop hopeless trials by ASHA, on the KID of few images.")
@click.option(
    "--extend",
    metavar="SWEEP",
    shell_complete=completion.folders("sweeps"),
    help="Add values, seeds or points to this sweep; what is done is not done again.",
)
@options.max_concurrent
@runs_on_cluster(files=["sweep", "base"])
@options.overrides
@options.dry_run
@click.option("--probe/--no-probe", default=True, help="With --dry-run: measure a few steps of one trial, or none.")
@options.json
def sweep(
    sweep: str | None,
    over: tuple[str, ...],
    steps: int | None,
    images: int | None,
    minutes: float | None,
    early_stopping: bool,
    extend: str | None,
    max_concurrent: int | None,
    context: Context,
    overrides: tuple[str, ...],
    dry_run: bool,
    probe: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Compare settings: train each point alike, and rank them.

    It ends with a ranking, its noise, and a report. With no arguments, three noise schedules by three T on the embedded digits. Ranked by
    a metric of the images at equal count, sampler and network calls; the training loss, which does not compare, is refused. `ddpm-pipe
    resume SWEEP` continues one that was stopped.
    """
    from pipeline.sweeps import commands as sweep_commands

    budget = {"steps": steps, "images": images, "minutes": minutes}
    given = {name: value for name, value in budget.items() if value is not None}
    asked |= {"budget": given or None, "early_stopping": {} if early_stopping else None}
    if extend is not None:
        fixed = [
            name for name in ("base", "metric", "budget", "search", "early_stopping") if asked.get(name) is not None
        ]
        if sweep is not None or overrides or dry_run or fixed:
            raise UsageError(
                "--extend takes --over, --seeds and --num-points; it keeps the sweep's own base, metric, budget and settings"
            )
        result = sweep_commands.extend(context, extend, over, asked, max_concurrent)
    else:
        request = sweep_commands.sweep_request(context, sweep, over, asked, overrides, max_concurrent)
        if dry_run:
            from pipeline.sweeps.forecast import forecast_sweep

            forecast = forecast_sweep(request, sweep_commands.plan_sweep(request), measure=probe)
            print_result(forecast, as_json, lambda: [forecast.to_text()])
            return
        result = sweep_commands.start_sweep(context, request)
    show(result, as_json=as_json)


def show(result: Result, *, as_json: bool) -> None:
    """Print a sweep's result; FailedTrialsError afterwards where trials failed, for the exit code."""
    from pipeline.sweeps import commands as sweep_commands
    from pipeline.sweeps.text import next_commands, rows, to_text

    if as_json:
        print_json(result.to_json())
    else:
        print_table(rows(result))
        click.echo("\n".join([*to_text(result), *next_lines(next_commands(result))]))
    sweep_commands.require_all_finished(result)


@click.command(
    epilog=options.example("""
ddpm-pipe serve latest
ddpm-pipe serve k7m2 --port 8001
""")
)
@options.run
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 is any free one.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; anything else can be reached from outside.",
)
@options.checkpoint
@options.cluster
def serve(run: str, port: int, host: str, checkpoint: Which, context: Context) -> None:
    """Answer requests for images of RUN with PNGs, until Ctrl-C.

    GET /images?n=4&seed=1 gives four as JSON, /images/7.png?seed=1 one, /grid.png?n=16 a sheet; / is a page that shows some.
    """
    from pipeline.runs.serve import serve_model
    from pipeline.storage.runs import Run
    from pipeline.training.trained import not_trained

    serve_model(Run.find(context.home, run, context.store, not_trained), host, port, click.echo, checkpoint)
