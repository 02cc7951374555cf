"""The spool keeps what was appended, whatever happened to the process, and reads past a line that was cut."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from pipeline.tracking.delivery import MAX_METRICS_PER_CALL, groups
from pipeline.tracking.spool import CHUNK_BYTES, Event, Position, Spool
from tests.kit.commands import python
from tests.kit.small_disk import small_disk


def event(number: int, **fields: object) -> Event:
    return {"id": f"t-{number}", "kind": "tags", "tags": {"n": str(number)}, **fields}


def test_events_come_back_in_order_from_any_offset(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert spool.read(0) == []
    assert spool.size() == 0
    for n in range(50):
        spool.append(event(n, text="ü" * n))
    found = spool.read(0)
    assert [item["id"] for item, _ in found] == [f"t-{n}" for n in range(50)]
    assert found[-1][1] == spool.size() == spool.events_path.stat().st_size
    for n, (_, offset) in enumerate(found):
        assert [item["id"] for item in spool.events(offset)] == [f"t-{k}" for k in range(n + 1, 50)]


def test_an_event_larger_than_a_chunk_is_read_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(event(0))
    spool.append(event(1, text="x" * (2 * CHUNK_BYTES)))
    spool.append(event(2))
    assert [item["id"] for item in spool.events()] == ["t-0", "t-1", "t-2"]


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
        assert spool.size() == first
        spool.append(event(2))
        expected = ["t-0", "t-2"] if cut < len(content) - 1 else ["t-0", "t-1", "t-2"]
        assert [item["id"] for item in spool.events()] == expected
        assert spool.size() == spool.events_path.stat().st_size


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
        numbers = [item["id"] for item in Spool(folder).events()]
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
    ids = [item["id"] for item in Spool(tmp_path).events()]
    for name in "ab":
        assert [item for item in ids if item.startswith(name)] == [f"{name}-{n}" for n in range(500)]
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
        assert [item["id"] for item in spool.events()] == [f"t-{n}" for n in range(91)]


def test_the_position_survives_and_is_not_believed_when_it_cannot_be_true(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(3):
        spool.append(event(n))
    position = Position("sqlite:///x", spool.size(), "run", "me", (0, 40))
    spool.save_position(position)
    assert Spool(tmp_path).position() == position
    for damaged in ("", "[]", "{}", '{"offset": 1, "unknown": 2}', "{\x00"):
        (tmp_path / "delivered.json").write_text(damaged)
        assert Spool(tmp_path).position() == Position()
    spool.save_position(Position("sqlite:///x", spool.size() + 1, "run"))  # the spool was replaced by a shorter one
    assert spool.position() == Position("sqlite:///x", 0, "run")


def test_one_process_at_a_time_delivers(tmp_path: Path) -> None:
    spool, other = Spool(tmp_path), Spool(tmp_path)
    with spool.delivering() as first, other.delivering() as second:
        assert (first, second) == (True, False)
    with other.delivering() as third:
        assert third


def test_metrics_are_grouped_up_to_the_limit_and_a_record_is_never_split() -> None:
    rng = random.Random(1)
    events: list[tuple[Event, int]] = []
    for n in range(400):
        kind = rng.choice(["metrics"] * 9 + ["tags"])
        values = {f"m{k}": 0.0 for k in range(rng.randint(1, 60))}
        item = {"id": n, "kind": kind} | ({"values": values} if kind == "metrics" else {})
        events.append((item if rng.random() > 0.02 else {}, 10 * (n + 1)))
    found = list(groups(events))
    assert [item for group, _ in found for item in group] == [item for item, _ in events if item]
    for group, _ in found:
        assert {item["kind"] for item in group} in ({"metrics"}, {"tags"}, set())
        assert len(group) <= 1 or sum(len(item["values"]) for item in group) <= MAX_METRICS_PER_CALL
        assert len(group) == 1 or all(item["kind"] == "metrics" for item in group)
    offsets = {item["id"]: offset for item, offset in events if item}
    assert all(end == offsets[group[-1]["id"]] for group, end in found if group)
    assert found[-1][1] == events[-1][1]
    assert max(sum(len(i.get("values", ())) for i in group) for group, _ in found) > MAX_METRICS_PER_CALL - 60


def test_lines_are_plain_json_of_one_line(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(event(0, text="a\nb\u2028c"))
    lines = spool.events_path.read_bytes().split(b"\n")
    assert len(lines) == 2
    assert json.loads(lines[0])["text"] == "a\nb\u2028c"
