"""The progress bar: redrawn on a terminal, plain lines in a log, and there before the first piece of work is done."""

from __future__ import annotations

import contextlib
import io
import time

import pytest

from pipeline import console
from pipeline.console import Bar, Console
from tests.kit.waiting import wait_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_shows_rate_elapsed_left_and_what_stands_beside() -> None:
    screen = Terminal()
    bar = Bar(Console(screen), "training", 100, "steps", quiet_s=0.0)
    wait_for(lambda: "0/100" in screen.getvalue(), explain=screen.getvalue)  # before anything is done
    bar(10, "loss 0.5", first=True)
    bar(20, "loss 0.25")
    Console(screen).say("a line that stays")
    bar(100, "loss 0.125")
    drawn = screen.getvalue()
    assert "training: " in drawn
    assert "20%" in drawn
    assert "20/100 [" in drawn
    assert "loss 0.25" in drawn
    assert "steps/s" in drawn
    assert "\na line that stays\n" in drawn.replace("\r", "\n")
    assert "100/100" in drawn.splitlines()[-1]
    assert not Bar.shown


def test_in_a_log_it_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    bar = Bar(Console(log), "sampling", 4, quiet_s=0.0)
    wait_for(lambda: "0/4" in log.getvalue(), explain=log.getvalue)
    bar(1)
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    bar(2)
    bar(4)
    counts = [line.partition("/4")[0] for line in log.getvalue().splitlines()]
    assert counts == ["sampling:   0% 0", "sampling:  50% 2", "sampling: 100% 4"]
    assert "images/s" in log.getvalue()


def test_work_of_a_moment_is_not_worth_a_bar() -> None:
    for stream in (Terminal(), io.StringIO()):
        bar = Bar(Console(stream), "sampling", 2, quiet_s=60.0)
        bar(1)
        bar(2)
        assert stream.getvalue() == ""


def test_the_rate_is_reckoned_from_where_a_resumed_training_began() -> None:
    log = io.StringIO()
    bar = Bar(Console(log), "training", 1001, "steps", quiet_s=60.0)
    bar(1000, first=True)
    time.sleep(0.02)
    bar._quiet_until = 0.0
    bar(1001)
    assert "1001/1001" in log.getvalue()
    (rate,) = [float(word.split("steps")[0]) for word in log.getvalue().split(", ") if "steps/s" in word]
    assert rate < 60  # one step in 0.02 s or more, not a thousand


def test_a_bar_that_an_error_leaves_behind_shows_nothing_any_more() -> None:
    log = io.StringIO()

    def work() -> None:
        bar = Bar(Console(log), "sampling", 4, quiet_s=0.05)
        bar(1)
        raise ValueError

    with contextlib.suppress(ValueError):
        work()
    time.sleep(0.2)
    assert log.getvalue() == ""
