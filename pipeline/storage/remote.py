"""A folder in an object store: the one place that speaks S3, through pyarrow, with its errors in one line.

An address is `s3://bucket/prefix`, with `?endpoint_override=HOST:PORT&scheme=http&region=NAME` for a store other than AWS; the
variable AWS_ENDPOINT_URL says the same for all. Credentials come as AWS tools take them: environment, configuration files, or the
machine's role. They never stand in an address.

What is relied on is what S3 promises: an object appears whole or not at all, and whoever reads or lists after a write has been
answered sees it. Every operation may be done twice without harm, so faults that may pass (a lost connection, 5xx answers) are tried
again with growing pauses, about ten seconds in all: by the AWS library, and once more here, since that gives up on the refused
reading of a small object (the text of the refusal does not fit where the object's bytes were to go).
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qs, urlsplit

from pipeline.errors import StorageError, UsageError

T = TypeVar("T")

SCHEME = "s3://"
REQUESTS = 2  # of the AWS library, half a second and more apart
TRIES = 4  # of that, here
PAUSE_S = 1.0
CHUNK_BYTES = 8 << 20
_OPTIONS = {"endpoint_override", "scheme", "region"}
_ADVICE = {
    "ACCESS_DENIED": "check the credentials and what they allow",
    "INVALID_ACCESS_KEY_ID": "check AWS_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH": "check AWS_SECRET_ACCESS_KEY",
    "NO_SUCH_BUCKET": "make the bucket, or correct its name",
    "NETWORK_CONNECTION": "check the network and AWS_ENDPOINT_URL",
}
_FOR_GOOD = set(_ADVICE) - {"NETWORK_CONNECTION"}


@dataclass(frozen=True)
class StoredObject:
    """An object below a folder: its name there, size, and when it was last written, in seconds by the store's clock."""

    name: str
    num_bytes: int
    modified_s: float


def is_remote(place: str | Path | None) -> bool:
    """Whether a place is an address in an object store rather than a path."""
    return isinstance(place, str) and place.startswith(SCHEME)


class RemoteFolder:
    """A folder in an object store; names of objects are relative to it, with slashes. Pickles as its address."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if not uri.startswith(SCHEME) or not self.bucket:
            raise UsageError(f"{parts.scheme}://{self.bucket}: expected an address such as s3://bucket/folder")
        if "@" in self.bucket:
            raise UsageError(
                f"{SCHEME}{self.bucket.rpartition('@')[2]}: credentials do not belong into an address; set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        options = {name: values[0] for name, values in parse_qs(parts.query).items()}
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise UsageError(
                f"{SCHEME}{self.bucket}: option {unknown[0]!r} is unknown in an address; "
                f"there are {', '.join(sorted(_OPTIONS))}"
            )
        self._query = parts.query
        self._options = options

    @property
    def uri(self) -> str:
        """The address, from which an equal folder can be made."""
        return str(self) + (f"?{self._query}" if self._query else "")

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        return type(self), (self.uri,)

    def child(self, name: str) -> RemoteFolder:
        """Return a folder below this one."""
        query = f"?{self._query}" if self._query else ""
        return RemoteFolder(f"{self}/{name}{query}")

    @cached_property
    def filesystem(self) -> Any:
        """pyarrow's file system of the store, shared by all folders of one store."""
        endpoint = self._options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or None
        region = self._options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        bucket = self.bucket if endpoint is None else ""
        return self._try("", lambda: _filesystem(endpoint, self._options.get("scheme"), region, bucket))

    # -- looking

    def objects(self, below: str = "") -> list[StoredObject]:
        """Return the objects below this folder, or below a name in it, sorted by name."""
        root = self._path("")
        found = (info for info in self._infos(below, recursive=True) if info.is_file)
        entries = (self._entry(info.path.removeprefix(root).lstrip("/"), info) for info in found)
        return sorted(entries, key=lambda entry: entry.name)

    def folders(self) -> list[str]:
        """Return the names of the folders directly below this one."""
        return sorted(info.base_name for info in self._infos("", recursive=False) if not info.is_file)

    def stat(self, name: str) -> StoredObject | None:
        """Return what is known of an object; None where there is none."""
        info = self._try(name, lambda: self.filesystem.get_file_info(self._path(name)))
        return self._entry(name, info) if info.is_file else None

    def _infos(self, below: str, recursive: bool) -> Any:
        from pyarrow import fs

        selector = fs.FileSelector(self._path(below), recursive=recursive, allow_not_found=True)
        return self._try(below, lambda: self.filesystem.get_file_info(selector))

    def _entry(self, name: str, info: Any) -> StoredObject:
        return StoredObject(name, info.size or 0, (info.mtime_ns or 0) / 1e9)

    # -- reading

    def read(self, name: str) -> bytes | None:
        """Return an object's content; None where there is none."""

        def read() -> bytes | None:
            try:
                with self.filesystem.open_input_file(self._path(name)) as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

        return self._try(name, read)

    def download(self, name: str, path: Path) -> str:
        """Copy an object to a file and flush it to the disk; return its SHA-256. StorageError where there is none."""

        def download() -> str:
            digest = hashlib.sha256()
            with self.filesystem.open_input_file(self._path(name)) as stream, _opened(path) as file:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    with _local_errors(path):
                        file.write(chunk)
                with _local_errors(path):
                    file.flush()
                    os.fsync(file.fileno())
            return digest.hexdigest()

        return self._try(name, download)

    # -- writing

    def write(self, name: str, content: bytes) -> None:
        """Make an object, or replace it as a whole, by one request where it is small."""

        def write() -> None:
            with self.filesystem.open_output_stream(self._path(name)) as stream:
                stream.write(content)

        self._try(name, write)

    def upload(self, name: str, path: Path) -> str:
        """Copy a file to an object, which appears once it is whole; return the SHA-256 of what was sent."""

        def upload() -> tuple[str, int]:
            digest, sent = hashlib.sha256(), 0
            with path.open("rb") as file, self._whole_or_none(name) as stream:
                while chunk := file.read(CHUNK_BYTES):
                    stream.write(chunk)
                    digest.update(chunk)
                    sent += len(chunk)
            return digest.hexdigest(), sent

        sha256, sent = self._try(name, upload)
        there = self.stat(name)
        if there is None or there.num_bytes != sent:
            has = "none" if there is None else there.num_bytes
            raise StorageError(f"{self}/{name}: {sent} bytes were sent, the store has {has}; try again")
        return sha256

    @contextmanager
    def _whole_or_none(self, name: str) -> Iterator[Any]:
        """Give a stream that becomes an object when the block ends, and nothing when it raises.

        pyarrow knows no way to give a stream up: closed (or forgotten), it makes an object of the parts that arrived. That is removed;
        where the store refuses even that, what is left is a part of something whose manifest is missing.
        """
        stream = self.filesystem.open_output_stream(self._path(name))
        try:
            yield stream
        except BaseException:
            with suppress(OSError):
                stream.close()
            with suppress(OSError):
                self.filesystem.delete_file(self._path(name))
            raise
        stream.close()

    def delete(self, name: str) -> None:
        """Remove an object; that it is gone already is no error."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(self._path(name))

        self._try(name, delete)

    def delete_all(self, below: str) -> None:
        """Remove every object below a name in this folder."""
        self._try(below, lambda: self.filesystem.delete_dir_contents(self._path(below), missing_dir_ok=True))

    # -- inner

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self.bucket, self.prefix, name) if part)

    def _try(self, name: str, operation: Callable[[], T]) -> T:
        """Return what an operation returns, tried again where it failed for a reason that may pass; StorageError in the end."""
        where = f"{self}/{name}".rstrip("/")
        for attempt in range(TRIES):
            try:
                return operation()
            except FileNotFoundError:
                raise StorageError(f"{where}: is not there; it was removed, or never written") from None
            except OSError as error:
                code, said = _answer(error)
                if attempt == TRIES - 1 or code in _FOR_GOOD:
                    advice = _ADVICE.get(code, "try again, or see what the store logs")
                    raise StorageError(f"{where}: {said}; {advice}") from None
            time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError("the last try returns or raises")


def _answer(error: OSError) -> tuple[str, str]:
    """Return the store's code for an error ("" where it has none), and words for it."""
    text = " ".join(str(error).split())
    code = re.search(r"AWS Error (\w+)", text)
    if code is None:
        return "", text[:200]
    detail = re.search(r"operation: (.*?)(?: \(Request ID.*)?$", text)
    said = f" ({detail[1].split('; Details:')[-1].strip()[:160]})" if detail else ""
    return code[1], f"the store says {code[1]}{said}"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with _local_errors(path):
        file = path.open("wb")
    with file:
        yield file


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says about a file into one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or make it writable") from None


@lru_cache(maxsize=8)
def _filesystem(endpoint: str | None, scheme: str | None, region: str | None, bucket: str) -> Any:
    from pyarrow import fs

    return fs.S3FileSystem(
        endpoint_override=endpoint,
        scheme=scheme or ("http" if (endpoint or "").startswith("http://") else "https"),
        region=region or (fs.resolve_s3_region(bucket) if endpoint is None else "us-east-1"),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=REQUESTS),
        connect_timeout=5,
        allow_delayed_open=True,  # small objects go in one request
        background_writes=False,  # a disk faster than the network would fill the memory
    )
