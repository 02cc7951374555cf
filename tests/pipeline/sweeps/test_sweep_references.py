"""Which sweep or run a reference given to `resume` means, where it could mean several."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.errors import UsageError
from pipeline.storage.runs import Run
from pipeline.sweeps.commands import sweep_meant
from pipeline.sweeps.config import plain_base, sweep_from
from pipeline.sweeps.folder import SweepFolder

HERE = Context(Profile())


def sweep(home: Path, name: str, identifier: str) -> SweepFolder:
    asked = sweep_from(
        {"name": name, "base": "digits", "space": {"diffusion.schedule": ["linear"]}, "budget": {"steps": 9}}
    )
    base = plain_base(asked)
    made = SweepFolder.create(home, asked, base, base, {"path": "", "fingerprint": "images"}, {}, ["ddpm-pipe"])
    renamed(made.folder, "sweep.json", identifier)
    return SweepFolder(made.folder.with_name(identifier))


def run(home: Path, identifier: str) -> Run:
    made = Run.create(
        home, name="mine", experiment={}, config_hash="", dataset={"fingerprint": ""}, profile={}, command=["ddpm-pipe"]
    )
    renamed(made.folder, "run.json", identifier)
    return Run(made.folder.with_name(identifier))


def renamed(folder: Path, record: str, identifier: str) -> None:
    """Give a folder an id that a test can tell."""
    path = folder / record
    path.write_text(path.read_text().replace(folder.name, identifier))
    folder.rename(folder.with_name(identifier))


def test_a_reference_that_fits_several_names_them_all(home: Path) -> None:
    sweep(home, "twice", "k7aaaaaa")
    sweep(home, "twice", "k7bbbbbb")
    sweep(home, "once", "m2cccccc")
    run(home, "m2dddddd")
    both = (
        "'twice' is ambiguous: it fits sweep k7aaaaaa (twice), sweep k7bbbbbb (twice); give more characters of the id"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(both)}$"):
        sweep_meant(HERE, "twice")
    with pytest.raises(UsageError, match=r"'m2' is ambiguous: it fits sweep m2cccccc \(once\), run m2dddddd \(mine\);"):
        sweep_meant(HERE, "m2")
    for reference in ("once", "m2c", "m2cccccc"):
        found = sweep_meant(HERE, reference)
        assert found is not None
        assert found.id == "m2cccccc"
    assert sweep_meant(HERE, "m2d") is None
    assert sweep_meant(HERE, "nothing") is None


def test_a_whole_id_decides_against_a_sweep_of_that_name(home: Path) -> None:
    sweep(home, "m2dddddd", "k7aaaaaa")
    run(home, "m2dddddd")
    assert sweep_meant(HERE, "m2dddddd") is None


def test_a_damaged_record_of_a_sweep_hides_neither_sweeps_nor_runs(home: Path) -> None:
    damaged = sweep(home, "damaged", "k7aaaaaa")
    sweep(home, "sound", "k7bbbbbb")
    run(home, "m2dddddd")
    for content in (b"", b"{}", b'{"created": 1}'):
        (damaged.folder / "sweep.json").write_bytes(content)
        assert [found.id for found in SweepFolder.all(home)] == ["k7bbbbbb"]
        assert sweep_meant(HERE, "m2dddddd") is None


def test_a_reference_that_is_no_id_names_no_command_that_does_not_exist(home: Path) -> None:
    with pytest.raises(UsageError, match=r"^sweep 'a/b': expected a sweep id, a prefix of one, or 'latest'$"):
        SweepFolder.find(home, "a/b")
    with pytest.raises(UsageError, match=r"ddpm-pipe runs` lists them$"):
        Run.find(home, "a/b")
