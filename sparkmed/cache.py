"""Copies of remote files on the local disk: fetched once per machine, checked, and never more of them than a limit.

fsspec's ``filecache`` and ``simplecache`` neither check what they hold, nor keep a limit, nor let one process wait while another
fetches the same file; hence this one.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from sparkmed import storage
from sparkmed.rejection import InputError

CHUNK = 16 << 20  # one request of an object store
ENTRY = re.compile(r"[0-9a-f]{32}\.([0-9a-f]{64}|part)")
STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "modificationTime", "updated", "created")


class FetchError(OSError):
    """A remote file cannot be read, or is not the one that was listed."""


def version(url: str) -> str:
    """What the file system says of ``url`` that changes with its content (etags, times); "" where it says nothing of the kind.

    Raises :class:`FetchError` when it cannot say.
    """
    try:
        fs, path = storage.filesystem(url)
        info = fs.info(path)
    except Exception as e:  # of any file system
        raise FetchError(f"{type(e).__name__}: {e}") from e
    return " ".join(f"{key}={info[key]}" for key in STAMPS if info.get(key))


class FileCache:
    """Copies of remote files that all processes of one user on this machine share, at most ``limit_gb`` (1e9 bytes) of them.

    They are in a folder per user, open to nobody else, below ``folder`` (None: the system's for temporary files). A copy is named
    after its URL, size and version, so a changed file is another copy, and after its SHA-256, which each process checks when it
    first opens the copy. Copies make room for others in the order of their last use.

    A copy is written to ``<key>.part`` under a lock on that file, and renamed when it is whole and on the disk. Who wants the same
    file meanwhile waits for the lock. A killed process loses its lock, and the next that fetches anything removes what it left.

    Where the folder cannot be used (not writable, disk full) files are read where they are, with one warning per process.
    """

    def __init__(self, folder: str | None = None, limit_gb: float = 20.0):
        parent = storage.local_path(folder or tempfile.gettempdir())
        if parent is None:
            raise InputError(f"a cache wants a folder on the local disk, got {folder}")
        self.folder = parent / f"sparkmed-cache-{os.geteuid()}"
        self.limit_bytes = int(limit_gb * 1e9)
        self._checked: dict[str, tuple[int, int]] = {}  # size and time of change of the copies whose checksum was right
        self._failed = False

    def open(self, url: str, size: int, version: str) -> BinaryIO | pa.NativeFile:
        """``url`` of ``size`` bytes, open for reading: its copy, or itself when it has no version or is larger than the limit.

        An open copy stays readable when it has to make room. Raises :class:`FetchError` when ``url`` cannot be read or is not of
        that size and version any more.
        """
        copy = None
        if version and size <= self.limit_bytes:
            key = hashlib.sha256(f"{url} {size} {version}".encode()).hexdigest()[:32]
            try:
                self._claim()
                copy = self._find(key)
                if copy is None and not self._failed:
                    copy = self._fetch(key, url, size, version)
            except FetchError:
                raise
            except OSError as e:
                if not self._failed:
                    warnings.warn(f"remote files are read without a cache: {self.folder}: {e.strerror or e}", stacklevel=2)
                self._failed = True
        return storage.open(url) if copy is None else copy

    def _claim(self):
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.geteuid():
            raise PermissionError("it belongs to another user")

    def _find(self, key: str) -> pa.NativeFile | None:
        """The copy, open and marked as used; a damaged one is removed."""
        for path in self.folder.glob(f"{key}.*"):
            checksum = path.suffix[1:]
            if checksum == "part":
                continue
            try:
                file, status = pa.OSFile(str(path)), path.stat()
            except FileNotFoundError:  # it made room just now
                continue
            state = status.st_size, status.st_mtime_ns
            if self._checked.get(path.name) != state:
                if _sha256(file) != checksum:
                    file.close()
                    path.unlink(missing_ok=True)
                    continue
                self._checked[path.name] = state
            _mark_used(path, status)
            return file
        return None

    def _fetch(self, key: str, url: str, size: int, stamp: str) -> pa.NativeFile | None:
        """A new copy, open; None when the copies that others are fetching leave no room for it."""
        part = self.folder / f"{key}.part"
        with _locked(part) as out:
            found = self._find(key)  # another process fetched it while this one waited for the lock
            if found is not None or not self._reserve(out, part, size):
                return found
            checksum, arrived = hashlib.sha256(), 0
            for chunk in _chunks(url):
                out.write(chunk)
                checksum.update(chunk)
                arrived += len(chunk)
                if arrived > size:
                    break
            if arrived != size:
                raise FetchError(f"it was listed with {size} bytes, {'more' if arrived > size else arrived} came")
            if (now := version(url)) != stamp:
                raise FetchError(f"it changed: listed with {stamp}, now {now}")
            out.flush()
            os.fsync(out.fileno())
            path = self.folder / f"{key}.{checksum.hexdigest()}"
            with self._alone():
                os.replace(part, path)
                file, status = pa.OSFile(str(path)), path.stat()
            self._checked[path.name] = status.st_size, status.st_mtime_ns
            _mark_used(path, status)
            return file

    def _reserve(self, out: BinaryIO, part: pathlib.Path, size: int) -> bool:
        """Give ``part`` its final size, which others then count, and remove the copies that were not used for longest."""
        with self._alone():
            fetched, copies = 0, []
            for path in self.folder.iterdir():
                if not ENTRY.fullmatch(path.name) or path == part:
                    continue
                if path.suffix == ".part" and _remove_abandoned(path):
                    continue
                try:
                    status = path.stat()
                except FileNotFoundError:  # it was damaged, or could not be fetched
                    continue
                if path.suffix == ".part":
                    fetched += status.st_size
                else:
                    copies.append((status.st_atime_ns, status.st_size, path))
            if fetched + size > self.limit_bytes:
                return False
            used = fetched + sum(n for _, n, _ in copies)
            for _, n, path in sorted(copies):
                if used + size <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= n
            out.truncate(size)
            return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While copies are counted, and while one gets its name, nobody else does so."""
        with open(self.folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[BinaryIO]:
    """``path``, made where it is not there, open and locked; in the end it is removed unless it was renamed.

    Only who has its lock renames or removes it. The kernel unlocks the file of a killed process.
    """
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # who had the lock renamed or removed it
                continue
            try:
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()
            return


def _mark_used(path: pathlib.Path, status: os.stat_result):
    with contextlib.suppress(FileNotFoundError):  # it made room just now
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))


def _remove_abandoned(part: pathlib.Path) -> bool:
    try:
        with open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, part):
                part.unlink()
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:  # somebody writes it
        return False


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sha256(file: pa.NativeFile) -> str:
    """Of all of ``file``, which is at its start before and after."""
    checksum = hashlib.sha256()
    while chunk := file.read(1 << 20):
        checksum.update(chunk)
    file.seek(0)
    return checksum.hexdigest()


def _chunks(url: str) -> Iterator[bytes]:
    try:
        with storage.open(url) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except Exception as e:  # of any file system
        raise FetchError(f"{type(e).__name__}: {e}") from e
