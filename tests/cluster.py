"""A real Spark standalone cluster on loopback, from the pyspark that pip installed.

Run as a program it is a keeper: it starts a command in a process group of its own and ends the group when the process that
asked for it ends, however that happens. A killed test run therefore leaves neither a master nor workers behind.
"""

import contextlib
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pyspark

SPARK_HOME = pathlib.Path(pyspark.__file__).parent


@dataclass(frozen=True)
class Cluster:
    """A running cluster: ``master`` is its ``spark://`` address, ``web`` the master's page, ``folder`` has logs and work files."""

    master: str
    web: str
    folder: pathlib.Path

    def state(self) -> dict:
        """The master's own account: ``workers``, ``activeapps``, ``completedapps`` ..."""
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.web}/json/", timeout=10) as page:
            return json.load(page)

    def submit(self, program, *args, conf: dict | None = None, env: dict | None = None, timeout: float = 300):
        """Run ``spark-submit program args...`` to its end; a :class:`subprocess.CompletedProcess` with text.

        Raises TimeoutError after ``timeout`` seconds, with what was said so far; the program has ended then.
        """
        settings = {"spark.executor.memory": "1g", "spark.driver.memory": "1g", "spark.driver.host": "127.0.0.1"}
        settings |= {"spark.ui.enabled": "false"} | (conf or {})
        command = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", self.master]
        command += [word for key, value in settings.items() for word in ("--conf", f"{key}={value}")]
        command += [str(program), *(str(a) for a in args)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with kept(command, _environment(self.folder) | (env or {}), **streams) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as e:
                said = [(text or b"").decode(errors="replace")[-3000:] for text in (e.stdout, e.stderr)]
                raise TimeoutError(f"{program} ran for more than {timeout} s; it said\n" + "\n".join(said)) from None
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def standalone(folder: pathlib.Path, workers=2, cores=1, memory="2g", patience=90.0) -> Iterator[Cluster]:
    """A master and ``workers`` workers on 127.0.0.1 at free ports, all registered; they end with the block.

    ``folder`` exists and is empty; ``cores`` and ``memory`` are what one worker offers. Raises TimeoutError after ``patience`` s.
    """
    with contextlib.ExitStack() as stack:

        def start(name: str, *arguments: str) -> pathlib.Path:
            log = folder / f"{name}.log"
            command = [str(SPARK_HOME / "bin" / "spark-class"), *arguments]
            output = stack.enter_context(open(log, "w"))
            stack.enter_context(kept(command, _environment(folder), stdout=output, stderr=subprocess.STDOUT))
            return log

        at = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
        log = start("master", "org.apache.spark.deploy.master.Master", *at)
        master = _told(log, r"Starting Spark master at (spark://\S+)", patience)
        web = "http://127.0.0.1:" + _told(log, r"MasterWebUI.* started at http://\S+:(\d+)", patience)
        for i in range(workers):
            place = ["--cores", str(cores), "--memory", memory, "--work-dir", str(folder / f"worker-{i}")]
            start(f"worker-{i}", "org.apache.spark.deploy.worker.Worker", *at, *place, master)
        cluster = Cluster(master, web, folder)
        deadline = time.monotonic() + patience
        while cluster.state()["aliveworkers"] < workers:
            if time.monotonic() > deadline:
                raise TimeoutError("workers did not register:\n" + "\n".join(p.read_text()[-2000:] for p in folder.glob("*.log")))
            time.sleep(0.2)
        yield cluster


def _environment(folder: pathlib.Path) -> dict[str, str]:
    """This process's environment without the Spark that the user may have set up, and with this interpreter for all of Python."""
    others = ("SPARK_", "PYSPARK_", "HADOOP_", "YARN_")
    return {k: v for k, v in os.environ.items() if not k.startswith(others)} | {
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "512m",
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
    }


def _told(log: pathlib.Path, pattern: str, patience: float) -> str:
    """The first group of ``pattern`` once it stands in ``log``."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise TimeoutError(f"no {pattern!r} in {log}:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def kept(command: list[str], environment: dict[str, str], **streams) -> Iterator[subprocess.Popen]:
    """``command`` under a keeper: it ends with the block, and with this process."""
    theirs, ours = os.pipe()
    keeper = [sys.executable, __file__, str(theirs), *command]
    streams |= {"stdin": subprocess.DEVNULL, "pass_fds": [theirs], "start_new_session": True}
    try:
        process = subprocess.Popen(keeper, env=environment, **streams)
    finally:
        os.close(theirs)
    try:
        yield process
    finally:
        os.close(ours)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _keep(pipe: int, command: list[str]) -> int:
    """Run ``command`` until it ends or ``pipe`` is closed at its other end; its exit status."""
    child = subprocess.Popen(command, start_new_session=True)
    try:
        while child.poll() is None and not select.select([pipe], [], [], 0.1)[0]:
            pass
    finally:
        for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)
                if sign == signal.SIGTERM:
                    time.sleep(0.2)
    return child.returncode


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), sys.argv[2:]))
