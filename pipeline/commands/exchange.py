"""Commands that carry models to and from other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pipeline.commands import options
from pipeline.commands.output import print_result

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.storage.retention import Which


@click.command(
    epilog=options.example("""
ddpm-pipe export latest pipeline/ --format diffusers
ddpm-pipe export k7m2 model/ --format safetensors --weights raw --checkpoint 2000
ddpm-pipe export k7m2 graph/ --format onnx
""")
)
@options.run
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--format",
    "form",
    type=click.Choice(["diffusers", "safetensors", "onnx"]),
    default="diffusers",
    show_default=True,
    help="diffusers: a DDPMPipeline; safetensors: what `import` reads; onnx: the network as a graph.",
)
@click.option("--weights", metavar="WHICH", default="ema", show_default=True, help="As in `ddpm-pipe sample`.")
@options.checkpoint
@options.cluster
@options.json
def export(
    run: str,
    folder: Path,
    form: Literal["diffusers", "safetensors", "onnx"],
    weights: str,
    checkpoint: Which,
    context: Context,
    as_json: bool,
) -> None:
    """Write the model of RUN for other programs.

    DIR is a new folder. No format holds code or pickles. What has no equal in a format is refused with the reason.
    """
    from pipeline.exchange.export import ExportRequest, export_run

    result = export_run(context, run, ExportRequest(folder, form, checkpoint, weights))
    print_result(result, as_json)


@click.command(
    "import",
    epilog=options.example("""
ddpm-pipe import ddpm-cifar10-32 --data cifar10
ddpm-pipe import model/ --name borrowed
"""),
)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--data", metavar="DATA", help="Images to score it against and fine-tune it on: a dataset or a source.")
@click.option("--name", help="Of the run. Default: DIR's name.")
@options.cluster
@options.json
def import_(folder: Path, data: str | None, name: str | None, context: Context, as_json: bool) -> None:
    """Make a run of the model in DIR.

    The run is ready to sample, score and fine-tune. DIR has the layout of a diffusers DDPMPipeline (safetensors or .bin), or is what
    `ddpm-pipe export --format safetensors` wrote. It is read as a stranger's: nothing in it is run.
    """
    from pipeline.runs.import_run import import_folder

    result = import_folder(context, folder, data, name)
    print_result(result, as_json)
