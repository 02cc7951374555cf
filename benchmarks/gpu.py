"""Speed of one network on one GPU: training and sampling in each arithmetic, beside diffusers.

`benchmarks/gpu.sh` runs it. Each row of the table is a process of its own, so that what fails, or takes longer than there is time, costs no
other row; rows that time does not reach are marked as not run. The cheap rows come first, those that compile last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sampling, training
from benchmarks.rounds import rate, summary
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.config.yaml_files import validate
from pipeline.gpus import usable_gpus
from pipeline.training.device import Compute, sampling_compute, training_compute
from pipeline.training.models import build_model

RESULTS = Path(__file__).resolve().parent / "gpu.json"
BUDGET_S = 450.0  # gpu.sh ends what takes longer than 480 seconds
PROCESSES = multiprocessing.get_context("forkserver")
Work = Callable[[], dict[str, Any]]
Call = Callable[[Work, float], dict[str, Any]]  # of a work, with the seconds that it may take
NOT_RUN = "not run: no time left"

FP32, BF16 = ("training.precision=fp32",), ("training.precision=bf16", "training.channels_last=false")
CHANNELS_LAST = ("training.precision=bf16", "training.channels_last=true")
COMPILED = (*CHANNELS_LAST, "training.compile=true")
TUNED = "bf16, channels_last"


@dataclass(frozen=True)
class Row:
    """One line of the table: what is measured, with which settings of the experiment."""

    work: str  # of WORKS
    name: str
    batch_size: int
    settings: tuple[str, ...] = ()
    needs_s: float = 15.0  # with less time left it is not begun
    cuda_graphs: bool = False
    like_the_best: bool = False  # with the settings of the fastest row of ours so far that trains deterministically


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long."""

    preset: str = "ddpm-cifar10"
    settings: tuple[str, ...] = ()  # of all rows
    batch_size: int = 128
    large: tuple[int, ...] = (512, 2048)
    sampled: int = 256
    sampling_steps: int = 10
    window_s: float = 2.0  # of each of three windows that are measured
    matrix: int = 8192


def rows(sizes: Sizes) -> list[Row]:
    batch, sampled = sizes.batch_size, sizes.sampled
    return [
        Row("train", TUNED, batch, CHANNELS_LAST),
        Row("train", "fp32", batch, FP32),
        Row("train", "TF32", batch, (*FP32, "training.tf32=true")),
        Row("train", "bf16", batch, BF16),
        Row("train", f"{TUNED}, not deterministic", batch, (*CHANNELS_LAST, "training.deterministic=false")),
        Row("train diffusers", "fp32", batch, FP32),
        Row("train diffusers", TUNED, batch, CHANNELS_LAST),
        Row("sample", "fp32", sampled, ("sampling.precision=fp32",)),
        Row("sample", TUNED, sampled, ("sampling.precision=bf16",)),
        Row("sample diffusers", "fp32", sampled, ("sampling.precision=fp32",)),
        Row("sample diffusers", TUNED, sampled, ("sampling.precision=bf16",)),
        Row("train", f"{TUNED}, compiled", batch, COMPILED, needs_s=60),
        *(Row("train", "the best of these", large, like_the_best=True, needs_s=30) for large in sizes.large),
        Row("sample", f"{TUNED}, compiled", sampled, ("sampling.precision=bf16", "sampling.compile=true"), needs_s=45),
        Row("train", f"{TUNED}, compiled, CUDA graphs", batch, COMPILED, needs_s=60, cuda_graphs=True),
        Row("train diffusers", f"{TUNED}, compiled", batch, COMPILED, needs_s=60),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds after which no row is begun")
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if not usable_gpus():
        parser.exit(3, "benchmarks/gpu.sh: got no usable GPU, expected one. On CPUs run: make bench\n")
    sizes = Sizes()
    PROCESSES.set_forkserver_preload(["benchmarks.gpu"])
    print(table(run(rows(sizes), sizes, asked.budget_s, asked.json, in_process)))


def run(asked: Sequence[Row], sizes: Sizes, budget_s: float, results: Path, call: Call) -> dict[str, Any]:
    """Measure the rows that there is time for; `results` has what was found at any moment, the others marked as not run."""
    end = time.monotonic() + budget_s
    found: dict[str, Any] = {"card": call(partial(card, sizes), budget_s)}
    found["rows"] = [asdict(row) | {"note": NOT_RUN} for row in asked]
    for number, row in enumerate(asked):
        results.write_text(json.dumps(found, indent=1) + "\n")
        left_s = end - time.monotonic()
        if left_s < row.needs_s:
            continue
        if row.like_the_best:
            best = best_of(found["rows"])
            if best is None:
                found["rows"][number]["note"] = "not run: nothing to choose from"
                continue
            row = replace(row, settings=tuple(best["settings"]), name=f"the best: {best['name']}")
        seen = call(partial(WORKS[row.work], row, sizes), left_s)
        if "images_per_s" in seen:
            seen["share"] = share(seen, row, found["card"])
        found["rows"][number] = asdict(row) | {"note": ""} | seen
    results.write_text(json.dumps(found, indent=1) + "\n")
    return found


def best_of(measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest row of our training at the usual batch whose kernels repeat."""
    ours = [row for row in measured if row["work"] == "train" and "images_per_s" in row and not row["like_the_best"]]
    repeating = [row for row in ours if "training.deterministic=false" not in row["settings"]]
    return max(repeating, key=lambda row: row["images_per_s"]["median"], default=None)


def share(seen: dict[str, Any], row: Row, card: dict[str, Any]) -> float | None:
    """Return the network's part of the operations that the card's bf16 products reach; a step of training is three calls."""
    if "flop_per_s" not in card:
        return None
    calls = 3 if row.work.startswith("train") else 1
    per_s: float = seen["images_per_s"]["median"]
    return per_s * calls * card["flop_per_image"] / card["flop_per_s"]


def in_process(work: Work, limit_s: float) -> dict[str, Any]:
    """Return what `work` finds in a process of its own, or a note why there is nothing."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_send, args=(work, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(0.0, limit_s)):
            return {"note": "stopped: it took longer than there was time"}
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        return {"note": f"failed: its process ended with exit code {process.exitcode}"}
    else:
        return found
    finally:
        process.kill()
        process.join()


def _send(work: Work, sender: Any) -> None:
    try:
        found = work()
    except Exception as error:  # out of memory, a kernel that is missing: the other rows are measured all the same
        lines = str(error).strip().splitlines() or [""]
        found = {"note": f"failed: {type(error).__name__}: {lines[0][:120]}"}
    sender.send(found)


def card(sizes: Sizes) -> dict[str, Any]:
    """Return the device's name, the rate of its bf16 products, and the operations of one call of the network for one image."""
    compute = sampling_compute(profile())
    compute.start()
    n = sizes.matrix
    a, b = (torch.randn(n, n, device=compute.device, dtype=torch.bfloat16) for _ in range(2))

    def multiply(times: int) -> None:
        for _ in range(times):
            a @ b
        compute.wait()

    experiment = experiment_of(Row("train", "", sizes.batch_size), sizes)
    shape = training.SHAPES[sizes.preset]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(experiment, shape).eval()(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64))
    per_s = rounds_of(multiply, 2 * n**3, sizes)["median"]
    return {
        "name": compute.name,
        "torch": torch.__version__,
        "flop_per_s": per_s,
        "flop_per_image": counter.get_total_flops(),
    }


def train(row: Row, sizes: Sizes, *, peer: bool = False) -> dict[str, Any]:
    """Train ours as `pipeline.training.loop.fit` does, or the peer in its own loop, with the row's settings."""
    begin, shape, experiment = time.monotonic(), training.SHAPES[sizes.preset], experiment_of(row, sizes)
    compute = training_compute(experiment, profile(row), 1, shape)
    if peer:  # as its users run it
        compute = replace(compute, deterministic=False)
    compute.start()
    with ExitStack() as stack:
        if peer:
            work = training.peer_training(experiment, shape, compute)
        else:
            work = training.our_training(experiment, shape, compute, stack)
        return measured(work, row.batch_size, sizes, compute, begin)


def sample(row: Row, sizes: Sizes, *, peer: bool = False) -> dict[str, Any]:
    """Take DDIM steps from noise to one batch; images/s are rows of one call of the network."""
    begin, shape, experiment = time.monotonic(), training.SHAPES[sizes.preset], experiment_of(row, sizes)
    compute = sampling_compute(profile(row))
    if peer:
        compute = replace(compute, deterministic=False)
    compute.start()
    make = sampling.peer_sampling if peer else sampling.our_sampling
    once = make(experiment, shape, row.batch_size, sizes.sampling_steps, compute)

    def work(times: int) -> None:
        for _ in range(times):
            once()
        compute.wait()

    return measured(work, row.batch_size * sizes.sampling_steps, sizes, compute, begin)


WORKS: dict[str, Callable[[Row, Sizes], dict[str, Any]]] = {
    "train": train,
    "train diffusers": partial(train, peer=True),
    "sample": sample,
    "sample diffusers": partial(sample, peer=True),
}


def experiment_of(row: Row, sizes: Sizes) -> Experiment:
    """Nothing is compiled that does not ask for it."""
    usual = ("training.compile=false", "sampling.compile=false", f"sampling.batch_size={row.batch_size}")
    return training.experiment_of(sizes.preset, row.batch_size, (*sizes.settings, *usual, *row.settings))


def profile(row: Row | None = None) -> Profile:
    """One worker of this machine, with its GPU if it has one."""
    graphs = row is not None and row.cuda_graphs
    resources = {"CPU": None, "GPU": min(1, usable_gpus())}
    return validate(Profile, {"name": "gpu", "resources_per_worker": resources, "cuda_graphs": graphs}, "profile")


def measured(work: Callable[[int], None], count: int, sizes: Sizes, compute: Compute, begin: float) -> dict[str, Any]:
    """Measure a work of `count` images a turn; `begin` is when it began to get ready."""
    work(2)  # kernels are chosen, recorded, and memory is taken here
    compute.wait()
    ready_s = time.monotonic() - begin
    if compute.on_gpu:
        torch.cuda.reset_peak_memory_stats(compute.device)
    found = {"images_per_s": rounds_of(work, count, sizes), "ready_s": ready_s, "arithmetic": compute.arithmetic}
    if compute.on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(compute.device)
    return found


def rounds_of(work: Callable[[int], None], count: int, sizes: Sizes) -> dict[str, Any]:
    """Return the median and the spread of three windows, in `count` a second for each turn of the work."""
    alone_s = statistics.median(1 / rate(partial(work, 1), 1)() for _ in range(3))
    turns = max(1, round(sizes.window_s / alone_s))
    return summary([rate(partial(work, turns), count * turns)() for _ in range(3)])


def table(found: dict[str, Any]) -> str:
    """Return Markdown: all rows, those that were not run included."""
    about = found["card"]
    lines = [
        f"{about.get('name', about.get('note'))}, torch {about.get('torch', 'unknown')}",
        "",
        "| work | batch | how | images/s | spread | peak memory | share of bf16 rate | ready after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if "images_per_s" not in row:
            cells = [row["note"], "", "", "", ""]
        else:
            low, high = row["images_per_s"]["spread"]
            peak, part = row.get("peak_bytes"), row["share"]
            cells = [
                f"{row['images_per_s']['median']:,.0f}",
                f"{low:,.0f} to {high:,.0f}",
                "unknown" if peak is None else f"{peak / 2**30:.1f} GiB",
                "unknown" if part is None else f"{part:.0%}",
                f"{row['ready_s']:.0f} s",
            ]
        lines.append(f"| {row['work']} | {row['batch_size']} | {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
