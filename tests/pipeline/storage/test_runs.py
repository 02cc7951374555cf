"""Run folders: lookup, locks between real processes, fencing, and files that are never half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunLockedError, StorageError, UsageError
from pipeline.redaction import DECLARED_SECRETS
from pipeline.storage.durable import write_atomically
from pipeline.storage.folder import RunStatus, new_id
from pipeline.storage.runs import Run, normalise_name
from tests.kit.commands import python
from tests.kit.small_disk import small_disk

HOLD = """
import sys, time
from pathlib import Path
from pipeline.storage.runs import Run
run = Run(Path(sys.argv[1]))
with run.lock():
    run.update(status="RUNNING", step=7)
    print("held", flush=True)
    time.sleep(600)
"""
RACE = """
import sys
from pathlib import Path
from pipeline.errors import RunLockedError
from pipeline.storage.runs import Run
run = Run(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    with run.lock():
        print("won", run.next_attempt(), flush=True)
        sys.stdin.readline()  # until all others have asked
except RunLockedError as error:
    print("lost", error.exit_code, flush=True)
"""


def test_ids_are_short_letter_first_and_free_of_look_alikes() -> None:
    ids = {new_id() for _ in range(2000)}
    assert len(ids) == 2000
    assert all(re.fullmatch(r"[a-z][a-z2-9]{7}", name) and not set(name) & set("ilo") for name in ids)


def test_the_record_is_what_was_asked_for(run: Run, home: Path) -> None:
    again = Run(run.folder)
    assert again.record == run.record
    assert run.record.name == "test"
    assert run.record.dataset["fingerprint"] == "ab" * 32
    assert run.record.libraries["torch"].startswith("2.")
    assert run.state().status is RunStatus.CREATED
    assert run.folder == home / "runs" / run.id


def test_names_keep_only_what_is_safe_everywhere() -> None:
    assert normalise_name("My run: 1/2") == "My-run-1-2"
    assert normalise_name("../../etc/passwd") == "etc-passwd"
    assert len(normalise_name("x" * 100)) == 64
    for empty in ("", "...", "///"):
        with pytest.raises(UsageError):
            normalise_name(empty)


def test_a_run_is_found_by_id_prefix_mlflow_id_and_latest(new_run: Callable[..., Run], home: Path) -> None:
    first, second = new_run(name="first"), new_run(name="second")
    (first.folder / "spool").mkdir()
    (first.folder / "spool" / "mlflow.json").write_text(json.dumps({"mlflow_run_id": "0" * 20 + "f" * 12}))
    assert Run.find(home, first.id).id == first.id
    assert Run.find(home, "0" * 20 + "f" * 12).id == first.id
    assert Run.find(home, "000").id == first.id
    assert Run.find(home, "latest").id == second.id
    for length in range(1, 9):
        prefix = second.id[:length]
        if not first.id.startswith(prefix):
            assert Run.find(home, prefix).id == second.id
    assert [run.id for run in Run.all(home)] == [first.id, second.id]


def test_the_latest_is_the_newest_that_can_do_it_and_a_line_names_those_that_were_skipped(
    new_run: Callable[..., Run], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [new_run().id for _ in range(9)]
    assert Run.find(home, "latest", why_not=lambda run: "" if run.id in ids[:2] else "no checkpoint yet").id == ids[1]
    skipped = ", ".join(f"{name} (no checkpoint yet)" for name in ids[:3:-1])
    said = f"latest: run {ids[1]} (test); newer ones that were skipped: {skipped}, and 2 more\n"
    assert capsys.readouterr().err == said
    assert Run.find(home, "latest").id == ids[-1]
    assert Run.find(home, "latest", why_not=lambda _: "no").id == ids[-1]  # whose own error says what is missing
    assert capsys.readouterr().err == f"latest: run {ids[-1]} (test)\n" * 2


def test_an_unknown_or_ambiguous_reference_lists_the_candidates(new_run: Callable[..., Run], home: Path) -> None:
    with pytest.raises(UsageError, match="there are no runs"):
        Run.find(home, "latest")
    runs = [new_run(name=f"n{i}") for i in range(3)]
    for i, run in enumerate(runs):  # ids that share a prefix
        run.folder.rename(run.folder.with_name(f"abcdefg{i + 2}"))
    with pytest.raises(UsageError, match=r"ambiguous.*abcdefg2 \(n0\), abcdefg3 \(n1\), abcdefg4 \(n2\)"):
        Run.find(home, "abc")
    with pytest.raises(UsageError, match=r"no such run.*did you mean 'abcdefg2'.*abcdefg4"):
        Run.find(home, "abcdefh2")


@pytest.mark.parametrize("reference", ["../x", "/etc", "a/b", "..", ".", "", "x" * 65, "a\nb", "runs/*"])
def test_a_reference_never_leads_out_of_the_runs_folder(reference: str, run: Run, home: Path) -> None:
    outside = home / "x"
    shutil.copytree(run.folder, outside)
    with pytest.raises(UsageError):
        Run.find(home, reference)


def test_links_in_the_runs_folder_are_not_followed(run: Run, home: Path) -> None:
    shutil.copytree(run.folder, home / "elsewhere")
    (home / "runs" / "abcdefgh").symlink_to(home / "elsewhere")
    assert [found.id for found in Run.all(home)] == [run.id]
    with pytest.raises(UsageError):
        Run.find(home, "abcdefgh")


def test_a_damaged_folder_does_not_hide_the_others(
    new_run: Callable[..., Run], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, good = new_run(), new_run()
    (broken.folder / "run.json").write_text("{")
    (home / "runs" / "notarun").mkdir()
    assert [run.id for run in Run.all(home)] == [good.id]
    assert broken.id in caplog.text
    with pytest.raises(StorageError, match=r"run\.json"):
        _ = Run(broken.folder).record


@pytest.mark.fault(19)
def test_a_second_process_is_refused_at_once_with_who_holds_the_run(run: Run) -> None:
    with python(HOLD, run.folder) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=rf"process {holder.pid} on .* since 20") as caught, run.lock():
            pass
        assert caught.value.exit_code == 9
        assert run.is_locked()
        assert run.state().status is RunStatus.RUNNING
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert run.state().status is RunStatus.INTERRUPTED
        assert run.state().step == 7
        with run.lock():  # a killed holder leaves nothing behind
            assert run.state().status is RunStatus.RUNNING
    assert not run.is_locked()


@pytest.mark.fault(19)
def test_of_processes_that_start_together_exactly_one_gets_the_run(run: Run) -> None:
    racers = [python(RACE, run.folder) for _ in range(4)]
    assert [racer.stdout.readline() for racer in racers if racer.stdout] == ["ready\n"] * 4
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    told = [racer.stdout.readline() for racer in racers if racer.stdout]
    assert sorted(told) == ["lost 9\n"] * 3 + ["won 1\n"], told
    for racer in racers:
        racer.communicate()


@pytest.mark.fault(19)
def test_attempts_count_up_and_a_stale_one_is_known(run: Run) -> None:
    assert run.current_attempt() == 0
    assert [run.next_attempt() for _ in range(3)] == [1, 2, 3]
    assert Run(run.folder).current_attempt() == 3
    assert run.state().attempt == 3


def test_attempts_and_updates_from_many_threads_lose_nothing(run: Run) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: Run(run.folder).next_attempt(), range(40)))
    assert sorted(numbers) == list(range(1, 41))


def test_an_update_changes_only_what_it_names(run: Run) -> None:
    run.update(status=RunStatus.RUNNING, step=5)
    run.update(summary={"fid": 1.5, "kid": float("nan")})
    run.update(status="FINISHED", overrides=["training.steps=9"])
    state = Run(run.folder).state()
    assert (state.status, state.step, state.overrides) == (RunStatus.FINISHED, 5, ["training.steps=9"])
    assert state.summary["fid"] == 1.5
    assert state.summary["kid"] != state.summary["kid"]
    with pytest.raises(TypeError):
        run.update(stpe=6)


def test_fields_of_a_later_version_do_not_make_a_run_unreadable(run: Run) -> None:
    content = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**content, "invented_later": 1}))
    assert Run(run.folder).record == run.record


@pytest.mark.fault(6)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=64k") as disk:
        target = disk.inside / "status.json"
        write_atomically(target, b"old")
        with pytest.raises(StorageError, match=r"storage full: 0\.0 MB left at .*status\.json"):
            write_atomically(target, b"x" * 2**20)
        assert target.read_bytes() == b"old"
        assert os.listdir(disk.inside) == ["status.json"]


@pytest.mark.fault(7)
def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be created.*DDPM_PIPE_HOME"):
        Run.create(tmp_path / "file", name="x", experiment={}, config_hash="", dataset={}, profile={}, command=[])


def test_a_short_or_common_value_that_is_forwarded_leaves_the_run_usable(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "ddpm", "NUMBER": "1", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(DECLARED_SECRETS, "AWS_ACCESS_KEY_ID,NUMBER,AWS_DEFAULT_REGION")
    dataset = {"path": "s3://ddpm/digits?region=us-east-1", "fingerprint": "a1" * 32}
    run = new_run(dataset=dataset, profile={"storage": "/mnt/ddpm/us-east-1"})
    assert run.record.dataset == dataset
    assert run.record.profile["storage"] == "/mnt/ddpm/us-east-1"


@pytest.mark.parametrize(
    "name", ["task-ddpm-experiments-2024", "hf_runs", "tokens=16", "sk-lab-2024", "kQ3vX9bT2mLr7Wn5cYp8ZsA1"]
)
def test_records_are_exact(new_run: Callable[..., Run], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "experiments-2024")
    experiment = {"model": {"arguments": {"token_mixer": "point", "hub_token": name}}}
    dataset = {"path": f"/home/{name}/datasets/a", "fingerprint": "a1" * 32}
    command = ["ddpm-pipe", "train", "--data", f"/data/{name}"]
    run = new_run(
        name="x", experiment=experiment, dataset=dataset, command=command, profile={"storage": f"/mnt/{name}"}
    )
    record = Run(run.folder).record
    assert record.experiment == experiment
    assert record.dataset == dataset
    assert record.command == command
    assert record.profile == {"storage": f"/mnt/{name}"}


def test_the_log_and_reasons_hide_secrets(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "correct-horse-9")
    run = new_run()
    run.update(reason="https://u:hunter22@host refused AKIAABCDEFGHIJKLMNOP")
    run.log("token=plainvalue, tokens=16, with correct-horse-9, in /home/task-ddpm-experiments-2024")
    written = b"".join(path.read_bytes() for path in run.folder.iterdir())
    for secret in (b"hunter22", b"AKIAABCDE", b"plainvalue", b"correct-horse-9"):
        assert secret not in written
    assert b"tokens=16" in written
    assert b"/home/task-ddpm-experiments-2024" in written


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b""),
        ("run.json", b"[]"),
        ("run.json", b"[" * 100_000),
        ("run.json", b"\xff\xfe"),
        ("run.json", {"created": 3}),
        ("run.json", {"created": "yesterday"}),
        ("run.json", {"experiment": []}),
        ("run.json", {"dataset": "digits"}),
        ("run.json", {"command": {"a": 1}}),
        ("status.json", {"status": "DONE"}),
        ("status.json", {"step": "many"}),
        ("status.json", {"summary": [1.0]}),
        ("status.json", {"overrides": 7}),
    ],
)
def test_a_damaged_record_is_one_line_and_hides_no_other_run(
    new_run: Callable[..., Run],
    home: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    content: bytes | dict[str, Any],
) -> None:
    damaged, sound = new_run(), new_run()
    path = damaged.folder / name
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps({**json.loads(path.read_text()), **content}).encode()
    )
    assert [run.id for run in Run.all(home)] == [sound.id]
    (line,) = caplog.messages
    assert line.startswith(f"{path}: cannot be read")
    assert line.endswith("restore it from a backup, or remove the folder")
    assert Run.find(home, "latest").id == sound.id


@pytest.mark.parametrize("content", [b"x", b"1.5", b"\xff", b"1 2"])
def test_a_damaged_number_of_attempts_is_one_line(new_run: Callable[..., Run], content: bytes) -> None:
    run = new_run()
    (run.folder / "attempt").write_bytes(content)
    with pytest.raises(StorageError, match="attempt: cannot be read"):
        run.next_attempt()


@pytest.mark.fault(6, 7)
def test_the_lock_on_a_full_or_read_only_disk(new_run: Callable[..., Run], tmp_path: Path) -> None:
    place = tmp_path / "disk" / "runs"
    place.mkdir(parents=True)
    run = new_run()
    with small_disk(place.parent, "size=256k") as disk:
        there = disk.inside / "runs" / run.id
        shutil.copytree(run.folder, there)
        disk.fill()
        with Run(there).lock():  # the note on who holds it is lost, not the lock
            assert Run(there).is_locked()
            with pytest.raises(RunLockedError, match="is being worked on by another process"), Run(there).lock():
                pass
            Run(there).log("a line that is lost")
        assert not Run(there).is_locked()
        with pytest.raises(StorageError, match=r"storage full: 0\.0 MB left at"):
            Run(there).update(status="RUNNING")
        (there / "lock").unlink()
        disk.mount("remount,ro")
        with pytest.raises(StorageError, match=r"lock: cannot be written \(Read-only file system\)"), Run(there).lock():
            pass
