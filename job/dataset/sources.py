"""Find the files that TAGGER_DATA_DATASET names: on this machine, in object storage, or in a Hub repository."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from job.config.redaction import mask_urls
from job.errors import InvalidInputError
from job.system.paths import GLOB, PACKAGE_PREFIX, exists, is_remote, local_path

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 20
"""How much is read from a file at a time; each read from object storage is a request."""
HEAD_BYTES = 1024
"""Read first, to tell what a file is; enough for the error that object storage may send instead."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set."""

    name: str
    """As messages show it: the path or URL."""
    path: str
    system: FileSystem | None = None
    """None for this machine's."""

    @property
    def format(self) -> str:
        """The suffix that says how the file is read, without that of a compression."""
        return data_suffix(self.name)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading, decompressed.

        Raises InvalidInputError when it cannot be read, or is a pointer that Git LFS has left in its place.
        """
        import pyarrow

        compression = COMPRESSIONS.get(PurePosixPath(self.name).suffix.lower())
        try:
            system = self.system
            stream = system.open_input_file(self.path) if system else pyarrow.OSFile(self.path, "rb")
            start = stream.read(HEAD_BYTES)
            if start.startswith(_LFS_POINTER):
                raise InvalidInputError(
                    f"{self.name} is a pointer of Git LFS, not the file itself; run `git lfs pull`, then try again"
                )
            _refuse_disguised(self.name, compression, start[:4])
            stream.seek(0)
            yield pyarrow.CompressedInputStream(stream, compression) if compression else stream
        except OSError as error:
            # a damaged compressed stream ends in an OSError too
            raise self._unreadable(error) from error

    @property
    def is_compressed(self) -> bool:
        return PurePosixPath(self.name).suffix.lower() in COMPRESSIONS

    def state(self) -> FileState:
        """Return the size of the file and when it was changed; raises InvalidInputError when it cannot be read."""
        try:
            if self.system is None:
                found = os.stat(self.path)  # noqa: PTH116 - the path of a file, or of a named pipe, as it was given
                return FileState(found.st_size, found.st_mtime_ns)
            info = self.system.get_file_info(self.path)
            if info.size is None:
                raise FileNotFoundError("there is no such file")
            return FileState(info.size, info.mtime_ns)
        except OSError as error:
            raise self._unreadable(error) from error

    def digest(self) -> str:
        """Return the SHA-256 of the file as it is stored; raises InvalidInputError when it cannot be read."""
        import pyarrow

        digest = hashlib.sha256()
        try:
            with self.system.open_input_stream(self.path) if self.system else pyarrow.OSFile(self.path, "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise self._unreadable(error) from error
        return digest.hexdigest()

    def _unreadable(self, error: OSError) -> InvalidInputError:
        detail = " ".join(str(error.strerror or error).split())[:200]
        return InvalidInputError(f"{self.name} cannot be read: {detail}; expected a readable file")


@dataclass(frozen=True)
class FileState:
    """What tells cheaply that a file has changed."""

    bytes: int
    modified: int | None
    """Nanoseconds since 1970; None if the store does not say."""


def _refuse_disguised(name: str, compression: str | None, start: bytes) -> None:
    """Raise InvalidInputError for a file whose first bytes say that it is something else than its name does."""
    kinds = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "ZIP or Excel", b"PAR1": "Parquet"}
    kind = next((kind for mark, kind in kinds.items() if start.startswith(mark)), None)
    named_so = kind == compression or (kind == "Parquet" and data_suffix(name) == ".parquet")
    if kind is not None and not named_so:
        raise InvalidInputError(
            f"{name} is a {kind} file by its content; give it the name of one, or unpack or convert it"
        )


def data_suffix(name: str) -> str:
    """Return the format's suffix of a file name in lower case, before that of a compression; empty if unknown."""
    path = PurePosixPath(name)
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    suffix = path.suffix.lower()
    return suffix if suffix in FORMATS else ""


def is_saved_dataset(path: Path) -> bool:
    """Check whether a folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def find_files(dataset: str) -> list[SourceFile]:
    """Return the files that a setting names, in order: one file, a folder's, those of a glob, or several with commas.

    Raises InvalidInputError when there are none, or when one has no known suffix.
    """
    parts = [part.strip() for part in dataset.split(",")] if _is_list(dataset) else [dataset]
    files = [file for part in parts for file in (_remote if is_remote(part) else _local)(part)]
    if unknown := [file.name for file in files if not file.format]:
        raise InvalidInputError(
            f"{unknown[0]} is not a data file; expected one that ends in {', '.join(FORMATS)}, each also with .gz or "
            ".zst (TAGGER_DATA_DATASET)"
        )
    return files


def _is_list(dataset: str) -> bool:
    return (
        "," in dataset
        and not exists(dataset)
        and all(data_suffix(p) or is_remote(p.strip()) for p in dataset.split(","))
    )


def _local(name: str) -> list[SourceFile]:
    if GLOB.search(name) and not name.startswith(PACKAGE_PREFIX) and not exists(name):
        base = Path(name).expanduser()
        root = Path(base.anchor) if base.is_absolute() else Path()
        try:
            matches = root.glob(str(base.relative_to(base.anchor) if base.anchor else base))
            found = sorted(path for path in matches if not path.is_dir())
        except (ValueError, OSError) as error:
            raise InvalidInputError(f"TAGGER_DATA_DATASET={name} is no pattern of files: {error}") from error
        if not found:
            raise InvalidInputError(f"TAGGER_DATA_DATASET={name} matches no file; expected at least one")
        return [SourceFile(str(path), str(path)) for path in found]
    path = local_path(name, "TAGGER_DATA_DATASET")
    if path.is_dir():
        found = sorted(file for file in _files_below(path) if data_suffix(file.name))
        if not found:
            raise InvalidInputError(
                f"the folder {path} holds no data file (TAGGER_DATA_DATASET); expected some that end in "
                f"{', '.join(FORMATS)}, each also with .gz or .zst"
            )
        return [SourceFile(str(file), str(file)) for file in found]
    return [SourceFile(str(path), str(path))]


def _files_below(path: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, linked ones too; names that begin with . or _ are left out."""
    for folder, folders, names in os.walk(path, followlinks=True):
        here = Path(folder).resolve()
        visible = [name for name in folders if not name.startswith((".", "_"))]
        # a link to a folder above would be followed for ever
        folders[:] = [name for name in visible if Path(folder, name).resolve() not in (here, *here.parents)]
        yield from (Path(folder, name) for name in names if not name.startswith((".", "_")))


def _remote(url: str) -> list[SourceFile]:
    """Return the files of a URL: one, those of a folder, or those of a glob in its last part."""
    import pyarrow
    from pyarrow.fs import FileSelector, FileType

    scheme = url.partition("://")[0]
    folder, glob = (url.rpartition("/")[0], url.rpartition("/")[2]) if GLOB.search(url) else (url, "")
    try:
        system, path = file_system(folder)
        info = system.get_file_info(path)
        if info.type == FileType.File:
            return [SourceFile(mask_urls(url), path, system)]
        entries = system.get_file_info(FileSelector(path, recursive=not glob, allow_not_found=True))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        detail = " ".join(str(error).split())[:200]
        raise InvalidInputError(
            f"TAGGER_DATA_DATASET={url} cannot be read: {detail}. Check the URL, the network and the credentials"
        ) from error

    def is_named(file: PurePosixPath) -> bool:
        """Check a glob, or the suffix; names that begin with . or _ are left out, as on this machine."""
        below = file.relative_to(path).parts
        return file.match(glob) if glob else bool(data_suffix(file.name)) and not any(p[0] in "._" for p in below)

    files = [entry for entry in entries if entry.type == FileType.File and is_named(PurePosixPath(entry.path))]
    if not files:
        raise InvalidInputError(f"TAGGER_DATA_DATASET={url} names no data file; expected at least one")
    return [
        SourceFile(f"{scheme}://{file.path}", file.path, system) for file in sorted(files, key=lambda file: file.path)
    ]


def file_system(url: str) -> tuple[FileSystem, str]:
    """Return the file system of a URL and the path in it; credentials come from each store's usual variables."""
    from pyarrow.fs import AzureFileSystem, FileSystem, S3FileSystem, resolve_s3_region

    scheme, _, path = url.partition("://")
    if scheme == "az":
        account = os.environ.get("AZURE_STORAGE_ACCOUNT", "")
        return AzureFileSystem(account_name=account, account_key=os.environ.get("AZURE_STORAGE_KEY")), path
    if scheme == "s3":
        # a small object is then written by a single request
        options: dict[str, Any] = {"allow_delayed_open": True, "region": os.environ.get("AWS_REGION")}
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            options |= {"endpoint_override": endpoint, "scheme": endpoint.partition("://")[0]}
            options["region"] = options["region"] or "us-east-1"
        options["region"] = options["region"] or resolve_s3_region(path.partition("/")[0])
        return S3FileSystem(**options), path
    system, path = FileSystem.from_uri(url)
    return system, path
