import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from sparkmed import lease, storage


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "LOOK", 0.01)
    monkeypatch.setattr(lease, "BEAT", 0.05)


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    return lease.url(str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}", "work")


def test_the_second_waits_for_the_first_and_leaves_nothing(place):
    order, inside = [], threading.Event()

    def first():
        with lease.held(place, "work"):
            inside.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with pytest.raises(lease.Taken, match="another run is at work on work"), lease.held(place, "work", wait=False):
        pass
    with lease.held(place, "work"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"] and not storage.exists(place)


def test_one_of_many_at_a_time(tmp_path):
    place, most, at_work = lease.url(str(tmp_path), "work"), [], []

    def work(n):
        with lease.held(place, "work"):
            at_work.append(n)
            most.append(len(at_work))
            time.sleep(0.01)
            at_work.remove(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most == [1] * 8


def test_a_killed_process_of_this_machine_blocks_nobody(tmp_path):
    place = lease.url(str(tmp_path), "work")
    program = (
        f"from sparkmed import lease; import time\nwith lease.held({place!r}, 'work'): print('held', flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGKILL)
        began = time.monotonic()
        with lease.held(place, "work"):
            assert time.monotonic() - began < lease.PATIENCE / 2


def test_a_holder_elsewhere_is_dead_when_it_has_been_silent(place, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE", 0.3)
    elsewhere = {"holder": "x", "host": "far", "process": 1, "started": "1", "machine": "another", "beats": 0}
    storage.write_bytes(place, json.dumps(elsewhere).encode())
    began = time.monotonic()

    def beats():
        for n in range(1, 5):
            time.sleep(0.15)
            storage.write_bytes(place, json.dumps(elsewhere | {"beats": n}).encode())

    thread = threading.Thread(target=beats)
    thread.start()
    with lease.held(place, "work"):
        assert time.monotonic() - began > 0.6 + 0.3
    thread.join()


def test_a_holder_beats_and_goes_on_without_when_it_was_taken_for_dead(place):
    with lease.held(place, "work"):
        first = storage.read_bytes(place)
        deadline = time.monotonic() + 5
        while storage.read_bytes(place) == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        theirs = b'{"holder": "y"}'
        storage.write_bytes(place, theirs)
        time.sleep(0.2)
    assert storage.read_bytes(place) == theirs


@pytest.mark.parametrize("left", [b"", b"null", b"[1]"], ids=repr)
def test_a_holder_that_died_before_it_could_say_who_it_is_blocks_nobody(place, monkeypatch, left):
    monkeypatch.setattr(lease, "PATIENCE", 0.2)
    storage.write_bytes(place, left)
    took = threading.Event()

    def work():
        with lease.held(place, "work"):
            took.set()

    threading.Thread(target=work, daemon=True).start()
    assert took.wait(10)
