"""The command that looks whether a cluster is ready."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from pipeline.cli_options import example, json_option, print_json
from pipeline.cli_submit import runs_on_cluster

if TYPE_CHECKING:
    from pipeline.checks import Finding

COLORS = {"green": "green", "yellow": "yellow", "red": "red", "skipped": "bright_black"}
INDENT = " " * 20


@click.command(
    epilog=example("""
ddpm-pipe doctor
ddpm-pipe doctor --cluster multi-node-gpu.yaml --data /mnt/ddpm/datasets/photos
ddpm-pipe doctor --preset ddpm-cifar10 --json
""")
)
@runs_on_cluster(files=["data"])
@click.option("--data", metavar="DATA", help="An ingested dataset that every node should read: a folder, or s3://...")
@click.option("--preset", metavar="NAME", help="The experiment whose training step is timed. Default: digits.")
@json_option
def doctor(cluster: str | None, data: str | None, preset: str | None, as_json: bool) -> None:
    """Look in under a minute whether a cluster is ready for what its profile asks.

    One line for each check: green, yellow (works, with a drawback), red (training would fail or mislead) or skipped, with what to do
    about it. Exit code 10 if something is red.
    """
    from pipeline.doctor import examine, require_healthy
    from pipeline.doctor_request import examination_of

    examination = examination_of(cluster, data, preset)
    findings = examine(examination, (lambda finding: None) if as_json else _tell)
    if as_json:
        print_json({"profile": examination.profile.name, "checks": [finding.to_dict() for finding in findings]})
    require_healthy(findings)


def _tell(finding: Finding) -> None:
    word = click.style(f"{finding.verdict:<8}", fg=COLORS[finding.verdict])
    head, *rest = textwrap.wrap(finding.says, 110) or [""]
    click.echo(f"{word}{finding.check:<12}{head}")
    for line in rest:
        click.echo(INDENT + line)
    for line in textwrap.wrap(finding.remedy, 108, initial_indent="-> ", subsequent_indent="   "):
        click.echo(INDENT + line)
