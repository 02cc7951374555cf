"""The documents, held against the program: commands, examples, exit codes, links, targets and files that they name."""

from __future__ import annotations

import importlib
import operator
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

from pipeline import errors
from pipeline.cli import cli as root

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
REFERENCE = REPOSITORY / "docs" / "reference.md"
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("cluster/**/*.md")])
EXPERIMENTS = sorted(REPOSITORY.glob("experiments/*.yaml"))
PROFILES = sorted(REPOSITORY.glob("cluster/*.yaml"))


def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command of the tree with the words that call it, groups themselves left out."""
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from walk(child, (*path, name))
    else:
        yield path, command


COMMANDS = dict(walk(root))
every_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


def help_of(path: tuple[str, ...]) -> str:
    context = click.Context(root, info_name="ddpm-pipe")
    command: click.Command = root
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
        context = click.Context(command, info_name=name, parent=context)
    return command.get_help(context)


def command_lines(text: str) -> list[list[str]]:
    """Return the `ddpm-pipe ...` commands that stand on lines of their own, as words, without comments, pipes and redirections."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^\s*(?:[$#>]\s+)?(?:\.venv/bin/)?ddpm-pipe\s+(.+)$", joined, re.MULTILINE)
    return [shlex.split(re.split(r"\s[|>&]|\s{2,}\(", line)[0], comments=True) for line in lines]


def check_parses(words: list[str]) -> None:
    """Let click parse a command line without running it; what `--help` and `--version` do counts as parsed."""
    if words and words[0].startswith("-"):
        return
    command: click.Command = root
    while isinstance(command, click.Group):
        assert words, "a group alone"
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context(command.name, list(words))
    except click.exceptions.Exit:
        return
    except click.BadParameter as error:
        if "does not exist" not in error.format_message():  # a file that is at the reader's, not here
            pytest.fail(f"ddpm-pipe {command.name} {shlex.join(words)}: {error.format_message()}")


def code_blocks(document: Path) -> list[str]:
    return re.findall(r"^```(?:sh|bash|console|shell)?\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@every_command
def test_every_command_says_what_it_does_and_shows_an_example(path: tuple[str, ...]) -> None:
    text = help_of(path)
    first_line = (COMMANDS[path].help or "").strip().split("\n")[0]
    assert first_line.endswith("."), f"{path}: the help's first line is a sentence, got {first_line!r}"
    summary = COMMANDS[path].get_short_help_str(60)
    assert not summary.endswith("..."), f"{path}: `ddpm-pipe --help` cuts the summary: {summary!r}"
    examples = [words for words in command_lines(text.partition("Example")[2]) if tuple(words[: len(path)]) == path]
    assert examples, f"`ddpm-pipe {' '.join(path)} --help` shows no example of itself"


@every_command
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    options = [option for option in COMMANDS[path].params if isinstance(option, click.Option)]
    silent = [option.opts[-1] for option in options if not option.help and not isinstance(option.type, click.Choice)]
    assert not silent, f"options of `{' '.join(path)}` without help: {silent}"


@every_command
def test_examples_in_the_help_parse(path: tuple[str, ...]) -> None:
    for words in command_lines(help_of(path).partition("Example")[2]):
        check_parses(words)


@every_command
def test_every_command_is_in_the_reference(path: tuple[str, ...]) -> None:
    assert re.search(rf"^\| `ddpm-pipe {' '.join(path)}\b", REFERENCE.read_text(), re.MULTILINE), (
        f"docs/reference.md never shows `ddpm-pipe {' '.join(path)}`"
    )


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_commands_in_the_documents_parse(document: Path) -> None:
    for block in code_blocks(document):
        for words in command_lines(block):
            check_parses(words)


def test_the_library_example_in_the_readme_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    namespace = {
        "model": lambda x_t, t: torch.zeros_like(x_t),
        "x_T": torch.randn(2, 1, 4, 4, generator=generator),
        "generator": generator,
    }
    exec(block, namespace)
    # A network that sees no noise anywhere leaves x0 to the clip: the last image lies within it.
    assert isinstance(namespace["x"], torch.Tensor)
    assert namespace["x"].abs().max() <= 1


def test_the_exit_codes_of_the_reference_are_those_of_the_error_tree() -> None:
    section = re.split(r"\n#+ ", REFERENCE.read_text().partition("Exit codes")[2])[0]
    documented = {int(code) for code in re.findall(r"^\|\s*`?(\d+)`?\s*\|", section, re.MULTILINE)}
    classes = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PipelineError)
    ]
    # Success, and the two ways in which a signal ends a command (docstring of errors.py).
    assert documented == {kind.exit_code for kind in classes} | {0, 130, 143}


def test_the_error_tree_drawn_in_errors_is_the_one_defined() -> None:
    drawn = dict(re.findall(r"(?:──|^) ?\s*(\w+Error)\s+(\d+)", errors.__doc__ or "", re.MULTILINE))
    classes = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PipelineError)
    ]
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in classes}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing, f"{document.name} links to {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_files_and_targets_named_in_the_documents_exist(document: Path) -> None:
    text = document.read_text()
    named = re.findall(
        r"`((?:ddpm|pipeline|experiments|cluster|tests|benchmarks|docs)/[\w./-]+\.(?:py|yaml|md))`", text
    )
    missing = [path for path in named if not (REPOSITORY / path).exists()]
    assert not missing, f"{document.name} names {missing}"
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    called = {
        target
        for block in [*code_blocks(document), *re.findall(r"`(make [^`]*)`", text)]
        for target in make_targets(block)
    }
    assert called <= set(targets.split()), f"{document.name}: make {sorted(called - set(targets.split()))}"


def test_the_maths_names_code_that_exists() -> None:
    """`ddpm/FILE.py` followed by `Name` or `Class.attribute`, several separated by commas; tables name their file above."""
    text = (REPOSITORY / "docs" / "maths.md").read_text()
    named = re.findall(r"`ddpm/(\w+)\.py`\)? ?((?:`[\w.]+`(?:, )?)+)", text)
    for file, names in named:
        module = importlib.import_module(f"ddpm.{file}")
        for name in re.findall(r"`([\w.]+)`", names):
            assert operator.attrgetter(name)(module) is not None
    assert len(named) > 10
    tables = {"schedule": r"`(BetaSchedule\.\w+)` \|", "likelihood": r"`(\w+_bits)` \|"}
    for file, pattern in tables.items():
        names = re.findall(pattern, text)
        assert len(names) >= 3
        for name in names:
            assert name == "BetaSchedule.betas" or operator.attrgetter(name)(importlib.import_module(f"ddpm.{file}"))


def make_targets(text: str) -> list[str]:
    return re.findall(r"^\s*(?:\$ )?make ([a-z]+)\b(?!=)", text, re.MULTILINE)


@pytest.mark.parametrize("path", [*EXPERIMENTS, *PROFILES], ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_each_shipped_file_opens_with_what_it_is_for(path: Path) -> None:
    """An experiment's head says command, time and expected result; a profile's where, when, cost and time."""
    head = (re.match(r"(?:#.*\n)*", path.read_text()) or [""])[0]
    words = ["ddpm-pipe", "Time", "Expect"] if path in EXPERIMENTS else ["Where", "When", "Cost", "Time"]
    missing = [word for word in words if word.lower() not in head.lower()]
    assert not missing, f"{path.name}: its head comment lacks {missing}"
    for line in head.splitlines():
        for command in command_lines(line.lstrip("# ")):
            check_parses(command)
