"""What shells complete, by click's own classes; and the list of presets. None of it loads anything heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from pipeline.cli import cli
from pipeline.config import presets
from tests.kit.commands import PROGRAM, Typed
from tests.test_architecture import HEAVY


def completed(*words: str) -> list[str]:
    """The completions of the last word, marked by a colon where they are a kind of file."""
    found = BashComplete(cli, {}, "ddpm-pipe", "_DDPM_PIPE_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value if item.type == "plain" else f":{item.type}" for item in found]


def test_commands_and_options_are_completed() -> None:
    assert completed("in") == ["init", "ingest", "inspect"]
    assert completed("train", "--list") == ["--list-presets"]


@pytest.mark.parametrize(
    "words", [("train",), ("train", "--preset"), ("init",), ("doctor", "--preset"), ("sweep", "--base")], ids=" ".join
)
def test_presets_are_completed_and_else_files(words: tuple[str, ...]) -> None:
    assert completed(*words, "") == presets.names("experiments")
    assert completed(*words, "ddpm-c") == ["ddpm-celebahq-256", "ddpm-cifar10"]
    assert completed(*words, "./exp") == [":file"]


def test_sweeps_profiles_and_files_are_completed() -> None:
    assert completed("sweep", "sw") == ["sweep-schedules"]
    assert completed("train", "--cluster", "g") == ["gpu"]
    assert completed("jobs", "list", "--cluster", "kube") == ["kuberay"]
    for words in (
        ("train", "--data"),
        ("resume", "r", "--data"),
        ("doctor", "--data"),
        ("ingest",),
        ("ingest", "x"),
        ("inspect",),
    ):
        assert completed(*words, "x") == [":file"]


def test_runs_are_completed_newest_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed("sample", "") == ["latest"]
    for age, place in enumerate(["runs/abc1", "runs/abd2", "runs/.part", "sweeps/abe3"]):
        (home / place).mkdir(parents=True)
        os.utime(home / place, (1e9 + age, 1e9 + age))
    for command in ("sample", "evaluate", "export", "serve", "sync", "compare", "verify"):
        assert completed(command, "") == ["latest", "abd2", "abc1"]
    assert completed("compare", "abc1", "abd") == ["abd2"]
    assert completed("resume", "ab") == completed("rm", "abc1", "ab") == ["abe3", "abd2", "abc1"]
    assert completed("train", "--from", "a") == completed("sweep", "--extend", "a") == ["abe3"]


@pytest.mark.parametrize(
    "words", [("train", "-s"), ("resume", "x", "--set"), ("sweep", "-s"), ("sweep", "--over")], ids=" ".join
)
def test_keys_of_settings_are_completed(words: tuple[str, ...]) -> None:
    assert completed(*words, "training.adam") == ["training.adam_betas=", "training.adam_eps="]
    assert {"seed=", "model.arguments="} <= set(completed(*words, ""))


def test_the_list_of_presets_names_each_with_a_line(typed: Typed) -> None:
    code, out, _ = typed("train", "--list-presets")
    rows = [line.split(maxsplit=1) for line in out.splitlines()]
    assert (code, [name for name, _ in rows[1:]]) == (0, presets.names("experiments"))
    assert all(about.endswith(".") and len(about) <= 130 for _, about in rows[1:])


def test_neither_list_nor_completion_loads_anything_heavy(home: Path) -> None:
    code = f"""
import sys
from click.shell_completion import BashComplete
from pipeline.cli import cli
shell = BashComplete(cli, {{}}, "ddpm-pipe", "_DDPM_PIPE_COMPLETE")
for words in (["train", "--preset"], ["sample"], ["train", "-s"], ["train", "--cluster"]):
    assert shell.get_completions(words, ""), words
cli.main(["train", "--list-presets"], standalone_mode=False)
print("HEAVY", *sorted(set(sys.modules) & {HEAVY!r}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "HEAVY"


def test_the_documented_line_makes_bash_complete(home: Path) -> None:
    script = f"""
eval "$(_DDPM_PIPE_COMPLETE=bash_source {PROGRAM})"
COMP_WORDS=({PROGRAM} init mn) COMP_CWORD=2
_ddpm_pipe_completion {PROGRAM}
echo "${{COMPREPLY[@]}}"
"""
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout == "mnist\n"
