"""A folder on this machine or in object storage, in which each file appears complete or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from job.dataset.sources import BLOCK_BYTES, file_system
from job.errors import InvalidInputError, JobError
from job.runs.atomic import atomic_file
from job.runs.checksums import file_digest
from job.runs.objects import StoreError, open_objects
from job.system.paths import is_remote

log = logging.getLogger(__name__)

T = TypeVar("T")
BUCKETS = "hf://buckets/"
ATTEMPTS = 7
"""How often a request to object storage is tried; the waits before are 0.5, 1, 2, 4, 8 and 16 seconds."""
FINAL = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|HTTP status 40[0134]")
"""Failures of object storage that another attempt would not change."""


class Folder(Protocol):
    """Files by their names, which may have slashes."""

    name: str
    """As messages show it."""

    def list(self) -> dict[str, int]:
        """Return the names of all files below the folder, with their sizes; empty if the folder does not exist."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a file; None if there is none."""

    def writer(self, name: str) -> Any:
        """Return a context that yields a binary stream; the file appears when the context ends without an error."""

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""


def open_folder(name: str) -> Folder:
    """Return the folder at a path or URL; raises InvalidInputError when the URL cannot be used."""
    if not is_remote(name):
        return LocalFolder(Path(name).expanduser())
    if name.startswith(BUCKETS):
        return BucketFolder(name.rstrip("/"))
    return RemoteFolder(name.rstrip("/"))


def write(folder: Folder, name: str, content: bytes) -> None:
    """Write a file."""
    with folder.writer(name) as stream:
        stream.write(content)


def open_parent(name: str) -> tuple[Folder, str]:
    """Return the folder of a file's path or URL, and the name of the file in it."""
    before, slash, last = name.rpartition("/")
    return open_folder((before + slash) or "."), last


class LocalFolder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def list(self) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.path):
            for name in names:
                file = Path(folder, name)
                try:
                    found[file.relative_to(self.path).as_posix()] = file.lstat().st_size
                except FileNotFoundError:  # another worker has renamed or deleted it
                    continue
        return found

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def digest(self, name: str) -> str | None:
        try:
            return file_digest(self.path / name)
        except FileNotFoundError:
            return None

    def writer(self, name: str) -> Any:
        return atomic_file(self.path / name)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


class RemoteFolder:
    """A prefix of object storage. An object is written by one request, or appears when its last piece is there."""

    def __init__(self, url: str) -> None:
        import pyarrow

        self.name = url
        self._is_proven = False
        """Whether a file has been written."""
        try:
            self._system, self._path = file_system(url)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InvalidInputError(_unusable(url, error)) from error

    def list(self) -> dict[str, int]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._path, recursive=True, allow_not_found=True)
        entries = self._retry(lambda: self._system.get_file_info(selector), "listed")
        prefix = self._path.rstrip("/") + "/"
        return {e.path.removeprefix(prefix): e.size for e in entries if e.type == FileType.File}

    def exists(self, name: str) -> bool:
        from pyarrow.fs import FileType

        info = self._retry(lambda: self._system.get_file_info(f"{self._path}/{name}"), f"read: {name}")
        return bool(info.type == FileType.File)

    def read(self, name: str) -> bytes | None:
        def step() -> bytes | None:
            try:
                with self._system.open_input_stream(f"{self._path}/{name}") as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._retry(step, f"read: {name}")

    def digest(self, name: str) -> str | None:
        def step() -> str | None:
            digest = hashlib.sha256()
            try:
                with self._system.open_input_stream(f"{self._path}/{name}") as stream:
                    while block := stream.read(BLOCK_BYTES):
                        digest.update(block)
            except FileNotFoundError:
                return None
            return digest.hexdigest()

        return self._retry(step, f"read: {name}")

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """Collect the content in a temporary file, so that a failed request can be repeated."""
        with tempfile.TemporaryFile() as file:
            yield file

            def step() -> None:
                file.seek(0)
                with self._writer(name) as stream:
                    while block := file.read(1 << 23):
                        stream.write(block)

            self._retry(step, f"written: {name}")
            self._is_proven = True

    def _writer(self, name: str) -> Any:
        return self._system.open_output_stream(f"{self._path}/{name}")

    def delete(self, name: str) -> None:
        def step() -> None:
            try:
                self._system.delete_file(f"{self._path}/{name}")
            except FileNotFoundError:
                return

        self._retry(step, f"deleted: {name}")

    def _retry(self, step: Callable[[], T], what: str) -> T:
        if self._is_proven:
            return retry(step, f"{self.name} cannot be {what}")
        try:
            return retry(step, f"{self.name} cannot be {what}", attempts=4)
        except JobError as error:  # before the first file is written, nothing has been spent
            raise InvalidInputError(_unusable(self.name, error.__cause__ or error)) from error


class BucketFolder:
    """A prefix of a bucket of the Hub."""

    def __init__(self, url: str) -> None:
        self.name = url
        self._objects = open_objects(url)

    def list(self) -> dict[str, int]:
        return self._call(lambda: self._objects.list(""), "listed")

    def exists(self, name: str) -> bool:
        return name in self.list()

    def read(self, name: str) -> bytes | None:
        return self._call(lambda: self._objects.get(name), f"read: {name}")

    def digest(self, name: str) -> str | None:
        content = self.read(name)
        return None if content is None else hashlib.sha256(content).hexdigest()

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """Collect the content in a temporary file, which is sent at the end."""
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            self._call(lambda: self._objects.put(name, file), f"written: {name}")

    def delete(self, name: str) -> None:
        self._call(lambda: self._objects.delete([name]), f"deleted: {name}")

    def _call(self, step: Callable[[], T], what: str) -> T:
        try:
            return step()
        except StoreError as error:
            raise JobError(
                f"{self.name} cannot be {what} ({error}); sealed parts are kept, run the command again"
            ) from error


def retry(step: Callable[[], T], what: str, attempts: int | None = None) -> T:
    """Return the result of a step on object storage, repeated while it fails; raises JobError with the last failure.

    A failure is an OSError, or an InvalidInputError that was caused by one. One that says that something does not
    exist or is forbidden is final.
    """
    pause, attempts = 0.5, attempts or ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return step()
        except (OSError, InvalidInputError) as error:
            cause = error.__cause__ if isinstance(error, InvalidInputError) else error
            if not isinstance(cause, OSError):
                raise
            is_final = isinstance(cause, (FileNotFoundError, PermissionError)) or FINAL.search(str(cause))
            if attempt == attempts or is_final:
                raise JobError(f"{what} ({_detail(cause)}); sealed parts are kept, run the command again") from error
            log.warning("tag: %s (%s); retrying in %g s", what, _detail(cause), pause)
            time.sleep(pause)
            pause *= 2
    raise AssertionError("the loop returns or raises")


def retry_input(step: Callable[[], T]) -> T:
    """Return the result of a step that finds or inspects the input, repeated while object storage fails.

    Raises InvalidInputError with the last failure, because nothing has been spent yet.
    """
    try:
        return retry(step, "the input cannot be read", attempts=6)
    except InvalidInputError:
        raise
    except JobError as error:
        refusal = error.__cause__
        raise refusal if isinstance(refusal, InvalidInputError) else InvalidInputError(str(refusal)) from error


def _unusable(url: str, error: BaseException) -> str:
    return (
        f"TAGGER_TAG_OUTPUT={url} cannot be written: {_detail(error)}. Check the URL, the network and the credentials"
    )


def _detail(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
