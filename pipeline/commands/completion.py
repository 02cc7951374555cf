"""What a shell completes: shipped names, runs, and keys of settings. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete files."""
    return [CompletionItem(incomplete, type="file")]


def shipped(kind: str) -> Completer:
    """Complete the names of shipped files ("experiments", "sweeps", "cluster"), or files where none begins so."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from pipeline.config import presets

        named = [CompletionItem(name, help=presets.about(kind, name)) for name in presets.names(kind)]
        return _beginning(named, incomplete) or files(ctx, param, incomplete)  # bash shows one or the other

    return complete


def folders(*kinds: str) -> Completer:
    """Complete ids below these folders of the home ("runs", "sweeps"), the newest first."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from pipeline.storage.home import home

        found = [folder for kind in kinds for folder in (home() / kind).glob("[!.]*")]
        newest = sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)
        return _beginning(
            [CompletionItem(name) for name in ["latest", *(folder.name for folder in newest)]], incomplete
        )

    return complete


def keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the key of `key=value`."""
    from pipeline.config.experiment import Experiment
    from pipeline.config.yaml_files import flatten

    return _beginning([CompletionItem(f"{key}=") for key in flatten(Experiment().to_dict())], incomplete)


def _beginning(items: list[CompletionItem], incomplete: str) -> list[CompletionItem]:
    return [item for item in items if item.value.startswith(incomplete)]
