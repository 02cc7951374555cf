"""Shuffled images per second into one training process: this project's reader, torch's DataLoader and Ray Data in one run.

    python benchmarks/data.py                        200,000 random 32x32 colour images, about two minutes on two cores
    python benchmarks/data.py --data data/cifar10    an ingested dataset of raw images

Every loader gives shuffled uint8 batches [128, C, H, W] of the same images. Ours, and DataLoader without workers, run in one
thread on one core; DataLoader's workers and Ray get the whole machine. The second column counts the processor's time instead
of the clock's, which is the fairer one where others use the machine; it is left out where work is done in other processes.
Compare rows of one run only.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 128
NUM_STREAMS = 16
WINDOW = 1024  # each stream's: together they shuffle 16,384 rows at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="ingested dataset of raw images; random ones by default")
    parser.add_argument("--images", type=int, default=200_000, help="random images to make")
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure each loader for")
    parser.add_argument("--skip-ray", action="store_true", help="leave Ray Data out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or make_dataset(Path(temporary) / "data", options.images)
        print(describe(folder))
        loaders: dict[str, Callable[[Path], Iterator[Any]]] = {
            "ours, from memory, one core": lambda f: ours(f, 2**60),
            "ours, from disk, one core": lambda f: ours(f, 0),
            "DataLoader on an array in memory, one core": lambda f: data_loader(f, 0),
            "DataLoader on an array in memory, 2 workers": lambda f: data_loader(f, 2),
        }
        if not options.skip_ray:
            loaders["Ray Data on the same shards"] = ray_data
        rates = {name: measure(name, loader(folder), options.seconds) for name, loader in loaders.items()}
    disk = rates["ours, from disk, one core"][0]
    print("\n| loader | images/s | images/s of processor time | of ours from disk |\n|---|---|---|---|")
    for name, (rate, by_processor) in rates.items():
        alone = "" if "one core" not in name else f"{by_processor:,.0f}"
        print(f"| {name} | {rate:,.0f} | {alone} | {rate / disk:.2f} |")


def make_dataset(folder: Path, num_images: int) -> Path:
    from pipeline.ingest.ingest import ingest

    print(f"making {num_images:,} random images ...", flush=True)
    rng = np.random.default_rng(0)
    source = folder.with_suffix(".npz")
    np.savez(
        source, images=rng.integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8), labels=np.zeros(num_images, int)
    )
    ingest(str(source), folder)
    source.unlink()
    return folder


def describe(folder: Path) -> str:
    from pipeline.data.shards import Dataset

    manifest = Dataset.open(folder).manifest
    if manifest.encoding != "raw":
        raise SystemExit("give a dataset of raw images (up to 64x64)")
    size = sum(shard.num_bytes for shard in manifest.shards) / 1e6
    channels, height, width = manifest.shape
    return f"{manifest.num_rows:,} images {height}x{width}x{channels}, {len(manifest.shards)} shards, {size:.0f} MB"


def measure(name: str, batches: Iterator[Any], seconds: float) -> tuple[float, float]:
    """Images per second, by the clock and by this process's processor time, after the first ten batches."""
    for _ in range(10):
        next(batches)
    count, begin, processor = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        count += len(next(batches))
    rates = count / (time.perf_counter() - begin), count / (time.process_time() - processor)
    print(f"{name:46} {rates[0]:12,.0f} images/s", flush=True)
    batches.close()  # type: ignore[attr-defined]
    return rates


def on_one_core(batches: Iterator[Any]) -> Iterator[Any]:
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        yield from batches
    finally:
        os.sched_setaffinity(0, everywhere)


def ours(folder: Path, memory_budget_bytes: int) -> Iterator[Any]:
    from pipeline.data.order import Order
    from pipeline.data.shards import Dataset, read_batches

    dataset = Dataset.open(folder)
    order = Order(dataset.manifest.row_groups, 0, NUM_STREAMS, BATCH_SIZE, WINDOW)
    batches = read_batches(dataset, order, range(NUM_STREAMS), memory_budget_bytes=memory_budget_bytes)
    yield from on_one_core(batch.images for batch in batches)


def data_loader(folder: Path, num_workers: int) -> Iterator[Any]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from pipeline.data.shards import Dataset

    dataset = Dataset.open(folder)
    dataset.hold_in_memory()
    images = TensorDataset(torch.from_numpy(dataset.read(range(len(dataset)))))
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0)
    batches = (batch for _ in iter(int, 1) for (batch,) in loader)  # epoch after epoch
    yield from batches if num_workers else on_one_core(batches)


def ray_data(folder: Path) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from pipeline.data.shards import Dataset

    shape = Dataset.open(folder).manifest.shape

    def decode(table: Any) -> dict[str, Any]:
        column = table.column("image").combine_chunks()
        pixels = np.frombuffer(column.buffers()[1], np.uint8)
        begin = column.offset * column.type.byte_width
        return {"image": pixels[begin : begin + len(column) * column.type.byte_width].reshape(-1, *shape)}

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        files = sorted(map(str, folder.glob("shard-*.parquet")))
        images = ray.data.read_parquet(files).select_columns(["image"]).map_batches(decode, batch_format="pyarrow")
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # which using ray.data at all sets back
        for epoch in iter(range(10**9)):
            options = {"local_shuffle_buffer_size": NUM_STREAMS * WINDOW, "local_shuffle_seed": epoch}
            for batch in images.iter_batches(batch_size=BATCH_SIZE, batch_format="numpy", **options):
                yield batch["image"]
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
