"""One store for a local folder, S3, GCS, Azure and memory: read, list, and put if absent.

Every durable effect of the house is a put-if-absent of a whole object under its final name, so a
reader never sees half of one and a second writer never replaces the first one's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from data.secrets import has_credentials, redact

CLOUD_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
TEMPORARY = ".tmp"  # suffix of a local file on its way to its name; gc removes those left by a kill

_ABSENT = (NotFoundError, FileNotFoundError)
_PRESENT = (AlreadyExistsError, FileExistsError)


class Entry(NamedTuple):
    """One stored object: its path in the store, its size in bytes, and a tag that changes with it."""

    path: str
    size: int
    version: str


@dataclass(frozen=True)
class Store:
    """Named bytes under one folder or URL prefix; made by `open_store`.

    `url` is what a person would type: an absolute path, or `s3://bucket/prefix`. Paths are relative to
    it, POSIX style.
    """

    url: str
    backend: ObjectStore
    prefix: str  # of the backend; without slashes at its ends, '' at its root

    @property
    def local(self) -> Path | None:
        """The folder on this machine, or None for a cloud or memory store."""
        return Path(self.url) if isinstance(self.backend, LocalStore) else None

    def uri(self, path: str = "") -> str:
        """The full path or URL of `path`, as pandas, DuckDB or Polars take it."""
        return f"{self.url}/{path}" if path else self.url

    def child(self, path: str) -> Store:
        """The store of a folder in this one; nothing is created.

        >>> open_store("memory://doc").child("a/b").uri("c")
        'memory://doc/a/b/c'
        """
        return replace(self, url=self.uri(path), prefix=self.key(path))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Commit `data` whole under `path`; True if this call created it, False if it was there.

        On a cloud store whose answer was lost, a retried put finds its own object and returns False:
        after False, trust what is stored, not what is in memory. Local commits survive a power cut.

        >>> store = open_store("memory://doc")
        >>> store.put_if_absent("x", b"1"), store.put_if_absent("x", b"2"), store.get("x")
        (True, False, b'1')
        """
        if self.local is not None:
            return _commit_local(self.local / path, data)
        try:
            obstore.put(self.backend, self.key(path), data, mode="create")
        except _PRESENT:
            return False
        return True

    def get(self, path: str) -> bytes:
        """The object's bytes; FileNotFoundError if there is none."""
        try:
            return bytes(obstore.get(self.backend, self.key(path)).bytes())
        except _ABSENT:
            raise FileNotFoundError(f"no object {self.uri(path)}") from None

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of the object."""
        if start == end:
            return b""
        if self.local is not None:
            with self.open(path) as file:
                file.seek(start)
                return file.read(end - start)
        return bytes(obstore.get_range(self.backend, self.key(path), start=start, end=end))

    def open(self, path: str) -> BinaryIO:
        """The object as a file to read and seek in; a remote one is fetched as it is read."""
        if self.local is not None:
            return open(self.local / path, "rb")
        return io.BufferedReader(_Remote(obstore.open_reader(self.backend, self.key(path))), 1 << 20)

    def exists(self, path: str) -> bool:
        return self.stat(path) is not None

    def stat(self, path: str) -> Entry | None:
        """The object's size and version, or None when there is no such object."""
        try:
            return _entry(path, obstore.head(self.backend, self.key(path)))
        except _ABSENT:
            return None

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Every committed object under the folder `prefix`; in order of path on S3 and GCS only.

        >>> store = open_store("memory://doc-list")
        >>> store.put_if_absent("a/1", b"one") and [e.path for e in store.entries("a")]
        ['a/1']
        """
        return (entry for entry in self._list(prefix) if not _temporary(entry.path))

    def leftovers(self) -> Iterator[Entry]:
        """Files that a killed local put left on their way to their names."""
        return (entry for entry in self._list("") if _temporary(entry.path))

    def folders(self) -> list[str]:
        """Names of the folders directly under this store, sorted."""
        listing = obstore.list_with_delimiter(self.backend, prefix=self.prefix or None)
        return sorted(path.rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def files(self) -> list[str]:
        """Names of the objects directly under this store, sorted."""
        if self.local is not None:
            with os.scandir(self.local) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        listing = obstore.list_with_delimiter(self.backend, prefix=self.prefix or None)
        return sorted(meta["path"].rsplit("/", 1)[-1] for meta in listing["objects"])

    def delete(self, path: str) -> None:
        """Remove the object; no error if it is already gone."""
        with suppress(*_ABSENT):
            obstore.delete(self.backend, self.key(path))

    def check(self, *, write: bool = False) -> Store:
        """This store, or a ValueError of one line if it cannot be read (or, with `write`, written)."""
        if self.local is not None:
            _check_local(self.local, write)
        else:
            try:
                next(iter(self._list("")), None)
            except (BaseError, OSError) as error:
                raise ValueError(f"cannot read {self.url}: {first_line(error)}") from None
        return self

    def key(self, path: str) -> str:
        """The path as the backend knows it."""
        return "/".join(part for part in (self.prefix, path) if part)

    def _list(self, prefix: str) -> Iterator[Entry]:
        cut = len(self.prefix) + 1 if self.prefix else 0
        for page in obstore.list(self.backend, prefix=self.key(prefix) or None):
            yield from (_entry(meta["path"][cut:], meta) for meta in page)


def open_store(location: str | os.PathLike[str]) -> Store:
    """The store at a local path or an s3://, gs://, az:// or memory:// URL; nothing is created.

    Credentials and endpoints come from the environment, as each provider's own tools read them
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …). Raises ValueError for an unknown scheme.

    >>> open_store("ftp://host/x")
    Traceback (most recent call last):
    ValueError: unknown store 'ftp://host/x': give a local path or a URL of file, memory, s3, ...
    """
    url = os.fspath(location)
    if has_credentials(url):
        raise ValueError(
            f"{redact(url)!r} has credentials in it, which would be kept with every table: give them by the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3)"
        )
    url = url if url.endswith("://") else url.rstrip("/") or "/"
    scheme = urlsplit(url).scheme if "://" in url else "file"
    if scheme == "file":
        path = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
        return Store(path, _local_backend(), path.strip("/"))
    if scheme == "memory":
        name, _, prefix = url.removeprefix("memory://").partition("/")
        return Store(url, _memory_backend(name), prefix)
    if scheme not in CLOUD_SCHEMES:
        known = ", ".join(("file", "memory", *CLOUD_SCHEMES))
        raise ValueError(f"unknown store {url!r}: give a local path or a URL of {known}")
    return _open_cloud(url)


def seal(body: dict[str, Any]) -> bytes:
    """JSON bytes of `body` that carry their own digest, for `unseal` to check.

    >>> unseal(seal({"rows": 3}))
    {'rows': 3}
    """
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "body": {text}}}\n'.encode()


def unseal(data: bytes, place: str = "record") -> dict[str, Any]:
    """What was sealed; a ValueError that names `place` if a single bit has changed since."""
    try:
        body = json.loads(data)["body"]
        intact = isinstance(body, dict) and seal(body) == data
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{place} is damaged: its content does not match its own sha256")
    return body


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a one-line report; without credentials."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])


class _Remote(io.RawIOBase):
    """obstore's reader as the raw stream that Python's own libraries and pyarrow take."""

    def __init__(self, reader: obstore.ReadableFile):
        self._reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._reader.seek(offset, whence)

    def tell(self) -> int:
        return self._reader.tell()

    def readinto(self, buffer: Any) -> int:
        data = bytes(self._reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)


@cache
def _local_backend() -> LocalStore:
    return LocalStore()


@cache
def _memory_backend(name: str) -> MemoryStore:
    """One shared memory store a name, so that two opens of memory://name meet, as on a disk."""
    return MemoryStore()


def _open_cloud(url: str) -> Store:
    base, prefix = url, ""
    parts = urlsplit(url)
    if parts.scheme in ("s3", "s3a", "gs"):  # az:// has its container in the path: obstore cuts it
        base, prefix = f"{parts.scheme}://{parts.netloc}", parts.path.strip("/")
    if not parts.netloc:
        raise ValueError(f"no bucket in {url!r}: write {parts.scheme}://BUCKET/PREFIX")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and has_credentials(endpoint):
        raise ValueError(f"AWS_ENDPOINT_URL={redact(endpoint)} has credentials in it, which S3 does not take")
    return Store(url, _cloud_backend(base, endpoint if parts.scheme in ("s3", "s3a") else None), prefix)


@cache
def _cloud_backend(url: str, endpoint: str | None) -> ObjectStore:
    """One client a bucket and endpoint, for its pool of connections."""
    options: dict[str, Any] = {}
    if endpoint:  # a loopback server (MinIO, moto) speaks plain http
        options = {"endpoint": endpoint, "client_options": {"allow_http": endpoint.startswith("http://")}}
    return from_url(url, **options)


def _entry(path: str, meta: Any) -> Entry:
    tag = meta.get("e_tag") or meta["last_modified"].isoformat()
    return Entry(path, int(meta["size"]), str(tag).strip('"'))


def _temporary(path: str) -> bool:
    return path.endswith(TEMPORARY) and path.rsplit("/", 1)[-1].startswith(".")


def _commit_local(path: Path, data: bytes) -> bool:
    """Write beside, fsync, link under the final name, fsync the folder: all of it or nothing."""
    with _naming(path):
        if path.exists():
            _sync_folder(path.parent)  # its writer may have died before this line
            return False
        _make_folder(path.parent)
        draft = path.parent / f".{path.name}.{os.urandom(6).hex()}{TEMPORARY}"
        try:
            _write_durably(draft, data)
            os.link(draft, path)
            created = True
        except FileExistsError:
            created = False
        finally:
            draft.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return created


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the path in an error of the system about an open file, which names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """mkdir -p whose new entries are on disk before anything is put in them."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_local(folder: Path, write: bool) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file, not a folder: give another path than {folder}")
    mode = os.R_OK | os.X_OK | (os.W_OK if write else 0)
    if not os.access(existing, mode):
        verb = "write to" if write else "read"
        raise ValueError(f"cannot {verb} {existing}: permission denied; give a folder of yours")
