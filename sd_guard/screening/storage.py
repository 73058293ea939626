"""A run's folder, on this machine or at any address of fsspec (`s3://`, `gs://`, `memory://`, ...).

Every file in it is whole or not there. On this machine by write, fsync, rename; elsewhere a file is put as one, and the
address must show it whole or not at all, as object stores do.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast
from uuid import uuid4
from weakref import WeakValueDictionary, finalize

import fsspec
from fsspec.implementations.local import LocalFileSystem

_HALF_WRITTEN: Final = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_LOCK_FILE: Final = ".lock"


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of files by name; names may hold slashes.

    Attributes:
        address: As the user wrote it.
        files: The file system.
        root: The folder in it.
    """

    address: str
    files: fsspec.AbstractFileSystem
    root: str

    @classmethod
    def at(cls, address: Path | str | Store) -> Store:
        """The folder at a path or an address; nothing is made yet.

        Raises:
            ValueError: If fsspec knows no such address, or lacks the package for it.
        """
        if isinstance(address, Store):
            return address
        try:
            files, root = fsspec.url_to_fs(str(address))
        except (ValueError, ImportError) as error:
            raise ValueError(f"{address}: cannot be used as a folder ({error}); name another") from None
        return cls(str(address), files, root.rstrip("/"))

    @property
    def local(self) -> Path | None:
        """The folder's path; None if it is not on this machine."""
        return Path(self.root) if isinstance(self.files, LocalFileSystem) else None

    def where(self, name: str) -> str:
        """Where a file is, as the user wrote the folder: a path, or an address."""
        return f"{self.address.rstrip('/')}/{name}"

    def is_same(self, other: Store) -> bool:
        """True if both are one folder, however it was written."""
        if self.local is not None and other.local is not None:
            return self.local.resolve() == other.local.resolve()
        return self.root == other.root and self.files == other.files

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in a folder, sorted; none if it is not there. Half-written files are not."""
        path = self._path(folder)
        self.files.invalidate_cache(path)
        try:
            found = cast("list[str]", self.files.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (each.rstrip("/").rpartition("/")[2] for each in found)
        return sorted(name for name in names if name != _LOCK_FILE and not _HALF_WRITTEN.fullmatch(name))

    def exists(self, name: str) -> bool:
        """True if there is such a file."""
        return bool(self.files.exists(self._path(name)))

    def open(self, name: str) -> IO[bytes]:
        """A file to read, in any order."""
        return cast("IO[bytes]", self.files.open(self._path(name), "rb"))

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file that is whole or not there."""
        with self.create(name) as file:
            file.write(data)

    @contextmanager
    def create(self, name: str) -> Generator[IO[bytes], None, None]:
        """A new file to write, which is there only when the block has ended, and not if it raised."""
        if self.local is not None:
            with atomic(self.local / name) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile() as file:
            yield cast("IO[bytes]", file)
            file.flush()
            path = self._path(name)
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.put_file(file.name, path)

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all that is in it, if it is there."""
        if self.exists(name):
            self.files.rm(self._path(name), recursive=True)

    def sweep(self, folder: str = "") -> None:
        """Removes the half-written files that killed processes have left in a folder; no other may be at work there."""
        path = None if self.local is None else self.local / folder
        if path is None or not path.is_dir():
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if _HALF_WRITTEN.fullmatch(entry.name):
                    os.unlink(entry.path)

    def lock(self) -> Lock | None:
        """Keeps other processes out of the folder, which is made, until the lock is closed.

        None where the folder is on no file system of this machine, or on one that knows no locks.

        Raises:
            ValueError: If the folder cannot be made, or another process has it.
        """
        if self.local is None:
            return None
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            return Lock.of(self.local.resolve() / _LOCK_FILE)
        except ImportError:  # Windows has no such locks
            return None
        except OSError as error:
            if error.errno in _TAKEN:
                raise ValueError(
                    f"{self.address}: another run is at work there; wait for its end, or name another folder with --out"
                ) from None
            if error.errno in _NO_LOCKS:
                return None
            reason = error.strerror or type(error).__name__
            raise ValueError(f"{self.address}: cannot be written ({reason}); name another folder with --out") from None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


_TAKEN: Final = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_locks: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


class Lock:
    """A file that one process at a time has, until it is closed or the process ends, in whatever way."""

    def __init__(self, path: Path) -> None:
        """Makes and takes it; OSError where another process has it."""
        import fcntl

        while True:
            file = path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # whoever had it has removed it meanwhile
        self.close = finalize(self, _release, path, file)

    @classmethod
    def of(cls, path: Path) -> Lock:
        """This process's own."""
        held = _locks.get(path)
        if held is None or not held.close.alive:
            held = _locks[path] = cls(path)
        return held


def _release(path: Path, file: IO[bytes]) -> None:
    path.unlink(missing_ok=True)
    file.close()


@contextmanager
def atomic(path: Path) -> Generator[IO[bytes], None, None]:
    """A file to write that is either absent (or as it was) or complete, also after a kill or a loss of power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")  # several processes may write the same file
    file: IO[Any] = temporary.open("wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
