"""PostgreSQL on loopback, and MLflow's server before it as conf/mlflow/ starts it."""

import contextlib
import os
import pathlib
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import cluster

UNIT = pathlib.Path(__file__).parents[1] / "conf" / "mlflow" / "sparkmed-mlflow.service"


def postgres_programs() -> pathlib.Path | None:
    """The folder of initdb and postgres: Debian keeps it off the PATH. None without PostgreSQL."""
    named = shutil.which("postgres")
    debian = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    found = pathlib.Path(named).resolve() if named else debian[-1] if debian else None
    return found.parent if found and (found.parent / "initdb").exists() else None


@contextlib.contextmanager
def postgres(patience=90.0) -> Iterator[str]:
    """SQLAlchemy's URL of an empty database ``mlflow``, with its password; server and database end with the block."""
    import psycopg2

    programs, port, password = postgres_programs(), _free_port(), secrets.token_urlsafe(12)
    # as root it will not run; pytest's folders are closed to others
    become = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as scratch:
        folder = pathlib.Path(scratch)
        (folder / "password").write_text(password)
        if become:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres")
        initdb = [*become, programs / "initdb", "-D", folder / "data", "-U", "mlflow", "-E", "UTF8", "--locale=C", "--no-sync"]
        made = [*initdb, "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
        subprocess.run(made, check=True, capture_output=True, text=True, cwd=folder)
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
        command = [*become, str(programs / "postgres"), "-D", str(folder / "data"), *options]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
        with cluster.kept(command, dict(os.environ), **streams) as process:
            where = {"host": "127.0.0.1", "port": port, "user": "mlflow", "password": password}
            deadline = time.monotonic() + patience
            while True:
                try:
                    connection = psycopg2.connect(dbname="postgres", **where)
                    break
                except psycopg2.OperationalError as e:
                    if time.monotonic() > deadline or process.poll() is not None:
                        raise TimeoutError(f"PostgreSQL does not answer: {e}") from None
                    time.sleep(0.2)
            connection.autocommit = True
            connection.cursor().execute("create database mlflow")
            connection.close()
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow"


@contextlib.contextmanager
def server(store: str, folder: pathlib.Path, patience=180.0) -> Iterator[str]:
    """URL of ``mlflow server`` on the database ``store``, its artifacts under ``folder``: the command and environment of the unit,
    with what the unit says an operator may change."""
    text = UNIT.read_text()
    environment = dict(line.split("=", 1) for line in re.findall(r"^Environment=(.*)$", text, re.M))
    program, *arguments = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.M)[1])
    assert program.endswith("/.venv/bin/mlflow")
    changed = {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_PORT"}
    assert changed < environment.keys()
    port = _free_port()
    environment |= dict(zip(sorted(changed), (str(folder / "artifacts"), store, str(port)), strict=True))
    others = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    log = folder / "server.log"
    with open(log, "w") as output:
        command = [str(pathlib.Path(sys.executable).with_name("mlflow")), *arguments]
        with cluster.kept(command, others | environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder) as process:
            url = f"http://{environment['MLFLOW_HOST']}:{port}"
            deadline = time.monotonic() + patience
            while not _healthy(url):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise TimeoutError(f"MLflow's server does not answer:\n{log.read_text()[-3000:]}")
                time.sleep(0.3)
            yield url


def _healthy(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as page:
            return page.read() == b"OK"
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
