"""How fast ddpm-pipe is: beside diffusers as shipped and tuned, beside bare loops, and until the first step.

    make bench                                          all rounds, about half an hour on two idle cores
    make bench-quick                                    the same keys in at most five minutes
    .venv/bin/python -m benchmarks.bench --only train   the cases with a figure whose key begins so

Contestants take turns, and a figure is the median over rounds; its spread is the least and the most. Results go to
benchmarks/results.json, which keeps what was not measured again, and to docs/speed.png. Compare figures, not rates: other work on the
machine changes those. docs/speed.md explains the figures.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks import first_step, frame, rounds, sampling, training

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PICTURE = HERE.parent / "docs" / "speed.png"


def cases() -> list[rounds.Case]:
    return [*training.cases(), *sampling.cases(), *frame.cases(), *first_step.cases()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; one where a step takes half a minute")
    parser.add_argument("--only", metavar="KEY", default="", help="cases with a figure whose key begins so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    asked = parser.parse_args()
    found = json.loads(asked.results.read_text()) if asked.results.exists() else {"cases": {}}
    for case in cases():
        left_out = asked.quick and not case.quick_rounds
        if any(key.startswith(asked.only) for key in case.figures) and not left_out:
            found["cases"][case.title] = rounds.run(case, asked.quick) | {"machine": machine(), "quick": asked.quick}
            asked.results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["cases"]))
    draw(found["cases"], asked.picture)


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {"processor": _processor(), "threads": torch.get_num_threads(), **versions}


def _processor() -> str:
    """The processor's name and, of its instructions, those for bf16."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = dict(line.split("\t", 1) for line in info.read_text().splitlines() if "\t" in line)
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in lines.get("flags\t", lines.get("flags", ""))]
    name = lines.get("model name", platform.processor()).strip(": ")
    return ", ".join([name, *flags])


def table(found: dict[str, Any]) -> str:
    """Markdown: the figures of all cases, and what they come from."""
    lines = ["| figure | median | spread | case | measured |", "|---|---|---|---|---|"]
    for title, case in found.items():
        rates = ", ".join(f"{name} {each['median']:.3g}" for name, each in case["measured"].items())
        for key, figure in case["figures"].items():
            lines.append(f"| `{key}` | {figure['median']:.3g} | {_spread(figure)} | {title} | {rates} {case['unit']} |")
    return "\n".join(lines)


def _spread(figure: dict[str, Any]) -> str:
    return "unknown" if figure["spread"] is None else "{:.3g} to {:.3g}".format(*figure["spread"])


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the ratios to diffusers as bars, the spread as whiskers."""
    from matplotlib.figure import Figure

    figures = {key: each for case in found.values() for key, each in case["figures"].items() if "_vs_" in key}
    picture = Figure(figsize=(8, 0.4 * len(figures) + 1), layout="constrained")
    axes = picture.subplots()
    for row, each in enumerate(figures.values()):
        low, high = each["spread"] or (each["median"], each["median"])
        whiskers = [[each["median"] - low], [high - each["median"]]]
        axes.barh(row, each["median"], color="tab:blue", xerr=whiskers, capsize=3)
    axes.set_yticks(range(len(figures)), list(figures))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times the peer's (1: equal)")
    picture.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
