"""What the program does, in figures: to compare a commit with another one after code was moved or made simpler.

python -m tests.kit.behaviour FILE            record: numbers, hashes, keys and messages, in a few minutes on one machine
python -m tests.kit.behaviour --compare A B   print what differs between two records; exit code 1 if something does

Two records compare only where machine, threads and torch are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.numpy import load_file

from tests.kit.commands import PROGRAM, Shell

ONE, TWO = ("--cluster", "one.yaml"), ("--cluster", "two.yaml")
SHORT = ("-s", "training.steps=200", "-s", "logging.grid_every_steps=null", "-s", "sampling.batch_size=64")
UNSCORED = ("-s", "evaluation.enabled=false")
TRAININGS = {
    "one worker": (*ONE,),
    "two workers": (*TWO,),
    "dropout 0.1": (*ONE, "-s", "model.dropout=0.1"),
    "class labels": (*ONE, "-s", "model.class_conditional=true"),
}
SAMPLERS = {"ddim": ("--steps", "20"), "ancestral": ("--steps", "50"), "dpm_solver": ("--steps", "10")}
SWEEP = (
    *("sweep", "--over", "diffusion.num_timesteps=50,100", "--steps", "20", "--seeds", "2", "--max-concurrent", "1"),
    *("-s", "sampling.steps=10", "-s", "evaluation.num_images=128", *ONE),
)
WRONG = """
train -s training.learning_rat=1
train -s trainig.steps=1
train -s training.steps=0
train -s training.learning_rate=.inf
train -s training.steps
train -s diffusion.num_timesteps=1
train -s diffusion.schedule=cosin
train -s diffusion.prediction=epsilon
train -s model.channel_multipliers=[1,2,2,2,2]
train -s model.norm_groups=7
train -s training.batch_size=4096
train -s training.num_streams=7
train -s model={type: 'no_such_module:Net'}
train -s model={type: 'torch.nn:Linearr'}
train --preset digit
train x.yaml --preset digits
train x.yaml
train --data nowhere/at/all
train --cluster gpus
train --cluster gpu
train --stepz 1
train --detach
train --from zzzz
resume zzzz
resume RUN
resume RUN -s seed=1
resume RUN --data digits
resume RUN --max-concurrent 2
sample zzzz
sample RUN --steps 2000
sample RUN --sampler ancestral --eta 0.5
sample RUN --label 3
sample RUN --weights ema:0.5
sample RUN --checkpoint 7
sample RUN --out s3://bucket/folder
sample RUN --format gif -n 100
sample RUN --interpolate 1 2 --guidance 2
evaluate RUN --metrics fidd
evaluate RUN --metrics bpd --neighbours
evaluate RUN --grid sampler=euler
evaluate RUN --extractor inception
compare RUN --metric fidd
compare RUN --across samplers
sweep --over diffusion.schedule=cosin
sweep --over training.learning_rate=1e-3 --metric loss
sweep --extend zzzz
ingest nowhere data/nowhere
inspect nowhere
schedule lineer
export RUN one.yaml
import nowhere
jobs list --cluster local
sync zzzz
""".strip().splitlines()


class Recorder:
    """Types commands in a home of its own and keeps what they answer."""

    def __init__(self, home: Path) -> None:
        self.home, self.runs = home, list[str]()
        (home / "one.yaml").write_text("workers: 1\nthreads_per_worker: 1\n")
        (home / "two.yaml").write_text("workers: 2\nthreads_per_worker: 1\n")

    def run(self, *words: str) -> Any:
        """Return what a command prints with `--json`."""
        environment = os.environ | {"DDPM_PIPE_HOME": str(self.home)}
        done = subprocess.run(
            [PROGRAM, *words, "--json"], cwd=self.home, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode in {0, 10}, f"{words}: {done.returncode}\n{done.stderr}"
        return json.loads(done.stdout)

    def refused(self, line: str) -> str:
        """Return exit code and last line of a command that is wrong, without what differs from home to home."""
        words = [self.runs[0] if word == "RUN" else word for word in re.split(r" (?![^{]*})", line)]
        with Shell(self.home) as shell:
            code, _, err = shell.type(*words)
        last = (err.strip().splitlines() or [""])[-1]
        for number, run in enumerate(self.runs):
            last = last.replace(run, f"RUN{number}")
        return f"{code} {last.replace(str(self.home), 'HOME')}"


def record(file: Path) -> None:
    """Write the record of this commit, part by part."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="behaviour-") as folder:
        here = Recorder(Path(folder).resolve())
        for part in PARTS:
            found[part.__name__] = part(here)
            file.write_text(json.dumps(found, indent=1))


def ema(here: Recorder) -> dict[str, str]:
    """Train, and return the hashes of the averaged weights."""
    hashes = {}
    for name, options in TRAININGS.items():
        made = here.run("train", *options, *SHORT, *UNSCORED)
        here.runs.append(made["run"])
        hashes[name] = _ema(here.home / "runs" / made["run"])
    return hashes


def samples(here: Recorder) -> dict[str, str]:
    """Return the hashes of 16 images of each sampler."""
    hashes = {}
    for sampler, options in SAMPLERS.items():
        here.run("sample", here.runs[0], *_IMAGES, "--out", sampler, "--sampler", sampler, *options)
        hashes[sampler] = _pixels(here.home / sampler)
    here.run("sample", here.runs[3], *_IMAGES, "--out", "labels", "--steps", "20", "--guidance", "2")
    return hashes | {"class labels, guidance 2": _pixels(here.home / "labels")}


def wrong(here: Recorder) -> dict[str, str]:
    """Return exit code and last line of each wrong command line."""
    return {line: here.refused(line) for line in WRONG}


def scores(here: Recorder) -> dict[str, float]:
    """Return FID, KID and bits/dim of a model of few steps."""
    few = ("-s", "diffusion.num_timesteps=50", "-s", "sampling.steps=10")
    here.runs.append(here.run("train", *ONE, *SHORT, *UNSCORED, *few)["run"])
    values: dict[str, float] = here.run("evaluate", here.runs[-1], "--metrics", "fid,kid,bpd", "-n", "128")["values"]
    return values


def sweep(here: Recorder) -> Any:
    """Return a small sweep's points, without what differs each time."""
    swept = here.run(*SWEEP)
    _forget(swept["points"])
    return swept["points"]


def json_keys(here: Recorder) -> dict[str, Any]:
    """Return the keys of what each command prints with `--json`."""
    return {
        name: keys(here.run(*(here.runs[-1] if word == "RUN" else word for word in line.split("|"))))
        for name, line in OTHERS.items()
    }


PARTS = (ema, samples, wrong, scores, sweep, json_keys)
_IMAGES = ("-n", "16", "--format", "png")


OTHERS = {
    "runs": "runs",
    "sample": "sample|RUN|-n|2",
    "evaluate": "evaluate|RUN|--metrics|fid,bpd|-n|128",
    "resume": "resume|RUN|-s|training.steps=220",
    "compare": "compare|RUN|--metric|fid",
    "evaluate --grid": "evaluate|RUN|--grid|steps=2,5|-n|64|--metrics|kid",
    "evaluate --dry-run": "evaluate|RUN|--dry-run",
    "evaluate --grid --dry-run": "evaluate|RUN|--grid|steps=2,5|--dry-run",
    "sample --dry-run": "sample|RUN|--dry-run",
    "sample --format strip": "sample|RUN|--format|strip|--out|strip",
    "sample --interpolate": "sample|RUN|--interpolate|1|2|--out|way|-n|3",
    "train --dry-run": "train|--dry-run",
    "train --dry-run --no-probe": "train|--dry-run|--no-probe",
    "sweep --dry-run": "sweep|--dry-run|--no-probe",
    "ingest": "ingest|digits|data/digits",
    "inspect": "inspect|data/digits|--verify|--picture|digits.png",
    "schedule": "schedule|linear|cosine",
    "export": "export|RUN|exported|--format|safetensors",
    "import": "import|exported",
    "doctor": "doctor",
}


def keys(value: Any) -> Any:
    """Return the keys of a JSON value at every depth; those of a list are its items' together."""
    if isinstance(value, dict):
        return {key: keys(each) for key, each in value.items()}
    if isinstance(value, list):
        merged: dict[str, Any] = {}
        for item in value:
            found = keys(item)
            merged |= found if isinstance(found, dict) else {}
        return [merged] if merged else []
    return None


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return a line for each place where two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            line for key in dict.fromkeys([*a, *b]) for line in differences(a.get(key), b.get(key), f"{where}/{key}")
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}\n  - {a}\n  + {b}"]


def _ema(run: Path) -> str:
    (checkpoint,) = sorted((run / "checkpoints").glob("*200*"))[-1:]
    tensors = load_file(checkpoint / "ema.safetensors")
    return _sha256(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors)))


def _pixels(folder: Path) -> str:
    return _sha256(b"".join(Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _forget(value: Any) -> None:
    """Take out of a sweep's table what differs each time: ids, times, paths."""
    if isinstance(value, dict):
        for key in [key for key in value if key in {"run", "runs", "training_s"}]:
            del value[key]
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _forget(each)


def main() -> int:
    """Record or compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    asked = parser.parse_args()
    if not asked.compare:
        record(asked.files[0])
        return 0
    found = differences(*(json.loads(path.read_text()) for path in asked.files))
    print("\n".join(found) or "no differences")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
