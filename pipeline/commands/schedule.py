"""The command that shows noise schedules."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands import options
from pipeline.commands.output import print_json, print_table, unused


@click.command(
    epilog=options.example("""
ddpm-pipe schedule
ddpm-pipe schedule linear cosine -T 1000 -T 100 -o linear-cosine.png
ddpm-pipe schedule linear --zero-terminal-snr --json
ddpm-pipe schedule --betas my-betas.txt
""")
)
@click.argument("names", nargs=-1)
@click.option(
    "-T",
    "num_timesteps",
    type=click.IntRange(min=2),
    multiple=True,
    help="Number of steps; may be given again. Default: 1000.",
)
@click.option(
    "--zero-terminal-snr", is_flag=True, help="Rescale so that nothing of the image is left at the last step."
)
@click.option(
    "--betas",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A table of betas: a text file of numbers, one per step.",
)
@click.option(
    "-o",
    "--picture",
    type=click.Path(path_type=Path),
    help="Where to draw. Default: schedule.png here, or schedule-2.png and so on where that is taken.",
)
@options.json
def schedule(
    names: tuple[str, ...],
    num_timesteps: tuple[int, ...],
    zero_terminal_snr: bool,
    betas: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Compare noise schedules: figures and one picture.

    NAMES are linear, quadratic, constant, warmup10, warmup50, cosine, sigmoid, jsd, or one of the first five with _raw, which
    keeps the betas of T = 1000 whatever T is. None is all but these. What is refused is listed with the reason.
    """
    from pipeline.pictures.schedule_picture import draw_schedules, example_digit
    from pipeline.pictures.schedule_report import COLUMNS, facts, report_lines

    found = facts(names, num_timesteps or (1000,), betas, zero_terminal_snr=zero_terminal_snr)
    drawn = [fact.schedule for fact in found if fact.schedule is not None]
    picture = picture or unused(Path("schedule.png"))
    if drawn:
        draw_schedules(drawn, *example_digit(), picture)
    written = str(picture.absolute()) if drawn else None
    if as_json:
        print_json({"schedules": [fact.to_dict() for fact in found], "picture": written})
        return
    print_table([fact.row() for fact in found if fact.schedule is not None], list(COLUMNS))
    for line in report_lines(found):
        click.echo(line)
    if written:
        click.echo(f"picture: {written}")
