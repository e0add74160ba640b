"""What pip is told: ranges in pyproject.toml, pins in requirements.lock, and what is installed here."""

import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(r.name): str(r.specifier).removeprefix("==")
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
    for r in [Requirement(line)]
}
RANGES = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]


@pytest.mark.parametrize("requirement", RANGES, ids=lambda r: r.name)
def test_lock_is_within_the_ranges(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)], prereleases=True)


def test_installed_is_what_the_lock_says():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in PINS}
    assert installed == PINS


def test_lock_holds_all_that_is_needed():
    """Nothing that a locked package needs in turn is left to chance (torch's CUDA packages apart: its other build brings them)."""
    needed = {canonicalize_name(r.name) for r in RANGES}
    for name in [*PINS, "horovod"]:
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed.add(canonicalize_name(requirement.name))
    assert needed - {"triton", "cuda-bindings", "cuda-toolkit"} - {n for n in needed if n.startswith("nvidia-")} <= set(PINS)


def test_horovod_wheel_is_the_version_of_the_extra():
    sys.path.insert(0, str(ROOT / "conf" / "environment"))
    try:
        import horovod_wheel
    finally:
        sys.path.pop(0)
    (extra,) = map(Requirement, PROJECT["optional-dependencies"]["horovod"])
    assert extra.specifier.contains(horovod_wheel.VERSION)
    assert importlib.metadata.version("horovod") == horovod_wheel.VERSION


def test_gpl_is_asked_for():
    """pylibjpeg-libjpeg is GPLv3: it comes with its own extra only."""
    assert not {"pylibjpeg-libjpeg"} & {canonicalize_name(r.name) for r in RANGES}
    assert "pylibjpeg-libjpeg" not in PINS


def test_command_is_installed():
    ended = subprocess.run([pathlib.Path(sys.executable).with_name("sparkmed"), "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and "catalog" in ended.stdout
