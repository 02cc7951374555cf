"""README's blocks, typed as they stand: a reader copies them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.kit.commands import Typed
from tests.kit.data import some_images, write_folder
from tests.test_docs import README

NETWORK = """
from torch import nn

class Denoiser(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x_t, t):
        return self.net(x_t)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def commands(marker: str) -> list[list[str]]:
    """The commands of the block that holds `marker`."""
    (block,) = [block for block in blocks("sh") if marker in block]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_the_library_example_runs() -> None:
    (example,) = blocks("python")
    seen: dict[str, object] = {}
    exec(example, seen)
    assert seen["x"].shape == (4, 1, 8, 8)  # type: ignore[attr-defined]
    assert seen["t"] == 0


def test_the_own_network_works_as_a_file(typed: Typed, home: Path) -> None:
    (block,) = blocks("yaml")
    (home / "mine.yaml").write_text(block)
    (home / "my_network.py").write_text(NETWORK)
    code, out, err = typed("train", "mine.yaml", "--dry-run", "--no-probe")
    assert (code, err) == (0, "")
    assert re.search(r"parameters: +1,217\n", out)  # 64 * 9 + 64, and 64 * 9 + 1
    options = ("-s", "model.type=my_network:Denoiser", "-s", "model.arguments.width=64")
    assert all(option in README.read_text() for option in options)
    assert re.search(r"parameters: +1,217\n", typed("train", *options, "--dry-run", "--no-probe")[1])


@pytest.mark.all
def test_the_quick_start_can_be_typed_as_written(typed: Typed) -> None:
    steps = ("-s", "training.steps=60", "-s", "training.warmup_steps=1")
    assert typed("train", *steps)[0] == 0
    for _, command, *arguments in commands("ddpm-pipe ui"):
        if command == "ui":  # stays until it is stopped; tests/ray/test_pages.py looks at its pages
            continue
        dry = ["--dry-run", "--no-probe"] if command == "train" else []  # MNIST would be downloaded
        code, out, err = typed(command, *arguments, *dry)
        assert code == 0, (command, err)
        assert out


def test_the_readers_images_can_be_used_as_written(typed: Typed, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    write_folder(home / "photos", some_images(140, (70, 80, 3)))
    for _, command, source, *arguments in commands("ddpm-pipe ingest"):
        dry = ["--dry-run", "--no-probe"] if command == "train" else []
        code, out, err = typed(command, source.replace("~", str(home)), *arguments, *dry)
        assert code == 0, (command, err)
        assert out
