"""Reading an archive in a process of its own, whose time and memory are measured and limited."""

import multiprocessing
import pathlib
import resource
import time
import traceback
from dataclasses import dataclass

from sparkmed import formats

LIMIT = 4 << 30
"""Bytes of address space that a reading may take on top."""


@dataclass(frozen=True)
class Outcome:
    volumes: list[str]
    """Names of the files that became volumes."""
    reasons: dict[str, str]
    """Reason by name of the file or member."""
    messages: list[str]
    error: str
    seconds: float
    """Of the processor."""
    mb: float
    """Growth of resident memory at its highest, in MiB."""


def read(folder: pathlib.Path, patience: float = 60) -> Outcome:
    """What ``read_archive`` makes of ``folder``; the process that does it may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparkmed.formats"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(str(folder), theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(patience):
            return Outcome([], {}, [], f"no end after {patience} s", patience, 0)
        return ours.recv()
    except EOFError:
        child.join()
        return Outcome([], {}, [], f"died with status {child.exitcode}", 0, 0)
    finally:
        child.kill()
        child.join()


def _measured(folder: str, connection):
    size = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT, size + LIMIT))
    before, started, error = _status("VmRSS"), time.process_time(), ""
    volumes, rejections = [], []
    try:
        volumes, rejections = formats.read_archive(folder)
    except BaseException:
        error = traceback.format_exc()
    seconds, mb = time.process_time() - started, (_status("VmHWM") - before) / 2**20
    prefix = f"file://{folder}/"
    names = [s.replace(prefix, "") for v in volumes for s in v.sources]
    reasons = {r.uri.replace(prefix, ""): r.reason for r in rejections}
    connection.send(Outcome(names, reasons, [r.message for r in rejections], error, seconds, mb))


def _status(name: str) -> int:
    (line,) = (s for s in pathlib.Path("/proc/self/status").read_text().splitlines() if s.startswith(name + ":"))
    return int(line.split()[1]) * 1024
