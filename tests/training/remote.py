"""A remote file system for tests, whose ``counted:///folder/file`` is a local file, and a process that fetches from it.

The path of every file that is opened is written to the file that the environment names as ``COUNTED_OPENS``. Reading takes
``COUNTED_SECONDS`` per ``COUNTED_BYTES`` bytes, where they are given.
"""

import os
import pathlib
import time

import fsspec
from fsspec.implementations.local import LocalFileSystem


class CountedFileSystem(LocalFileSystem):
    protocol = ("counted",)
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).removeprefix("counted://"))

    def _open(self, path, mode="rb", **kwargs):
        with open(os.environ["COUNTED_OPENS"], "a") as log:
            log.write(path + "\n")
        return _Slow(open(path, mode))


class _Slow:
    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def read(self, size=-1):
        seconds = float(os.environ.get("COUNTED_SECONDS", 0))
        if seconds:
            time.sleep(seconds)
            size = min(size, int(os.environ["COUNTED_BYTES"])) if size >= 0 else size
        return self._file.read(size)


fsspec.register_implementation("counted", CountedFileSystem, clobber=True)


def opened() -> list[str]:
    """Names of the files opened so far, by any process."""
    log = pathlib.Path(os.environ["COUNTED_OPENS"])
    return [pathlib.Path(line).name for line in log.read_text().splitlines()] if log.exists() else []


def fetch(folder: str, url: str, answers, limit_gb: float = 1.0) -> None:
    """In a process of its own: read ``url`` through the cache in ``folder``, and put what was read into the queue ``answers``."""
    from sparkmed.cache import FileCache, version

    size = os.path.getsize(url.removeprefix("counted://"))
    with FileCache(folder, limit_gb).open(url, size, version(url)) as file:
        answers.put(bytes(file.read()))
