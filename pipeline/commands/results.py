"""Commands about runs and what came out of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipeline.commands import completion, options
from pipeline.commands.output import print_json, print_result, print_table, unused
from pipeline.commands.submit import runs_on_cluster
from pipeline.console import plural
from pipeline.storage.next_command import typeable

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.runs.sample_run import SampleResult

SCREENFUL = 20  # runs


@click.command(
    epilog=options.example("""
ddpm-pipe sample latest
ddpm-pipe sample k7m2 -n 1000 --format png --out digits/
ddpm-pipe sample k7m2 --sampler ancestral --seed 7 --format parquet
ddpm-pipe sample k7m2 --label 7 --guidance 3
ddpm-pipe sample k7m2 --format gif -n 25
ddpm-pipe sample k7m2 --interpolate 12 ~/seven.png
""")
)
@options.run
@click.option(
    "-n",
    "--num-images",
    type=click.IntRange(min=1),
    help="Images to generate. Default: 64; of a strip 8, of an animation 16, between two images 9.",
)
@click.option("--out", type=click.Path(path_type=Path), help="A new folder. Default: RUN's own, under samples/.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["grid", "png", "parquet", "strip", "gif"]),
    default="grid",
    show_default=True,
    help="`strip` and `gif` show how images come out of noise.",
)
@click.option(
    "--interpolate",
    "between",
    nargs=2,
    metavar="A B",
    help="Draw the way from one image to another: each the number of a training image, or a file.",
)
@options.sampling
@runs_on_cluster(files=["between"], outputs=["out"])
@options.dry_run
@options.json
def sample(
    run: str,
    num_images: int | None,
    out: Path | None,
    form: Literal["grid", "png", "parquet", "strip", "gif"],
    between: tuple[str, str] | None,
    context: Context,
    dry_run: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Generate images from RUN. Image i depends on the seed and i alone, whatever -n is."""
    from pipeline.runs.sample import SampleRequest
    from pipeline.runs.sample_run import SampleTarget, plan_samples, sample_run

    usual = 9 if between else {"strip": 8, "gif": 16}.get(form, 64)
    request = SampleRequest(num_images=num_images or usual, **how)
    target = SampleTarget(out, form, between)
    if dry_run:
        plan = plan_samples(context, run, request, target)
        print_result(plan, as_json)
    else:
        result = sample_run(context, run, request, target)
        print_result(result, as_json, lambda: _sample_lines(result))


def _sample_lines(result: SampleResult) -> list[str]:
    """Return where the images are, and in a line what they are; the whole of it is in the last file."""
    first, *others, about = result.written
    more = f" ... ({len(others) + 1} images)" if others else ""
    made = result.identity
    shown = ("sampler", "steps", "seed", "weights", "error_of_the_ends")
    settings = [f"{name} {made[name]}" for name in shown if name in made]
    return [
        f"{first}{more}",
        f"{plural(made['num_images'], 'image')} of run {result.run}, step {made['checkpoint_step']}: {', '.join(settings)}",
        f"all settings: {about}",
    ]


@click.command(
    epilog=options.example("""
ddpm-pipe runs
ddpm-pipe runs --limit 100
ddpm-pipe runs --json
""")
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help=f"At most N. Default: {SCREENFUL}; with --json all."
)
@options.cluster
@options.json
def runs(limit: int | None, context: Context, as_json: bool) -> None:
    """List the runs, newest first, with score and status.

    Below them, those whose process was killed or crashed, with the line that resumes each.
    """
    from pipeline.runs.runs_table import COLUMNS, runs_table
    from pipeline.storage.folder import GONE

    rows = runs_table(context.home, context.store)[::-1]
    shown = rows[: limit if as_json else limit or SCREENFUL]
    if as_json:
        print_json(shown)
    elif rows:
        print_table(shown, COLUMNS)
        if hidden := len(rows) - len(shown):
            click.echo(
                f"{plural(hidden, 'older run')} not shown; list all with: {typeable(f'runs --limit {len(rows)}')}"
            )
        for row in shown:
            if row["reason"] == GONE:
                resume = typeable(f"resume {row['id']}")
                click.echo(
                    f"{row['id']} died after step {row['step']} (its process was killed or crashed); resume it with: {resume}"
                )
    else:
        click.echo(f"no runs in {context.home} yet; start one with: {typeable('train')}")


@click.command(
    epilog=options.example("""
ddpm-pipe verify latest
ddpm-pipe verify k7m2 --steps 100
""")
)
@options.run
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Replay N steps: to a checkpoint N steps later, or twice if there is none. Default: to the newest checkpoint.",
)
@options.cluster
@options.json
def verify(run: str, steps: int | None, context: Context, as_json: bool) -> None:
    """Replay steps of RUN's training and compare the bytes.

    It starts from the last checkpoint but one, here, with the recorded settings and number of threads, and writes nothing into RUN.
    Other bytes than the newest checkpoint's mean silent corruption: the exit code is 12, and one line names the file and the tensor.
    """
    from pipeline.runs.verify import verify_run

    found = verify_run(context, run, steps)
    equal = (
        f"run {found.run}: the steps {found.from_step} to {found.to_step} ended with the bytes of {found.compared_with}"
    )
    print_result(found, as_json, lambda: [] if found.differences else [equal])
    found.require_equal()


@click.command(
    epilog=options.example("""
ddpm-pipe report latest
ddpm-pipe report k7m2 p3xw --out linear-or-cosine.html
""")
)
@options.runs
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: report.html, of one RUN in its folder, of several here."
)
@options.cluster
@options.json
def report(runs: tuple[str, ...], out: Path | None, context: Context, as_json: bool) -> None:
    """Write one HTML page about RUN, or several side by side.

    Curves, samples by step, scores, settings, data, noise schedule and cost, and the commands that repeat them. The page needs no network.
    """
    from pipeline.runs.report import REPORT_FILE, make_report

    made = make_report(context, runs, out, unused(Path.cwd() / REPORT_FILE))
    print_result(made, as_json, lambda: [str(made.path)])


@click.command(
    epilog=options.example("""
ddpm-pipe curves latest
ddpm-pipe curves k7m2 p3xw --csv > curves.csv
""")
)
@options.runs
@click.option("--csv", "as_csv", is_flag=True, help="Print every value: run, metric, step, value, time.")
@options.cluster
@options.json
def curves(runs: tuple[str, ...], as_csv: bool, context: Context, as_json: bool) -> None:
    """Print the metrics that RUN recorded, or every value.

    Of each metric its first, last and lowest value; with --csv or --json all of them.
    """
    from pipeline.tracking.curves import curves_of, summary_rows, to_csv

    points = curves_of(context.home, runs, context.store)
    if as_csv:
        click.echo(to_csv(points), nl=False)
    elif as_json:
        print_json([point._asdict() for point in points])
    else:
        print_table(summary_rows(points))


@click.command(
    epilog=options.example("""
ddpm-pipe ui
ddpm-pipe ui --port 5001
""")
)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on 127.0.0.1.")
@options.cluster
def ui(port: int, context: Context) -> None:
    """Serve MLflow's pages about the runs, until Ctrl-C.

    Only this machine can open them.
    """
    from pipeline.tracking.ui import serve_ui

    mlflow = context.profile.mlflow
    serve_ui(context.home, port, mlflow.tracking_uri, mlflow.experiment)


@click.command(
    epilog=options.example("""
ddpm-pipe sync latest
ddpm-pipe sync --moved
""")
)
@click.argument("run", required=False, shell_complete=completion.folders("runs"))
@click.option("--moved", is_flag=True, help="After the home was moved or copied: correct MLflow's paths.")
@options.cluster
def sync(run: str | None, moved: bool, context: Context) -> None:
    """Deliver RUN's records that the tracking store lacks.

    They were recorded while the store was away.
    """
    from pipeline.errors import UsageError
    from pipeline.sweeps.commands import sync as deliver
    from pipeline.tracking.moved import correct_places

    if moved == (run is not None):
        raise UsageError(
            f"sync: got {'both RUN and --moved' if moved else 'neither RUN nor --moved'}, expected one of them"
        )
    if run is None:
        click.echo(f"{context.home}: corrected {correct_places(context.home)} paths of artifacts in mlflow.db")
        return
    done = deliver(context, run)
    click.echo(f"{done.what}: delivered {done.num_records} records to {done.uri}")
