"""Commands that score runs."""

from __future__ import annotations

from typing import Any

import click

from pipeline.cli_options import cluster_option, dry_run_option, example, json_option, print_json, sampling_options

METRICS = ("fid", "kid", "is", "prdc", "bpd")


def _metrics(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Read a list with commas; each name once, in the order given."""
    if value is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "none"
        raise click.BadParameter(f"got {got}; expected some of {', '.join(METRICS)}, with commas between")
    return names


@click.command(
    epilog=example("""
ddpm-pipe evaluate latest
ddpm-pipe evaluate k7m2 --sampler ddim --steps 100 --num-images 600
ddpm-pipe evaluate k7m2 --metrics fid,kid,is,prdc --seeds 3
ddpm-pipe evaluate k7m2 --metrics bpd --split test
ddpm-pipe evaluate k7m2 --extractor inception --inception-weights weights-inception-2015-12-05.pth
""")
)
@click.argument("run")
@click.option(
    "--metrics",
    metavar="LIST",
    callback=_metrics,
    help=f"Some of {', '.join(METRICS)}, with commas between. Default: as the experiment says.",
)
@click.option(
    "--seeds",
    "num_seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Score as many sets of images, of consecutive seeds: mean and deviation.",
)
@click.option(
    "--extractor", type=click.Choice(["auto", "classifier", "inception"]), help="Default: as the experiment says."
)
@click.option(
    "-n",
    "--num-images",
    type=click.IntRange(min=2),
    help="Images on each side of the comparison; for bpd at most so many, by default all.",
)
@click.option(
    "--split", metavar="NAME", help="For bpd: another split of the run's source. Default: the images trained on."
)
@click.option("--inception-weights", metavar="PATH|URL", help="The 2015-12-05 FID Inception weights.")
@sampling_options
@cluster_option
@dry_run_option
@json_option
def evaluate(
    run: str,
    metrics: tuple[str, ...] | None,
    num_seeds: int,
    extractor: str | None,
    num_images: int | None,
    split: str | None,
    inception_weights: str | None,
    cluster: str | None,
    dry_run: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Score RUN, beside what real images and noise get by the same code.

    \b
    fid   Frechet distance of the extractor's features
    kid   kernel distance of the same, without FID's bias
    is    Inception Score
    prdc  precision, recall, density, coverage
    bpd   bits per dimension of real images: the variational bound, its parts, its curve over t
    """
    from pipeline import result_commands
    from pipeline.evaluate import ScoreRequest

    request = ScoreRequest(
        metrics=metrics,
        num_seeds=num_seeds,
        extractor=extractor,
        num_images=num_images,
        split=split,
        inception_weights=inception_weights,
        **how,
    )
    result = result_commands.evaluate(run, request, cluster, dry_run=dry_run)
    print_json(result) if as_json else click.echo(result_commands.to_text(result))
