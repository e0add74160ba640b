"""Builds the Horovod wheel for one Python environment, once, and prints where it is.

    python3.11 horovod_wheel.py [--python .venv/bin/python]

Horovod is published as sources only. They set C++14, which torch >= 2.1 refuses, so the compiler is wrapped. What comes out fits
one torch only: wheels are kept by the versions of horovod, torch and python in $SPARKMED_CACHE/wheels, ~/.cache/sparkmed/wheels.
HOROVOD_GPU_OPERATIONS=NCCL makes a wheel whose ranks talk from GPU to GPU. Standard library only.
"""

import argparse
import contextlib
import fcntl
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile

VERSION = "0.28.1"
OPTIONS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
}
COMPILER = """#!/usr/bin/env bash
args=()
for a in "$@"; do
    case $a in -std=c++11 | -std=c++14 | -std=gnu++11 | -std=gnu++14) a=-std=gnu++17 ;; esac
    args+=("$a")
done
exec {compiler} "${{args[@]}}"
"""
FACTS = "import platform, sys, torch; print('torch-%s-cp%d%d-%s' % (torch.__version__, *sys.version_info[:2], platform.machine()))"
NOT_PLAIN = r"[^\w./-]"
TRIAL = "import torch, horovod.torch as h; h.init(); assert h.gloo_built() and h.allreduce(torch.ones(3)).sum() == 3"


def cache() -> pathlib.Path:
    """The folder of the wheels; outside any repository, so that a fresh clone need not build again."""
    root = os.environ.get("SPARKMED_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sparkmed")
    return pathlib.Path(root).expanduser().absolute() / "wheels"


def key(python: pathlib.Path) -> str:
    """Name of what a wheel for ``python`` depends on. Raises SystemExit when that Python has no torch."""
    facts = subprocess.run([python, "-c", FACTS], capture_output=True, text=True)
    if facts.returncode:
        raise SystemExit(f"{python} has no torch that it can import; install it first\n{facts.stderr}")
    gpu = os.environ.get("HOROVOD_GPU_OPERATIONS", "")
    return f"horovod-{VERSION}-{facts.stdout.strip()}" + (f"-{gpu.lower()}" if gpu else "")


def wheel(python: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The wheel for ``python`` in ``folder``, built when it is not there.

    Only a wheel that Python could load gets its name there, by one rename: a killed build leaves nothing that is taken for a wheel.
    Of builds of one wheel at the same time one builds and the others wait.
    """
    name = key(python)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _whole(folder / name)
        if found is None:
            for remains in [folder / name, *folder.glob(f"{_building(name)}*")]:
                shutil.rmtree(remains, ignore_errors=True)
            found = _build(python, folder, name)
        return found


def _whole(folder: pathlib.Path) -> pathlib.Path | None:
    for path in folder.glob("*.whl"):
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:
                return path
    return None


def _building(name: str) -> str:
    """How the folder begins in which a wheel is built. The sources' CMake files take its path for a regular expression."""
    return f".building-{re.sub(NOT_PLAIN, '-', name)}-"


def _build(python: pathlib.Path, folder: pathlib.Path, name: str) -> pathlib.Path:
    print(f"building the Horovod wheel, once (3 minutes on 2 cores): {folder / name}", file=sys.stderr, flush=True)
    log = folder / f"{name}.log"
    with contextlib.ExitStack() as stack:
        building = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_building(name), dir=folder)))
        scratch = building
        if re.search(NOT_PLAIN, str(building)):
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        if " " in str(python):
            (scratch / "environment").symlink_to(python.parent.parent)
            python = scratch / "environment" / "bin" / python.name
        compiler = scratch / "g++17"
        compiler.write_text(COMPILER.format(compiler=shlex.quote(os.environ.get("CXX") or "g++")))
        compiler.chmod(0o755)
        environment = {**os.environ, **OPTIONS, "CXX": str(compiler), "TMPDIR": str(scratch)}
        environment["MAKEFLAGS"] = f"-j{min(os.cpu_count() or 1, 8)}"
        command = [python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-binary", "horovod"]
        command += ["--no-cache-dir", "--wheel-dir", building / "out", f"horovod=={VERSION}"]  # pip's cache knows no torch versions
        with open(log, "w") as output:
            status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output).returncode
        built = _whole(building / "out")
        if status or built is None:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:])
            raise SystemExit(f"{tail}\nthe Horovod wheel could not be built; all that was said is in {log}")
        with zipfile.ZipFile(built) as archive:
            archive.extractall(scratch / "trial")
        unpacked = {**os.environ, "PYTHONPATH": str(scratch / "trial")}
        trial = subprocess.run([python, "-c", TRIAL], env=unpacked, capture_output=True, text=True)
        if trial.returncode:
            raise SystemExit(f"{trial.stderr}\nthe Horovod wheel was built but does not load; the build is in {log}")
        (building / "out").rename(folder / name)
        return folder / name / built.name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=pathlib.Path, default=sys.executable, help="one that has torch, setuptools and wheel")
    # absolute, but links are kept: a virtual environment's python is a link
    print(wheel(parser.parse_args().python.absolute(), cache()))
