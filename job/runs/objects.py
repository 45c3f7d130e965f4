"""Objects in S3, Google Cloud Storage, Azure, a bucket of the Hub, or a folder: read, write, write only if absent."""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote

from job.config.redaction import redact
from job.errors import InvalidInputError
from job.system import hub_token

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Obstore

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az", "hf", "file")
REQUEST_SECONDS = 120
"""After which a request is given up; a repeated one may wait as long."""
RETRY_SECONDS = 180
"""How long requests are repeated while object storage is unavailable."""
RANGE_BYTES = 16 * 2**20
"""How much of an object one request brings: on a slow line too, it ends within REQUEST_SECONDS."""
ATTEMPTS, PAUSE_SECONDS = 3, 1.0
"""How often a request is made whose answer is cut off, and the pause in between."""
SETTLE_SECONDS = 3.0
"""For object storage without conditional writes: the time after which a write of another process would have shown."""
LONGEST_MESSAGE = 300


class StoreError(Exception):
    """Object storage has failed or refused a request; the message is one line without secrets."""


class Objects(Protocol):
    """Objects by their names below a URL. An object appears complete or not at all."""

    url: str

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        """Write an object; one of that name is replaced."""

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Write an object unless there is one of that name; return whether it was written."""

    def get(self, name: str) -> bytes | None:
        """Return the content of an object; None if there is none."""

    def download(self, name: str, to: IO[bytes]) -> bool:
        """Copy the content of an object into a file; return whether there is one."""

    def list(self, prefix: str) -> dict[str, int]:
        """Return the objects below a prefix that ends in `/`, or all for an empty one, by name with their sizes."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that do not exist are ignored."""


def open_objects(url: str) -> Objects:
    """Return the objects below a URL; nothing is requested yet. All methods raise StoreError.

    Raises InvalidInputError for a URL that cannot be used.
    """
    if url.startswith("hf://"):
        return _Bucket(url)
    return _Folder(url) if url.startswith("file://") else _Cloud(url)


class _Obstore:
    """S3, Google Cloud Storage, Azure or a folder of this machine, which all have conditional writes."""

    _store: Obstore

    def __init__(self, url: str) -> None:
        import obstore

        self._obstore: Any = obstore
        self.url = url.rstrip("/")

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        def send() -> None:
            if not isinstance(content, bytes):
                content.seek(0)
            self._obstore.put(self._store, name, content)

        self._call(send)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        try:
            self._call(lambda: self._obstore.put(self._store, name, content, mode="create"))
        except StoreError as error:
            if not isinstance(error.__cause__, self._obstore.exceptions.AlreadyExistsError):
                raise
            # perhaps by this very request, whose answer was lost
            return self.get(name) == content
        return True

    def get(self, name: str) -> bytes | None:
        return self._found(lambda: bytes(self._obstore.get(self._store, name).bytes()))

    def download(self, name: str, to: IO[bytes]) -> bool:
        to.seek(0)
        to.truncate()

        def copy_small() -> int:
            found = self._obstore.get(self._store, name)
            size = int(found.meta["size"])
            if size <= RANGE_BYTES:
                to.write(found.bytes())
            return size

        if (size := self._found(copy_small)) is None:
            return False
        for start in range(to.tell(), size, RANGE_BYTES):
            length = min(RANGE_BYTES, size - start)
            part = self._found(partial(self._obstore.get_range, self._store, name, start=start, length=length))
            if part is None:  # its owner has pruned it by now
                return False
            to.write(part)
        return True

    def list(self, prefix: str) -> dict[str, int]:
        batches = self._call(lambda: list(self._obstore.list(self._store, prefix or None)))
        return dict(sorted((entry["path"], entry["size"]) for batch in batches for entry in batch))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:  # of several, one that does not exist would end the request
            self._found(partial(self._obstore.delete, self._store, name))

    def _found(self, step: Callable[[], T]) -> T | None:
        try:
            return self._call(step)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError) and "NoSuchBucket" not in str(error.__cause__):
                return None
            raise

    def _call(self, step: Callable[[], T]) -> T:
        """Make a request, again if its answer is cut off: the client repeats only what has no answer yet."""
        deadline = time.monotonic() + RETRY_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return step()
            except (self._obstore.exceptions.BaseError, OSError) as error:
                is_cut = isinstance(error, self._obstore.exceptions.GenericError) and "body error" in str(error)
                if not is_cut or attempt == ATTEMPTS or time.monotonic() > deadline:
                    raise StoreError(_detail(error)) from error
            time.sleep(PAUSE_SECONDS)
        raise AssertionError


class _Cloud(_Obstore):
    def __init__(self, url: str) -> None:
        from obstore.store import from_url

        super().__init__(url)
        plain = self.url.replace("#", "%23").replace("?", "%3F")  # of a path; they would end it
        seconds = datetime.timedelta(seconds=RETRY_SECONDS)
        try:
            self._store = from_url(
                plain,
                # plain HTTP is only used where the endpoint's URL says so
                client_options={"timeout": f"{REQUEST_SECONDS}s", "connect_timeout": "10s", "allow_http": True},
                retry_config={"max_retries": 12, "retry_timeout": seconds},
            )
        except (self._obstore.exceptions.BaseError, OSError, ValueError, TypeError) as error:
            raise InvalidInputError(f"TAGGER_RUN_STORE={url} cannot be opened: {_detail(error)}") from error


class _Folder(_Obstore):
    """A folder of this machine, created by the first write."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._path = Path(unquote(self.url.removeprefix("file://")))

    @cached_property
    def _store(self) -> Obstore:  # type: ignore[override]
        from obstore.store import LocalStore

        return LocalStore(self._path, mkdir=True)

    def get(self, name: str) -> bytes | None:
        return super().get(name) if self._path.is_dir() else None

    def download(self, name: str, to: IO[bytes]) -> bool:
        return self._path.is_dir() and super().download(name, to)

    def list(self, prefix: str) -> dict[str, int]:
        return super().list(prefix) if self._path.is_dir() else {}

    def delete(self, names: Iterable[str]) -> None:
        super().delete(names if self._path.is_dir() else ())


class _Bucket:
    """A bucket of the Hub, which has no conditional writes: `put_if_absent` waits for what others write meanwhile."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        kind, _, rest = url.removeprefix("hf://").partition("/")
        parts = [part for part in rest.split("/") if part]
        if kind != "buckets" or len(parts) < 2:
            raise InvalidInputError(
                f"TAGGER_RUN_STORE={url} names no bucket; expected hf://buckets/<user or organization>/<bucket>"
            )
        self.url = url.rstrip("/")
        self._bucket = "/".join(parts[:2])
        self._prefix = "".join(f"{part}/" for part in parts[2:])
        self._api = HfApi(token=hub_token.token(), library_name="tagger-job")
        disable_progress_bars()  # a bar for each of many small files, in the middle of training

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        data = content if isinstance(content, bytes) else _path_of(content)
        self._call(lambda: self._api.batch_bucket_files(self._bucket, add=[(data, self._prefix + name)]))

    def put_if_absent(self, name: str, content: bytes) -> bool:
        if self.get(name) is not None:
            return False
        self.put(name, content)
        time.sleep(SETTLE_SECONDS)
        return self.get(name) == content

    def get(self, name: str) -> bytes | None:
        with tempfile.TemporaryFile() as file:
            if not self.download(name, file):
                return None
            file.seek(0)
            return file.read()

    def download(self, name: str, to: IO[bytes]) -> bool:
        from huggingface_hub.errors import EntryNotFoundError

        # next to the file, because /tmp may be in memory
        near = Path(to.name).parent if isinstance(getattr(to, "name", None), str) else None
        with tempfile.TemporaryDirectory(dir=near) as folder:
            path = Path(folder, "object")
            files: Any = [(self._prefix + name, path)]
            try:
                self._call(lambda: self._api.download_bucket_files(self._bucket, files, raise_on_missing_files=True))
            except EntryNotFoundError:
                return False
            with path.open("rb") as file:
                shutil.copyfileobj(file, to)
        return True

    def list(self, prefix: str) -> dict[str, int]:
        from huggingface_hub import BucketFile
        from huggingface_hub.errors import EntryNotFoundError

        below = (self._prefix + prefix).rstrip("/") or None

        def files() -> dict[str, int]:
            tree = self._api.list_bucket_tree(self._bucket, below, recursive=True)
            found = [(entry.path, entry.size) for entry in tree if isinstance(entry, BucketFile)]
            return {path.removeprefix(self._prefix): size for path, size in sorted(found)}

        try:
            return self._call(files)
        except EntryNotFoundError:
            return {}

    def delete(self, names: Iterable[str]) -> None:
        paths = [self._prefix + name for name in names]
        if paths:
            self._call(lambda: self._api.batch_bucket_files(self._bucket, delete=paths))

    @staticmethod
    def _call(step: Callable[[], T]) -> T:
        import httpx2
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        pause = 1.0
        while True:
            try:
                return step()
            except EntryNotFoundError:
                raise
            except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response else None
                is_final = isinstance(error, ValueError) or (status is not None and status < 500 and status != 429)
                if is_final or pause > 16:
                    raise StoreError(_detail(error)) from error
                time.sleep(pause)
                pause *= 2


def _path_of(file: IO[bytes]) -> Path | bytes:
    """Return a path to an open file, also if its name is another file's by now; its content where there is none."""
    path = Path(f"/proc/self/fd/{file.fileno()}")
    return path if path.exists() else file.read()


def _detail(error: BaseException) -> str:
    """Return the message of an error in one line; obstore's have a dump of the request below."""
    message = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
    return redact(message)[:LONGEST_MESSAGE]
