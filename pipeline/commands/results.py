"""Commands about runs and what came out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from pipeline.commands.options import (
    cluster_option,
    dry_run_option,
    example,
    json_option,
    print_json,
    print_table,
    sampling_options,
)
from pipeline.commands.submit import runs_on_cluster


@click.command(
    epilog=example("""
ddpm-pipe sample latest
ddpm-pipe sample k7m2 -n 1000 --format png --out digits/
ddpm-pipe sample k7m2 --sampler ancestral --seed 7 --format parquet
ddpm-pipe sample k7m2 --label 7 --guidance 3
ddpm-pipe sample k7m2 --format gif -n 25
ddpm-pipe sample k7m2 --interpolate 12 ~/seven.png
""")
)
@click.argument("run")
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
@sampling_options
@runs_on_cluster(files=["between"], outputs=["out"])
@dry_run_option
@json_option
def sample(
    run: str,
    num_images: int | None,
    out: Path | None,
    form: Literal["grid", "png", "parquet", "strip", "gif"],
    between: tuple[str, str] | None,
    cluster: str | None,
    dry_run: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Generate images from RUN. Image i depends on the seed and i alone, whatever -n is."""
    from pipeline.commands import result_commands
    from pipeline.runs.sample import SampleRequest

    usual = 9 if between else {"strip": 8, "gif": 16}.get(form, 64)
    request = SampleRequest(num_images=num_images or usual, **how)
    result = result_commands.sample(run, request, out, form, cluster, dry_run=dry_run, between=between)
    print_json(result) if as_json else click.echo(result_commands.to_text(result))


@click.command(
    epilog=example("""
ddpm-pipe runs
ddpm-pipe runs --json
""")
)
@cluster_option
@json_option
def runs(cluster: str | None, as_json: bool) -> None:
    """List the runs: id, name, dataset, schedule, T, steps, score, status.

    Below them, those whose process was killed or crashed, with the line that resumes each.
    """
    from pipeline.config.cluster_profile import home_of, storage_of
    from pipeline.runs.runs_table import COLUMNS, died, runs_table

    folder = home_of(cluster)
    rows = runs_table(folder, storage_of(cluster))
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows, COLUMNS)
        for line in died(rows):
            click.echo(line)
    else:
        click.echo(f"no runs in {folder} yet; start one with: ddpm-pipe train")


@click.command(
    epilog=example("""
ddpm-pipe ui
ddpm-pipe ui --port 5001
""")
)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on 127.0.0.1.")
@cluster_option
def ui(port: int, cluster: str | None) -> None:
    """Serve MLflow's pages about the runs, on this machine alone, until Ctrl-C."""
    from pipeline.config.cluster_profile import load_profile
    from pipeline.tracking.ui import serve_ui

    profile = load_profile(cluster)
    serve_ui(profile.home(), port, profile.mlflow.tracking_uri, profile.mlflow.experiment)


@click.command(
    epilog=example("""
ddpm-pipe sync latest
""")
)
@click.argument("run")
@cluster_option
def sync(run: str, cluster: str | None) -> None:
    """Deliver to the tracking store what RUN recorded while the store was away."""
    from pipeline.commands import result_commands

    click.echo(result_commands.sync(run, cluster))
