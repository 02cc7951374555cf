"""A store that was copied: what its records name in the store is found in the copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.storage.remote import RemoteFolder
from pipeline.storage.remote_run import located_in_store, portable_in_store
from pipeline.storage.runs import Run


@pytest.mark.parametrize("root", ["s3://a", "s3://a/x", "s3://a/x?region=eu-west-1"])
def test_places_in_a_store_are_kept_relative_to_it(root: str) -> None:
    there = RemoteFolder(root)
    for place in (there, there.child("datasets/d"), there.child("runs/k7/checkpoints")):
        kept = portable_in_store(place.uri, there)
        assert kept.startswith("store:")
        assert "s3" not in kept
        assert located_in_store(kept, there) == place.uri
    for other in ("s3://b/x/datasets/d", "/data/d", "digits", "s3://b?unknown=1", "s3://"):
        assert located_in_store(portable_in_store(other, there), there) == other
    assert portable_in_store("s3://a/xy/d", RemoteFolder("s3://a/x")) == "s3://a/xy/d"


@pytest.mark.slow
def test_a_run_of_a_copied_store_works_in_the_copy(
    bucket: str, tmp_path: Path, new_run: Callable[..., Run], home: Path
) -> None:
    old, new = f"{bucket}/old", f"{bucket}/new/place"
    command = ["ddpm-pipe", "train", "--data", f"{old}/datasets/d"]
    run = new_run(
        profile=Profile(storage=old).to_dict(),
        dataset={"path": f"{old}/datasets/d", "fingerprint": "0"},
        initial_weights=f"{old}/runs/k7m2/checkpoints/x",
        command=command,
    )
    assert Run.find(home, run.id).record.dataset["path"] == f"{old}/datasets/d"
    source, target = RemoteFolder(old), RemoteFolder(new)
    for item in source.objects():
        target.write(item.name, source.read(item.name) or b"")
    source.delete_all("runs")
    for place in (tmp_path / "another machine", home):  # the last has the record as it was in the old store
        found = Run.find(place, run.id, new)
        assert found.remote is not None
        assert str(found.remote.folder) == f"{new}/runs/{run.id}"
        record = found.record
        assert (record.profile["storage"], record.dataset["path"]) == (new, f"{new}/datasets/d")
        assert (record.initial_weights, record.command) == (f"{new}/runs/k7m2/checkpoints/x", command)
        found.update(status="FINISHED")
    assert json.loads(target.read(f"runs/{run.id}/status.json") or b"")["status"] == "FINISHED"
    assert source.objects() == []
