"""Mutation check: put one small fault into the code, run the tests that reach it, and see whether one of them fails.

    python -m tests.mutants [--seed SEED] [--num 200] [--jobs 1] [--least 90] [--only PATH[:LINE] ...]

First the tests run once on the code as it is: all must pass, and which lines each one runs is noted. Then each mutant gets a process of its
own, forked from this one, which has torch and its like imported but none of our code; there the changed module is imported in place of the
file, which stays as it is. The tests that run the changed lines follow, the fastest first, until one fails. A test that takes ten times its
CPU time, or an hour's memory, fails, too. Exit code: 0 if at least `--least` percent of the mutants are killed, 1 if fewer, 2 if the check
itself cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from tests.hermetic import REPOSITORY, hermetic_environment, make_root
from tests.mutants.operators import Mutant, marked, mutants_of

TARGETS = (
    "ddpm/*.py",
    "pipeline/training/loop.py",
    "pipeline/storage/checkpoint.py",
    "pipeline/data/order.py",
    "pipeline/metrics/fid.py",
)
# Those that run the targets in the test's own process; processes that a test starts run the code as it is.
TESTS = (
    "tests/ddpm",
    "tests/pipeline/data/test_order.py",
    "tests/pipeline/data/test_shard_batches.py",
    "tests/pipeline/metrics/test_fid.py",
    "tests/pipeline/storage/test_checkpoint.py",
    "tests/pipeline/training/test_combinations.py",
    "tests/pipeline/training/test_loop.py",
    "tests/pipeline/worker/test_modes.py",
    "tests/pipeline/worker/test_workers.py",
)
MARKS = "not ray and not gpu and not all"
# Tests of processes, which know nothing of the mutant.
OTHER_PROCESSES = "not (workers_see_the_same or workers_draw_the_same or is_waited_for or kill_at_any_system_call)"
# Imported once, before the forks: what of the tests' imports is not ours and takes long.
HEAVY = (
    *("numpy", "scipy.linalg", "torch", "torch._dynamo", "torch.distributed", "torchvision", "safetensors.torch"),
    *("hypothesis.strategies", "pydantic", "yaml", "pyarrow.parquet", "pandas", "PIL.Image", "sklearn.datasets"),
    *("diffusers", "torch_fidelity", "torchmetrics.image.fid", "torchmetrics.image.kid"),
)
SLACK_S, SLACK_FACTOR, LOAD_FACTOR = 5.0, 10.0, 10.0
MEMORY_BYTES = 8 << 30
MARK = "_reached_by_a_test"
STARTED: set[int] = set()


@dataclass
class Reach:
    """What the tests of the code as it is showed: the CPU time of each, and which of them run each statement of the targets."""

    cost_s: dict[str, float]
    tests: dict[tuple[str, int], set[str]]

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant, the fastest first. Constants and defaults are read on import: all tests of the file count."""
        found = self.tests.get((mutant.path, mutant.reach), set())
        if mutant.on_import:
            found = set().union(*(tests for (path, _), tests in self.tests.items() if path == mutant.path))
        return sorted(found, key=lambda test: (self.cost_s[test], test))


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from other code than that of their files, which know some names beforehand."""

    def __init__(self, codes: Mapping[str, CodeType], names: Mapping[str, Mapping[str, object]]) -> None:
        self.paths = {path.removesuffix(".py").replace("/", "."): path for path in codes}
        self.codes, self.names = codes, names

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.paths:
            return None
        return importlib.util.spec_from_file_location(name, REPOSITORY / self.paths[name], loader=self)

    def exec_module(self, module: ModuleType) -> None:
        path = self.paths[module.__name__]
        module.__dict__.update(self.names.get(path, {}))
        exec(self.codes[path], module.__dict__)


class Watch:
    """A pytest plugin that notes the statements of the targets that each test runs, those of its wider fixtures included."""

    def __init__(self, targets: Sequence[str]) -> None:
        self.marks: dict[str, dict[int, bool]] = {path: {} for path in targets}
        self.fixtures: dict[Any, tuple[set[tuple[str, int]], float]] = {}
        self.cost_s: dict[str, float] = {}
        self.tests: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.failed: list[str] = []
        codes = {path: marked(path, REPOSITORY, MARK) for path in targets if not path.endswith("__init__.py")}
        sys.meta_path.insert(0, Instead(codes, {path: {MARK: lines} for path, lines in self.marks.items()}))

    def taken(self) -> set[tuple[str, int]]:
        """The statements that ran since the last time."""
        found = {(path, line) for path, lines in self.marks.items() for line in lines}
        for lines in self.marks.values():
            lines.clear()
        return found

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        before, start = self.taken(), time.process_time()
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef] = self.taken(), time.process_time() - start
            for path, line in before:
                self.marks[path][line] = True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.taken()
        start, known = time.process_time(), set(self.fixtures)
        try:
            return (yield)
        finally:
            places = self.taken()
            cost = time.process_time() - start - sum(s for f, (_, s) in self.fixtures.items() if f not in known)
            for fixture in (f for found in item._fixtureinfo.name2fixturedefs.values() for f in found):
                its_places, its_cost = self.fixtures.get(fixture, (set(), 0.0))
                places |= its_places
                cost += its_cost
            self.cost_s[item.nodeid] = cost
            for place in places:
                self.tests[place].add(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class Chosen:
    """A pytest plugin that runs the chosen tests in their order, each within its time, and notes the first that fails."""

    def __init__(self, tests: Sequence[str], cost_s: dict[str, float]) -> None:
        self.order = {test: place for place, test in enumerate(tests)}
        self.cost_s = cost_s
        self.passed, self.failed = 0, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        limit_cpu(SLACK_S + SLACK_FACTOR * self.cost_s[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and not report.failed
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} cannot be imported"


def limit_cpu(seconds: float) -> None:
    """Let the signal's default action end this process after so much CPU time, inside native code too."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def run_pytest(folder: Path, plugin: object, *arguments: str) -> int:
    """Run pytest in this process with a folder for its temporary files and its output."""
    options = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    options += ["-m", MARKS, "-k", OTHER_PROCESSES, f"--basetemp={folder / 'tmp'}"]
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        return int(pytest.main([*options, *arguments], plugins=[plugin]))


def fork(folder: Path, work: Callable[[], dict[str, Any]]) -> int:
    """Start a process that does the work and leaves its result in the folder; return its id."""
    folder.mkdir()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        STARTED.add(pid)
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        (folder / "result").write_text(json.dumps(work()))
        os._exit(0)
    except BaseException:
        (folder / "output").open("a").write(traceback.format_exc())
    finally:
        os._exit(70)


def end(pid: int) -> None:
    """Kill a process that `fork` started, and what its tests left running: it is the head of a session of its own."""
    STARTED.discard(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def reach_of(targets: Sequence[str], tests: Sequence[str], root: Path) -> Reach:
    """Run the tests on the code as it is; SystemExit where one fails."""
    folder = root / "as-it-is"

    def work() -> dict[str, Any]:
        watch = Watch(targets)
        code = run_pytest(folder, watch, *tests)
        places = [[path, line, sorted(found)] for (path, line), found in watch.tests.items()]
        return {"code": code, "failed": watch.failed, "cost_s": watch.cost_s, "places": places}

    pid = fork(folder, work)
    os.waitpid(pid, 0)
    end(pid)
    result = folder / "result"
    told = json.loads(result.read_text()) if result.exists() else {"code": 70, "failed": []}
    if told["code"] != 0:
        print((folder / "output").read_text()[-4000:], *told["failed"], sep="\n", file=sys.stderr)
        print("the tests do not pass on the code as it is: no mutant was tried", file=sys.stderr)
        raise SystemExit(2)
    return Reach(told["cost_s"], {(path, line): set(found) for path, line, found in told["places"]})


def try_mutant(mutant: Mutant, tests: Sequence[str], cost_s: dict[str, float], folder: Path) -> int:
    """Start the tests of a mutant in a process of their own; return its id."""

    def work() -> dict[str, Any]:
        limit_cpu(60)
        sys.meta_path.insert(0, Instead({mutant.path: mutant.code(REPOSITORY)}, {}))
        chosen = Chosen(tests, cost_s)
        code = run_pytest(folder, chosen, "-x", *dict.fromkeys(test.partition("::")[0] for test in tests))
        return {"code": code, "passed": chosen.passed, "failed": chosen.failed}

    return fork(folder, work)


def verdict(status: int, folder: Path, num_tests: int) -> tuple[bool, str]:
    """Whether the mutant was killed, and by what."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return True, "time limit" if number in (signal.SIGPROF, signal.SIGKILL) else signal.Signals(number).name
    if not (folder / "result").exists():
        raise RuntimeError(f"a mutant's process ended with {status}:\n{(folder / 'output').read_text()[-2000:]}")
    told = json.loads((folder / "result").read_text())
    if told["code"] == 0 and told["passed"] == num_tests:
        return False, ""
    if not told["failed"]:
        raise RuntimeError(f"pytest ended with {told} of {num_tests} tests:\n{(folder / 'output').read_text()[-2000:]}")
    return True, told["failed"]


def control(mutant: Mutant, reach: Reach, root: Path) -> None:
    """Try the code as it is in a mutant's place: what kills that would kill every mutant. SystemExit where it does not survive."""
    tests, folder = reach.tests_of(mutant)[:20], root / "control"
    pid, status = os.waitpid(try_mutant(replace(mutant, choice=None), tests, reach.cost_s, folder), 0)
    end(pid)
    killed, by = verdict(status, folder, len(tests))
    if killed:
        print(f"the code as it is does not survive in the place of {mutant}: {by}", file=sys.stderr)
        raise SystemExit(2)


def check(mutants: Sequence[Mutant], reach: Reach, root: Path, jobs: int) -> dict[Mutant, tuple[bool, str]]:
    """Try all mutants, some at a time; tell each survivor as it is found."""
    verdicts: dict[Mutant, tuple[bool, str]] = {}
    running: dict[int, tuple[Mutant, Path, int, float]] = {}
    waiting, begin = list(enumerate(mutants)), time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, mutant = waiting.pop(0)
            tests = reach.tests_of(mutant)
            if not tests:
                verdicts[mutant] = False, "no test runs it"
                print(f"survived  {mutant}  (no test runs it)", flush=True)
                continue
            cost = sum(reach.cost_s[test] for test in tests)
            pid = try_mutant(mutant, tests, reach.cost_s, root / str(number))
            running[pid] = mutant, root / str(number), len(tests), time.monotonic() + 120 + LOAD_FACTOR * cost
        for pid, (mutant, folder, num_tests, deadline) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                if time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
                continue
            end(pid)
            del running[pid]
            verdicts[mutant] = killed, by = verdict(status, folder, num_tests)
            shutil.rmtree(folder, ignore_errors=True)
            if not killed:
                print(f"survived  {mutant}  ({num_tests} tests)", flush=True)
            elapsed, num = time.monotonic() - begin, len(verdicts)
            rate, left = num / elapsed, (len(mutants) - num) * elapsed / num
            alive = sum(not killed for killed, _ in verdicts.values())
            print(
                f"{num}/{len(mutants)}, {alive} survive; {60 * rate:.0f} a minute, {left / 60:.1f} min left | {by[-90:]}",
                file=sys.stderr,
            )
        time.sleep(0.02)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", help="which mutants are drawn (default: a new seed, printed)")
    parser.add_argument("--num", type=int, default=200, help="mutants to draw; 0: all (default: 200)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument("--least", type=float, default=90, help="percent that must be killed (default: 90)")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="PATH[:LINE]", help="draw from these files or lines alone"
    )
    chosen = parser.parse_args()
    seed = chosen.seed or secrets.token_hex(4)
    targets = [
        path.relative_to(REPOSITORY).as_posix() for pattern in TARGETS for path in sorted(REPOSITORY.glob(pattern))
    ]
    candidates = [m for path in targets for m in mutants_of(path, REPOSITORY)]
    if chosen.only:
        candidates = [m for m in candidates if {m.path, f"{m.path}:{m.line}"} & set(chosen.only)]
    drawn = random.Random(seed).sample(candidates, min(chosen.num or len(candidates), len(candidates)))
    print(f"seed {seed}: {len(drawn)} of {len(candidates)} mutants; again with SEED={seed}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    root = make_root()
    environment = hermetic_environment(root, os.environ) | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    try:
        for name in HEAVY:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        begin = time.monotonic()
        reach = reach_of(targets, TESTS, root)
        print(f"{len(reach.cost_s)} tests pass on the code as it is ({time.monotonic() - begin:.0f} s)", flush=True)
        control(drawn[0], reach, root)
        verdicts = check(drawn, reach, root, chosen.jobs)
    finally:
        for pid in set(STARTED):
            end(pid)
        shutil.rmtree(root, ignore_errors=True)
    return summary(verdicts, chosen.least, seed)


def summary(verdicts: dict[Mutant, tuple[bool, str]], least: float, seed: str) -> int:
    """Print the score by file; return the exit code."""
    num = Counter(mutant.path for mutant in verdicts)
    killed = Counter(mutant.path for mutant, (dead, _) in verdicts.items() if dead)
    print(f"\n{'file':34}{'mutants':>8}{'killed':>8}{'%':>7}")
    for path in sorted(num):
        print(f"{path:34}{num[path]:8}{killed[path]:8}{100 * killed[path] / num[path]:7.1f}")
    score = 100 * killed.total() / max(num.total(), 1)
    print(f"{'all':34}{num.total():8}{killed.total():8}{score:7.1f}   seed {seed}, at least {least:g} expected")
    return 0 if score >= least else 1


if __name__ == "__main__":
    sys.exit(main())
