"""`ddpm-pipe sample` of a model that knows classes: what each option does, and what each mistake is told."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.shards import Dataset
from pipeline.signals import Terminated, keeping_sigterm, raising
from pipeline.storage.runs import Run
from tests.kit import trainer
from tests.kit.commands import Shell, Typed
from tests.kit.drawings import pixels_of, place_of
from tests.kit.experiments import TINY

FEW = ("--steps", "3")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with classes and two averages of weights."""
    return trainer.trained_run(
        tmp_path_factory.mktemp("home"),
        model=TINY["model"] | {"class_conditional": True},
        training=TINY["training"] | {"steps": 6, "ema_decay": [0.9, 0.5], "warmup_steps": 0},
        sampling={"eta": 1.0, "batch_size": 4},
    )


@pytest.fixture
def sample(labelled: Run) -> Typed:
    """Type `ddpm-pipe sample` for that run."""
    return partial(Shell(labelled.folder.parent.parent).type, "sample", labelled.id)


def about(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "samples.json").read_text())
    return content


def test_every_option_is_part_of_what_the_images_are(sample, tmp_path):
    options = [
        "--sampler",
        "dpm_solver",
        "--spacing",
        "linspace",
        "--guidance",
        "2",
        "--label",
        "7",
        "--weights",
        "ema:0.5",
    ]
    code, _, err = sample(*FEW, "-n", "4", *options, "--format", "png", "--out", str(tmp_path / "a"))
    assert (code, "Traceback" in err) == (0, False)
    expected = {"sampler": "dpm_solver", "steps": 3, "spacing": "linspace", "guidance_scale": 2.0, "labels": "7"}
    found = about(tmp_path / "a")
    assert expected.items() <= found.items()
    # eta is ddim's: the experiment's 1.0 is none of this sampler's business
    assert (found["weights"], found["eta"]) == ("ema:0.5", 0.0)


def test_three_lines_say_where_the_images_are_and_what_they_are(sample, labelled, tmp_path):
    for form, first in (("grid", "grid.png"), ("png", "000000.png ... (2 images)"), ("parquet", "samples.parquet")):
        code, out, _ = sample(*FEW, "-n", "2", "--seed", "4", "--format", form, "--out", str(tmp_path / form))
        folder = tmp_path / form
        assert (code, out.splitlines()) == (
            0,
            [
                f"{folder}/{first}",
                f"2 images of run {labelled.id}, step 6: sampler ddim, steps 3, seed 4, weights ema",
                f"all settings: {folder}/samples.json",
            ],
        )


def test_strips_animations_and_passages_are_drawn(sample, labelled, tmp_path):
    for kind, count in (("png", 3), ("strip", 2), ("gif", 3)):
        assert sample(*FEW, "--format", kind, "-n", str(count), "--out", str(tmp_path / kind))[0] == 0
    Image.fromarray(np.full((20, 20), 90, np.uint8)).save(tmp_path / "mine.png")
    between = ("--interpolate", "5", str(tmp_path / "mine.png"), "-n", "4", "--out", str(tmp_path / "way"))
    code, _, err = sample(*FEW, *between)
    assert (code, err.count("\n")) == (10, 1)
    assert "grey levels" in err
    assert "--steps" in err
    assert not (tmp_path / "way").exists()
    code, out, _ = sample("--steps", "300", *between)
    assert code == 0
    assert "error_of_the_ends" in out
    images = [np.asarray(Image.open(path))[None] for path in sorted((tmp_path / "png").rglob("*.png"))]
    assert len(images) == 3
    strip = pixels_of(tmp_path / "strip" / "denoising.png")
    places = [place_of(image, strip, 8) for image in images[:2]]  # the last of three columns, one below the other
    assert places[1][0] - places[0][0] == 66
    assert {left for _, left in places} == {2 + 2 * 66}
    assert strip.shape[1] == 2 + 3 * 66
    with Image.open(tmp_path / "gif" / "denoising.gif") as motion:
        assert motion.n_frames == 3
        motion.seek(2)
        last = np.asarray(motion.convert("L")).astype(int)
    for i, image in enumerate(images):
        top, left = 2 + 66 * (i // 2), 2 + 66 * (i % 2)
        assert np.abs(last[top : top + 64 : 8, left : left + 64 : 8] - image[0]).max() <= 3  # a GIF has 256 colours
    way = pixels_of(tmp_path / "way" / "interpolation.png")
    assert way.shape[1] == 6 * 66 + 2
    given = (Dataset.open(labelled.record.dataset["path"]).read([5])[0, 0], np.full((8, 8), 90))
    for image, left in zip(given, (2, 2 + 5 * 66), strict=True):
        np.testing.assert_array_equal(way[2:66:8, left : left + 64 : 8, 0], image)
    assert about(tmp_path / "way")["labels"] == "#none"


def test_a_generated_set_is_ingested_with_its_labels(sample, labelled, tmp_path):
    shell = Shell(labelled.folder.parent.parent)
    assert sample(*FEW, "-n", "12", "--format", "parquet", "--out", str(tmp_path / "set"))[0] == 0
    assert sample(*FEW, "-n", "12", "--format", "png", "--out", str(tmp_path / "files"))[0] == 0
    code, _, err = shell.type("ingest", str(tmp_path / "set"), str(tmp_path / "data"))
    assert (code, "classes: 10 (0 2, 1 2, 2 1," in err) == (0, True), err
    dataset = Dataset.open(tmp_path / "data")
    labels = dataset.labels()
    assert labels is not None
    assert (dataset.manifest.class_names, labels.tolist()) == (tuple("0123456789"), [i % 10 for i in range(12)])
    for image, file in zip(dataset.read(range(12)), sorted((tmp_path / "files").glob("*.png")), strict=True):
        np.testing.assert_array_equal(image[0], np.asarray(Image.open(file)))
    none = ("-n", "3", "--format", "parquet", "--label", "#none", "--out", str(tmp_path / "none"))
    assert sample(*FEW, *none)[0] == shell.type("ingest", str(tmp_path / "none"), str(tmp_path / "more"))[0] == 0
    assert Dataset.open(tmp_path / "more").labels() is None


MISTAKES = {
    "a class that is none": (["--label", "ten"], "no class 'ten'"),
    "guidance to no class": (["--label", "#none", "--guidance", "2"], "there is no class to guide to"),
    "eta of another sampler": (["--sampler", "dpm_solver", "--eta", "0.5"], "which is ddim's"),
    "a decay that was not kept": (["--weights", "ema:0.99"], "this run kept ema:0.9, ema:0.5"),
    "no snapshots": (["--weights", "posthoc:0.1"], "stored no snapshots"),
    "nonsense weights": (["--weights", "best"], "expected ema, ema:DECAY, raw, or posthoc:WIDTH"),
    "a row that is none": (["--interpolate", "5", "99999"], "has rows 0 .. 1796"),
    "a guided way back": (["--interpolate", "5", "6", "--guidance", "2"], "cannot be run backwards"),
    "a noisy way back": (["--interpolate", "5", "6", "--eta", "1"], "DDIM without noise"),
    "one image between two": (["--interpolate", "5", "6", "-n", "1"], "take 2 .. 64"),
    "too many in a strip": (["--format", "strip", "-n", "65"], "holds at most 64"),
    "more steps than T": (["--steps", "1001"], "T = 1000"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_reported_in_one_line(sample, tmp_path, name):
    arguments, told = MISTAKES[name]
    code, _, err = sample(*arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(20)
@pytest.mark.slow
def test_sigterm_ends_with_a_line_and_keeps_what_was_computed(home: Path, start) -> None:
    made = trainer.trained_held_sampler(home, hold_after=4, steps=2, batch_size=4)
    (home / "hold").touch()  # two chunks are done, the others wait
    sampling = start("sample", made.id, "-n", "16")
    sampling.wait_for(lambda: list((made.folder / "generated").glob("*/chunk-*")))
    sampling.send(signal.SIGTERM)
    code, _, stderr = sampling.end(60)
    assert code == 75, stderr
    assert stderr.splitlines()[-1] == (
        "ddpm-pipe: stopped; what was computed so far is kept: the same command goes on from there"
    )


def test_a_handler_of_sigterm_that_rays_start_sets_does_not_stay() -> None:
    def start(comes: bool = False) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as `ray.init` does
        if comes:
            signal.raise_signal(signal.SIGTERM)

    outside = signal.getsignal(signal.SIGTERM)
    with raising():
        ours = signal.getsignal(signal.SIGTERM)
        with keeping_sigterm():
            start()
        assert signal.getsignal(signal.SIGTERM) is ours
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Terminated), keeping_sigterm():
            start(comes=True)
    assert signal.getsignal(signal.SIGTERM) is outside
