"""A real S3 server on loopback (moto's), and ways to make it fail."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from pipeline.storage.remote import RemoteFolder

QUICK = {
    "init_backoff": timedelta(milliseconds=10),
    "max_backoff": timedelta(milliseconds=20),
    "base": 2,
}  # between retries
UNAVAILABLE = ("503 Service Unavailable", "ServiceUnavailable")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


class ObjectStore:
    """The server, with faults to order: it answers `refusal` to the requests that `refuse(method, path)` chooses, and notes all.

    Its clock is `ahead_s` seconds ahead of the machine's.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._putting = threading.Lock()  # moto checks a condition and writes in two steps
        self.url = ""
        self.ahead_s = 0.0
        self.refuse: Callable[[str, str], bool] = lambda method, path: False
        self.refusal = UNAVAILABLE
        self.ignores_conditions = False
        self.requests: list[tuple[str, str]] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests.append((method, path))
            refused = self.refuse(method, path)
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if not refused:
            with self._putting if method == "PUT" else nullcontext():
                return self._app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = self.refusal
        body = f"<Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode()
        start_response(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def put(self, path: str, body: bytes) -> None:
        """Store an object at once; also from within `refuse`, where no request to the server would be answered."""
        from werkzeug.test import Client

        signed = f"AWS4-HMAC-SHA256 Credential={CREDENTIALS['AWS_ACCESS_KEY_ID']}/20250101/us-east-1/s3/aws4_request"
        answer = Client(self._app).put(
            path, data=body, headers={"Authorization": f"{signed}, SignedHeaders=host, Signature=0"}
        )
        assert answer.status_code == 200, answer.text

    def count(self, method: str, pattern: str) -> int:
        """Return how many requests of a method there were for paths that match the pattern."""
        with self._lock:
            return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)

    def new_bucket(self) -> str:
        """Make a bucket of its own for a test; return its address, which needs AWS_ENDPOINT_URL."""
        from pyarrow import fs

        name = f"test-{secrets.token_hex(4)}"
        fs.S3FileSystem(endpoint_override=self.url, region="us-east-1", allow_bucket_creation=True).create_dir(name)
        return f"s3://{name}"


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """Run the server in a thread of this process for the time of the context."""
    from moto.s3 import models
    from moto.server import MotoRequestHandler
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log(self, kind: str, message: str, *args: Any) -> None:
            pass

    store = ObjectStore()
    machines_clock = models.utcnow
    models.utcnow = lambda: machines_clock() + timedelta(seconds=store.ahead_s)  # the time of what is written
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        models.utcnow = machines_clock
        server.shutdown()
        thread.join()
        server.server_close()


def objects(folder: str) -> list[str]:
    """Return the names of the objects below an address, without leases that nobody holds."""
    found = RemoteFolder(folder)
    names = [entry.name for entry in found.objects()]
    return [name for name in names if not (name.endswith("lease.json") and found.read(name) == b"{}")]
