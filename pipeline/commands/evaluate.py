"""Commands that score runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands import completion, options
from pipeline.commands.output import Result, print_result, table_lines
from pipeline.commands.submit import runs_on_cluster

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.runs.evaluation import Evaluation

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
    epilog=options.example("""
ddpm-pipe evaluate latest
ddpm-pipe evaluate k7m2 --sampler ddim --steps 100 --num-images 600
ddpm-pipe evaluate k7m2 --metrics fid,kid,is,prdc --seeds 3
ddpm-pipe evaluate k7m2 --metrics bpd --split test
ddpm-pipe evaluate k7m2 --grid "sampler=ancestral,ddim steps=10,50,1000"
ddpm-pipe evaluate k7m2 --extractor inception --inception-weights weights-inception-2015-12-05.pth
""")
)
@options.run
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
    "--extractor",
    metavar="NAME|FILE",
    help="auto, classifier, inception, or a network in an .onnx file. Default: as the experiment says.",
)
@click.option(
    "-n",
    "--num-images",
    type=click.IntRange(min=2),
    help="Images on each side of the comparison; for bpd at most so many, by default all.",
)
@click.option(
    "--split", metavar="NAME", help="Judge by another split of the run's source. Default: the images trained on."
)
@click.option("--inception-weights", metavar="PATH|URL", help="The 2015-12-05 FID Inception weights.")
@click.option(
    "--neighbours", is_flag=True, help="Also draw generated images beside the training images closest to them."
)
@click.option(
    "--grid",
    metavar="POINTS",
    help='Score every combination of settings, such as "sampler=ancestral,ddim steps=10,50": a table and a picture.',
)
@options.sampling
@runs_on_cluster(files=["inception_weights", "extractor"])
@options.dry_run
@options.json
def evaluate(run: str, grid: str | None, context: Context, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Score RUN beside the scores of real images and of noise.

    \b
    fid   Frechet distance of the extractor's features
    kid   kernel distance of the same, without FID's bias
    is    Inception Score
    prdc  precision, recall, density, coverage
    bpd   bits per dimension of real images: the variational bound, its parts, its curve over t
    """
    from pipeline.runs.evaluate import ScoreRequest

    request = ScoreRequest(**asked)
    if dry_run:
        from pipeline.runs.evaluate import plan_evaluation
        from pipeline.runs.evaluate_grid import plan_grid

        plan: Result = (
            plan_evaluation(context, run, request) if grid is None else plan_grid(context, run, request, grid)
        )
        print_result(plan, as_json)
    elif grid is None:
        from pipeline.runs.evaluate import evaluate as evaluate_run

        result = evaluate_run(context, run, request)
        print_result(result, as_json, lambda: _page(result.found.run, evaluation_lines(result.found), result.written))
    else:
        from pipeline.runs.evaluate_grid import evaluate_grid

        scored = evaluate_grid(context, run, request, grid)
        print_result(scored, as_json, lambda: _page(scored.run, table_lines(scored.grid.shown()), scored.written))


def evaluation_lines(found: Evaluation) -> list[str]:
    """Return the tables of scores, closest training images and bits/dim, each where it was asked for."""
    from pipeline.metrics.neighbours import neighbour_lines
    from pipeline.metrics.score_table import score_lines

    parts = [
        [] if found.scored is None else score_lines(found.scored.scores),
        [] if found.sheet is None else neighbour_lines(found.sheet.neighbours),
        [] if found.measured is None else found.measured.lines(),
    ]
    return [line for part in parts if part for line in ["", *part]][1:]


def _page(run: str, table: Sequence[str], written: Sequence[Path]) -> list[str]:
    """Return the lines of a result: which run, what was found, and the files that hold it."""
    return [f"run {run}", "", *table, "", *map(str, written)]


@click.command(
    epilog=options.example("""
ddpm-pipe compare
ddpm-pipe compare k7m2 p3xw --metric fid
ddpm-pipe compare k7m2 p3xw --metric kid --across sampler,steps
""")
)
@click.argument("runs", metavar="[RUN]...", nargs=-1, shell_complete=completion.folders("runs"))
@click.option(
    "--metric", metavar="NAME", help="Such as fid, kid, bits_per_dim, precision. Default: one that most have."
)
@click.option(
    "--across",
    metavar="FIELDS",
    default="",
    help="Fields of the values' identities that may differ, with commas between, such as sampler,steps.",
)
@options.cluster
@options.json
def compare(runs: tuple[str, ...], metric: str | None, across: str, context: Context, as_json: bool) -> None:
    """Rank evaluated runs, like with like; other settings below.

    Without RUN, all evaluated runs. Several checkpoints of a run are ranked too. With --metric or --across, exit code 10 if the runs have
    no values of one kind.
    """
    from pipeline.runs.compare import compare_runs

    fields = [name.strip() for name in across.split(",") if name.strip()]
    found = compare_runs(context, runs, metric, fields)
    print_result(found, as_json, lambda: [line for ranking in found.rankings for line in ["", *ranking.lines()]][1:])
