"""Where decoders run, so that one which dies takes nothing with it.

Decoders are C and Rust. On hostile bytes one may crash, hang or ask for all memory, and its process goes with it. :func:`decode`
runs in this process; within

    with watched():    a decode that takes too long ends this process: for workers that are started anew
    with isolated():   every decode runs in a child process, and a child that dies is the file's ``DECODER_CRASH``
"""

import contextlib
import inspect
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from sparkmed.rejection import Refused

SECONDS = 120.0
"""What any source may take to decode; a hang is what takes longer."""
SECONDS_PER_MB = 1.0
"""What it may take on top per 1e6 bytes of the source."""

_FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGALRM}
"""Signals that a decoder brings on itself. Others come from outside: of the memory killer, of who stops the job."""
_PROGRAM = "import sys; from sparkmed.formats import isolation; isolation._serve(int(sys.argv[1]))"


class Unavailable(OSError):
    """No child process could be started: no fault of a file."""


class _Child:
    """A process that decodes what it is sent, started when first needed and again after its death."""

    def __init__(self):
        self.process = None

    def _start(self):
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        try:
            self.connection, theirs = multiprocessing.Pipe()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=os.environ | {"PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        except OSError as e:  # too little memory, too many processes or files
            raise Unavailable(f"no decoding process can be started: {e.strerror or type(e).__name__}") from None
        try:
            self.connection.recv()
        except (EOFError, OSError):
            raise Unavailable(f"the decoding process ended with status {self.stop()} before it had begun") from None

    def stop(self) -> int | None:
        """End the process, if there is one; its exit status as :mod:`subprocess` gives it."""
        if self.process is None:
            return None
        self.connection.close()  # it ends by itself, unless it is at work
        try:
            status = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process = None
        return status

    def decode(self, function: Callable, data: bytes, arguments: tuple, seconds: int, what: str) -> Any:
        for repeated in (False, True):
            if self.process is None:
                self._start()
            try:
                self.connection.send((function, data, arguments, seconds))
                answer = self.connection.recv()
            except (EOFError, OSError):
                status = self.stop()
                # what was killed from outside may have been killed for another's sake: it is tried once more
                if repeated or status >= 0 or -status in _FAULTS:
                    raise Refused("DECODER_CRASH", f"decoder {what}: {_end(status, seconds)}") from None
                continue
            if isinstance(answer, Refused):
                raise answer
            return answer


def _end(status: int, seconds: int) -> str:
    if status >= 0:
        return f"ended its process with status {status}"
    if -status == signal.SIGALRM:
        return f"took longer than {seconds} s"
    return f"died with signal {-status}"


_child: _Child | None = None
_watched = False


@contextlib.contextmanager
def isolated():
    """Within this block :func:`decode` runs in a child process, the same one as long as it lives."""
    global _child
    before, _child = _child, _Child()
    try:
        yield
    finally:
        _child.stop()
        _child = before


@contextlib.contextmanager
def watched():
    """Within this block a decode that takes longer than its limit ends this process by ``SIGALRM``, even one that never returns."""
    global _watched
    before, _watched = _watched, True
    try:
        yield
    finally:
        _watched = before


def decode(function: Callable, data: bytes, *arguments, what: str) -> Any:
    """``function(data, *arguments)``: voxels of one source; ``what`` names decoder and source in messages.

    ``function`` is one of a module, and raises :class:`Refused`. In a child its death or :data:`SECONDS` without an answer is
    ``DECODER_CRASH``; :class:`Unavailable` when there can be no child.
    """
    if _child is not None:
        return _child.decode(function, data, arguments, _seconds(data), what)
    if not _watched:
        return function(data, *arguments)
    signal.alarm(_seconds(data))  # its default is to end the process, also in the middle of foreign code that keeps Python's lock
    try:
        return function(data, *arguments)
    finally:
        signal.alarm(0)


def decode_each(function: Callable, data: bytes, *arguments, what: str) -> Iterator[Any]:
    """:func:`decode` of a ``function`` that yields, such as frames; the limit of seconds is for each of them."""
    if _child is not None:
        yield from _child.decode(function, data, arguments, _seconds(data), what)
        return
    made = function(data, *arguments)
    while True:
        if _watched:
            signal.alarm(_seconds(data))
        try:
            item = next(made, None)
        finally:
            if _watched:
                signal.alarm(0)
        if item is None:
            return
        yield item


def _seconds(data: bytes) -> int:
    return math.ceil(SECONDS + SECONDS_PER_MB * len(data) / 1e6)


def _serve(fd: int):
    """The child: answers until its parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends, and hangs up
    connection = Connection(fd)
    connection.send("ready")
    while True:
        try:
            function, data, arguments, seconds = connection.recv()
        except EOFError:
            return
        signal.alarm(seconds)
        try:
            answer = function(data, *arguments)
            answer = list(answer) if inspect.isgenerator(answer) else answer
        except Refused as e:
            answer = e
        except (MemoryError, RecursionError, Exception) as e:
            answer = Refused("BROKEN_FILE", f"the voxels cannot be read ({type(e).__name__})")
        signal.alarm(0)
        del data
        connection.send(answer)
