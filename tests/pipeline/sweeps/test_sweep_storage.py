"""A sweep whose profile stores in an object store, on a real S3 server: begun in one home, gone on with in another."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.errors import RunLockedError, StorageError, UsageError
from pipeline.runs.record import Trial
from pipeline.storage.folder import RunStatus
from pipeline.storage.runs import Run
from pipeline.sweeps.config import plain_base, sweep_from
from pipeline.sweeps.folder import SweepFolder
from tests.kit.object_store import ObjectStore, objects
from tests.pipeline.sweeps.swept_entries import entry

POINT = {"diffusion.schedule": "linear"}


def created(home: Path, storage: str) -> SweepFolder:
    sweep = sweep_from(
        {"base": "digits", "space": {"diffusion.schedule": ["linear", "cosine"]}, "budget": {"steps": 9}}
    )
    base = plain_base(sweep)
    profile = Profile(storage=storage).to_dict()
    return SweepFolder.create(home, sweep, base, base, {"path": "", "fingerprint": "images"}, profile, ["ddpm-pipe"])


def trial_run(sweep: SweepFolder) -> Run:
    home, base = sweep.folder.parent.parent, sweep.base
    trial = Trial(sweep.id, "linear-0", POINT, "linear", 0)
    profile, dataset = sweep.record.profile, sweep.record.dataset
    return Run.create(
        home, name="linear", experiment=base.to_dict(), config_hash=base.hash(""), dataset=dataset, profile=profile,
        command=["ddpm-pipe", "train"], trial=trial.to_json(),
    )  # fmt: skip


def test_ledger_report_trials_and_time_are_found_elsewhere(bucket: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    sweep = created(here, bucket)
    with sweep.lock():
        sweep.begin()
        sweep.update(status=RunStatus.RUNNING)
        run = trial_run(sweep)
        with run.lock():
            scores = run.folder / "evaluations" / "fid_1" / "scores.json"
            scores.parent.mkdir(parents=True)
            scores.write_text("{}")
        (sweep.folder / "tune").mkdir()
        (sweep.folder / "tune" / "state").write_text("Tune's own, thrown away")
        sweep.enter(entry(POINT, 0, 2.5))
        sent = objects(f"{bucket}/sweeps/{sweep.id}")  # before the driver ends, which it may not come to
        assert {"sweep.json", "status.json", "ledger.jsonl"} <= set(sent)
        held = SweepFolder.find(there, "latest", bucket)
        with pytest.raises(RunLockedError, match=f"^sweep {sweep.id} is being worked on by process"), held.lock():
            pass
    with sweep.lock():
        sweep.report.mkdir()
        (sweep.report / "result.json").write_text("{}")
    assert not any(name.startswith(("tune", "lease/")) for name in objects(f"{bucket}/sweeps/{sweep.id}"))

    found = SweepFolder.find(there, sweep.id[:5], bucket)
    assert found.folder == there / "sweeps" / sweep.id
    assert found.state().status is RunStatus.INTERRUPTED
    assert found.seconds > 0
    with found.lock():
        assert found.ledger.entries() == sweep.ledger.entries()
        assert (found.report / "result.json").is_file()
        (trial,) = found.trials().values()
        assert trial.folder == there / "runs" / run.id
        assert (trial.folder / "evaluations" / "fid_1" / "scores.json").is_file()
        more = found.sweep.model_copy(update={"seeds": found.sweep.seeds + 1})
        found.extend(more, ["ddpm-pipe", "sweep", "--extend"])
        found.enter(entry(POINT, 1, 2.6))

    again = SweepFolder.of(here, sweep.id, bucket)  # whose copy of the record was made before
    assert again is not None
    assert again.sweep == more
    again.fetch_files()
    assert again.ledger.entries() == found.ledger.entries()
    assert len(again.ledger.entries()) == 2


def test_without_the_storage_a_sweep_is_not_found_and_one_that_cannot_be_sent_leaves_nothing(
    bucket: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    sweep = created(tmp_path / "here", bucket)
    with pytest.raises(UsageError, match="there are no sweeps"):
        SweepFolder.find(tmp_path / "there", sweep.id)
    object_store.refuse = lambda method, path: method == "PUT"
    with pytest.raises(StorageError):
        created(tmp_path / "refused", bucket)
    assert list((tmp_path / "refused" / "sweeps").iterdir()) == []
