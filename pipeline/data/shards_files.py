"""The files of a dataset: in a folder (LocalShards), or in an object store with copies on this machine (RemoteShards)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.config.cluster_profile import Cache
from pipeline.data.manifest import Manifest
from pipeline.data.shards_format import read_footer
from pipeline.errors import DataError, PipelineError, StorageError
from pipeline.storage.remote import RemoteFolder, is_remote
from pipeline.storage.remote_cache import NodeCache
from pipeline.storage.remote_run import own_folder


class LocalShards:
    """Shards in a folder; all are compared with the manifest when it is opened."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.location = folder, str(folder)
        self.cache: Cache | None = None
        self.manifest = Manifest.load(folder)
        self._footers = [read_footer(folder / shard.file, shard, self.manifest) for shard in self.manifest.shards]

    @contextmanager
    def opened(self, shard: int) -> Iterator[tuple[Path, Any]]:
        """Yield the path of a shard and its parsed footer."""
        yield self._folder / self.manifest.shards[shard].file, self._footers[shard]

    def expect(self, shards: Iterable[int]) -> None:
        """Do nothing: the shards are here."""

    def discard(self, shard: int) -> bool:
        """Return False: there is no other copy to read."""
        return False


def cached_shards(cache: Cache) -> NodeCache:
    """Return this machine's copies of shards, as a profile says."""
    own = own_folder("shards") if cache.folder is None else Path(cache.folder)
    return NodeCache(own, int(cache.max_gb * 1e9))


class RemoteShards:
    """Shards in an object store, downloaded when first read; their sizes are compared with the manifest when it is opened."""

    def __init__(self, folder: RemoteFolder, cache: Cache) -> None:
        self._remote, self.location = folder, folder.uri
        self.cache: Cache | None = cache
        self.manifest = Manifest.load(folder)
        self._require_all()
        self._copies = cached_shards(cache)
        self._footers: dict[int, Any] = {}
        self._ahead: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[None]] = {}

    @contextmanager
    def opened(self, shard: int) -> Iterator[tuple[Path, Any]]:
        """Yield the path of this machine's copy, which is not evicted meanwhile, and its parsed footer; DataError if it is damaged."""
        about = self.manifest.shards[shard]
        where = f"{self._remote}/{about.file}"
        with self._copies.use(about.sha256, about.num_bytes, where, lambda path: self._fetch(about.file, path)) as path:
            if shard not in self._footers:
                self._footers[shard] = read_footer(path, about, self.manifest)
            yield path, self._footers[shard]

    def expect(self, shards: Iterable[int]) -> None:
        """Start to download shards that will be read soon; does not wait."""
        self._coming = {shard: future for shard, future in self._coming.items() if not future.done()}
        for shard in shards:
            if shard not in self._coming and not self._copies.has(self.manifest.shards[shard].sha256):
                self._ahead = self._ahead or ThreadPoolExecutor(2, thread_name_prefix="shards")
                self._coming[shard] = self._ahead.submit(self._fetch_ahead, shard)

    def discard(self, shard: int) -> bool:
        """Remove this machine's damaged copy, so that it is downloaded again."""
        self._copies.discard(self.manifest.shards[shard].sha256)
        return True

    def _fetch(self, file: str, path: Path) -> str:
        try:
            return self._remote.download(file, path)
        except StorageError as error:
            raise DataError(str(error)) from None

    def _fetch_ahead(self, shard: int) -> None:
        with suppress(PipelineError), self.opened(shard):  # the error is raised when the shard is read
            pass

    def _require_all(self) -> None:
        """Raise DataError if a shard is missing or has another size, before anything is downloaded."""
        sizes = {entry.name: entry.num_bytes for entry in self._remote.objects()}
        for shard in self.manifest.shards:
            size = sizes.get(shard.file)
            if size != shard.num_bytes:
                has = "is missing" if size is None else f"has {size} bytes, the manifest says {shard.num_bytes}"
                raise DataError(f"{self._remote}/{shard.file} {has}: restore it or ingest the dataset again")


def manifest_of(location: str | Path) -> Manifest:
    """Read the manifest of a dataset, local or in an object store; DataError as in `Manifest.load`."""
    return Manifest.load(
        RemoteFolder(location) if isinstance(location, str) and is_remote(location) else Path(location)
    )
