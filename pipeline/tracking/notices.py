"""Notices: one JSON message when a run or a sweep ends, fails, is interrupted or restarts, to a command or a webhook.

A message goes into a spool of its own (`notices/` of the run's folder), and a process of its own sends what is there: the command neither
waits for a receiver nor needs one. What could not be sent is sent with the next message, or by `sync`.

`python -m pipeline.tracking.notices FOLDER` is that process; the receivers come as JSON on its stdin, since an address may be secret.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.redaction import HIDDEN, one_line, redact
from pipeline.storage.folder import Folder, now
from pipeline.storage.provenance import JOB_VARIABLE
from pipeline.tracking.spool import Spool

if TYPE_CHECKING:
    from pipeline.config.cluster_profile import Profile

COMMAND_VARIABLE, WEBHOOK_VARIABLE = "DDPM_PIPE_NOTIFY_COMMAND", "DDPM_PIPE_NOTIFY_WEBHOOK"
TRIES, PAUSE_S = 3, 1.0
COMMAND_S, WEBHOOK_S = 60.0, 10.0  # for one try
WAIT_S = 300.0  # for another process that sends
IN_A_JOB, JOB_WAITS_S = {JOB_VARIABLE, "SLURM_JOB_ID"}, 3.0
Event = Literal["finished", "failed", "interrupted", "restarted"]
_senders: list[subprocess.Popen[bytes]] = []  # not waited for


@dataclass(frozen=True)
class Receivers:
    """Who gets messages: a command line, on its stdin, and an address, by POST."""

    command: str | None
    webhook: str | None

    @classmethod
    def of(cls, profile: Profile) -> Receivers | None:
        """Return the profile's, or else those of the environment; None if nobody is to be told."""
        command = profile.notify.command or os.environ.get(COMMAND_VARIABLE)
        webhook = profile.notify.webhook or os.environ.get(WEBHOOK_VARIABLE)
        return cls(command or None, webhook or None) if command or webhook else None


def notify(folder: Folder, profile: Profile, event: Event, reason: str = "", **more: Any) -> None:
    """Put a message about a run or a sweep into its spool, and have it sent. Never raises OSError.

    Waits for nobody. In a job, which ends the processes that it started, the last message has some seconds.
    """
    receivers, name = Receivers.of(profile), folder.record.name
    if receivers is None or getattr(folder.record, "trial", None) is not None:  # the sweep speaks for its trials
        return
    message = {
        "event": event,
        "kind": folder.KIND,
        "id": folder.id,
        "name": name,
        "reason": redact(reason),
        "time": now(),
        "host": socket.gethostname(),
        "text": redact(f"{folder.KIND} {folder.id} ({name}) {event}" + f": {reason}" * bool(reason)),
        **more,
    }
    Spool(_of(folder.folder)).append({"id": secrets.token_hex(8), "kind": "notice", "message": message})
    sender = _start(folder.folder, receivers)
    if sender is not None and event != "restarted" and IN_A_JOB & os.environ.keys():
        with suppress(subprocess.TimeoutExpired):
            sender.wait(JOB_WAITS_S)


def send_pending(folder: Path, profile: Profile) -> None:
    """Have the messages sent that were not."""
    receivers = Receivers.of(profile)
    if receivers is not None and _of(folder).is_dir() and Spool(_of(folder)).pending():
        _start(folder, receivers)


def _of(folder: Path) -> Path:
    return folder / "notices"


def _start(folder: Path, receivers: Receivers) -> subprocess.Popen[bytes] | None:
    words = [sys.executable, "-P", "-m", "pipeline.tracking.notices", str(folder)]
    try:
        sender = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError:  # no process, no memory: the next message tries again
        return None
    assert sender.stdin is not None
    with suppress(BrokenPipeError), sender.stdin:
        sender.stdin.write(json.dumps(asdict(receivers)).encode())
    _senders.append(sender)
    return sender


def _send(folder: Path, receivers: Receivers) -> None:
    """Send what is pending, in order; the first message that is not taken after some tries ends this, with a line in the run's log."""
    spool, begin = Spool(_of(folder)), time.monotonic()
    while time.monotonic() - begin < WAIT_S:
        with spool.delivering() as mine:
            if mine:
                while waiting := spool.pending():
                    if problem := _send_one(json.dumps(waiting[0]["message"]).encode(), receivers):
                        with (folder / "log.txt").open("a") as log:
                            log.write(
                                f"{now()}  warning: a notice was not taken: {problem}; it is sent with the next one\n"
                            )
                        return
                    spool.receive(waiting[:1], "notices")
                return
        time.sleep(PAUSE_S)  # another one sends, and may give up before it comes to the newest message


def _send_one(message: bytes, receivers: Receivers) -> str:
    """Hand a message to the webhook and to the command; return why it was not taken, "" if it was."""
    problem = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE_S * (attempt > 0))
        try:
            if receivers.webhook is not None:
                request = urllib.request.Request(receivers.webhook, message, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=WEBHOOK_S):
                    pass
            if receivers.command is not None:
                subprocess.run(shlex.split(receivers.command), input=message, timeout=COMMAND_S, check=True)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            problem = one_line(error).replace(receivers.webhook or "\0", HIDDEN)
        else:
            return ""
    return problem


if __name__ == "__main__":
    _send(Path(sys.argv[1]), Receivers(**json.load(sys.stdin)))
