"""The scaling model: held against published measurements, and what it predicts for the paper's two networks up to 64 nodes and beyond.

    python benchmarks/scaling.py                                     the tables of docs/scaling.md
    python benchmarks/scaling.py --figure docs/scaling.png           its picture
    python benchmarks/scaling.py --parameters 35.7e6 --images-per-s 5400 --batch 4096 --bandwidth 10 --gpus-per-node 8

The last form is for a training of your own: parameters, images per second that one GPU trains (`ddpm-pipe train --dry-run` measures it),
the global batch, and GB/s of an all-reduce between nodes (`ddpm-pipe doctor` measures it). Nothing is measured here, nothing needs a GPU:
`benchmarks/scaling_model.py` is the model. docs/scaling.md says what is assumed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaling_model import (
    GPU_NETWORK,
    Link,
    Network,
    Work,
    checkpoint_interval_s,
    efficiency,
    lost_share,
    mean_time_to_failure_s,
    sampling_s,
    step_s,
    weak_efficiency,
)

# Images/s on A100s, eight to a node, in this order of GPUs: Stable Diffusion 2's U-Net at a global batch of 2048
# (mosaicml/diffusion, README and yamls/hydra-yamls/SD-2-base-256.yaml). The first of each row sets the compute time.
PUBLISHED_GPUS = (8, 16, 32, 64, 128)
PUBLISHED = {"256px": (1100, 2180, 4080, 8530, 11600), "512px": (290, 585, 1195, 2340, 4590)}
PUBLISHED_PARAMETERS, PUBLISHED_BATCH = 866_000_000, 2048

# The paper's two networks on H100s in bf16. Assumed: 20 % of the peak, which gives these images/s of training.
CIFAR = Work(35_700_000, 1 / 5400)
LSUN = Work(113_700_000, 1 / 133)
NETWORKS = {"32px, 35.7 M": CIFAR, "256px, 113.7 M": LSUN}
ROWS = (
    ("32px, 35.7 M", 512),
    ("32px, 35.7 M", 128),
    ("32px, 35.7 M", 16),
    ("256px, 113.7 M", 16),
    ("256px, 113.7 M", 4),
)
BANDWIDTHS = (
    50.0,
    29.6,
    7.0,
    2.0,
)  # GB/s between nodes: 400 Gb/s for each GPU, four 100 Gb/s, one 100 Gb/s, 25 Gb/s Ethernet
SAMPLING_GPUS = (1, 8, 64, 256, 512)


def between(gb_per_s: float) -> Network:
    """Eight GPUs to a node on NVSwitch, with so much all-reduce bandwidth between nodes."""
    return Network(8, GPU_NETWORK.within, Link(gb_per_s * 1e9))


@dataclass(frozen=True)
class Point:
    """One published measurement beside the model's figure."""

    resolution: str
    gpus: int
    published: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def validation() -> list[Point]:
    """The eight published points that the model does not know, with one free number: 50 GB/s between nodes.

    Jitter is left out: the rate on one node, from which the compute time is taken, already holds it.
    """
    points = []
    for resolution, rates in PUBLISHED.items():
        work = Work(PUBLISHED_PARAMETERS, PUBLISHED_GPUS[0] / rates[0], jitter=0.0)
        for gpus, published in list(zip(PUBLISHED_GPUS, rates, strict=True))[1:]:
            predicted = PUBLISHED_BATCH / step_s(work, PUBLISHED_BATCH / gpus, gpus, between(50))
            points.append(Point(resolution, gpus, published, predicted))
    return points


def least_batch(work: Work, gpus: int, gb_per_s: float, wanted: float = 0.95) -> int:
    """The least batch of one GPU at which `gpus` do `wanted` of what they would do if nothing had to be sent."""
    batch = 1
    while work.compute_s(batch) / step_s(work, batch, gpus, between(gb_per_s)) < wanted:
        batch += 1
    return batch


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report() -> str:
    """Every table of docs/scaling.md, as Markdown."""
    parts = ["Held against MosaicML's published measurements:", table(
        ["images", "A100s", "published images/s", "model", "off by"],
        [[p.resolution, p.gpus, f"{p.published:,}", f"{p.predicted:,.0f}", f"{p.error:+.1%}"] for p in validation()],
    )]  # fmt: skip
    parts += ["Predicted efficiency of 8 and 64 nodes against one, an equal batch on each GPU (weak scaling):", table(
        ["network, images a GPU", "8 nodes, 50 GB/s", *(f"64 nodes, {b:g} GB/s" for b in BANDWIDTHS), "256 nodes, 50 GB/s"],
        [[f"{name}, {batch}", *(f"{weak_efficiency(NETWORKS[name], batch, gpus, between(b)):.3f}" for gpus, b in
          ((64, 50.0), *((512, b) for b in BANDWIDTHS), (2048, 50.0)))] for name, batch in ROWS],
    )]  # fmt: skip
    parts += ["Predicted efficiency of one global batch on more nodes (strong scaling), 50 GB/s:", table(
        ["network, global batch", *(f"{n} nodes" for n in (2, 4, 8, 16, 64))],
        [[f"{name}, {batch}", *(f"{efficiency(NETWORKS[name], batch, 8 * n, between(50)):.2f}" for n in (2, 4, 8, 16, 64))]
         for name, batch in (("32px, 35.7 M", 128), ("32px, 35.7 M", 4096), ("256px, 113.7 M", 64), ("256px, 113.7 M", 2048))],
    )]  # fmt: skip
    parts += ["Least batch of a GPU for 95 % of the ideal at 512 GPUs:", table(
        ["network", *(f"{b:g} GB/s" for b in BANDWIDTHS[:3])],
        [[name, *(least_batch(work, 512, b) for b in BANDWIDTHS[:3])] for name, work in NETWORKS.items()],
    )]  # fmt: skip
    failure = mean_time_to_failure_s(512)
    parts += ["Time lost at 512 GPUs, one failure in 15.8 h:", table(
        ["a checkpoint stops training for", "Young's interval", "lost at it", "lost at hourly checkpoints"],
        [[f"{c:g} s", f"{checkpoint_interval_s(c, failure):.0f} s",
          f"{lost_share(c, checkpoint_interval_s(c, failure), failure):.2%}", f"{lost_share(c, 3600, failure):.2%}"]
         for c in (0.2, 7.0, 21.0)],
    )]  # fmt: skip
    parts += ["Minutes to draw 50,000 images:", table(
        ["network, network calls an image", *("1 GPU" if g == 1 else f"{g} GPUs" for g in SAMPLING_GPUS)],
        [[f"{name}, {calls}", *(f"{sampling_s(50_000, calls, 3 / work.image_s, g) / 60:,.2f}" for g in SAMPLING_GPUS)]
         for name, work in NETWORKS.items() for calls in (1000, 50)],
    )]  # fmt: skip
    return "\n\n".join(parts)


def own_training(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What one global batch takes on more and more nodes."""
    network = Network(asked.gpus_per_node, GPU_NETWORK.within, Link(asked.bandwidth * 1e9))
    work = Work(int(asked.parameters), 1 / asked.images_per_s)
    rows = []
    for nodes in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        gpus = nodes * asked.gpus_per_node
        if gpus <= asked.batch:
            step = step_s(work, asked.batch / gpus, gpus, network)
            share = efficiency(work, asked.batch, gpus, network)
            rows.append({"nodes": nodes, "gpus": gpus, "images_per_s": asked.batch / step, "efficiency": share})
    return rows


def draw(path: Path) -> None:
    """Two panels: the published points with the model's line, and predicted efficiency over nodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (resolution, rates), color in zip(PUBLISHED.items(), ("C0", "C1"), strict=True):
        work = Work(PUBLISHED_PARAMETERS, PUBLISHED_GPUS[0] / rates[0], jitter=0.0)
        gpus = range(8, 257, 8)
        ideal = [rates[0] / 8 for _ in gpus]
        model = [PUBLISHED_BATCH / step_s(work, PUBLISHED_BATCH / n, n, between(50)) / n for n in gpus]
        left.plot(gpus, [m / i for m, i in zip(model, ideal, strict=True)], color=color, label=f"model, {resolution}")
        measured = [rate / n / (rates[0] / 8) for rate, n in zip(rates, PUBLISHED_GPUS, strict=True)]
        left.plot(PUBLISHED_GPUS, measured, "o", color=color, label=f"published, {resolution}")
    left.set(xscale="log", xlabel="A100 GPUs", ylabel="efficiency against one node", ylim=(0, 1.1),
             title="Held against MosaicML: SD2, global batch 2048")  # fmt: skip
    left.set_xticks([8, 16, 32, 64, 128, 256], labels=["8", "16", "32", "64", "128", "256"])
    left.minorticks_off()
    nodes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for name, batch, style in (("256px, 113.7 M", 16, "-"), ("32px, 35.7 M", 128, "-"), ("32px, 35.7 M", 16, "-")):
        values = [weak_efficiency(NETWORKS[name], batch, 8 * n, between(50)) for n in nodes]
        right.plot(nodes, values, style, label=f"{name}, {batch} images a GPU")
    for name, batch, style in (("256px, 113.7 M", 64, "--"), ("32px, 35.7 M", 128, ":")):
        values = [efficiency(NETWORKS[name], batch, 8 * n, between(50)) for n in nodes]
        right.plot(nodes, values, style, color="C7", label=f"{name}, the paper's batch of {batch} in all")
    right.set(
        xscale="log",
        xlabel="nodes of eight H100s, 50 GB/s between them",
        ylim=(0, 1.1),
        title="Predicted, not measured",
    )
    right.set_xticks(nodes, labels=[str(n) for n in nodes])
    right.minorticks_off()
    left.legend(fontsize=8, loc="lower left")
    right.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.68))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the picture of docs/scaling.md instead")
    parser.add_argument("--parameters", type=float, help="of a training of your own")
    parser.add_argument("--images-per-s", type=float, help="that one GPU of yours trains")
    parser.add_argument("--batch", type=int, default=128, help="global batch (default 128)")
    parser.add_argument(
        "--bandwidth", type=float, default=50.0, help="GB/s of an all-reduce between nodes (default 50)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="a training of your own as JSON")
    asked = parser.parse_args()
    if (asked.parameters is None) != (asked.images_per_s is None):
        parser.error("give --parameters and --images-per-s together")
    return asked


def main() -> None:
    asked = arguments()
    if asked.figure is not None:
        draw(asked.figure)
    elif asked.parameters is None:
        print(report())
    else:
        rows = own_training(asked)
        cells = [[r["nodes"], r["gpus"], f"{r['images_per_s']:,.0f}", f"{r['efficiency']:.2f}"] for r in rows]
        print(json.dumps(rows, indent=2) if asked.json else table(["nodes", "GPUs", "images/s", "efficiency"], cells))


if __name__ == "__main__":
    main()
