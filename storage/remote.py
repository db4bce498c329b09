"""Folders of remote stores: any URL that fsspec has a driver for, s3:// first.

Readers take a root that is a Path or a RemotePath. Small files (cache.json, corpus.json, manifests)
carry checksums of their own and are read straight from the store; what a manifest vouches for is
fetched into the bounded local cache and checked there against its size and sha256. A Path is read
directly, and nothing is copied. Endpoint and credentials come from where the driver looks for them
(AWS_* in the environment, ~/.aws, fsspec's configuration), never from our configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from storage import durable
from storage.errors import ConfigError, MissingShard, RemoteError, ScholiastError
from storage.local_cache import LocalCache, wrong_bytes

T = TypeVar("T")

_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
_filesystems: dict[tuple[int, str], Any] = {}


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a remote store; as much of pathlib's Path as reading needs.

    Attributes:
        url: without a slash at its end.
        cache: where its objects are kept.

    Raises (by every method):
        RemoteError: the store cannot be reached, or refuses us.
        ConfigError: no driver for this kind of URL.
    """

    url: str
    cache: LocalCache

    def __truediv__(self, name: str | Path) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.cache)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    def read_bytes(self, most: int | None = None) -> bytes:
        """Returns the file's bytes, unchecked (FileNotFoundError if there is none).

        Args:
            most: how many of them are asked for at most, from its beginning; a store without ranges
                may give more.
        """
        return self.call(lambda store, path: _read(store, path, most))

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Opens the file for reading, unchecked (FileNotFoundError if there is none)."""
        file: IO[bytes] = self.call(lambda store, path: store.open(path, mode))
        return file

    def exists(self) -> bool:
        return bool(self.call(lambda store, path: store.exists(path)))

    def names(self) -> list[str]:
        """Returns the names of the files in the folder, in any order; [] if there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            listed = self.call(lambda store, path: store.ls(path, detail=False))
            return [name.rstrip("/").rsplit("/", 1)[1] for name in listed]
        return []

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of every file at or below the folder, by its path relative to it."""
        with contextlib.suppress(FileNotFoundError):
            inside = _inside(self.url).rstrip("/") + "/"
            found = self.call(lambda store, path: store.find(path, detail=True))
            return {name.removeprefix(inside): int(of["size"]) for name, of in found.items()}
        return {}

    def sha256(self) -> str:
        """Returns the sha256 of the file's bytes, all of which are read."""

        def digest(store: Any, path: str) -> str:
            with store.open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self.call(digest)

    def opened(self, size: int, digest: str) -> int:
        """Returns a file descriptor of the object's copy, fetched and checked if it is not here.

        Raises:
            MissingShard: the store has no such object.
            CorruptShard: it has other bytes.
        """

        def fetch(target: Path) -> None:
            found = self.call(lambda store, path: store.size(path))
            if found not in (None, size):  # before it is fetched: it may fill the disk
                raise wrong_bytes(self, size, digest, found)
            self.call(lambda store, path: _download(store, path, target))

        try:
            return self.cache.opened(digest, size, fetch, self)
        except FileNotFoundError:
            raise MissingShard(
                "an object that its manifest vouches for is missing from the store", where=self,
                todo="put the file there again: run `scholiast push --verify` from the "
                "original",
            ) from None  # fmt: skip

    def fetch(self, size: int, digest: str) -> None:
        """Sees to it that the object's copy is here, for a while."""
        os.close(self.opened(size, digest))

    def write(self, source: Path) -> None:
        """Uploads a local file."""
        self.call(lambda store, path: _upload(store, source, path))

    def call(self, action: Callable[[Any, str], T]) -> T:
        """Returns action(filesystem, path inside it), what drivers raise made ours."""
        with _translated(self.url):
            return action(_filesystem(self.url), _inside(self.url))


Root = Path | RemotePath


def root_of(place: str, cache: LocalCache) -> Root:
    """Returns the folder that a configuration names: a RemotePath for a URL, else a Path."""
    return RemotePath(place.rstrip("/"), cache) if "://" in place else Path(place)


def require_local(root: Root, key: str) -> Path:
    """Returns a folder that is worked on in place.

    Raises:
        ConfigError: it is remote.
    """
    if isinstance(root, RemotePath):
        raise ConfigError(
            "this command works on local folders", where=key,
            expected="a local folder", found=root,
            todo="name one; `scholiast push` copies finished ones to a store",
        )  # fmt: skip
    return root


def open_object(path: Root, size: int, digest: str) -> int:
    """Returns a file descriptor of what a manifest vouches for.

    Raises:
        MissingShard, CorruptShard, RemoteError: of a remote object.
        FileNotFoundError: of a local one, which is not checked here.
    """
    if isinstance(path, RemotePath):
        return path.opened(size, digest)
    return os.open(path, os.O_RDONLY)


def _read(store: Any, path: str, most: int | None) -> bytes:
    data: bytes
    try:
        data = store.cat_file(path) if most is None else store.cat_file(path, start=0, end=most)
    except FileNotFoundError:
        raise
    except Exception:
        if most is None or store.size(path) != 0:
            raise
        data = b""  # S3 knows no range of an empty object
    return data


def _download(store: Any, path: str, target: Path) -> None:
    with durable.disk_errors(target):
        store.get_file(path, str(target))


def _upload(store: Any, source: Path, path: str) -> None:
    with contextlib.suppress(FileExistsError, NotImplementedError):
        store.makedirs(path.rsplit("/", 1)[0], exist_ok=True)  # nothing to do in an object store
    store.put_file(str(source), path)


def _filesystem(url: str) -> Any:
    """Returns this process's own filesystem: one made before a fork waits for a thread that is gone."""
    scheme, rest = url.split("://", 1)
    key = (os.getpid(), f"{scheme}://{rest.split('/', 1)[0]}")
    if key not in _filesystems:
        import fsspec

        _filesystems[key] = fsspec.core.url_to_fs(
            url, skip_instance_cache=True, use_listings_cache=False
        )[0]
    return _filesystems[key]


def _inside(url: str) -> str:
    import fsspec

    stripped: str = fsspec.core.strip_protocol(url)
    return stripped


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turns what drivers raise into our errors; that a file is not there stays FileNotFoundError."""
    scheme = url.split("://", 1)[0]
    try:
        yield
    except (FileNotFoundError, ScholiastError):
        raise
    except ImportError as error:
        driver = _DRIVERS.get(scheme, "")
        hint = "'scholiast[s3]'" if driver == "s3fs" else driver or "the driver named"
        raise ConfigError(
            f"the driver for {scheme}:// is not installed", where=url,
            expected=driver or "its package", found=error,
            todo=f"pip install {hint}",
        ) from error  # fmt: skip
    except ValueError as error:
        if "rotocol" not in str(error):
            raise
        raise ConfigError(
            "no driver knows this kind of URL", where=url, expected="s3://… and the like", found=error,
            todo="name a local folder, s3://bucket/prefix, or another URL that fsspec knows",
        ) from error  # fmt: skip
    except Exception as error:
        if isinstance(error, PermissionError) or type(error).__name__ in _CREDENTIALS:
            raise RemoteError(
                "the store refuses our credentials, or there are none", where=url,
                expected="a key that may use this place", found=_line(error),
                todo="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws), and the endpoint "
                "they belong to",
            ) from error  # fmt: skip
        if not _of_the_store(error):
            raise
        raise RemoteError(
            "the store cannot be reached, or fails", where=url, expected="an answer",
            found=_line(error),
            todo="check the network, the bucket's name and AWS_ENDPOINT_URL, and run the same "
            "command again: what is fetched is kept",
        ) from error  # fmt: skip


def _of_the_store(error: Exception) -> bool:
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.split(".")[0] in (
        "aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "s3fs",
    )  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
