"""The batch of a step: rows from the shards and the random numbers that go with them, prepared ahead by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import Draw, Model, conditioned, drop_labels
from pipeline.data.images import flip, to_float
from pipeline.data.order import Order
from pipeline.data.shards import Dataset, read_batches
from pipeline.training.device import Compute
from pipeline.training.randomness import Draws, concatenate, training_draws

END_S = 5.0  # for a read that hangs; its thread ends with the process


@dataclass(frozen=True)
class Batch:
    """One worker's part of the batch of one step: uint8 images [b, C, H, W], int64 labels [b] where known, and their chance."""

    step: int
    images: Tensor
    labels: Tensor | None
    rows: Tensor
    draws: Draws

    def pin(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies without waiting."""
        draws = Draws(*(getattr(self.draws, f.name).pin_memory() for f in fields(Draws)))
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, images=self.images.pin_memory(), labels=labels, draws=draws)


def training_batches(dataset: Dataset, order: Order, streams: range, start_step: int, seed: int) -> Iterator[Batch]:
    """Yield one worker's batches from `start_step` on, without end: rows and chance are functions of (seed, step, stream)."""
    shape, count = dataset.manifest.shape, order.rows_per_stream
    for raw in read_batches(dataset, order, streams, start_step):
        draws = concatenate([training_draws(seed, raw.step, stream, count, shape) for stream in streams])
        labels = None if raw.labels is None else torch.from_numpy(raw.labels)
        yield Batch(raw.step, torch.from_numpy(raw.images), labels, torch.from_numpy(raw.rows), draws)


@dataclass(frozen=True)
class PlacedBatch:
    """A worker's part of a step on the device: uint8 images [b, C, H, W] and what chance decided about each."""

    images: Tensor
    eps: Tensor
    timesteps: Tensor
    weights: Tensor
    mirrored: Tensor | None
    labels: Tensor | None
    keys: Tensor | None

    @classmethod
    def of(
        cls,
        batch: Batch,
        drawn: Draw,
        compute: Compute,
        horizontal_flip: bool,
        null_class: int | None,
        label_dropout: float,
        keyed: bool = False,
    ) -> PlacedBatch:
        """Send a batch to the device; with a `null_class` its labels too, each dropped with a probability of `label_dropout`.

        `keyed` is a network whose dropout masks are a function of keys.
        """
        draws, send, labels = batch.draws, compute.send, None
        if null_class is not None:
            assert batch.labels is not None
            labels = send(drop_labels(batch.labels, draws.u_label, label_dropout, null_class))
        mirrored = send(draws.u_flip < 0.5) if horizontal_flip else None
        keys = send(draws.keys) if keyed else None
        return cls(send(batch.images), send(draws.eps), send(drawn.t), send(drawn.weight), mirrored, labels, keys)

    def part(self, rows: slice, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return x0, t and eps of some rows."""
        x0 = to_float(self.images[rows])
        if self.mirrored is not None:
            x0 = flip(x0, self.mirrored[rows])
        if channels_last:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        return x0, self.timesteps[rows], self.eps[rows]

    def conditioned(self, network: nn.Module, rows: slice) -> Model:
        """Return the network with the labels and the keys of some rows, where it takes any."""
        model: Any = network if self.keys is None else partial(network, keys=self.keys[rows])
        return model if self.labels is None else conditioned(model, self.labels[rows])


class Prefetch:
    """Iterate over batches that another thread prepares ahead; `waited_s` sums the time that the consumer waited.

    An exception of the producer is raised in the consumer, at the item it belongs to. Use as a context manager: leaving it ends the
    thread.
    """

    def __init__(self, items: Iterator[Batch], depth: int = 3) -> None:
        self.waited_s = 0.0
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(items,), name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join(END_S)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            item = self._queue.get()
            self.waited_s += time.perf_counter() - begin
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _produce(self, items: Iterator[Batch]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        """Put unless the consumer has left; return whether it was put."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
