"""`ddpm-pipe serve RUN`: a trained model that answers requests for images with PNGs, on this machine alone by default.

GET /images?n=4&seed=0&steps=50   JSON: the images as base64 PNGs, and what makes them these
GET /images/7.png?seed=0          image 7 of a seed
GET /grid.png?n=16&seed=0         one picture of n images
GET /                             a page that shows some
GET /health                       "ok"
"""

from __future__ import annotations

import base64
import ipaddress
import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from torch import Tensor

from pipeline.console import answer
from pipeline.errors import PipelineError, UsageError
from pipeline.pictures.pictures import as_png, grid_picture, picture_of
from pipeline.runs.sample import SampleRequest, run_sampler
from pipeline.sampling.generation import ImageGenerator
from pipeline.signals import listening
from pipeline.storage.retention import Which
from pipeline.storage.runs import Run
from pipeline.training.device import serving_compute
from pipeline.training.trained import Trained

MAX_IMAGES = 1000
PARAMETERS = ("n", "seed", "steps", "sampler", "eta", "guidance_scale", "labels")
PAGE = """<!doctype html><meta charset=utf-8><title>{name}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:30px auto;padding:0 16px;color:#222}}
img{{max-width:100%;image-rendering:pixelated}}code{{background:#f1f3f4;padding:2px 5px;border-radius:4px}}</style>
<h1>{name}</h1><p>Run {run}, step {step}. Image i is a function of the seed and i alone.</p>
<p><img src="grid.png?n=16" alt="16 generated images"></p>
<p><code>GET /grid.png?n=16&amp;seed=1</code> <code>GET /images/7.png?seed=1</code> <code>GET /images?n=4&amp;seed=1</code></p>"""


class Gallery:
    """A trained model as a source of images; one request at a time uses it."""

    def __init__(self, run: Run, weights: str = "ema", checkpoint: Which = None) -> None:
        self.run = run
        self.compute = serving_compute()
        self.trained = Trained.from_run(run, checkpoint, weights)
        self.compute.place(self.trained.model)
        self._lock = threading.Lock()
        self._sampler = lru_cache(maxsize=4)(self._make_sampler)
        self._images = lru_cache(maxsize=16)(self._make)

    def images(self, request: SampleRequest, indices: range) -> list[Tensor]:
        """Return images uint8 [C, H, W] of the given indices; UsageError where the request does not fit the model."""
        request = replace(request, num_images=0)
        sampling, _ = request.settings(self.trained.experiment)
        bounds = sorted({indices.start, indices.stop, *range(0, indices.stop, sampling.batch_size)})
        parts = [range(a, b) for a, b in itertools.pairwise(bounds) if a in indices]
        with self._lock:
            return [image for part in parts for image in self._images(request, part)]

    def identity(self, request: SampleRequest) -> dict[str, Any]:
        """Return what makes the images these."""
        return asdict(self._sampler(replace(request, num_images=0)).identity(self.trained.weights))

    def _make_sampler(self, request: SampleRequest) -> ImageGenerator:
        return run_sampler(self.trained, request, self.compute, self.compute)

    def _make(self, request: SampleRequest, indices: range) -> Tensor:
        self.compute.start()  # in the thread of this request
        return self._sampler(request).images(indices)


def serve_model(run: Run, host: str, port: int, say: Callable[[str], None] = answer, checkpoint: Which = None) -> None:
    """Answer requests until Ctrl-C or SIGTERM. UsageError where the port is taken."""
    gallery = Gallery(run, checkpoint=checkpoint)
    try:
        server = ThreadingHTTPServer((host, port), _handler(gallery, host))
    except OSError as error:
        raise UsageError(
            f"{host}:{port}: cannot be listened on ({error.strerror}); choose another with --port or --host"
        ) from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="serve", daemon=True)
    with listening() as signals, server:
        thread.start()
        say(f"serving run {run.id} ({run.record.name}) at http://{host}:{server.server_address[1]}/\nCtrl-C stops it")
        while signals.first is None and thread.is_alive():
            thread.join(0.2)
        server.shutdown()
    say("stopped")


def _handler(gallery: Gallery, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """One request."""

        def do_GET(self) -> None:
            try:
                self._answer()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # whoever asked has left

        def _answer(self) -> None:
            refused = refusal(host, self.headers.get("Host"), self.headers.get("Sec-Fetch-Site"))
            if refused is not None:
                self._send(403, "application/json", _json({"error": refused}))
                return
            try:
                kind, body = _answer(gallery, self.path)
                self._send(200, kind, body)
            except _NotFoundError as error:
                self._send(404, "application/json", _json({"error": str(error)}))
            except (PipelineError, ValueError) as error:
                self._send(400, "application/json", _json({"error": " ".join(str(error).split())}))

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Say nothing of each request."""

    return Handler


def refusal(host: str, asked: str | None, site: str | None) -> str | None:
    """Return why a request is refused by a server that listens on `host`; None where it is answered.

    `asked` is the request's Host, `site` its Sec-Fetch-Site: which page a browser asks for it.

    Pages of other sites may neither embed what is generated here nor, where the server is for this machine alone, reach it by a name of
    theirs that they have made point at it.
    """
    if site == "cross-site":
        return "a page of another site asked for this; open it by its own address"
    try:
        name = urlsplit(f"//{asked or ''}").hostname or ""
    except ValueError:
        name = ""
    if _is_loopback(host) and not _is_loopback(name):
        return f"Host {name!r}: this server answers to the names of this machine alone, such as 127.0.0.1 and localhost"
    return None


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _NotFoundError(Exception):
    """There is nothing at this path."""


def _answer(gallery: Gallery, target: str) -> tuple[str, bytes]:
    """Return content type and body for a path with its query."""
    parts = urlsplit(target)
    asked = _asked(parts.query)
    number = asked.pop("n", 4 if parts.path == "/images" else 16)
    if not 1 <= number <= MAX_IMAGES:
        raise ValueError(f"n: got {number}; expected 1 to {MAX_IMAGES}")
    if parts.path == "/health":
        return "text/plain", b"ok"
    if parts.path == "/":
        record = gallery.run.record
        page = PAGE.format(
            name=record.name, run=record.id, step=gallery.trained.step
        )  # names are letters, digits, . _ -
        return "text/html; charset=utf-8", page.encode()
    request = SampleRequest(num_images=number, **asked)
    if parts.path == "/images":
        images = [base64.b64encode(_png(image)).decode() for image in gallery.images(request, range(number))]
        about = {"run": gallery.run.id, "step": gallery.trained.step, **gallery.identity(request)}
        return "application/json", _json({**about, "images": images})
    if parts.path == "/grid.png":
        return "image/png", as_png(grid_picture(torch.stack(gallery.images(request, range(number)))))
    if found := re.fullmatch(r"/images/([0-9]{1,9})\.png", parts.path):
        index = int(found[1])
        return "image/png", _png(gallery.images(request, range(index, index + 1))[0])
    raise _NotFoundError(f"{parts.path}: there are /images, /images/7.png, /grid.png and /health")


def _asked(query: str) -> dict[str, Any]:
    """Return the parameters of a query, checked for their names and kinds."""
    asked: dict[str, Any] = {}
    for name, values in parse_qs(query, keep_blank_values=True).items():
        if name not in PARAMETERS:
            raise ValueError(f"{name!r}: unknown; there are {', '.join(PARAMETERS)}")
        kind = int if name in ("n", "seed", "steps") else float if name in ("eta", "guidance_scale") else str
        try:
            asked[name] = kind(values[-1])
        except ValueError:
            raise ValueError(f"{name}: got {values[-1]!r}; expected a number") from None
        if kind is int and asked[name] < 0:
            raise ValueError(f"{name}: got {asked[name]}; expected 0 or more")
    return asked


def _png(image: Tensor) -> bytes:
    return as_png(picture_of(image))


def _json(value: object) -> bytes:
    return (json.dumps(value) + "\n").encode()
