"""A lease: of several runs that would do the same work one does it, and the others wait for it.

It saves work and nothing else depends on it: what is true is what a fenced commit says. A holder writes a new beat every few
seconds. It is taken for dead when no beat came for :data:`PATIENCE` seconds by the clock of the one who waits, or at once when it
was a process of this machine that is no more.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from sparkmed import storage

BEAT = 5.0
PATIENCE = 30.0
LOOK = 0.5
log = logging.getLogger(__name__)


class Taken(Exception):
    """Somebody else holds the lease."""


def url(lake: str, name: str) -> str:
    return storage.join(lake, "leases", f"{name}.json")


@contextlib.contextmanager
def held(url: str, what: str, wait: bool = True) -> Iterator[None]:
    """Hold the lease at ``url`` while the block runs; waits for another holder, or raises :class:`Taken` without ``wait``.

    Who loses it to somebody who took it for dead (after a long pause of its machine) goes on all the same.
    """
    mine = {"holder": uuid.uuid4().hex, "host": socket.gethostname(), **_process(os.getpid())}
    _take(url, what, mine, wait)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(url, mine, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError):
            if _holder(_read(url)) == mine["holder"]:
                storage.remove(url)


def _take(url: str, what: str, mine: dict, wait: bool):
    seen, since, told = None, 0.0, False
    while not storage.create(url, _beats(mine, 0)):
        found = _read(url)
        if found != seen:
            seen, since = found, time.monotonic()
        # a file without a word is of who died before it could write, or writes now
        if found is not None and (_dead(found, mine) or time.monotonic() - since > PATIENCE):
            if _read(url) == found:  # of two who find this at once one may take it from the other: both work then
                with contextlib.suppress(FileNotFoundError):
                    storage.remove(url)
            seen = None
            continue
        if not wait:
            raise Taken(f"another run is at work on {what}")
        if not told and found:
            log.info("another run is at work on %s (%s); waiting for it", what, _who(found))
            told = True
        time.sleep(LOOK)


def _beat(url: str, mine: dict, ended: threading.Event):
    beats = 0
    while not ended.wait(BEAT):
        beats += 1
        try:
            if _holder(_read(url)) != mine["holder"]:
                log.warning("the lease %s was lost: another run may do the same work; no result is counted twice", url)
                return
            storage.write_bytes(url, _beats(mine, beats))
        except OSError as e:  # storage that does not answer now may do so at the next beat
            log.warning("the lease %s could not be renewed: %s", url, e.strerror or type(e).__name__)


def _beats(mine: dict, beats: int) -> bytes:
    return json.dumps({**mine, "beats": beats}).encode()


def _read(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        return None


def _facts(found: bytes | None) -> dict:
    try:
        facts = json.loads(found or b"{}")
    except ValueError:  # being written, or not ours
        return {}
    return facts if isinstance(facts, dict) else {}


def _holder(found: bytes | None) -> str | None:
    return _facts(found).get("holder")


def _who(found: bytes) -> str:
    facts = _facts(found)
    return f"process {facts.get('process')} on {facts.get('host')}"


def _process(number: int) -> dict:
    """What tells a process from all others of the machine, its container and all times; without ``/proc`` nothing does."""
    try:
        with open(f"/proc/{number}/stat") as f:
            state, *rest = f.read().rpartition(")")[2].split()
        started = None if state in "ZX" else rest[18]
        with open("/proc/sys/kernel/random/boot_id") as f:
            machine = f.read().strip()
        return {"process": number, "started": started, "machine": f"{machine} {os.readlink('/proc/self/ns/pid')}"}
    except (OSError, IndexError):
        return {"process": number, "started": None, "machine": None}


def _dead(found: bytes, mine: dict) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    facts = _facts(found)
    if not mine["machine"] or facts.get("machine") != mine["machine"]:
        return False
    return _process(facts["process"])["started"] != facts["started"]
