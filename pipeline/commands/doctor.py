"""The command that looks whether a cluster is ready."""

from __future__ import annotations

import functools
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from pipeline.commands.options import example, json_option, print_json
from pipeline.commands.submit import runs_on_cluster

if TYPE_CHECKING:
    from pipeline.doctor.verdicts import Finding

F = TypeVar("F", bound=Callable[..., Any])
COLORS = {"green": "green", "yellow": "yellow", "red": "red", "skipped": "bright_black"}
INDENT = " " * 20


def _auth_first(command: F) -> F:
    """Probe the authentication of a cluster that jobs are sent to: what keeps us out is a finding like any other."""

    @functools.wraps(command)
    def looked_at(*, cluster: str | None, as_json: bool, **given: Any) -> Any:
        from pipeline.config.cluster_profile import load_profile
        from pipeline.storage.provenance import JOB_VARIABLE

        profile = load_profile(cluster)
        if profile.kind == "job" and JOB_VARIABLE not in os.environ:
            from pipeline.doctor.doctor import auth_findings, require_healthy

            findings = auth_findings(profile)
            if findings:
                _tell_all(profile.name, findings, as_json)
            require_healthy(findings)
        return command(cluster=cluster, as_json=as_json, **given)

    return looked_at  # type: ignore[return-value]


@click.command(
    epilog=example("""
ddpm-pipe doctor
ddpm-pipe doctor --cluster multi-node-gpu.yaml --data /mnt/ddpm/datasets/photos
ddpm-pipe doctor --preset ddpm-cifar10 --json
""")
)
@_auth_first
@runs_on_cluster(files=["data"])
@click.option("--data", metavar="DATA", help="An ingested dataset that every node should read: a folder, or s3://...")
@click.option("--preset", metavar="NAME", help="The experiment whose training step is timed. Default: digits.")
@json_option
def doctor(cluster: str | None, data: str | None, preset: str | None, as_json: bool) -> None:
    """Look in under a minute whether a cluster is ready for what its profile asks.

    One line for each check: green, yellow (works, with a drawback), red (training would fail or mislead) or skipped, with what to do
    about it. Exit code 10 if something is red.
    """
    from pipeline.doctor.doctor import examine, require_healthy
    from pipeline.doctor.request import examination_of

    examination = examination_of(cluster, data, preset)
    stdout = sys.stdout  # while Ray is up, what is printed goes to stderr, for Ray's sake
    findings = examine(examination, (lambda finding: None) if as_json else lambda finding: _tell(finding, stdout))
    if as_json:
        _tell_all(examination.profile.name, findings, as_json)
    require_healthy(findings)


def _tell_all(profile: str, findings: Sequence[Finding], as_json: bool) -> None:
    if as_json:
        print_json({"profile": profile, "checks": [finding.to_dict() for finding in findings]})
    else:
        for finding in findings:
            _tell(finding)


def _tell(finding: Finding, stdout: TextIO | None = None) -> None:
    word = click.style(f"{finding.verdict:<8}", fg=COLORS[finding.verdict])
    head, *rest = textwrap.wrap(finding.says, 110) or [""]
    click.echo(f"{word}{finding.check:<12}{head}", stdout)
    for line in rest:
        click.echo(INDENT + line, stdout)
    for line in textwrap.wrap(finding.remedy, 108, initial_indent="-> ", subsequent_indent="   "):
        click.echo(INDENT + line, stdout)
