"""Decoding in a child process: the children here really crash."""

import ctypes
import errno
import os
import signal
import time

import numpy as np
import pytest

from sparkmed import formats
from sparkmed.formats import isolation
from sparkmed.rejection import Refused

from . import dicoms


def in_child() -> bool:
    return "isolation._serve" in open("/proc/self/cmdline").read()


def total(data: bytes, more: int = 0) -> np.ndarray:
    return np.array([sum(data) + more, in_child()])


def crash(data: bytes):
    ctypes.string_at(0)


def end(data: bytes):
    os._exit(3)


def be_killed(data: bytes):
    os.kill(os.getpid(), signal.SIGKILL)


def be_killed_once(data: bytes) -> str:
    """``data`` is the path of a marker that is there when it has been."""
    if os.path.exists(data):
        return "alive"
    open(data, "w").close()
    be_killed(data)


def hang(data: bytes):
    """Without giving up Python's lock, as a decoder in C does."""
    ctypes.PyDLL(None).sleep(1000)


def refuse(data: bytes):
    raise Refused("BROKEN_PIXELS", "no pixels")


def fail(data: bytes):
    raise ZeroDivisionError("/of/somebody")


def decode(function, data=b"\1\2", *arguments):
    return isolation.decode(function, data, *arguments, what="x on source 1 of 1")


@pytest.fixture
def isolated():
    with isolation.isolated():
        yield


def test_in_a_child_within_the_block(isolated):
    assert decode(total, b"\1\2", 4).tolist() == [7, 1]
    with isolation.isolated():
        assert decode(total).tolist() == [3, 1]
    assert decode(total).tolist() == [3, 1]


def test_in_this_process_by_default():
    assert decode(total).tolist() == [3, 0]
    with isolation.watched():
        assert decode(total).tolist() == [3, 0]
    assert signal.alarm(0) == 0, "no alarm is left"


@pytest.mark.parametrize(
    "function, said",
    [(crash, "died with signal 11"), (end, "status 3"), (be_killed, "died with signal 9"), (hang, "longer than 3 s")],
)
def test_a_child_that_dies_is_a_refusal_and_the_next_file_is_decoded(isolated, monkeypatch, function, said):
    monkeypatch.setattr(isolation, "SECONDS", 2)
    assert decode(total).tolist() == [3, 1]
    started = time.monotonic()
    with pytest.raises(Refused, match=f"DECODER_CRASH: decoder x on source 1 of 1: .*{said}"):
        decode(function)
    assert time.monotonic() - started < 30
    assert decode(total).tolist() == [3, 1]


def test_a_child_that_something_else_killed_blames_no_file(isolated, tmp_path):
    assert decode(be_killed_once, str(tmp_path / "marker").encode()) == "alive"


def test_errors_come_back(isolated):
    with pytest.raises(Refused, match="BROKEN_PIXELS: no pixels"):
        decode(refuse)
    with pytest.raises(Refused, match="BROKEN_FILE: the voxels cannot be read .ZeroDivisionError"):
        decode(fail)


def test_a_child_that_cannot_start_blames_no_file(isolated, monkeypatch, tmp_path):
    (header,), _ = formats.read_headers(str(dicoms.write(tmp_path, [dicoms.dataset(np.zeros((4, 5), np.uint8))])))
    monkeypatch.setattr(isolation, "_PROGRAM", "raise SystemExit(1)")
    with pytest.raises(isolation.Unavailable, match="status 1"):
        formats.read_volume(header)

    def none_left(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(isolation.subprocess, "Popen", none_left)
    with pytest.raises(isolation.Unavailable, match="can be started: Resource temporarily"):
        formats.read_volume(header)


def test_volumes_are_the_same(tmp_path):
    made = dicoms.series(dicoms.stack((60, 50, 4)))
    for ds in made[:2]:
        ds.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    headers, _ = formats.read_headers(str(dicoms.write(tmp_path, made)))
    here = formats.read_volume(headers[0])
    with isolation.isolated():
        there = formats.read_volume(headers[0])
    np.testing.assert_array_equal(here.array, there.array)
    assert here.array.dtype == there.array.dtype


def test_no_child_outlives_its_block():
    with isolation.isolated():
        decode(total)
        pid = isolation._child.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
