"""Brings .venv to requirements.lock, with the Horovod wheel and sparkmed itself; does nothing when it is there already.

    python3.11 install.py

Standard library only: it runs before anything is installed. `make demo` and `make test` call it.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import horovod_wheel

ROOT = pathlib.Path(__file__).resolve().parents[2]


def install(root: pathlib.Path, cache: pathlib.Path):
    """Create or update ``root``/.venv. The stamp in it is written last, so that a killed run is taken up again by the next."""
    venv = root / ".venv"
    python, stamp = venv / "bin" / "python", venv / "sparkmed.json"
    with open(root / "requirements.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = {"root": str(root), "digest": _digest(root)}
        found = json.loads(stamp.read_text()) if stamp.exists() else {}
        if found == wanted and _runs(python):
            return
        stamp.unlink(missing_ok=True)
        if not _runs(python) or found.get("root", wanted["root"]) != wanted["root"]:  # its programs name the folder it was made in
            _run([sys.executable, "-m", "venv", "--clear", venv], "creating .venv")
        pip = [python, "-m", "pip", "install", "-qq"]
        _run([*pip, "-r", root / "requirements.lock"], "installing requirements.lock into .venv (2 minutes)")
        wheel = horovod_wheel.wheel(python, cache)
        _run([*pip, "--no-deps", "--force-reinstall", wheel], "installing Horovod")
        _run([*pip, "--no-deps", "--no-build-isolation", "--editable", root], "installing sparkmed")
        _run([python, "-m", "pip", "check"], "checking the environment")
        stamp.with_suffix(".new").write_text(json.dumps(wanted))
        stamp.with_suffix(".new").replace(stamp)


def _digest(root: pathlib.Path) -> str:
    files = [root / "requirements.lock", root / "pyproject.toml", *sorted(pathlib.Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join([sys.version.encode(), *(f.read_bytes() for f in files)])).hexdigest()


def _runs(python: pathlib.Path) -> bool:
    """Whether ``python`` is there and of our version."""
    probe = [python, "-c", "import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))"]
    return python.exists() and subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0


def _run(command: list, what: str):
    print(f"{what} ...", file=sys.stderr, flush=True)
    elsewhere = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    environment = {k: v for k, v in os.environ.items() if k not in elsewhere} | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode
    if status:
        raise SystemExit(f"{what}: failed (exit status {status})")


if __name__ == "__main__":
    install(ROOT, horovod_wheel.cache())
