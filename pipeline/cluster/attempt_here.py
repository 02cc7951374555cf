"""An attempt in the command's own process: one worker in the main thread, where `breakpoint()` reaches the user's terminal. No Ray."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from pipeline.cluster.attempt import Attempt, Ended, Observer
from pipeline.cluster.causes import cause_here
from pipeline.cluster.control_actor import ControlActor
from pipeline.errors import PipelineError
from pipeline.planning.plan import advice_to_isolate
from pipeline.signals import Signals, StoppedAtOnce
from pipeline.storage.next_command import typeable
from pipeline.training.device import release_memory
from pipeline.training.stacks import Stacks, path_of
from pipeline.training.team import Team
from pipeline.worker.worker import Worker

STEADY_S = 20.0  # of training, after which its pace is steady enough to predict the time left


class AttemptHere(Attempt):
    """Trains in this thread, while another one shows its progress."""

    _advised = False

    def run(self, observe: Observer) -> Ended:
        self.control = ControlActor()
        over = threading.Event()
        watching = threading.Thread(target=self._watch_over, args=(over, observe), name="watch", daemon=True)
        watching.start()
        try:
            with self.signals.ending_at_once():
                outcome = self._train()
        except StoppedAtOnce:
            return Ended(None, "stopped at once")
        except PipelineError:
            raise
        except (Exception, SystemExit) as error:  # of the user's own network, or a bug of ours
            return Ended(None, cause_here(error, self.job.code_folder), details=traceback.format_exc())
        finally:
            over.set()
            watching.join()
            release_memory()
        return Ended(outcome)

    def _train(self) -> str:
        path = path_of(Path(self.job.run_folder), self.job.attempt, rank=0)
        with Stacks(path, self.profile.timeouts.collective_s) as stacks:
            return Worker(self.job, Team(), _Link(self.control, self.signals, stacks)).work()

    def _watch_over(self, over: threading.Event, observe: Observer) -> None:
        self._watch(over.wait, observe)
        if self._stop_is_overdue() and not over.is_set():
            self.signals.overdue = True
            # acts as a second signal of the user's: it ends whatever waits, such as a write to storage that hangs
            signal.pthread_kill(threading.main_thread().ident or 0, self.signals.first or signal.SIGTERM)

    def _read(self) -> dict[str, Any]:
        return self.control.read()

    def _stop(self) -> None:
        """Does nothing: the worker itself reads the signals once a step."""

    def _look_around(self) -> None:
        """Print once that a long training is safer in a process of its own."""
        if self._advised or self.begin is None or time.monotonic() - self.begin[1] < STEADY_S:
            return
        self._advised = True
        run = Path(self.job.run_folder).name
        if advice := advice_to_isolate(self.profile, self.job.num_workers, self._time_left() or 0.0):
            self.console.say(f"{advice}: Ctrl-C, then {typeable(f'resume {run} --isolated')}")


class _Link:
    """The worker's link to this process: what it publishes can be read at once, and a signal asks it to stop."""

    def __init__(self, control: ControlActor, signals: Signals, stacks: Stacks) -> None:
        self._control, self._signals, self._stacks = control, signals, stacks

    def publish(self, progress: dict[str, Any]) -> None:
        """Publish progress, a warning or an early score."""
        self._control.publish(progress)

    def stop_requested(self) -> bool:
        """Return whether there was a signal. The worker calls this once a step."""
        self._stacks.step()
        return self._signals.first is not None
