"""The command that looks whether a cluster is ready."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import click

from pipeline.commands import completion, options
from pipeline.commands.output import print_json
from pipeline.commands.submit import runs_on_cluster

if TYPE_CHECKING:
    from pipeline.config.context import Context
    from pipeline.doctor.verdicts import Finding

COLORS = {"green": "green", "yellow": "yellow", "red": "red", "skipped": "bright_black"}
INDENT = " " * 20


def _require_access(context: Context, given: dict[str, Any]) -> None:
    """Probe the authentication of the cluster that the doctor is sent to; a refusal is a finding like any other."""
    from pipeline.doctor.doctor import auth_findings, require_healthy

    findings = auth_findings(context.profile)
    if findings:
        _print_all(context.profile.name, findings, given["as_json"])
    require_healthy(findings)


@click.command(
    epilog=options.example("""
ddpm-pipe doctor
ddpm-pipe doctor --cluster multi-node-gpu.yaml --data /mnt/ddpm/datasets/photos
ddpm-pipe doctor --preset ddpm-cifar10 --json
""")
)
@runs_on_cluster(files=["data"], first=_require_access)
@click.option(
    "--data",
    metavar="DATA",
    shell_complete=completion.files,
    help="An ingested dataset that every node should read: a folder, or s3://...",
)
@click.option(
    "--preset",
    metavar="NAME",
    shell_complete=completion.shipped("experiments"),
    help="The experiment whose training step is timed. Default: digits.",
)
@options.json
def doctor(context: Context, data: str | None, preset: str | None, as_json: bool) -> None:
    """Check whether a cluster is ready for its profile.

    It takes under a minute. One line for each check: green, yellow (works, with a drawback), red (training would fail or mislead) or
    skipped, with what to do about it. Exit code 10 if something is red.
    """
    from pipeline.doctor.doctor import examination_of, examine, require_healthy

    examination = examination_of(context.profile, data, preset)
    stdout = sys.stdout  # while Ray is up, what is printed goes to stderr, for Ray's sake
    findings = examine(examination, (lambda finding: None) if as_json else lambda finding: _print(finding, stdout))
    if as_json:
        _print_all(examination.profile.name, findings, as_json)
    require_healthy(findings)


def _print_all(profile: str, findings: Sequence[Finding], as_json: bool) -> None:
    if as_json:
        print_json({"profile": profile, "checks": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            _print(finding)


def _print(finding: Finding, stdout: TextIO | None = None) -> None:
    word = click.style(f"{finding.verdict:<8}", fg=COLORS[finding.verdict])
    head, *rest = textwrap.wrap(finding.says, 110) or [""]
    click.echo(f"{word}{finding.check:<12}{head}", stdout)
    for line in rest:
        click.echo(INDENT + line, stdout)
    for line in textwrap.wrap(finding.remedy, 108, initial_indent="-> ", subsequent_indent="   "):
        click.echo(INDENT + line, stdout)
