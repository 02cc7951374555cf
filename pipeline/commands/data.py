"""Commands about data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands import completion, options
from pipeline.commands.output import print_json, unused


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    """Read 32 or 32x48 (height x width)."""
    if value is None:
        return None
    parts = value.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(
            f"got {value!r}; expected a number of pixels such as 32, or HEIGHTxWIDTH such as 32x48"
        )
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


@click.command(
    epilog=options.example("""
ddpm-pipe ingest digits data/digits
ddpm-pipe ingest ~/photos data/photos --image-size 64 --mode RGB
ddpm-pipe ingest 's3://bucket/cifar10/*.parquet' data/cifar10 --image-column img
ddpm-pipe ingest ~/photos s3://bucket/data/photos --image-size 64
""")
)
@click.argument("source", shell_complete=completion.files)
@click.argument("dest", shell_complete=completion.files)
@click.option(
    "--image-size", callback=_size, metavar="N|HxW", help="Centre-crop and resize, antialiased. Default: as they are."
)
@click.option("--mode", type=click.Choice(["L", "RGB"]), help="Convert to grayscale or colour. Default: as they are.")
@click.option("--image-column", metavar="NAME", help="Parquet column of the images. Default: found by its type.")
@click.option("--label-column", metavar="NAME", help="Parquet column of the labels. Default: found by its type.")
@click.option("--split", metavar="NAME", help="Split of the source, such as train or test.")
@click.option(
    "--layout",
    type=click.Choice(["flat", "classes", "splits"]),
    help="What sub-folders of images are. Default: decided by their names.",
)
@click.option(
    "--skip-damaged",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Leave out up to N damaged images, and list them. Default: refuse.",
)
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=1),
    help="Processes that decode. Default: the machine's cores.",
)
@options.json
def ingest(source: str, dest: str, as_json: bool, **asked: Any) -> None:
    """Turn SOURCE into a dataset of verified shards in DEST.

    DEST is a new folder, here or in an object store (s3://bucket/folder). SOURCE is digits, mnist, fashion-mnist or cifar10, a folder of
    images (sub-folders are classes), Parquet files (a file, folder, glob, or s3:// or gs:// address), or an .npz file.
    """
    from pipeline.console import Bar, Console
    from pipeline.ingest.ingest import ingest as ingest_source
    from pipeline.pictures.pictures import card_lines, dataset_card

    console = Console()
    rate: list[Bar] = []

    def progress(done: int, total: int | None) -> None:
        if total is not None:
            if not rate:
                rate.append(Bar(console, "ingesting", total))
            rate[0](done)

    manifest = ingest_source(source, dest, **asked, progress=progress, say=console.say, summary=console.say)
    card = dataset_card(manifest)
    print_json(card) if as_json else click.echo("\n".join(card_lines(card)))


@click.command(
    epilog=options.example("""
ddpm-pipe inspect data/digits
ddpm-pipe inspect data/digits --verify --picture digits.png
""")
)
@click.argument("data", shell_complete=completion.files)
@click.option("--verify", is_flag=True, help="Read every row and compare it with its checksum.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="Where to write the grid. Default: DATA's name with .png (-2.png where that is taken), here; none for a store's.",
)
@options.json
def inspect(data: str, verify: bool, picture: Path | None, as_json: bool) -> None:
    """Show an ingested dataset: a card, and a grid picture.

    The grid has its first images.
    """
    from pipeline.console import Bar, Console
    from pipeline.data.shards import Dataset
    from pipeline.pictures.pictures import card_lines, dataset_card, inspect_picture
    from pipeline.storage.remote import is_remote

    dataset = Dataset.open(data)
    card = dataset_card(dataset.manifest)
    if verify:
        rate = Bar(Console(), "verifying", dataset.manifest.num_rows, "rows")
        dataset.verify(progress=lambda done, _: rate(done))
        card["verified"] = "every row"
    if picture is None and not is_remote(data):  # whose shards are not fetched unless they are asked for
        picture = unused(Path(f"{Path(data).resolve().name}.png"))
    if picture is not None:
        inspect_picture(dataset, picture)
        card["picture"] = str(picture.absolute())
    print_json(card) if as_json else click.echo("\n".join(card_lines(card)))
