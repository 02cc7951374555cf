"""A folder in an object store: the only module that uses S3, through obstore. Its errors have one line.

An address is `s3://bucket/prefix`, with `?endpoint_override=HOST:PORT&scheme=http&region=NAME` for a store other than AWS; the
variable AWS_ENDPOINT_URL does the same for all addresses. Credentials come from the variables AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, from the keys in `~/.aws/credentials`, or from the machine's role. An address must not
contain any.

The code relies on three guarantees of S3: an object appears whole or not at all; a read or a listing sees every write that was answered
before it began; a conditional write (create only, or replace one version) succeeds for one writer alone. obstore retries temporary
failures, such as a lost connection or a 5xx answer, with growing pauses, and aborts an upload that fails.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, urlsplit

from pipeline.errors import StorageError, UsageError
from pipeline.storage.durable import storage_errors

if TYPE_CHECKING:
    from obstore.store import RetryConfig, S3Store

SCHEME = "s3://"
CHUNK_BYTES = 8 << 20
_PARTS_AT_ONCE = 2
_OPTIONS = {"endpoint_override", "scheme", "region"}
_CLIENT = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(minutes=5),  # counts from the start of a request: it includes sending one part
    "timeout": timedelta(hours=1),
}
RETRIES: dict[str, Any] = {
    "max_retries": 5,
    "retry_timeout": timedelta(minutes=10),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=4), "base": 2},
}
_EXPIRED = "the credentials have expired: set new ones (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN)"
_ADVICE = {
    "AccessDenied": "check the credentials and what they allow",
    "403 Forbidden": "check the credentials and what they allow",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "NoSuchBucket": "create the bucket, or correct its name",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": "check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "correct this machine's clock",
    "NetworkError": "check the network and AWS_ENDPOINT_URL",
    "NoCredentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into ~/.aws/credentials",
}


@dataclass(frozen=True)
class StoredObject:
    """An object in a folder: its name there, and its size."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Version:
    """One version of an object: its content, the time of its write in seconds by the store's clock, and the store's tag."""

    content: bytes
    modified_s: float
    tag: str


def is_remote(place: str | Path | None) -> bool:
    """Whether a place is an address in an object store, not a path."""
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
                f"{SCHEME}{self.bucket.rpartition('@')[2]}: an address must not contain credentials; set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        options = {name: values[0] for name, values in parse_qs(parts.query).items()}
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise UsageError(
                f"{SCHEME}{self.bucket}: unknown option in an address: got {unknown[0]!r}, "
                f"expected one of {', '.join(sorted(_OPTIONS))}"
            )
        self._query = parts.query
        self._options = options

    @property
    def uri(self) -> str:
        """The address, with its options."""
        return str(self) + (f"?{self._query}" if self._query else "")

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        return type(self), (self.uri,)

    def child(self, name: str) -> RemoteFolder:
        """Return a folder below this one."""
        query = f"?{self._query}" if self._query else ""
        return RemoteFolder(f"{self}/{name}{query}")

    @property
    def parent(self) -> RemoteFolder:
        """The folder that holds this one."""
        query = f"?{self._query}" if self._query else ""
        return RemoteFolder(f"{SCHEME}{self.bucket}/{self.prefix.rpartition('/')[0]}{query}")

    # -- list

    def objects(self, below: str = "") -> list[StoredObject]:
        """Return the objects below this folder, or below a name in it, sorted by name."""
        import obstore

        with self._errors(below):
            found = obstore.list(self._store, self._path(below)).collect()
        start = len(self.prefix) + 1 if self.prefix else 0
        entries = (StoredObject(item["path"][start:], item["size"]) for item in found)
        return sorted(entries, key=lambda entry: entry.name)

    def folders(self) -> list[str]:
        """Return the names of the folders directly below this one."""
        import obstore

        with self._errors(""):
            found = obstore.list_with_delimiter(self._store, self.prefix)
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    # -- read

    def read(self, name: str) -> bytes | None:
        """Return an object's content; None if there is none."""
        found = self.version(name)
        return None if found is None else found.content

    def version(self, name: str) -> Version | None:
        """Return an object's newest version; None if there is none."""
        import obstore

        try:
            with self._errors(name):
                found = obstore.get(self._store, self._path(name))
                content = bytes(found.bytes())
        except NotThereError:
            return None
        return Version(content, found.meta["last_modified"].timestamp(), found.meta["e_tag"] or "")

    def download(self, name: str, path: Path) -> str:
        """Copy an object to a file and flush it to the disk; return its SHA-256. StorageError if there is none."""
        import obstore

        digest = hashlib.sha256()
        with storage_errors(path), path.open("wb") as file:
            with self._errors(name):
                stream = obstore.get(self._store, self._path(name)).stream(min_chunk_size=CHUNK_BYTES)
            while chunk := self._next(name, stream):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _next(self, name: str, stream: Any) -> bytes:
        with self._errors(name):
            return bytes(next(stream, b""))

    # -- write

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a small object by one request."""
        self._put(name, content, "overwrite")

    def create(self, name: str, content: bytes) -> bool:
        """Create a small object; False if there is one of that name."""
        return self._put(name, content, "create")

    def replace(self, name: str, content: bytes, version: Version) -> bool:
        """Replace a small object; False if that version is not the newest any more."""
        return self._put(name, content, {"e_tag": version.tag})

    def _put(self, name: str, content: bytes, mode: Any) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._errors(name):
            try:
                obstore.put(self._store, self._path(name), content, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def upload(self, name: str, path: Path) -> str:
        """Copy a file to an object, which appears once it is whole; return the SHA-256 of the sent bytes."""
        import obstore

        digest = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                yield chunk

        with path.open("rb") as file, self._errors(name):
            obstore.put(
                self._store,
                self._path(name),
                chunks(),
                use_multipart=os.fstat(file.fileno()).st_size > CHUNK_BYTES,
                chunk_size=CHUNK_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        return digest.hexdigest()

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""
        import obstore

        with self._errors(name):
            obstore.delete(self._store, self._path(name))

    def delete_all(self, below: str) -> None:
        """Remove every object below a name in this folder."""
        for entry in self.objects(below):
            self.delete(entry.name)

    def for_ray(self) -> Any:
        """Return pyarrow's file system of the same store, for Ray's own files."""
        from pyarrow.fs import S3FileSystem

        endpoint, region = self._endpoint_and_region()
        return S3FileSystem(endpoint_override=endpoint, region=region or ("us-east-1" if endpoint else None))

    # -- inner

    @cached_property
    def _store(self) -> S3Store:
        with self._errors(""):
            return _store(self.bucket, *self._endpoint_and_region())

    def _endpoint_and_region(self) -> tuple[str | None, str | None]:
        endpoint = self._options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or None
        if endpoint is not None and "://" not in endpoint:
            endpoint = f"{self._options.get('scheme', 'https')}://{endpoint}"
        region = self._options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return endpoint, region

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self.prefix, name) if part)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn an error of the store into a StorageError of one line."""
        from obstore.exceptions import BaseError

        where = f"{self}/{name}".rstrip("/")
        try:
            yield
        except (BaseError, OSError) as error:
            code, said = _answer(error)
            if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
                raise NotThereError(f"{where}: is not there; it was removed, or never written") from None
            advice = _ADVICE.get(code, "try again, or read the store's log")
            raise StorageError(f"{where}: {said}; {advice}") from None


class NotThereError(StorageError):
    """There is no object of that name."""


def _answer(error: Exception) -> tuple[str, str]:
    """Return the store's code for an error, or one of our own ("" if there is none), and a description."""
    text = " ".join(str(error).partition("Debug source")[0].split())
    code, message = re.search(r"<Code>(\w+)</Code>", text), re.search(r"<Message>(.*?)</Message>", text)
    if code is not None:
        return code[1], f"the store says {code[1]}" + (f" ({message[1][:160]})" if message else "")
    if status := re.search(r"status code: (\d{3} [A-Z][A-Za-z ]*\w)", text):
        return status[1], f"the store says {status[1]}"
    if "credential" in text.lower() or "169.254.169.254" in text:
        return "NoCredentials", "no credentials for the store were found"
    if "HTTP error" in text:
        return "NetworkError", "the store cannot be reached"
    return "", text[:200]


@lru_cache(maxsize=8)
def _store(bucket: str, endpoint: str | None, region: str | None) -> S3Store:
    from obstore.store import S3Store

    options: dict[str, Any] = {}
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        if _keys_of_profile() is not None:
            options["credential_provider"] = _keys_of_profile
        elif os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            raise OSError("no credentials: the machine's role must not be asked for them")
    if endpoint is not None:
        options["endpoint"] = endpoint
    elif region is None:
        from pyarrow.fs import resolve_s3_region

        region = resolve_s3_region(bucket)
    options["client_options"] = {**_CLIENT, "allow_http": (endpoint or "").startswith("http://")}
    return S3Store(bucket, region=region or "us-east-1", retry_config=cast("RetryConfig", RETRIES), **options)


def _keys_of_profile() -> dict[str, Any] | None:
    """Return the keys of the AWS profile in use, read again every five minutes; None if the file has none."""
    file = configparser.ConfigParser(interpolation=None)
    place = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    try:
        file.read(Path(place).expanduser())
        profile = file[os.environ.get("AWS_PROFILE") or "default"]
        keys = {"access_key_id": profile["aws_access_key_id"], "secret_access_key": profile["aws_secret_access_key"]}
    except (OSError, KeyError, RuntimeError, configparser.Error):
        return None
    token = profile.get("aws_session_token")
    return {**keys, "token": token, "expires_at": datetime.now(UTC) + timedelta(minutes=5)}
