"""A dashboard on loopback that answers as Ray's does, so far as submission asks, and fails where a test says so.

It shows what was sent, and does what a healthy cluster never does. tests/ray/test_submit.py asks it and a real dashboard the same.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
from aiohttp import web

TOKEN = "5f" * 16
Fault = Callable[[str, str], int | str | None]  # of (method, path): a status, "drop", or None


@dataclass
class Dashboard:
    """What it was sent (method, path, body), the jobs it knows, and how it fails."""

    url: str = ""
    open_to_all: bool = False
    sent: list[tuple[str, str, bytes]] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)
    log: str = ""
    fault: Fault = lambda method, path: None

    def add_job(self, name: str, status: str, exit_code: int | None = None) -> None:
        """Know a job."""
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "entrypoint": "x",
            "status": status,
            "driver_exit_code": exit_code,
            "start_time": 1,
            "message": "ended",
            **dict.fromkeys(("job_id", "driver_info", "error_type", "end_time", "metadata", "runtime_env")),
            **dict.fromkeys(("driver_agent_http_address", "driver_node_id")),
        }

    def submitted(self) -> dict[str, Any]:
        """Return the one job that was sent."""
        (body,) = [body for method, path, body in self.sent if (method, path) == ("POST", "/api/jobs/")]
        found: dict[str, Any] = json.loads(body)
        return found

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer any request."""
        path, body = request.path, await request.read()
        token = request.headers.get("Authorization")
        if not self.open_to_all and token != f"Bearer {TOKEN}":
            return web.Response(status=403 if token else 401, text="who are you?")
        self.sent.append((request.method, path, body))
        fault = self.fault(request.method, path)
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
        if fault is not None:
            return web.Response(status=fault if isinstance(fault, int) else 500, text="Traceback ...\nIt broke.")
        return await self._as_ray(request, path, body)

    async def _as_ray(self, request: web.Request, path: str, body: bytes) -> web.StreamResponse:
        if path == "/api/version":
            return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
        if path.startswith("/api/packages/"):
            if request.method == "PUT":
                self.packages.add(path)
            return web.Response(status=200 if path in self.packages else 404)
        if path == "/api/jobs/" and request.method == "POST":
            name = json.loads(body)["submission_id"]
            self.add_job(name, "PENDING")
            return web.json_response({"job_id": name, "submission_id": name})
        if path == "/api/jobs/":
            return web.json_response(list(self.jobs.values()))
        name = path.split("/")[3]
        if name not in self.jobs:
            return web.Response(status=404, text=f"Job {name} does not exist")
        if path.endswith("/logs/tail"):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.send_str(self.log)
            await socket.close()
            return socket
        if path.endswith("/logs"):
            return web.json_response({"logs": self.log})
        if path.endswith("/stop"):
            return web.json_response({"stopped": True})
        return web.json_response(self.jobs[name])


def answers(url: str, token: str) -> dict[str, Any]:
    """Ask a dashboard all that submission may ask; return by request the status, and what a reader relies on in the answer."""
    package, job, nobody = (
        "/api/packages/gcs/_ray_pkg_0123456789abcdef.zip",
        "/api/jobs/ddpm-abcd",
        "/api/jobs/ddpm-none",
    )
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    entry = json.dumps({"entrypoint": "true", "submission_id": "ddpm-abcd", "runtime_env": {}, "metadata": {}})
    found: dict[str, Any] = {}

    def ask(method: str, path: str, data: str | None = None, token: str = token, **headers: str) -> None:
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        answer = requests.request(method, url + path, data=data, headers=headers, timeout=60)
        seen: Any = None
        if path.startswith(nobody):
            seen = "Job ddpm-none does not exist" in answer.text
        elif answer.ok and answer.content and path != package:
            content = answer.json()
            seen = sorted(content if isinstance(content, dict) else content[0])
        found[f"{len(found)} {method} {path}"] = answer.status_code, seen

    for who in (token, "0" * 32, ""):
        ask("GET", "/api/version", token=who)
    for method in ("GET", "PUT", "GET"):
        ask(method, package, data="content" if method == "PUT" else None)
    ask("POST", "/api/jobs/", data=entry)
    for path in ("/api/jobs/", job, f"{job}/logs", nobody, f"{nobody}/logs"):
        ask("GET", path)
    ask("GET", f"{job}/logs/tail", **upgrade)
    for path in (job, nobody):
        ask("POST", f"{path}/stop")
    return found


@contextmanager
def running_dashboard() -> Iterator[Dashboard]:
    """Serve on a free port of loopback for the time of the context."""
    dashboard, loop, ready = Dashboard(), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        application = web.Application(client_max_size=1 << 28)
        application.router.add_route("*", "/{any:.*}", dashboard.answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        dashboard.url = site.name if not runner.addresses else f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    try:
        yield dashboard
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
