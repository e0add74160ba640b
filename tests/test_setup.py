"""The way from a bare machine to an environment: what is missing is named, a broken or killed step is not built on."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = ROOT / "conf" / "environment"
UNLESS = f'case $2 in {{}}) {{}} ;; *) exec "{sys.executable}" "$@" ;; esac'


@pytest.fixture
def programs(tmp_path):
    """A folder to be the whole PATH: ``programs(java="...")`` puts in shell scripts, and good ones for all that is not named."""
    folder = tmp_path / "some bin"
    folder.mkdir()
    for tool in ("bash", "sed", "head", "env"):
        (folder / tool).symlink_to(shutil.which(tool))

    def put(**scripts: str | None) -> dict[str, str]:
        good = {
            "python3.11": f'exec "{sys.executable}" "$@"',
            "java": "echo 'openjdk version \"17.0.15\" 2025-04-15' >&2",
            "g++": "exit 0",
            "cmake": "echo cmake version 3.25.1",
        }
        for name, text in (good | scripts).items():
            if text is not None:
                (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
                (folder / name).chmod(0o755)
        return {"PATH": str(folder)}

    return put


def check(environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([shutil.which("bash"), ENVIRONMENT / "check.sh"], env=environment, capture_output=True, text=True)


def test_all_there(programs):
    ended = check(programs())
    assert (ended.returncode, ended.stderr) == (0, "")
    assert pathlib.Path(ended.stdout.strip()).name == "python3.11"


@pytest.mark.parametrize(
    "lacking, told",
    [
        ({"python3.11": None}, ["Python 3.11", "found none", "python3.11-venv", "python3.11-devel", "python=3.11"]),
        ({"java": None}, ["Java 17", "found none", "openjdk-17-jre-headless", "java-17-openjdk-headless", "openjdk=17"]),
        ({"g++": None}, ["g++", "found none", "apt-get install g++", "gcc-c++", "gxx"]),
        ({"cmake": None}, ["CMake < 4", "found none", "apt-get install cmake", "dnf install cmake", "'cmake<4'"]),
        ({"python3.11": None, "python3": "echo 3.13"}, ["Python 3.11", "found 3.13"]),
        ({"python3.11": UNLESS.format("*ensurepip*", "exit 1")}, ["without its venv module"]),
        (
            {"python3.11": UNLESS.format("*sysconfig*", "echo /nowhere")},
            ["C headers", "python3.11-dev"],
        ),
        ({"java": "echo 'openjdk version \"21.0.2\" 2024-01-16' >&2"}, ["Java 17", "found 21.0.2", "JAVA_HOME"]),
        ({"java": "echo 'java version \"1.8.0_402\"' >&2"}, ["Java 17", "found 1.8.0_402"]),
        ({"java": "echo 'Unable to locate a Java Runtime.' >&2; exit 1"}, ["Java 17", "found none"]),
        ({"g++": "exit 1"}, ["g++", "without C++17"]),
        ({"cmake": "echo cmake version 4.1.0"}, ["CMake < 4", "found 4.1.0", "pip install 'cmake<4'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_missing_program_is_named_with_its_package(programs, lacking, told):
    ended = check(programs(**lacking))
    assert ended.returncode == 1 and ended.stdout == ""
    assert not [word for word in told if word not in ended.stderr], ended.stderr


def test_all_that_is_missing_is_told_at_once(programs):
    ended = check(programs(**{"java": None, "g++": None, "cmake": None, "python3.11": None}))
    (debian,) = re.findall("apt-get install (.*)", ended.stderr)
    assert debian.split() == ["python3.11", "python3.11-venv", "python3.11-dev", "openjdk-17-jre-headless", "g++", "cmake"]


def test_java_home_comes_first(programs, tmp_path):
    ended = check(programs() | {"JAVA_HOME": str(tmp_path / "no jdk")})
    assert ended.returncode == 1 and "found none in JAVA_HOME" in ended.stderr


def test_make_stops_where_something_is_missing(programs, tmp_path):
    """Of a copy of the repository, so that nothing is installed here should it go on."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ENVIRONMENT, tmp_path / "conf" / "environment")
    environment = programs(java=None)
    for target in ("demo", "test"):
        ended = subprocess.run([shutil.which("make"), target], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode != 0 and "openjdk-17-jre-headless" in ended.stderr
    assert not (tmp_path / ".venv").exists()


# the wheel: a stand-in for a Python with torch and pip, which counts what it is asked


PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")/..
case "$*" in
*torch.__version__*) echo torch-2.13.0+cpu-cp311-x86_64 ;;
*h.allreduce*) [ ! -e "$here/does-not-load" ] ;;
*"pip wheel"*)
    echo build >>"$here/builds"
    sleep "$(cat "$here/seconds")"
    if [ -e "$here/does-not-build" ]; then echo "error: no C++17" >&2; exit 1; fi
    "$CXX" -std=c++14 -DX="a b" >"$here/compiled" || exit 1
    echo "$TMPDIR" >"$here/place"
    while [ "$1" != --wheel-dir ]; do shift; done
    mkdir -p "$2" && cp "$here/stored.whl" "$2/horovod-0.28.1-cp311-cp311-linux_x86_64.whl" ;;
esac
"""


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "some venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(PYTHON)
    path.chmod(0o755)
    (tmp_path / "some venv" / "seconds").write_text("0")
    with zipfile.ZipFile(tmp_path / "some venv" / "stored.whl", "w") as wheel:
        wheel.writestr("horovod/__init__.py", "")
    compiler = tmp_path / "some venv" / "g++"
    compiler.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    compiler.chmod(0o755)
    return path


def start(python, cache) -> subprocess.Popen:
    command = [sys.executable, ENVIRONMENT / "horovod_wheel.py", "--python", python]
    environment = os.environ | {"SPARKMED_CACHE": str(cache), "CXX": str(python.parents[1] / "g++"), "HOROVOD_GPU_OPERATIONS": ""}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def build(python, cache) -> tuple[int, str, str]:
    process = start(python, cache)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err


def builds(python) -> int:
    return len((python.parents[1] / "builds").read_text().splitlines())


@pytest.mark.parametrize("name", ["cache", "my cache"])
def test_wheel_is_built_once_and_named_by_versions(python, tmp_path, name):
    first, second = build(python, tmp_path / name), build(python, tmp_path / name)
    assert first[0] == second[0] == 0 and first[1] == second[1]
    place = tmp_path / name / "wheels" / "horovod-0.28.1-torch-2.13.0+cpu-cp311-x86_64"
    assert first[1] == str(place / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl")
    assert builds(python) == 1
    assert (python.parents[1] / "compiled").read_text().splitlines() == ["-std=gnu++17", "-DX=a b"]
    assert not list((tmp_path / name / "wheels").glob(".building*"))
    place = (python.parents[1] / "place").read_text().strip()
    assert re.fullmatch(r"[\w./-]+", place), "CMake files of the sources take the path for a regular expression"


def test_builds_at_the_same_time_wait_for_one(python, tmp_path):
    (python.parents[1] / "seconds").write_text("2")
    both = [start(python, tmp_path / "cache") for _ in range(2)]
    said = [p.communicate(timeout=60)[0] for p in both]
    assert said[0] == said[1] != "" and builds(python) == 1


def test_killed_build_leaves_no_wheel(python, tmp_path):
    (python.parents[1] / "seconds").write_text("30")
    process = start(python, tmp_path / "cache")
    while not (python.parents[1] / "builds").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cache").rglob("*.whl"))
    (python.parents[1] / "seconds").write_text("0")
    status, path, _ = build(python, tmp_path / "cache")
    assert status == 0 and pathlib.Path(path).exists() and builds(python) == 2
    assert not list((tmp_path / "cache" / "wheels").glob(".building*"))


def test_damaged_wheel_is_built_again(python, tmp_path):
    _, path, _ = build(python, tmp_path / "cache")
    pathlib.Path(path).write_bytes(pathlib.Path(path).read_bytes()[:40])
    status, again, _ = build(python, tmp_path / "cache")
    assert (status, again) == (0, path) and zipfile.is_zipfile(path) and builds(python) == 2


@pytest.mark.parametrize("fault, told", [("does-not-build", "error: no C++17"), ("does-not-load", "does not load")])
def test_failed_build_is_told_and_not_kept(python, tmp_path, fault, told):
    (python.parents[1] / fault).touch()
    status, out, err = build(python, tmp_path / "cache")
    assert status != 0 and out == "" and told in err and ".log" in err
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_wheel_wants_torch(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no torch >&2; exit 1\n")
    python.chmod(0o755)
    process = start(tmp_path / "python", tmp_path / "cache")
    assert "has no torch" in process.communicate(timeout=60)[1] and process.returncode != 0


# the environment: installing again installs nothing


def test_second_install_does_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ENVIRONMENT))
    import horovod_wheel
    import install

    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    asked = []

    def run(command, what):
        if "venv" in command and (tmp_path / ".venv").exists():
            shutil.rmtree(tmp_path / ".venv")
        if "venv" in command:
            (tmp_path / ".venv" / "bin").mkdir(parents=True)
            (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
        asked.append(what.split()[0])
        if asked[-1] == failing:
            raise SystemExit(what)

    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(horovod_wheel, "wheel", lambda python, cache: tmp_path / "a.whl")

    def install_anew() -> list[str]:
        asked.clear()
        install.install(tmp_path, tmp_path / "cache")
        return asked

    failing = "checking"  # killed, or failed, before its end: the next one takes it up
    with pytest.raises(SystemExit):
        install_anew()
    failing = None
    assert install_anew() == ["installing"] * 3 + ["checking"]
    assert install_anew() == []
    with open(tmp_path / "requirements.lock", "a") as lock:
        lock.write("# changed\n")
    assert install_anew() == ["installing"] * 3 + ["checking"]
    moved = (tmp_path / ".venv" / "sparkmed.json").read_text().replace(str(tmp_path), "/elsewhere")
    (tmp_path / ".venv" / "sparkmed.json").write_text(moved)
    assert install_anew() == ["creating"] + ["installing"] * 3 + ["checking"]
    (tmp_path / ".venv" / "bin" / "python").unlink()
    assert install_anew()[0] == "creating"
    assert install_anew() == []
