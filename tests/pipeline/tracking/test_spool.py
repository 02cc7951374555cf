"""The spool keeps what was appended, whatever happened to the process, and reads past a line that was cut."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from pipeline.storage.durable import checked_line
from pipeline.tracking.spool import Event, Spool
from pipeline.tracking.writer import MAX_METRICS_PER_CALL, next_group
from tests.kit.commands import python
from tests.kit.small_disk import small_disk


def event(number: int, **fields: object) -> Event:
    return {"id": f"t-{number}", "kind": "tags", "tags": {"n": str(number)}, **fields}


def receipts(folder: Path) -> list[dict[str, object]]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if "received" in line]


def ids(spool: Spool) -> list[object]:
    return [item["id"] for item in spool.pending()]


def test_events_are_pending_in_order_until_the_run_has_received_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert spool.pending() == []
    for n in range(50):
        spool.append(event(n, text="ü" * n))
    events = spool.pending()
    assert [item["id"] for item in events] == [f"t-{n}" for n in range(50)]
    spool.use_run("run", "sqlite:///x")
    spool.receive(events[:20], "me")
    spool.receive(events[30:31], "me", refused="a reason")
    left = [f"t-{n}" for n in range(20, 50) if n != 30]
    assert ids(spool) == left
    other = Spool(tmp_path / "spool")  # another process
    assert len(other.pending()) == 50
    other.use_run(other.known_run("sqlite:///x"), "sqlite:///x")
    assert ids(other) == left
    assert other.last_sender == "me"
    other.receive(events[20:21], "you")
    assert (ids(spool), spool.last_sender) == (left[1:], "you")
    assert [receipt.get("refused") for receipt in receipts(tmp_path / "spool")] == [None, "a reason", None]


def test_another_run_of_mlflow_lacks_everything_and_the_first_one_goes_on_having_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(3):
        spool.append(event(n))
    spool.use_run("one", "sqlite:///x")
    spool.receive(spool.pending(), "me")
    assert ids(spool) == []
    spool.use_run("two", "sqlite:///y")
    assert len(ids(spool)) == 3
    spool.receive(spool.pending()[:1], "me")
    assert (spool.known_run(), spool.known_run("sqlite:///x")) == ("two", None)
    spool.use_run("one", "sqlite:///x")
    assert ids(spool) == []


def test_a_line_cut_at_any_byte_is_skipped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    whole = Spool(tmp_path / "whole")
    whole.append(event(0))
    whole.append(event(1))
    content = whole.events_path.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(first + 1, len(content)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "events.jsonl").write_bytes(content[:cut])
        spool = Spool(folder)
        assert ids(spool) == ["t-0"]
        spool.append(event(2))
        expected = ["t-0", "t-2"] if cut < len(content) - 1 else ["t-0", "t-1", "t-2"]
        assert ids(spool) == expected


@pytest.mark.promise("P4")
def test_a_process_killed_while_appending_leaves_a_prefix_of_whole_events(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipeline.tracking.spool import Spool
spool = Spool(Path(sys.argv[1]))
print("ready", flush=True)
n = 0
while True:
    spool.append({"id": n, "kind": "tags", "text": "x" * (n % 7000)})
    n += 1
"""
    delays = random.Random(0)
    for trial in range(3):
        folder = tmp_path / str(trial)
        with python(code, folder) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(delays.uniform(0.05, 0.2))
            except Exception:
                process.send_signal(signal.SIGKILL)
        numbers = ids(Spool(folder))
        assert len(numbers) > 10
        assert numbers == list(range(len(numbers)))


def test_two_processes_append_without_mixing_lines(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipeline.tracking.spool import Spool
spool = Spool(Path(sys.argv[1]))
for n in range(500):
    spool.append({"id": f"{sys.argv[2]}-{n}", "kind": "tags", "text": "x" * 3000})
"""
    writers = [python(code, tmp_path, name) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = [str(item) for item in ids(Spool(tmp_path))]
    for name in "ab":
        assert [item for item in found if item.startswith(name)] == [f"{name}-{n}" for n in range(500)]
    for writer in writers:
        writer.communicate()


@pytest.mark.fault(6)
@pytest.mark.promise("P4")
def test_a_full_disk_loses_nothing_and_raises_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=64k") as disk:
        spool = Spool(disk.inside / "spool")
        spool.append(event(0))
        disk.fill()  # there is room to the end of the page
        for n in range(1, 90):
            spool.append(event(n, text="x" * 50))
        assert 30 < spool.unwritten < 89
        disk.empty()
        spool.append(event(90))
        assert spool.unwritten == 0
        assert ids(spool) == [f"t-{n}" for n in range(91)]


def test_damaged_lines_and_a_damaged_name_of_the_run_are_passed_by(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(3):
        spool.append(event(n))
    spool.use_run("run", "sqlite:///x")
    spool.receive(spool.pending()[:1], "me")
    content = spool.events_path.read_bytes()
    damaged = [
        b"",
        b"[]",
        b"{}",
        b"{\x00",
        b"\xff",
        b"[" * 100_000,
        b'{"id": 1}',
        b'{"kind": "x", "id": [1]}',
        b'{"received": 1}',
    ]
    spool.events_path.write_bytes(b"\n".join(damaged) + b"\n" + content)
    again = Spool(tmp_path)
    again.use_run(again.known_run("sqlite:///x"), "sqlite:///x")
    assert ids(again) == ["t-1", "t-2"]
    for name in ("", "[]", "{}", "{\x00"):
        (tmp_path / "mlflow.json").write_text(name)
        assert Spool(tmp_path).known_run() is None


def test_no_flipped_bit_stops_the_reading(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(3):
        spool.append(event(n))
    spool.use_run("run", "sqlite:///x")
    spool.receive(spool.pending()[:2], "me")
    content = spool.events_path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        spool.events_path.write_bytes(flipped)
        read = Spool(tmp_path)
        read.use_run("run", "sqlite:///x")
        pending = {
            item["id"]: item for item in read.pending()
        }  # a receipt that is lost is sent again, no event is altered
        assert all(item == event(int(name[2:])) for name, item in pending.items())
        assert len(next_group(read.pending())) <= 1


def test_a_shorter_spool_that_took_its_place_is_read_from_the_beginning(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(3):
        spool.append(event(n))
    assert len(ids(spool)) == 3
    spool.events_path.write_bytes(checked_line(event(9)))
    assert ids(spool) == ["t-9"]


def test_one_process_at_a_time_delivers(tmp_path: Path) -> None:
    spool, other = Spool(tmp_path), Spool(tmp_path)
    with spool.delivering() as first, other.delivering() as second:
        assert (first, second) == (True, False)
    with other.delivering() as third:
        assert third


def test_metrics_are_grouped_up_to_the_limit_and_an_event_is_never_split() -> None:
    rng = random.Random(1)
    events: list[Event] = []
    for n in range(400):
        kind = rng.choice(["metrics"] * 29 + ["tags"])
        values = {f"m{k}": 0.0 for k in range(rng.randint(1, 60))}
        events.append({"id": n, "kind": kind} | ({"values": values} if kind == "metrics" else {}))
    left, found = events, []
    while left:
        found.append(next_group(left))
        left = left[len(found[-1]) :]
    assert [item for group in found for item in group] == events
    for group in found:
        assert {item["kind"] for item in group} in ({"metrics"}, {"tags"})
        assert len(group) == 1 or sum(len(item["values"]) for item in group) <= MAX_METRICS_PER_CALL
        assert len(group) == 1 or all(item["kind"] == "metrics" for item in group)
    assert max(sum(len(i.get("values", ())) for i in group) for group in found) > MAX_METRICS_PER_CALL - 60
    assert next_group([]) == []
    assert len(next_group([{"id": 0, "kind": "metrics", "values": {str(k): 0.0 for k in range(1500)}}])) == 1


def test_lines_are_plain_json_of_one_line(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(event(0, text="a\nb\u2028c"))
    lines = spool.events_path.read_bytes().split(b"\n")
    assert len(lines) == 2
    assert json.loads(lines[0])["text"] == "a\nb\u2028c"
